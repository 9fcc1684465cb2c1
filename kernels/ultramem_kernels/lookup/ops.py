"""The differentiable lookup operations. Legend as in reference.py.

Gradients of a table go straight into its `main_grad` (fp32, same shape) when it has one, as Megatron's parameters do:
the table itself then receives no gradient from autograd, and nothing of its size is allocated. A table without one gets
an ordinary dense gradient.

Forward and backward are custom operators (`ultramem::lookup_forward`, `ultramem::lookup_backward`), opaque to
torch.compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch

from ultramem_kernels import tuning
from ultramem_kernels.dispatch import choose, for_this_call
from ultramem_kernels.lookup import cuda, cuda_gradients, reference
from ultramem_kernels.lookup.table_gradients import add_by_reference, add_sorted, sorted_entries

# Below this many entries (T * M) the fixed cost of a sort outweighs what it saves over atomics (NOTES.md). Above,
# the CUDA kernels never use them: autotuning sees the rows of a first step, spread evenly, where atomics may win by
# little; in training many tokens want the same rows, and atomics on those wait for each other.
ATOMIC_BELOW = 1 << 16


class Options(NamedTuple):
    """How a lookup runs; fields as in `lookup` and `weighted_sum`."""

    activation: str
    core_width: int
    column_start: int
    row_start: int
    padding_index: int | None
    deterministic: bool
    backend: str | None


def _backend(
    options_backend: Optional[str],
    indices: torch.Tensor,
    weights: Optional[torch.Tensor],
    values: Optional[torch.Tensor],
    pre_values: Optional[torch.Tensor],
    core_width: int,
    column_start: int,
    dtype: Optional[torch.dtype] = None,
) -> str:
    cores = 1 if weights is None else weights.shape[2]
    table = values if values is not None else pre_values
    assert table is not None
    return choose(
        options_backend,
        table,
        lambda: cuda.supports(values, pre_values, indices, cores, core_width, column_start, dtype),
    )


def _present(*tensors: Optional[torch.Tensor]) -> tuple[Any, ...]:
    """The tensors as they are; which of them exist follows from the mode, beyond what types can say."""
    return tensors


def run_lookup_forward(
    indices: torch.Tensor,
    weights: Optional[torch.Tensor],
    pre_input: Optional[torch.Tensor],
    values: Optional[torch.Tensor],
    pre_values: Optional[torch.Tensor],
    activation: str,
    core_width: int,
    column_start: int,
    row_start: int,
    padding_index: Optional[int],
    backend: Optional[str],
    value_scales: Optional[torch.Tensor] = None,
    pre_value_scales: Optional[torch.Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Pooled values [T, V]; without `values` the dots [T, M]; without `pre_values` `weights` are final.

    With scales (fp32, both of one stride) the tables hold codes (see fp8_rows.py), and inputs and output are `dtype`.
    """
    chosen = _backend(backend, indices, weights, values, pre_values, core_width, column_start, dtype)
    w, x, v, p = _present(weights, pre_input, values, pre_values)
    place: dict[str, Any] = {"row_start": row_start, "padding_index": padding_index}
    scales: dict[str, Any] = {"value_scales_N": value_scales, "pre_value_scales_N": pre_value_scales}
    if chosen == "cuda":
        return cuda.forward(
            indices, _readable(w, v, dtype), x, v, p, activation=activation, core_width=core_width,
            column_start=column_start, dtype=dtype, **place, **scales,
        )  # fmt: skip
    if chosen == "reference":
        if p is None:
            return reference.weighted_sum(
                indices, w, v, core_width, column_start, **place, scales_N=value_scales, out_dtype=dtype
            )
        if v is None:
            return reference.pre_value_dot(indices, x, p, **place, scales_N=pre_value_scales)
        return reference.lookup(indices, w, x, v, p, activation, **place, **scales, out_dtype=dtype)
    from ultramem_kernels.lookup import forward_triton

    return forward_triton.forward(
        indices, w, x, v, p, activation=activation, core_width=core_width, column_start=column_start, dtype=dtype,
        **place, **scales,
    )  # fmt: skip


lookup_forward = torch.library.custom_op("ultramem::lookup_forward", mutates_args=())(run_lookup_forward)


