"""The lookup: pre-value dot products and score-weighted sums of value rows (arXiv 2508.18756, equation 15).

    pooled slice c = sum_m act(<x', P[row_m]>) * s_{m,c} * V[row_m, slice c]

Gradients of the tables never become autograd tensors where a table has a `main_grad` buffer: the backward adds its
rows to that buffer in place. Otherwise (small models, gradcheck) ordinary dense gradients are returned.

Shapes: T tokens, M rows per token, C cores, V value width Dv, D pre-value width Dp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from megatron_ultramem.memory import lookup_reference
from megatron_ultramem.memory.numerics import accumulation_dtype


class LookupBackend(Protocol):
    """What a backend provides: both directions of the formula above, without autograd."""

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: torch.Tensor,
        pre_values: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        """Pooled values [T, Dv] in the dtype of `pre_input_TD`, accumulated in fp32 (fp64 for fp64)."""

    def backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: torch.Tensor,
        pre_values: torch.Tensor,
        activation: str,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of scores and pre_input; ADDS those of the tables to the two buffers (None: not wanted)."""


def lookup_backend(name: str, device: torch.device) -> LookupBackend:
    """The backend `name` ('auto' or 'reference') for `device`. The one place where backends are chosen."""
    backends: dict[str, LookupBackend] = {"reference": lookup_reference.ReferenceLookup()}
    return backends["reference" if name == "auto" else name]


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
    """Pooled values [T, Dv] in the dtype of `pre_input_TD`; differentiable in all but the indices.

    Args:
        indices_TM: physical rows, int64.
        scores_TMC: score of every row per core; Dv divides into C slices.
        values, pre_values: tables [rows, Dv] and [rows, Dp]. A table with a `main_grad` attribute (of its shape) gets
            its gradient there, in place, and none from autograd.
        activation: 'none' or 'gelu', on the pre-value dot product.
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
    chosen = lookup_backend(backend, values.device)
    return _Lookup.apply(indices_TM, scores_TMC, pre_input_TD, *tables, activation, chosen, sinks, after_backward)


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
        activation: str,
        backend: LookupBackend,
        sinks: tuple[torch.Tensor | None, torch.Tensor | None],
        after_backward: Callable[[], None] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(indices_TM, scores_TMC, pre_input_TD, values, pre_values)
        ctx.activation, ctx.backend, ctx.sinks, ctx.after_backward = activation, backend, sinks, after_backward
        return backend.forward(indices_TM, scores_TMC, pre_input_TD, values, pre_values, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_pooled_TV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, values, pre_values = ctx.saved_tensors
        buffers = []
        for table, sink, wanted in zip((values, pre_values), ctx.sinks, ctx.needs_input_grad[3:5], strict=True):
            if sink is not None:
                buffers.append(sink.main_grad)
            elif wanted:
                buffers.append(torch.zeros_like(table, dtype=accumulation_dtype(table.dtype)))
            else:
                buffers.append(None)
        grad_scores, grad_pre_input = ctx.backend.backward(
            grad_pooled_TV, *inputs, values, pre_values, ctx.activation, *buffers
        )
        if ctx.after_backward is not None and any(sink is not None for sink in ctx.sinks):
            ctx.after_backward()
        dense = [
            buffer.to(table.dtype) if buffer is not None and sink is None else None
            for table, buffer, sink in zip((values, pre_values), buffers, ctx.sinks, strict=True)
        ]
        return None, grad_scores, grad_pre_input, *dense, None, None, None, None
