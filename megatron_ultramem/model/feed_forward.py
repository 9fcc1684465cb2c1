"""The block's `mlp` slot with a memory layer: beside the FFN (UltraMemV2, figure 1), instead of it, or with its output
added to a later block (UltraMem's skip-layer insertion)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ultramem.compat import build_ffn
from megatron_ultramem.memory.base import MemoryLayer

FIRST = -1  # priority of a stream


class Joint:
    """Carries a memory layer's output from the block that reads to the block that adds it, within one forward pass.

    Both blocks are of one model chunk, and so of one forward pass: nothing is left when it ends.
    """

    def __init__(self) -> None:
        self._output: Tensor | None = None

    def put(self, output: Tensor) -> None:
        self._output = output

    def take(self) -> Tensor:
        assert self._output is not None, "the block that reads comes before the block that adds"
        output, self._output = self._output, None
        return output


class FeedForwardWithMemory(MegatronModule):
    """FFN(x) + memory(x): both read the normalised FFN input x and neither waits for the other.

    Args:
        config: Megatron's TransformerConfig.
        ffn: `mlp` field of a dense or MoE FFN without a fused norm: memory needs the normalised input too. None: the
            memory layer takes its place.
        memory: builds this block's memory layer from the process groups; None: the block only adds another's output.
        sends: where this block's memory output goes, if not into this block.
        receives: whose memory output this block adds.
        overlap: on a GPU the memory layer runs on a stream of its own, so that its exchange hides behind the FFN (and
            the blocks up to the one that adds its output, or to the next one that retrieves rows). The FFN beside it
            begins when the rows are retrieved: before, both need the same units of the GPU, and it would be over when
            the exchange begins.
    """

    def __init__(
        self,
        config: Any,
        ffn: Any,
        memory: Callable[[ProcessGroupCollection], MemoryLayer] | None,
        sends: Joint | None = None,
        receives: Joint | None = None,
        overlap: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        # Up to 0.17 Megatron gives process groups only to the classes it knows.
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.ffn: Any = None if ffn is None else build_ffn(ffn, config, groups, is_mtp_layer)
        self.memory = None if memory is None else memory(groups)
        self.sends, self.receives, self.overlap = sends, receives, overlap
        for param in self.memory.parameters() if self.memory is not None else ():
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
        main, side = self._streams(hidden_states)
        terms, bias = [], None

        def ffn() -> None:
            """On the main stream, after what this block's own memory layer has launched by then."""
            nonlocal bias
            if self.ffn is None:
                return
            if main is not None and self.memory is not None:
                main.wait_stream(side)
            with _on(main):
                ffn_SBH, bias = self.ffn(hidden_states)
            terms.append(ffn_SBH)

        added: list[Tensor] = []
        if self.memory is None:
            ffn()
        else:
            with _on(side):
                memory_SBH = self.memory(hidden_states, retrieved=ffn)
            if side is not None:
                hidden_states.record_stream(side)  # its own stream must not use that memory anew before
            if self.sends is None:
                added.append(memory_SBH)
            else:
                self.sends.put(memory_SBH)
        if self.receives is not None:
            added.append(self.receives.take())
        if main is not None and added:
            main.wait_stream(side)
            for memory_SBH in added:
                memory_SBH.record_stream(main)
        return functools.reduce(torch.add, terms + added), bias

    def _streams(self, x: Tensor) -> tuple[Any, Any]:
        """The current stream and that of memory layers, where this block's goes on from there; None for both without
        overlap."""
        if not self.overlap or not x.is_cuda:
            return None, None
        main, side = torch.cuda.current_stream(), memory_stream(x.device)
        if self.memory is not None:
            side.wait_stream(main)
        return main, side

    @property
    def linear_fc1(self) -> torch.nn.Module | None:
        """Megatron's FP8 recompute and fused inference look for it."""
        return getattr(self.ffn, "linear_fc1", None)

    @property
    def linear_fc2(self) -> torch.nn.Module | None:
        return getattr(self.ffn, "linear_fc2", None)


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


@functools.cache
def memory_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all memory layers of a device. Its kernels go before the FFN's: what they then wait for, the
    exchange, passes while the FFN computes."""
    return torch.cuda.Stream(device, priority=FIRST)