@lookup_forward.register_fake
def _(indices, weights, pre_input, values, pre_values, *options):  # type: ignore[no-untyped-def]
    if values is not None:
        return values.new_empty(indices.shape[0], values.shape[1], dtype=options[-1] if len(options) == 9 else None)
    return pre_values.new_empty(indices.shape, dtype=reference.accumulation_dtype(pre_values.dtype))


def run_lookup_backward(
    indices: torch.Tensor,
    weights: Optional[torch.Tensor],
    pre_input: Optional[torch.Tensor],
    values: Optional[torch.Tensor],
    pre_values: Optional[torch.Tensor],
    grad: torch.Tensor,
    grad_values: Optional[torch.Tensor],
    grad_pre_values: Optional[torch.Tensor],
    activation: str,
    core_width: int,
    column_start: int,
    row_start: int,
    padding_index: Optional[int],
    deterministic: bool,
    backend: Optional[str],
    value_scales: Optional[torch.Tensor] = None,
    pre_value_scales: Optional[torch.Tensor] = None,
    dtype: Optional[torch.dtype] = None,
    sorted_rows: Optional[torch.Tensor] = None,
    sorted_order: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of pre_input, gradient of weights), and the tables' gradients added in place where buffers are given.

    A gradient that does not exist is an empty tensor. Scales and `dtype`: as in `run_lookup_forward`; the tables'
    gradients are then those of scale * code. `sorted_rows` and `sorted_order`: of `sort_for_backwards`.
    """
    chosen = _backend(backend, indices, weights, values, pre_values, core_width, column_start, dtype)
    w, x, v, p = _present(weights, pre_input, values, pre_values)
    options: dict[str, Any] = {
        "activation": activation, "core_width": core_width, "column_start": column_start, "row_start": row_start,
        "padding_index": padding_index, "value_scales_N": value_scales, "pre_value_scales_N": pre_value_scales,
    }  # fmt: skip
    if chosen == "reference":
        d_input, d_weights, d_dots, final = reference.backward_by_token(indices, w, x, v, p, grad, **options)
        of_tables = (grad_pre_values, x, d_dots), (grad_values, grad, final)
        add_by_reference(indices, *of_tables, core_width, column_start, row_start, padding_index)
        return _or_empty(d_input, indices), _or_empty(d_weights, indices)

    for buffer in (grad_values, grad_pre_values):
        if buffer is not None and buffer.dtype != torch.float32:
            raise ValueError(f"gradients of tables in {buffer.dtype}: the kernels add them in float32")
        if buffer is not None and buffer.data_ptr() % 16 and chosen == "cuda":
            chosen = "triton"  # which needs no aligned vectors

    entries = None
    if sorted_rows is not None and sorted_order is not None and sorted_order.dtype == _ORDER_DTYPES[chosen]:
        entries = sorted_rows, sorted_order

    def run(how: str, grad: torch.Tensor = grad) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return _backward(chosen, how, indices, w, x, v, p, grad, grad_values, grad_pre_values, options, dtype, entries)

    if grad_values is None and grad_pre_values is None:
        how = "atomic"  # of nothing: without the factors that segments need
    elif deterministic or not indices.is_cuda:
        how = "segments" if deterministic or indices.numel() >= ATOMIC_BELOW else "atomic"
    else:
        segments = tuple(cuda_gradients.WAYS) if chosen == "cuda" else ("segments",)
        if indices.numel() < ATOMIC_BELOW:
            names = ("atomic", *segments)
        else:
            names = segments if chosen == "cuda" else (*segments, "atomic")
        # A gradient of zeros leaves the tables' gradients as they are.
        how = tuning.choose(
            indices.device, "lookup_backward", _tuning_shape(chosen, indices, w, v, p), names,
            lambda name: run(name, torch.zeros_like(grad)),
        )  # fmt: skip
    d_input, d_weights = run(how)
    return _or_empty(d_input, indices), _or_empty(d_weights, indices)


def _backward(
    chosen: str,
    how: str,
    indices: torch.Tensor,
    w: Any,
    x: Any,
    v: Any,
    p: Any,
    grad: torch.Tensor,
    grad_values: torch.Tensor | None,
    grad_pre_values: torch.Tensor | None,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    entries: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of pre_input and weights by the kernels; those of the tables by atomics or by sorted segments, of
    `entries` if they are sorted already."""
    atomic = how == "atomic"
    grad_out, grad_dots = (grad, None) if v is not None else (None, grad)
    of_values, of_pre_values = (grad_values, grad_pre_values) if atomic else (None, None)
    if chosen == "cuda":
        d_input, d_weights, d_dots, final = cuda.backward_by_token(
            indices, _readable(w, v, dtype), x, v, p, grad_out, _readable(grad_dots, p, dtype), atomic=atomic,
            grad_values_NV=of_values, grad_pre_values_NP=of_pre_values, dtype=dtype, **options,
        )  # fmt: skip
        d_weights = None if d_weights is None else d_weights.to(w.dtype)
    else:
        from ultramem_kernels.lookup import backward_triton

        d_input, d_weights, d_dots, final = backward_triton.backward_by_token(
            indices, w, x, v, p, grad_out, grad_dots, grad_values_NV=of_values, grad_pre_values_NP=of_pre_values,
            **options,
        )  # fmt: skip
    if not atomic:
        rows = (v if v is not None else p).shape[0]
        if entries is None:
            entries = sorted_entries(chosen, indices, rows, options["row_start"], options["padding_index"])
        add_sorted(
            entries, chosen, indices.shape[1], (grad_pre_values, x, d_dots), (grad_values, grad_out, final),
            options["core_width"], options["column_start"], how,
        )  # fmt: skip
    return d_input, d_weights


