"""Lookups forward and backward, beside PyTorch's and FBGEMM's embedding bags; a rank's part of them by columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from ultramem_kernels.bench.lookup_gate import check_lookup
from ultramem_kernels.bench.record import Ceilings, Record, check
from ultramem_kernels.bench.shapes import DTYPE, SETS, RowChoice, Shape, Tables, make_tables
from ultramem_kernels.lookup import reference
from ultramem_kernels.lookup.ops import lookup, pre_value_dot, weighted_sum
from ultramem_kernels.timing import eager_ms, graph_ms


def bench_lookup(
    record: Record, ceilings: Ceilings, case: str, shape: Shape, choose_rows: RowChoice, tables: Tables, compare: bool
) -> None:
    """Lookup forward and both backwards; with `compare` also the reference and other libraries' embedding bags."""
    s, T, M = shape, shape.tokens, shape.m
    values, pre_values = (table.detach() for table in tables.both())
    sets = [choose_rows(T, M, min(s.keys**2, s.rows)) for _ in range(SETS)]
    scores = torch.randn(T, M, s.cores, device="cuda")
    x = torch.randn(T, s.pre_value_dim, device="cuda", dtype=DTYPE)
    grad = torch.randn(T, s.value_dim, device="cuda", dtype=DTYPE)
    check_lookup(case, sets[0], scores, x, tables, grad)
    distinct = sets[0].unique().numel()
    record.add(case, "distinct_rows", distinct, "rows")

    time = graph_ms([functools.partial(lookup, indices, scores, x, values, pre_values) for indices in sets])
    record.add(case, "lookup_forward_ms", time, "ms")
    record.add(case, "lookup_forward_floor_ms", ceilings.floor_ms(s.forward_bytes), "ms")
    record.add(case, "lookup_forward_gb_s", s.forward_bytes / time / 1e6, "GB/s")
    record.add(case, "lookup_forward_of_copy", 100 * s.forward_bytes / time / 1e6 / ceilings.copy_gb_s, "%")
    floor = ceilings.floor_ms(T * M * s.width * 2 + distinct * s.width * 4 * 2 + T * s.width * 2 * 2)
    record.add(case, "lookup_backward_floor_ms", floor, "ms")
    for metric, deterministic in (("lookup_backward_ms", False), ("lookup_backward_deterministic_ms", True)):
        time = graph_ms([_backward(indices, scores, x, tables, grad, deterministic) for indices in sets])
        record.add(case, metric, time, "ms")
        record.add(case, metric.replace("_ms", "_of_floor"), time / floor, "x")
    if compare:
        plain = functools.partial(lookup, sets[0], scores, x, values, pre_values, backend="reference")
        record.add(case, "reference_lookup_forward_ms", eager_ms(plain, 6, 2), "ms")
        flat = scores[..., 0].to(DTYPE).contiguous()  # values alone, one core, no dot products
        bag = functools.partial(F.embedding_bag, weight=values, per_sample_weights=flat, mode="sum")
        record.add(case, "embedding_bag_forward_ms", graph_ms([functools.partial(bag, i) for i in sets]), "ms")
        _bench_fbgemm(record, case, sets, s)


def _backward(
    indices: torch.Tensor,
    scores: torch.Tensor,
    x: torch.Tensor,
    tables: Tables,
    grad: torch.Tensor,
    deterministic: bool,
) -> Callable[[], object]:
    """One backward pass, gradients of the tables into main_grad."""
    values, pre_values = (table.detach() for table in tables.both())
    return lambda: torch.ops.ultramem.lookup_backward(
        indices, scores, x, values, pre_values, grad, *tables.grads, "none", values.shape[1] // scores.shape[2], 0, 0,
        None, deterministic, None,
    )  # fmt: skip


def _bench_fbgemm(record: Record, case: str, sets: list[torch.Tensor], shape: Shape) -> None:
    """FBGEMM's table-batched embedding of the values alone, where it is installed."""
    try:
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            EmbeddingLocation,
            IntNBitTableBatchedEmbeddingBagsCodegen,
            SparseType,
        )
    except ImportError:
        print("fbgemm_gpu is not installed: not compared", flush=True)
        return
    table = ("", shape.rows, shape.value_dim, SparseType.FP16, EmbeddingLocation.DEVICE)
    op = IntNBitTableBatchedEmbeddingBagsCodegen([table], device="cuda", output_dtype=SparseType.BF16)
    op.fill_random_weights()
    offsets = torch.arange(0, sets[0].numel() + 1, shape.m, device="cuda", dtype=torch.int32)
    calls = [functools.partial(op, indices.flatten(), offsets) for indices in sets]
    record.add(case, "fbgemm_forward_ms", graph_ms(calls), "ms")


def bench_columns(record: Record, ceilings: Ceilings, case: str, shape: Shape, ranks: int) -> None:
    """What a rank of memory-parallel by columns computes: dots and sums over its columns, of all ranks' tokens."""
    part = replace(shape, tokens=shape.tokens * ranks, value_dim=shape.value_dim // ranks, pre_value_dim=8, cores=1)
    T, width, generator = part.tokens, part.value_dim, torch.Generator("cuda").manual_seed(0)
    tables = make_tables(part)
    table, (table_grad, _) = tables.values.detach(), tables.grads
    sets = [torch.randint(0, part.keys**2, (T, part.m), device="cuda", dtype=torch.int32, generator=generator)
            for _ in range(3)]  # fmt: skip
    x = torch.randn(T, width, device="cuda", dtype=DTYPE, generator=generator)
    weights = torch.randn(T, part.m, 1, device="cuda", dtype=DTYPE, generator=generator)
    grad_dots = weights[..., 0].contiguous()
    some = slice(0, 64)
    wanted = reference.pre_value_dot(sets[0][some], x[some].double(), table.double())
    check(f"{case}: dots", pre_value_dot(sets[0], x, table)[some], wanted, 1e-3)
    wanted = reference.weighted_sum(sets[0][some], weights[some].double(), table.double(), width)
    check(f"{case}: weighted sum", weighted_sum(sets[0], weights, table, core_width=width)[some], wanted, 5e-3)
    backward = torch.ops.ultramem.lookup_backward
    rest = "none", width, 0, 0, None, False, None
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "dots_forward": lambda i: pre_value_dot(i, x, table),
        "sum_forward": lambda i: weighted_sum(i, weights, table, core_width=width),
        "dots_backward": lambda i: backward(i, None, x, None, table, grad_dots, None, table_grad, *rest),
        "sum_backward": lambda i: backward(i, weights, None, table, None, x, table_grad, None, *rest),
    }
    distinct = sets[0].unique().numel()
    forward_bytes = T * part.m * (width * 2 + 4 + 4) + T * width * 2
    for name, call in calls.items():
        time = graph_ms([functools.partial(call, i) for i in sets])
        floor = ceilings.floor_ms(forward_bytes + ("backward" in name) * distinct * width * 8)
        record.add(case, f"{name}_ms", time, "ms")
        record.add(case, f"{name}_of_floor", time / floor, "x")
