"""The block's `mlp` slot with a memory layer beside the FFN (UltraMemV2, figure 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ultramem.compat import build_ffn
from megatron_ultramem.memory.layer import UltraMemV2


class FeedForwardWithMemory(MegatronModule):
    """FFN(x) + memory(x): both read the normalised FFN input x and neither waits for the other.

    Args:
        config: Megatron's TransformerConfig.
        ffn: `mlp` field of a dense or MoE FFN without a fused norm: memory needs the normalised input too.
        memory: builds this block's memory layer from the process groups.
        overlap: on a GPU the memory layer runs on a stream of its own, so that its exchange hides behind the FFN.
    """

    def __init__(
        self,
        config: Any,
        ffn: Any,
        memory: Callable[[ProcessGroupCollection], UltraMemV2],
        overlap: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        # Up to 0.17 Megatron gives process groups only to the classes it knows.
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.ffn: Any = build_ffn(ffn, config, groups, is_mtp_layer)
        self.memory = memory(groups)
        self.overlap = overlap
        for param in self.memory.parameters():
            # Every tensor-parallel rank holds its own tokens: their gradients must be summed.
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's number of the layer, from 1; MoE layers want it."""
        if hasattr(self.ffn, "set_layer_number"):
            self.ffn.set_layer_number(layer_number)

    def forward(
        self, hidden_states: Tensor, *, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (the rank's share of s under sequence parallelism) to ([s, b, h], bias or None)."""
        if self.overlap and hidden_states.is_cuda:
            return self._forward_overlapped(hidden_states)
        ffn_SBH, bias = self.ffn(hidden_states)
        return ffn_SBH + self.memory(hidden_states), bias

    def _forward_overlapped(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same on two streams; autograd runs each backward on the stream of its forward."""
        main, side = torch.cuda.current_stream(), memory_stream(hidden_states.device)
        side.wait_stream(main)
        # First, so that the GPU is busy with it while the host waits for the sizes of the exchange.
        ffn_SBH, bias = self.ffn(hidden_states)
        with torch.cuda.stream(side):
            memory_SBH = self.memory(hidden_states)
        # Memory of these must not be used anew by its own stream while the other still reads it.
        hidden_states.record_stream(side)
        main.wait_stream(side)
        memory_SBH.record_stream(main)
        return ffn_SBH + memory_SBH, bias

    @property
    def linear_fc1(self) -> torch.nn.Module | None:
        """Megatron's FP8 recompute and fused inference look for it."""
        return getattr(self.ffn, "linear_fc1", None)

    @property
    def linear_fc2(self) -> torch.nn.Module | None:
        return getattr(self.ffn, "linear_fc2", None)


@functools.cache
def memory_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all memory layers of a device."""
    return torch.cuda.Stream(device)