_ORDER_DTYPES = {"cuda": torch.int32, "triton": torch.int64}


def sort_for_backwards(
    indices: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    core_width: int,
    column_start: int,
    *,
    padding_index: int | None,
    deterministic: bool,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(sorted rows, sorted order) for the backwards of a weighted sum and of dots over the same rows, which would each
    sort them; None where they need not be sorted. Arguments: those of the weighted sum."""
    chosen = _backend(backend, indices, weights, values, None, core_width, column_start, dtype)
    if chosen == "reference" or not (deterministic or (chosen == "cuda" and indices.numel() >= ATOMIC_BELOW)):
        return None
    return sorted_entries(chosen, indices, values.shape[0], 0, padding_index)


def _readable(
    factors: torch.Tensor | None, table: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor | None:
    """Scores, weights or gradients of dots in a dtype that the CUDA kernels read: fp32 or that of inputs."""
    if factors is None or table is None or factors.dtype in (torch.float32, dtype or table.dtype):
        return factors
    return factors.float()


def _tuning_shape(
    chosen: str, indices: torch.Tensor, w: torch.Tensor | None, v: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[object, ...]:
    """What the speed of a lookup depends on."""
    table = v if v is not None else p
    assert table is not None
    return (
        chosen, table.dtype, tuning.bucket(indices.shape[0]), indices.shape[1], 0 if p is None else p.shape[1],
        0 if v is None else v.shape[1], 0 if w is None else w.shape[2], tuning.bucket(table.shape[0]),
    )  # fmt: skip


lookup_backward = torch.library.custom_op("ultramem::lookup_backward", mutates_args=("grad_values", "grad_pre_values"))(
    run_lookup_backward
)


@lookup_backward.register_fake
def _(indices, weights, pre_input, *_rest):  # type: ignore[no-untyped-def]
    nothing = indices.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(pre_input) if pre_input is not None else nothing,
        torch.empty_like(weights) if weights is not None else nothing.clone(),
    )


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return tensor if tensor is not None else like.new_empty(0, dtype=torch.float32)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: torch.Tensor,
        weights: torch.Tensor | None,
        pre_input: torch.Tensor | None,
        values: torch.Tensor | None,
        pre_values: torch.Tensor | None,
        options: Options,
    ) -> torch.Tensor:
        ctx.save_for_backward(indices, weights, pre_input, values, pre_values)
        ctx.options = options
        return for_this_call(lookup_forward, run_lookup_forward)(
            indices, weights, pre_input, values, pre_values, options.activation, options.core_width,
            options.column_start, options.row_start, options.padding_index, options.backend,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, weights, pre_input, values, pre_values = ctx.saved_tensors
        o = ctx.options
        value_buffer, value_gradient = _buffer(values, ctx.needs_input_grad[3])
        pre_buffer, pre_gradient = _buffer(pre_values, ctx.needs_input_grad[4])
        d_input, d_weights = for_this_call(lookup_backward, run_lookup_backward)(
            indices, weights, pre_input, values, pre_values, grad.contiguous(), value_buffer, pre_buffer, o.activation,
            o.core_width, o.column_start, o.row_start, o.padding_index, o.deterministic, o.backend,
        )  # fmt: skip
        return (
            None,
            d_weights if weights is not None else None,
            d_input if pre_input is not None else None,
            value_gradient.to(values.dtype) if value_gradient is not None else None,
            pre_gradient.to(pre_values.dtype) if pre_gradient is not None else None,
            None,
        )


def _buffer(table: torch.Tensor | None, wanted: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(where a table's gradient is added, the same if autograd is to receive it)."""
    if table is None or not wanted:
        return None, None
    main_grad = getattr(table, "main_grad", None)
    if main_grad is not None:
        if main_grad.shape != table.shape or not main_grad.is_contiguous():
            raise ValueError(f"main_grad {tuple(main_grad.shape)} must be contiguous and of the table's shape "
                             f"{tuple(table.shape)}")  # fmt: skip
        return main_grad, None
    dense = torch.zeros(table.shape, dtype=reference.accumulation_dtype(table.dtype), device=table.device)
    return dense, dense


def lookup(
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TP: torch.Tensor,
    values_NV: torch.Tensor,
    pre_values_NP: torch.Tensor,
    *,
    activation: str = "none",
    deterministic: bool = False,
    row_start: int = 0,
    padding_index: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Pooled values [T, V] of `reference.lookup`, in the dtype of the tables; both tables in one pass.

    indices_TM     int32 or int64, rows of the whole table
    scores_TMC     any float dtype; core c weights columns c*V/C .. (c+1)*V/C
    pre_input_TP   dtype of the tables
    values_NV, pre_values_NP  bf16, fp16 or fp32, contiguous; rows row_start .. row_start+N-1 of the whole table
    deterministic  gradients of the tables bitwise equal from run to run
    padding_index  entries of this index contribute nothing, as do those outside the rows of this shard

    Raises ValueError for shapes that do not fit.
    """
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation={activation!r}: legal are 'none' and 'gelu'")
    T, M, C = scores_TMC.shape
    V = values_NV.shape[1]
    if indices_TM.shape != (T, M) or pre_input_TP.shape != (T, pre_values_NP.shape[1]) or V % C:
        raise ValueError(
            f"indices {tuple(indices_TM.shape)}, scores {tuple(scores_TMC.shape)}, pre-input "
            f"{tuple(pre_input_TP.shape)}, values {tuple(values_NV.shape)} and pre-values {tuple(pre_values_NP.shape)} "
            "do not fit: see reference.py"
        )
    if values_NV.shape[0] != pre_values_NP.shape[0]:
        raise ValueError(f"values have {values_NV.shape[0]} rows, pre-values {pre_values_NP.shape[0]}")
    options = Options(activation, V // C, 0, row_start, padding_index, deterministic, backend)
    return _Lookup.apply(
        indices_TM.contiguous(), scores_TMC.contiguous(), pre_input_TP.contiguous(), values_NV, pre_values_NP, options
    )


def pre_value_dot(
    indices_TM: torch.Tensor,
    pre_input_TP: torch.Tensor,
    pre_values_NP: torch.Tensor,
    *,
    deterministic: bool = False,
    row_start: int = 0,
    padding_index: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Dots [T, M] fp32 of `reference.pre_value_dot`: over a shard of columns they are partial sums, to be added up."""
    options = Options("none", 1, 0, row_start, padding_index, deterministic, backend)
    return _Lookup.apply(indices_TM.contiguous(), None, pre_input_TP.contiguous(), None, pre_values_NP, options)


def weighted_sum(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor,
    values_NV: torch.Tensor,
    *,
    core_width: int | None = None,
    column_start: int = 0,
    deterministic: bool = False,
    row_start: int = 0,
    padding_index: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Pooled values [T, V] of `reference.weighted_sum` for final weights.

    Over a shard of columns give `column_start`, its first column in the whole table, and `core_width`, the whole
    table's width divided by the cores.
    """
    width = core_width or values_NV.shape[1] // weights_TMC.shape[2]
    options = Options("none", width, column_start, row_start, padding_index, deterministic, backend)
    return _Lookup.apply(indices_TM.contiguous(), weights_TMC.contiguous(), None, values_NV, None, options)
