"""What every kind of memory layer shares: projections, shuffle, recompute, initialisation, checksum.

Shapes: T tokens, H hidden size, M rows per token, C scores of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_ultramem.memory.geometry import Pool
from megatron_ultramem.memory.init import Constant, Normal, fill_, linear_std
from megatron_ultramem.memory.shuffle import checksum, physical_rows, shuffle_permutation
from megatron_ultramem.memory.tables import ValuePool

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import MemoryConfig


@dataclass
class Kept:
    """What a recomputation takes over from the first forward instead of searching again."""

    keys_HSTM: torch.Tensor | None = None
    fused_keys: tuple[torch.Tensor, ...] | None = None  # what the kernels left, of every head
    counts_HSN: torch.Tensor | None = None


class LayerGraph(Protocol):
    """Forward and backward of a layer recorded for inputs of one shape."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `run` may compute this input's output."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""


class MemoryLayer(nn.Module, ABC):
    """One memory layer. Its value pool is owned elsewhere: no submodule, so that it is saved and moved once.

    Every parameter carries the `initializer` with which it is to be drawn; construction leaves them uninitialised.
    """

    permutation: torch.Tensor | None
    graph: LayerGraph | None = None  # stands in for the layer where it `takes` the input
    retrieval: nn.Module
    query_proj: nn.Module

    def __init__(
        self,
        config: MemoryConfig,
        *,
        hidden_size: int,
        layer: int,
        pool: Pool,
        table: ValuePool,
        norm_eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        linear: Callable[[int, int], nn.Module] | None = None,
        checkpoint: Callable[..., torch.Tensor] | None = None,
        tokens_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            layer: global number of the layer, from 0; it must be one of the pool's.
            table: the value pool to look up in.
            norm_eps: of the query and key norms.
            linear: makes a projection without bias from (input width, output width); default nn.Linear.
            checkpoint: computes function(*args) and again in the backward pass; default torch's.
            tokens_group: ranks that hold other tokens of the same micro-batch (sequence parallelism), for what is
                computed from all of them: the balance loss, batch norm.
            data_group: ranks with other micro-batches, for the running statistics of batch norm.
        """
        super().__init__()
        self.config, self.layer, self.pool, self.hidden_size = config, layer, pool, hidden_size
        self.norm_eps, self.tokens_group, self.data_group = norm_eps, tokens_group, data_group
        self._table = (table,)  # in a tuple: nn.Module would register it
        self._dtype, self._device, self._linear = dtype, device, linear
        self._checkpoint = checkpoint or _torch_checkpoint
        self.row_offset, self.row_span = pool.row_offset(layer), pool.rows
        permutation = None
        if config.shuffle:
            permutation = shuffle_permutation(
                pool.virtual_rows, seed=config.shuffle_seed, pool=pool.index, layer=layer, device=device
            )
        self.register_buffer("permutation", permutation, persistent=config.keep_shuffle)

    @property
    def table(self) -> ValuePool:
        return self._table[0]

    def forward(self, x: torch.Tensor, retrieved: Callable[[], None] | None = None) -> torch.Tensor:
        """Normalised FFN input [T, h] or [S, B, h] -> what is added to the residual stream, of the same shape.

        `retrieved` is called once, when all that is left is the lookup and what follows it, or before everything where
        the layer is not computed step by step (recomputation, a recorded layer).
        """
        self.table.settle()
        recorded = self.graph is not None and self.graph.takes(x)
        recomputed = self.config.recompute and torch.is_grad_enabled()
        if retrieved is not None and (recorded or recomputed):
            retrieved()
        if recorded:
            assert self.graph is not None
            return self.graph.run(x)
        x_TH, kept = x.reshape(-1, x.shape[-1]), Kept()
        if recomputed:
            out_TH = self._checkpoint(self._forward, x_TH, kept)
        else:
            out_TH = self._forward(x_TH, kept, retrieved)
        return out_TH.view(x.shape)

    @abstractmethod
    def retrieve(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T, M] (int64) and scores [T, M, C] of tokens."""

    @abstractmethod
    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        """What the layer makes of tokens and what was retrieved for them, [T, h]."""

    @abstractmethod
    def _forward(self, x_TH: torch.Tensor, kept: Kept, retrieved: Callable[[], None] | None = None) -> torch.Tensor:
        """[T, h] to [T, h]; a second call with the same `kept` makes the same selection. `retrieved`: see `forward`."""

    def refresh(self) -> None:
        """Recomputes what follows from the parameters; once per optimizer step, before it."""

    def begin_step(self) -> None:
        """Parameters stay as they are until `end_step`; once per optimizer step."""

    def end_step(self) -> None:
        """Takes up what the micro-batches of a step left; once per optimizer step, after it. May be a collective."""

    def forget_step(self) -> None:
        """Drops what the micro-batches left, of a step that is passed over."""

    def reset_parameters(self, seed: int) -> None:
        """Draws every parameter of this layer (not the pool's) from the seed and the layer's number."""
        for name, param in self.named_parameters():
            fill_(param, param.initializer, seed, f"layers.{self.layer}.memory.{name}")  # type: ignore[attr-defined]
        self.refresh()

    def shuffle_checksum(self) -> str:
        """Identifies a permutation that follows from the seed, in a checkpoint; '' where there is none to compare."""
        return "" if self.permutation is None or self.config.keep_shuffle else checksum(self.permutation)

    def physical(self, rows_TM: torch.Tensor) -> torch.Tensor:
        """Rows of the pool of what `retrieve` gave: the same, unless several rows of the layer are one of the pool."""
        return rows_TM

    def _rows(self, indices_TM: torch.Tensor) -> torch.Tensor:
        """What `retrieve` gives, of grid indices: through the shuffle, into the layer's window of the pool."""
        return physical_rows(indices_TM, self.permutation, self.row_offset, self.row_span)

    def _projection(self, width_in: int, width_out: int, std: float | None = None) -> nn.Module:
        """A linear without bias (a bias that `linear` brings starts at 0); std: None means sqrt(2/(5h))."""
        if self._linear is not None:
            made = self._linear(width_in, width_out)
        else:
            options = {"bias": False, "dtype": self._dtype, "device": self._device or "cpu"}
            made = nn.utils.skip_init(nn.Linear, width_in, width_out, **options)
        std = linear_std(self.hidden_size) if std is None else std
        for param in made.parameters():
            param.initializer = Normal(std) if param.dim() > 1 else Constant(0.0)  # type: ignore[attr-defined]
        return made


def _torch_checkpoint(function: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
    out: torch.Tensor = torch_checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return out
