"""Lookups in tables of E4M3 codes beside those in bf16, and what it takes to make the codes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ultramem_kernels.bench.record import Ceilings, Record, check
from ultramem_kernels.bench.shapes import DTYPE, SETS, Shape, Tables, uniform_rows
from ultramem_kernels.lookup.fp8_rows import decode, quantize_
from ultramem_kernels.lookup.ops import lookup, run_lookup_backward, run_lookup_forward
from ultramem_kernels.lookup.reference import lookup as exact_lookup
from ultramem_kernels.timing import graph_ms

Codes = tuple[torch.Tensor, torch.Tensor]


def bench_fp8_lookup(record: Record, ceilings: Ceilings, case: str, shape: Shape, tables: Tables) -> None:
    """Forward and both backwards with uniform rows; the bf16 forward in the same run, and how much faster codes are."""
    s, T, M = shape, shape.tokens, shape.m
    values, pre_values = (table.detach() for table in tables.both())
    scales_N2 = torch.empty(len(values), 2, device=values.device)
    codes = [_codes_of(values, scales_N2[:, 1]), _codes_of(pre_values, scales_N2[:, 0])]
    sets = [uniform_rows(T, M, min(s.keys**2, s.rows)) for _ in range(SETS)]
    scores = torch.randn(T, M, s.cores, device="cuda")
    x = torch.randn(T, s.pre_value_dim, device="cuda", dtype=DTYPE)
    grad = torch.randn(T, s.value_dim, device="cuda", dtype=DTYPE)
    forward, backward = _passes(s, codes, scores, x, grad, tables)
    _check(case, codes, sets[0], scores, x, grad, forward, backward)

    time = graph_ms([functools.partial(forward, indices) for indices in sets])
    in_bf16 = graph_ms([functools.partial(lookup, indices, scores, x, values, pre_values) for indices in sets])
    moved = s.forward_bytes - T * M * (s.width - 8)
    record.add(case, "lookup_forward_fp8_ms", time, "ms")
    record.add(case, "lookup_forward_fp8_floor_ms", ceilings.floor_ms(moved), "ms")
    record.add(case, "lookup_forward_fp8_gb_s", moved / time / 1e6, "GB/s")
    record.add(case, "lookup_forward_bf16_ms", in_bf16, "ms")
    record.add(case, "lookup_forward_fp8_speedup", in_bf16 / time, "x")
    for metric, deterministic in (("lookup_backward_fp8_ms", False), ("lookup_backward_deterministic_fp8_ms", True)):
        record.add(case, metric, graph_ms([functools.partial(backward, i, deterministic) for i in sets]), "ms")
    time = graph_ms([functools.partial(quantize_, values, *codes[0])])
    record.add(case, "quantize_ms", time, "ms")
    record.add(case, "quantize_of_copy", 100 * values.numel() * 3 / time / 1e6 / ceilings.copy_gb_s, "%")


def _codes_of(table: torch.Tensor, scales_N: torch.Tensor) -> Codes:
    codes = torch.empty(table.shape, dtype=torch.uint8, device=table.device)
    quantize_(table, codes, scales_N)
    return codes, scales_N


def _passes(
    s: Shape, codes: list[Codes], scores: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, tables: Tables
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """Forward of indices, and backward of indices (and whether it is deterministic) into `tables.grads`."""
    (values, value_scales), (pre_values, pre_value_scales) = codes
    width = s.value_dim // s.cores

    def forward(indices: torch.Tensor) -> torch.Tensor:
        return run_lookup_forward(
            indices,
            scores,
            x,
            values,
            pre_values,
            "none",
            width,
            0,
            0,
            None,
            None,
            value_scales,
            pre_value_scales,
            DTYPE,
        )

    def backward(indices: torch.Tensor, deterministic: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return run_lookup_backward(
            indices, scores, x, values, pre_values, grad, tables.grads[0], tables.grads[1], "none", width, 0, 0, None,
            deterministic, None, value_scales, pre_value_scales, DTYPE,
        )  # fmt: skip

    return forward, backward


def _check(
    case: str,
    codes: list[Codes],
    indices: torch.Tensor,
    scores: torch.Tensor,
    x: torch.Tensor,
    grad: torch.Tensor,
    forward: Callable[[torch.Tensor], torch.Tensor],
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Raises WrongResult unless some tokens' output and gradients are those of the numbers that the codes stand for."""
    some = torch.tensor([*range(32), *range(len(indices) - 32, len(indices))], device=indices.device)
    rows = indices[some].long()
    compact = torch.arange(rows.numel(), device=rows.device).view(rows.shape)
    exact = [tensor[some].double().requires_grad_() for tensor in (scores, x)]
    numbers = [decode(table[rows.flatten()]).double() * scale[rows.flatten(), None].double() for table, scale in codes]
    wanted = exact_lookup(compact, exact[0], exact[1], numbers[0], numbers[1])
    wanted_scores, wanted_x = torch.autograd.grad(wanted, exact, grad[some].double())
    check(f"{case}: lookup in codes", forward(indices)[some], wanted, 5e-3)
    d_input, d_scores = backward(indices, True)
    check(f"{case}: gradient of scores in codes", d_scores[some], wanted_scores, 1e-4)
    check(f"{case}: gradient of pre-inputs in codes", d_input[some], wanted_x, 5e-3)
