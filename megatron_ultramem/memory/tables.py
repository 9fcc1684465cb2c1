"""Value pools: the tables that a group of memory layers shares, and their gradient accounting.

A pool's tables get gradients from every layer of the pool. Each lookup's backward adds its rows to `main_grad`; only
after the last of the layers is the gradient of a microbatch complete, which `grad_ready` then announces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_ultramem.memory.geometry import Pool
from megatron_ultramem.memory.init import Normal, fill_, retrieval_gain, sigma_v
from megatron_ultramem.memory.lookup import lookup

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import MemoryConfig

RELEASED_VALUE_STD = 0.02


class ValuePool(nn.Module):
    """Parameters `values` [padded_rows, Dv] and `pre_values` [padded_rows, Dp] of one pool, uninitialised.

    Each carries its `initializer`: N(0, sigma_V^2) of the paper, or the released code's 0.02.

    Attributes:
        num_users: layers that look up in this pool; each has one backward per microbatch.
        grad_ready: called with each table that has a `main_grad`, once per microbatch, when all users' backwards are
            done.
    """

    def __init__(
        self,
        config: MemoryConfig,
        pool: Pool,
        *,
        hidden_size: int,
        num_layers: int,
        ffn_ratio: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`num_layers` are all of the model's; `ffn_ratio` is the FFN's inner width / h. Both enter sigma_V."""
        super().__init__()
        self.pool = pool
        self.activation, self.backend = config.activation, config.lookup_backend
        self.num_users = len(pool.layers)
        self.grad_ready: Callable[[nn.Parameter], None] | None = None
        self._backwards = 0
        std = RELEASED_VALUE_STD
        if config.init == "paper":
            _, variance = retrieval_gain(config, pool.keys_per_side)
            std = sigma_v(
                config, hidden_size=hidden_size, num_layers=num_layers, ffn_ratio=ffn_ratio, score_variance=variance
            )
        self.values = nn.Parameter(torch.empty(pool.padded_rows, config.value_dim, dtype=dtype, device=device))
        self.pre_values = nn.Parameter(torch.empty(pool.padded_rows, config.pre_value_dim, dtype=dtype, device=device))
        for table in (self.values, self.pre_values):
            table.initializer = Normal(std)  # type: ignore[attr-defined]

    def reset_parameters(self, seed: int) -> None:
        """Draws both tables; the numbers depend on the seed and the number of the pool."""
        for name, table in self.named_parameters():
            fill_(table, table.initializer, seed, f"pools.{self.pool.index}.{name}")  # type: ignore[attr-defined]

    def lookup(self, indices_TM: torch.Tensor, scores_TMC: torch.Tensor, pre_input_TD: torch.Tensor) -> torch.Tensor:
        """Pooled values [T, Dv] of physical rows `indices_TM`; see `memory.lookup`."""
        return lookup(
            indices_TM,
            scores_TMC,
            pre_input_TD,
            self.values,
            self.pre_values,
            self.activation,
            backend=self.backend,
            after_backward=self._count_backward,
        )

    def reset_grad_count(self) -> None:
        """Forgets backwards of a microbatch that was not finished (after an error)."""
        self._backwards = 0

    def _count_backward(self) -> None:
        self._backwards += 1
        if self._backwards < self.num_users:
            return
        self._backwards = 0
        if self.grad_ready is not None:
            for table in (self.values, self.pre_values):
                if table.requires_grad and getattr(table, "main_grad", None) is not None:
                    self.grad_ready(table)
