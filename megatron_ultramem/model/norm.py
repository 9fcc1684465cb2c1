"""RMSNorm of the `local` back end."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor of a Megatron norm.

    Megatron's own wrapper refuses sequence parallelism, which asks of a norm only that its weight be marked, so that
    the gradients of the ranks' shares of the sequence are summed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
