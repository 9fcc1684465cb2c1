"""The lookup: pre-value dot products and score-weighted sums of value rows (arXiv 2508.18756, equation 15).

    pooled slice c = sum_m act(<x', P[row_m]>) * s_{m,c} * V[row_m, slice c]

Gradients of the tables never become autograd tensors where a table has a `main_grad` buffer: the backward adds its
rows to that buffer in place. Otherwise (small models, gradcheck) ordinary dense gradients are returned.

A table without pre-values has D = 0: `pre_input_TD` and `pre_values` have no columns, and a row's weight is its score.

A `LookupPath` is how pooled values come about: `LocalLookup` here, or an exchange with the ranks that hold the rows
(package `parallel`). `run_lookup` is the one autograd boundary around any of them.

Shapes: T tokens, M rows per token, C cores, V value width Dv, D pre-value width Dp.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megatron_ultramem.memory import lookup_reference
from megatron_ultramem.memory.fp8_table import Fp8Table, Table
from megatron_ultramem.memory.lookup_reference import SortedRows
from megatron_ultramem.memory.numerics import accumulation_dtype


class LookupBackend(Protocol):
    """What a backend provides: both directions of the formula above, whole and in parts, without autograd.

    Sums are formed in fp32 (fp64 for fp64). `padded`: a negative index means no row, which contributes nothing and gets
    no gradient; such places may lie anywhere among a token's. Backwards ADD gradients of tables to the buffers they are
    given (None: not wanted). `column_start` is where the columns of `values` lie within the C slices of `core_width`
    that the weights are for. Tables may be given as an `Fp8Table`, whose numbers are read in their place.
    """

    def quantize_(self, copy: Fp8Table, table: torch.Tensor, amax_N: torch.Tensor) -> None:
        """`fp8_table.quantize_`."""

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        padded: bool = False,
    ) -> torch.Tensor:
        """Pooled values [T, Dv] in the dtype of `pre_input_TD`."""

    def backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of scores and pre_input, in their dtypes."""

    def dots(
        self, indices_TM: torch.Tensor, pre_input_TD: torch.Tensor, pre_values: Table, padded: bool = False
    ) -> torch.Tensor:
        """<x', P[row]> over the columns at hand, [T, M] in the accumulation dtype."""

    def sort_rows(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> SortedRows | None:
        """What `weighted_sum_backward` with these arguments and `dots_backward` of the same rows would each find out;
        None where there is nothing to share."""

    def dots_backward(
        self,
        grad_dots_TM: torch.Tensor,
        indices_TM: torch.Tensor,
        pre_input_TD: torch.Tensor,
        pre_values: Table,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        """Gradient of pre_input, in its dtype."""

    def weighted_sum(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> torch.Tensor:
        """Sum over m of weights * V[row] over the columns at hand, [T, columns] in the table's dtype."""

    def weighted_sum_backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        """Gradient of the weights [T, M, C] in the accumulation dtype."""


class Saved(NamedTuple):
    """What a forward leaves for its backward."""

    tensors: tuple[torch.Tensor, ...]
    plan: Any = None  # sizes and the like


class LookupPath(Protocol):
    """Both directions of a lookup for the tokens of this rank, without autograd; may communicate in both."""

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, Saved]:
        """Pooled values [T, Dv] in the dtype of `pre_input_TD`, and what the backward needs."""

    def backward(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        values: Table,
        pre_values: Table,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of scores and pre_input, in their dtypes; ADDS those of the tables to the two buffers."""


@dataclass(frozen=True)
class LocalLookup:
    """The `LookupPath` of tables that this rank holds whole. `padded`: as in `LookupBackend`."""

    backend: LookupBackend
    activation: str = "none"
    padded: bool = False

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, Saved]:
        saved = Saved((indices_TM, scores_TMC, pre_input_TD))
        if pre_values.shape[1] == 0:
            core_width = values.shape[1] // scores_TMC.shape[2]
            pooled_TV = self.backend.weighted_sum(indices_TM, scores_TMC, values, 0, core_width, self.padded)
            return pooled_TV.to(pre_input_TD.dtype), saved
        pooled_TV = self.backend.forward(
            indices_TM, scores_TMC, pre_input_TD, values, pre_values, self.activation, self.padded
        )
        return pooled_TV, saved

    def backward(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        values: Table,
        pre_values: Table,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices_TM, scores_TMC, pre_input_TD = saved.tensors
        if pre_values.shape[1] == 0:
            core_width = values.shape[1] // scores_TMC.shape[2]
            grad_scores_TMC = self.backend.weighted_sum_backward(
                grad_pooled_TV, indices_TM, scores_TMC, values, 0, core_width, values_grad, self.padded
            )
            return grad_scores_TMC.to(scores_TMC.dtype), torch.empty_like(pre_input_TD)
        return self.backend.backward(
            grad_pooled_TV,
            indices_TM,
            scores_TMC,
            pre_input_TD,
            values,
            pre_values,
            self.activation,
            values_grad,
            pre_values_grad,
            self.padded,
        )


def uses_kernels(name: str, device: torch.device) -> bool:
    """Whether model.memory.kernels = `name` means the fused kernels on `device`. The one place that decides."""
    if name == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return name == "fused"


def lookup_backend(name: str, device: torch.device) -> LookupBackend:
    """The backend for `device` that the setting model.memory.kernels names."""
    if uses_kernels(name, device):
        from megatron_ultramem.memory.fused import FusedLookup

        return FusedLookup()
    return lookup_reference.ReferenceLookup()


def lookup(
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TD: torch.Tensor,
    values: torch.Tensor,
    pre_values: torch.Tensor,
    activation: str = "none",
    *,
    backend: str = "auto",
    after_backward: Callable[[], None] | None = None,
) -> torch.Tensor:
    """`run_lookup` in whole tables [rows, Dv] and [rows, Dp] on this rank.

    activation: 'none' or 'gelu', on the pre-value dot product.
    """
    path = LocalLookup(lookup_backend(backend, values.device), activation)
    return run_lookup(path, indices_TM, scores_TMC, pre_input_TD, values, pre_values, after_backward=after_backward)


def run_lookup(
    path: LookupPath,
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TD: torch.Tensor,
    values: torch.Tensor,
    pre_values: torch.Tensor,
    *,
    read: tuple[Table, Table] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Pooled values [T, Dv] in the dtype of `pre_input_TD`; differentiable in all but the indices.

    Args:
        indices_TM: physical rows, integers.
        scores_TMC: score of every row per core; Dv divides into C slices.
        values, pre_values: tables, or this rank's shards of them. A table with a `main_grad` attribute (of its shape)
            gets its gradient there, in place, and none from autograd.
        read: what is read in place of the two tables, which get the gradients; None: the tables.
        after_backward: called at the end of the backward, once the gradients are in `main_grad`; only if some table
            has one.
    """
    sinks = tuple(table if _has_main_grad(table) else None for table in (values, pre_values))
    if any(sink is not None for sink in sinks) and not (scores_TMC.requires_grad or pre_input_TD.requires_grad):
        # A table in `sinks` is no input of the graph: without another one the backward would never run.
        scores_TMC = scores_TMC.detach().requires_grad_(torch.is_grad_enabled())
    # Detached, so that the engine does not visit the parameter's own gradient accumulation (and its hooks).
    tables = [
        table if sink is None else table.detach() for table, sink in zip((values, pre_values), sinks, strict=True)
    ]
    pooled_TV: torch.Tensor = _Lookup.apply(
        indices_TM, scores_TMC, pre_input_TD, *tables, path, sinks, read, after_backward
    )
    return pooled_TV


def _has_main_grad(table: torch.Tensor) -> bool:
    return table.requires_grad and getattr(table, "main_grad", None) is not None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: torch.Tensor,
        pre_values: torch.Tensor,
        path: LookupPath,
        sinks: tuple[torch.Tensor | None, torch.Tensor | None],
        read: tuple[Table, Table] | None,
        after_backward: Callable[[], None] | None,
    ) -> torch.Tensor:
        pooled_TV, saved = path.forward(indices_TM, scores_TMC, pre_input_TD, *(read or (values, pre_values)))
        ctx.save_for_backward(values, pre_values, *saved.tensors)
        ctx.path, ctx.plan, ctx.sinks, ctx.read, ctx.after_backward = path, saved.plan, sinks, read, after_backward
        return pooled_TV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_pooled_TV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, pre_values, *tensors = ctx.saved_tensors
        buffers = []
        for table, sink, wanted in zip((values, pre_values), ctx.sinks, ctx.needs_input_grad[3:5], strict=True):
            if sink is not None:
                buffers.append(sink.main_grad)
            elif wanted:
                buffers.append(torch.zeros_like(table, dtype=accumulation_dtype(table.dtype)))
            else:
                buffers.append(None)
        grad_scores, grad_pre_input = ctx.path.backward(
            Saved(tuple(tensors), ctx.plan), grad_pooled_TV, *(ctx.read or (values, pre_values)), *buffers
        )
        if ctx.after_backward is not None and any(sink is not None for sink in ctx.sinks):
            ctx.after_backward()
        dense = [
            buffer.to(table.dtype) if buffer is not None and sink is None else None
            for table, buffer, sink in zip((values, pre_values), buffers, ctx.sinks, strict=True)
        ]
        return None, grad_scores, grad_pre_input, *dense, None, None, None, None
