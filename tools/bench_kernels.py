"""Benchmark of `ultramem_kernels` on one GPU: times, floors counted from bytes and FLOPs, and a correctness gate.

    python tools/bench_kernels.py [--cases 227m,decode] [--quick]

Every timing is the median over replays of a CUDA graph that holds several calls on different indices, so it contains
neither launch gaps nor a warm cache (a case's rows are many times the L2 cache). Replays follow each other without a
gap, after 100 ms that do not count: a GPU that was idle runs memory-bound kernels 15 % slower for some milliseconds.
`host_ms` is the time that Python takes to launch a call. A case whose result is wrong is not reported: its rows are
dropped, the other cases go on, and the program ends with an error that names it.

Rows of the result: {"case", "metric", "value", "unit"}. Metrics ending in `_floor_ms` are counted: bytes over the
measured copy bandwidth, or FLOPs over the measured rate of a large bf16 matrix product, whichever is longer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from ultramem_kernels import lookup, pre_value_dot, retrieve, rms_norm_swapped, search, weighted_sum
from ultramem_kernels.lookup import reference as lookup_reference
from ultramem_kernels.retrieval import reference as retrieval_reference

from megatron_ultramem.results import Row, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DTYPE = torch.bfloat16
SETS = 4  # index sets that a timing rotates through


@dataclass(frozen=True)
class Shape:
    """A memory layer and its batch; letters as in the kernels' references, h the model's width."""

    tokens: int
    keys: int
    key_dim: int
    coarse_k: int
    m: int
    value_dim: int
    pre_value_dim: int
    rows: int
    hidden: int
    ranks: int = 2
    cores: int = 2


SHAPES = {
    # UltraMemV2-227M: 1138 keys a side over a pool of 20 tables of 360^2 rows
    "227m": Shape(16384, 1138, 192, 32, 32, 192, 192, 2592000, 768),
    # 2.5B/120B-top256 (widths not public: hidden 2 * Dk and Dp:Dv = 1:3 by the paper's sizing rules)
    "120b": Shape(8192, 1928, 1024, 128, 256, 768, 256, 1928**2, 2048),
}


class WrongResult(RuntimeError):
    """A kernel's result is off; nothing is reported."""


class Results:
    """Rows of the result file, printed as they come; cases whose results are wrong lose theirs."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.wrong: list[str] = []

    def add(self, case: str, metric: str, value: float, unit: str) -> None:
        self.rows.append(Row(case, metric, round(value, 5), unit))
        print(f"{case:34s} {metric:42s} {value:12.4f} {unit}", flush=True)

    def case(self, case: str, bench: Callable[..., None], *arguments: object) -> None:
        """`bench(results, *arguments)`; if it finds a wrong result nothing of the case is reported."""
        try:
            bench(self, *arguments)
        except WrongResult as error:
            self.wrong.append(str(error))
            self.rows = [row for row in self.rows if row.case != case]
            print(f"{case}: {error}; dropped", flush=True)


def timed_ms(calls: list[Callable[[], object]], repeats: int = 5, warm_up_ms: float = 100.0) -> float:
    """Median time of one call, from replays of a graph that holds all calls once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    once = _replays_ms(graph, 2)
    _replays_ms(graph, int(warm_up_ms / once) + 1)
    number = int(20 / once) + 1
    return statistics.median(_replays_ms(graph, number) for _ in range(repeats)) / len(calls)


def _replays_ms(graph: torch.cuda.CUDAGraph, number: int) -> float:
    """Mean time of a replay, of `number` behind each other."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(number):
        graph.replay()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / number, 1e-4)


def host_ms(call: Callable[[], object], calls: int = 8, repeats: int = 7) -> float:
    """Median time that the host takes to launch a call; few at a time, so that the GPU's queue never fills."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def eager_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of calls launched one by one, launch overhead included."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[repeats // 4 :])


def check(what: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Raises WrongResult unless ||got - wanted|| <= tolerance * ||wanted|| (NaN never passes)."""
    if got.numel() < 1 << 26:
        got, wanted = got.double(), wanted.double()
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= tolerance:
        raise WrongResult(f"{what}: relative error {error:.2e} is above {tolerance:.0e}")


def uniform_rows(tokens: int, m: int, distinct: int) -> torch.Tensor:
    return torch.randint(0, distinct, (tokens, m), device="cuda", dtype=torch.int32)


def zipf_rows(tokens: int, m: int, distinct: int, exponent: float = 1.1) -> torch.Tensor:
    """Zipf ranks by inversion of the continuous law, spread over the rows by a permutation."""
    u = torch.rand(tokens, m, device="cuda", dtype=torch.float64)
    power = 1 - exponent
    rank = ((1 - u * (1 - float(distinct) ** power)) ** (1 / power)).long().clamp(1, distinct) - 1
    return torch.randperm(distinct, device="cuda")[rank].int()


class Ceilings:
    """What this GPU reaches: copy bandwidth (bytes read plus written) and a large bf16 matrix product."""

    def __init__(self, results: Results) -> None:
        source = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        # Not from a graph: there a copy runs on the copy engine, which is slower.
        self.copy_gb_s = 2 * source.numel() / eager_ms(lambda: target.copy_(source)) / 1e6
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
        self.tflops = 2 * 8192**3 / timed_ms([lambda: a @ b]) / 1e9
        results.add("device", "copy_gb_s", self.copy_gb_s, "GB/s")
        results.add("device", "matmul_tflops", self.tflops, "TFLOP/s")

    def floor_ms(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.copy_gb_s / 1e6, flops / self.tflops / 1e9)


class Layer:
    """A memory layer's parameters and its forward pass by the kernels' public functions."""

    def __init__(self, shape: Shape, tables: tuple[torch.Tensor, torch.Tensor], gain: float = 0.1) -> None:
        self.shape, self.values, self.pre_values = shape, *tables
        s, h = shape, shape.hidden

        def weight(*size: int) -> torch.Tensor:
            return torch.empty(size, device="cuda", dtype=DTYPE).normal_(std=size[-1] ** -0.5).requires_grad_()

        self.query_proj, self.pre_proj = weight(2 * s.ranks * s.key_dim, h), weight(s.pre_value_dim, h)
        self.value_proj = weight(h, s.value_dim)
        self.keys = weight(2, s.keys, s.ranks, s.key_dim)
        self.gain = torch.full((s.key_dim,), gain, device="cuda", dtype=DTYPE, requires_grad=True)
        self.cores = torch.rand(s.cores, s.ranks, s.ranks, device="cuda").requires_grad_()
        u, _, v = torch.linalg.svd(self.cores.detach().sum(0))
        self.leading = torch.stack((u[:, 0], v[0])) * torch.sign(u[:, 0].sum())
        self.permutation = torch.randperm(s.keys**2, device="cuda", dtype=torch.int32)
        self.key_SRND: torch.Tensor | None = None  # normalised once, when the weights stand still (decoding)

    def parameters(self) -> list[torch.Tensor]:
        return [self.query_proj, self.pre_proj, self.value_proj, self.keys, self.gain, self.cores]

    def normalised_keys(self, backend: str | None = None) -> torch.Tensor:
        return rms_norm_swapped(self.keys, self.gain, 1e-5, backend=backend)

    def queries(self, x_TH: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        s, T = self.shape, x_TH.shape[0]
        query = F.linear(x_TH, self.query_proj).view(1, T, 2 * s.ranks, s.key_dim)
        return rms_norm_swapped(query, self.gain, 1e-5, backend=backend).view(2, s.ranks, T, s.key_dim)

    def retrieve(self, query_SRTD: torch.Tensor, key_SRND: torch.Tensor, backend: str | None = None):  # type: ignore[no-untyped-def]
        s = self.shape
        return retrieve(
            query_SRTD, key_SRND, self.leading, self.cores, coarse_k=s.coarse_k, top_m=s.m, rows=s.rows, offset=17,
            permutation=self.permutation, backend=backend,
        )  # fmt: skip

    def __call__(self, x_TH: torch.Tensor, deterministic: bool = False, backend: str | None = None) -> torch.Tensor:
        s = self.shape
        if self.key_SRND is not None:
            indices, scores, _ = self.retrieve(self.queries(x_TH, backend), self.key_SRND, backend)
        else:
            query_TQD = F.linear(x_TH, self.query_proj).view(len(x_TH), 2 * s.ranks, s.key_dim)
            indices, scores, _ = search(
                query_TQD, self.keys, self.gain, self.gain, self.leading, self.cores, eps=1e-5, coarse_k=s.coarse_k,
                top_m=s.m, rows=s.rows, offset=17, permutation=self.permutation, backend=backend,
            )  # fmt: skip
        pooled = lookup(
            indices, scores, F.linear(x_TH, self.pre_proj), self.values, self.pre_values, deterministic=deterministic,
            backend=backend,
        )  # fmt: skip
        return F.linear(pooled, self.value_proj)


def make_tables(rows: int, value_dim: int, pre_value_dim: int, main_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and pre-value table, with fp32 main_grad buffers."""
    tables = []
    for width in (value_dim, pre_value_dim):
        table = torch.nn.Parameter(torch.empty(rows, width, device="cuda", dtype=DTYPE).normal_(std=0.07))
        if main_grad:
            table.main_grad = torch.zeros(rows, width, device="cuda")  # type: ignore[attr-defined]
        tables.append(table)
    return tables[0], tables[1]


def check_lookup(case: str, indices: torch.Tensor, scores: torch.Tensor, x: torch.Tensor, tables, grad) -> None:  # type: ignore[no-untyped-def]
    """Output and gradients of the first and last tokens against fp64; all of a table's gradient by its rows' sum."""
    values, pre_values = tables
    leaves = [scores.clone().requires_grad_(), x.clone().requires_grad_()]
    for table in tables:
        table.main_grad.zero_()
    out = lookup(indices, *leaves, values, pre_values, deterministic=True)
    out.backward(grad)
    some = torch.tensor([*range(32), *range(len(indices) - 32, len(indices))], device="cuda")
    rows = indices[some].long()
    exact = [leaf[some].detach().double().requires_grad_() for leaf in leaves]
    compact = torch.arange(rows.numel(), device="cuda").view(rows.shape)  # row numbers in a small table of its own
    small = [table.detach()[rows.flatten()].double().requires_grad_() for table in tables]
    wanted = lookup_reference.lookup(compact, exact[0], exact[1], small[0], small[1])
    wanted.backward(grad[some].double())
    check(f"{case}: lookup", out[some], wanted, 5e-3)
    check(f"{case}: gradient of scores", leaves[0].grad[some], exact[0].grad, 1e-4)
    check(f"{case}: gradient of pre-inputs", leaves[1].grad[some], exact[1].grad, 5e-3)
    once = torch.bincount(indices.flatten())[rows.flatten()] == 1  # rows that no other entry adds to
    for name, table, alone in zip(("values", "pre-values"), tables, small, strict=True):
        got = table.main_grad[rows.flatten()[once]]
        check(f"{case}: gradient of {name} in rows used once", got, alone.grad[once], 1e-4)
    # Sum over all rows of the values' gradient = sum over entries of weight * grad_out, and its rows sum likewise.
    dots = torch.cat([
        torch.einsum("tmp,tp->tm", pre_values.detach()[indices[i : i + 1024].long()].float(), x[i : i + 1024].float())
        for i in range(0, len(indices), 1024)
    ])  # fmt: skip
    weights = (dots.unsqueeze(-1) * scores).double().sum(1)
    core = torch.arange(values.shape[1], device="cuda") // (values.shape[1] // scores.shape[2])
    check(
        f"{case}: values' gradient",
        values.main_grad.sum(0, dtype=torch.float64),
        (weights[:, core] * grad).sum(0),
        1e-4,
    )
    first = values.main_grad.clone(), pre_values.main_grad.clone()
    for deterministic in (True, False):
        for table in tables:
            table.main_grad.zero_()
        lookup(indices, *leaves, values, pre_values, deterministic=deterministic).backward(grad)
        if deterministic and not all(
            torch.equal(table.main_grad, old) for table, old in zip(tables, first, strict=True)
        ):
            raise WrongResult(f"{case}: the deterministic backward is not bitwise reproducible")
        check(f"{case}: the two backwards", pre_values.main_grad, first[1], 1e-5)


def bench_lookup(
    results: Results, ceilings: Ceilings, case: str, shape: Shape, make_rows: Callable[[int, int, int], torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor], compare: bool,
) -> None:  # fmt: skip
    """Lookup forward and both backwards."""
    s = shape
    T, M, C, width = s.tokens, s.m, s.cores, s.value_dim + s.pre_value_dim
    values, pre_values = tables
    sets = [make_rows(T, M, min(s.keys**2, s.rows)) for _ in range(SETS)]
    scores = torch.randn(T, M, C, device="cuda")
    x = torch.randn(T, s.pre_value_dim, device="cuda", dtype=DTYPE)
    grad = torch.randn(T, s.value_dim, device="cuda", dtype=DTYPE)
    check_lookup(case, sets[0], scores, x, tables, grad)
    distinct = sets[0].unique().numel()
    results.add(case, "distinct_rows", distinct, "rows")

    def forward(indices: torch.Tensor) -> Callable[[], object]:
        return lambda: lookup(indices, scores, x, values.detach(), pre_values.detach())

    forward_bytes = T * M * (width * 2 + 4 + 4 * C) + T * width * 2
    time = timed_ms([forward(indices) for indices in sets])
    results.add(case, "lookup_forward_ms", time, "ms")
    results.add(case, "lookup_forward_floor_ms", ceilings.floor_ms(forward_bytes), "ms")
    results.add(case, "lookup_forward_gb_s", forward_bytes / time / 1e6, "GB/s")
    results.add(case, "lookup_forward_of_copy", 100 * forward_bytes / time / 1e6 / ceilings.copy_gb_s, "%")
    backward_bytes = T * M * width * 2 + distinct * width * 4 * 2 + T * width * 2 * 2
    results.add(case, "lookup_backward_floor_ms", ceilings.floor_ms(backward_bytes), "ms")
    for metric, deterministic in (("lookup_backward_ms", False), ("lookup_backward_deterministic_ms", True)):
        time = timed_ms([backward_call(i, scores, x, tables, grad, deterministic) for i in sets])
        results.add(case, metric, time, "ms")
        results.add(case, metric.replace("_ms", "_of_floor"), time / ceilings.floor_ms(backward_bytes), "x")
    if compare:
        indices = sets[0]
        plain = (indices, scores, x, values.detach(), pre_values.detach())
        results.add(case, "reference_lookup_forward_ms", eager_ms(lambda: lookup(*plain, backend="reference"), 8), "ms")
        flat = scores[..., 0].to(DTYPE).contiguous()
        bag = [
            lambda i=i: F.embedding_bag(i, values.detach(), per_sample_weights=flat, mode="sum") for i in sets
        ]  # values alone, one core, no dot products
        results.add(case, "embedding_bag_forward_ms", timed_ms(bag), "ms")
        bench_fbgemm(results, case, sets, s)


def bench_fbgemm(results: Results, case: str, sets: list[torch.Tensor], shape: Shape) -> None:
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
    calls = [lambda i=i: op(i.flatten(), offsets) for i in sets]
    results.add(case, "fbgemm_forward_ms", timed_ms(calls), "ms")


def backward_call(indices, scores, x, tables, grad, deterministic) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    """One backward pass, gradients of the tables into main_grad."""
    values, pre_values = tables
    backward = torch.ops.ultramem.lookup_backward
    return lambda: backward(
        indices, scores, x, values.detach(), pre_values.detach(), grad, values.main_grad, pre_values.main_grad, "none",
        values.shape[1] // scores.shape[2], 0, 0, None, deterministic, None,
    )  # fmt: skip


def bench_layer(results: Results, ceilings: Ceilings, case: str, shape: Shape, tables, compare: bool) -> None:  # type: ignore[no-untyped-def]
    """Retrieval alone, and the whole layer."""
    s, layer = shape, Layer(shape, tables)
    inputs = [torch.randn(s.tokens, s.hidden, device="cuda", dtype=DTYPE) for _ in range(2)]
    check_retrieval(case, layer, inputs[0])
    with torch.no_grad():
        keys = layer.normalised_keys()
        queries = [layer.queries(x) for x in inputs]
        time = timed_ms([lambda q=q: layer.retrieve(q, keys) for q in queries])
        score_flops = 2.0 * 2 * s.ranks * s.tokens * s.keys * s.key_dim
        retrieval_bytes = 2 * 2 * s.ranks * (s.tokens + s.keys) * s.key_dim + s.tokens * s.m * (4 + 4 * s.cores)
        floor = ceilings.floor_ms(retrieval_bytes, score_flops)
        results.add(case, "retrieval_forward_ms", time, "ms")
        results.add(case, "retrieval_forward_floor_ms", floor, "ms")
        layer_time = timed_ms([lambda x=x: layer(x) for x in inputs])
        width, h = s.value_dim + s.pre_value_dim, s.hidden
        linear_flops = 2.0 * s.tokens * h * (2 * s.ranks * s.key_dim + width)
        lookup_bytes = s.tokens * s.m * (width * 2 + 4 + 4 * s.cores) + s.tokens * width * 2
        layer_floor = floor + ceilings.floor_ms(2 * s.tokens * 2 * h, linear_flops) + ceilings.floor_ms(lookup_bytes)
        results.add(case, "layer_forward_ms", layer_time, "ms")
        results.add(case, "layer_forward_floor_ms", layer_floor, "ms")
        results.add(case, "layer_forward_of_floor", layer_time / layer_floor, "x")
        results.add(case, "layer_forward_eager_ms", eager_ms(lambda: layer(inputs[0])), "ms")
    results.add(case, "layer_forward_host_ms", host_ms(lambda: layer(inputs[0])), "ms")
    with torch.no_grad():
        indices = layer.retrieve(queries[0], keys)[0]
        if compare:
            few = max(1, s.tokens // 8)  # the reference's temporaries do not fit at once
            part = timed_ms([lambda: layer.retrieve(queries[0][:, :, :few], keys, "reference")], 3)
            results.add(case, "reference_retrieval_forward_ms", part * s.tokens / few, "ms")
            results.add(case, "torch_topk_one_side_ms", topk_ms(layer, queries[0], keys), "ms")
    distinct = indices.unique().numel()
    grad = torch.randn(s.tokens, h, device="cuda", dtype=DTYPE)
    leaf = inputs[0].clone().requires_grad_()

    def step(deterministic: bool) -> Callable[[], object]:
        def run() -> None:
            for tensor in [leaf, *layer.parameters()]:
                tensor.grad = None
            layer(leaf, deterministic).backward(grad)

        return run

    backward_floor = 2 * (floor + ceilings.floor_ms(0, linear_flops)) + ceilings.floor_ms(
        s.tokens * s.m * width * 2 + distinct * width * 8
    )
    for name, deterministic in (("", False), ("_deterministic", True)):
        time = timed_ms([step(deterministic)])
        results.add(case, f"layer_forward_backward{name}_ms", time, "ms")
        results.add(case, f"layer_forward_backward{name}_of_floor", time / (layer_floor + backward_floor), "x")
    results.add(case, "layer_forward_backward_floor_ms", layer_floor + backward_floor, "ms")
    results.add(case, "layer_forward_backward_eager_ms", eager_ms(step(False)), "ms")
    results.add(case, "layer_forward_backward_host_ms", host_ms(step(False)), "ms")


def topk_ms(layer: Layer, query_SRTD: torch.Tensor, key_SRND: torch.Tensor) -> float:
    scores = torch.matmul(query_SRTD[0, 0], key_SRND[0, 0].mT)
    return timed_ms([lambda: scores.topk(layer.shape.coarse_k, dim=-1)])


def check_retrieval(case: str, layer: Layer, x_TH: torch.Tensor) -> None:
    """Selected indices and scores of some tokens against the reference; ties (to bf16 rounding) may fall either way."""
    s = layer.shape
    with torch.no_grad():
        query, keys = layer.queries(x_TH)[:, :, -256:], layer.normalised_keys()
        indices, scores, _ = layer.retrieve(query, keys)
        side = retrieval_reference.side_scores(query, keys)
        core = layer.cores.sum(0)
        wanted_keys = retrieval_reference.select(side, layer.leading, core, s.coarse_k, s.m)
        wanted = retrieval_reference.physical_rows(wanted_keys, s.keys, layer.permutation, 17, s.rows)
        at = retrieval_reference.gather_keys(side, wanted_keys)
        wanted_scores = retrieval_reference.pair_scores(at, layer.cores)
    same = (indices.sort(1).values == wanted.sort(1).values).float().mean().item()
    if same < 0.99:
        raise WrongResult(f"{case}: retrieval agrees on {100 * same:.2f} % of the indices")
    check(f"{case}: sums of scores", scores.sum((1, 2)), wanted_scores.sum((1, 2)), 1e-2)


def bench_decode(results: Results, shape: Shape, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Latency of a layer when few tokens are decoded: 20 layers one behind the other in a CUDA graph."""
    layers = [Layer(shape, tables) for _ in range(20)]
    with torch.no_grad():
        for layer in layers:
            layer.key_SRND = layer.normalised_keys()
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, shape.hidden, device="cuda", dtype=DTYPE)
            check("decode: layer", layers[0](x), layers[0](x, backend="reference"), 3e-2)

            def run(x: torch.Tensor = x) -> torch.Tensor:
                for layer in layers:
                    x = layer(x)
                return x

            results.add("decode", f"layer_t{tokens}_us", timed_ms([run]) * 1000 / len(layers), "us")


def bench_partial(results: Results, ceilings: Ceilings, case: str, shape: Shape, ranks: int) -> None:
    """What a rank of memory-parallel by columns computes: dots and sums over its columns, of all ranks' tokens."""
    s, T, width = shape, shape.tokens * ranks, shape.value_dim // ranks
    (table, _), generator = make_tables(s.rows, width, 8, True), torch.Generator("cuda").manual_seed(0)
    plain = table.detach()
    sets = [torch.randint(0, s.keys**2, (T, s.m), device="cuda", dtype=torch.int32, generator=generator) for _ in "123"]
    x = torch.randn(T, width, device="cuda", dtype=DTYPE, generator=generator)
    weights = torch.randn(T, s.m, 1, device="cuda", dtype=DTYPE, generator=generator)
    grad_dots = weights[..., 0].contiguous()
    some = slice(0, 64)
    wanted = lookup_reference.pre_value_dot(sets[0][some], x[some].double(), plain.double())
    check(f"{case}: dots", pre_value_dot(sets[0], x, plain)[some], wanted, 1e-3)
    wanted = lookup_reference.weighted_sum(sets[0][some], weights[some].double(), plain.double(), width)
    check(f"{case}: weighted sum", weighted_sum(sets[0], weights, plain, core_width=width)[some], wanted, 5e-3)
    backward = torch.ops.ultramem.lookup_backward
    rest = "none", width, 0, 0, None, False, None
    calls = {
        "dots_forward": lambda i: pre_value_dot(i, x, plain),
        "sum_forward": lambda i: weighted_sum(i, weights, plain, core_width=width),
        "dots_backward": lambda i: backward(i, None, x, None, plain, grad_dots, None, table.main_grad, *rest),
        "sum_backward": lambda i: backward(i, weights, None, plain, None, x, table.main_grad, None, *rest),
    }  # fmt: skip
    distinct = sets[0].unique().numel()
    forward_bytes = T * s.m * (width * 2 + 4 + 4) + T * width * 2
    for name, call in calls.items():
        time = timed_ms([functools.partial(call, i) for i in sets])
        floor = ceilings.floor_ms(forward_bytes + ("backward" in name) * distinct * width * 8)
        results.add(case, f"{name}_ms", time, "ms")
        results.add(case, f"{name}_of_floor", time / floor, "x")


def bench_sweep(results: Results, ceilings: Ceilings, quick: bool, out: Path) -> None:
    """Lookups over tokens, m, widths and rows, uniform and Zipf."""
    base = {"keys": 1 << 12, "key_dim": 64, "coarse_k": 32, "hidden": 64}
    grid = [
        (1024, 32, 192, 192, 2000000), (4096, 32, 192, 192, 2000000), (65536, 32, 192, 192, 2000000),
        (16384, 8, 192, 192, 2000000), (16384, 128, 192, 192, 2000000), (16384, 32, 64, 64, 2000000),
        (16384, 32, 768, 384, 1000000), (16384, 32, 192, 192, 130000), (16384, 33, 72, 72, 2000000),
    ]  # fmt: skip
    for tokens, m, value_dim, pre_value_dim, rows in grid[:2] if quick else grid:
        shape = Shape(tokens, m=m, value_dim=value_dim, pre_value_dim=pre_value_dim, rows=rows, **base)
        tables = make_tables(rows, value_dim, pre_value_dim, True)
        for name, make_rows in (("uniform", uniform_rows), ("zipf", zipf_rows)):
            case = f"T{tokens}_m{m}_Dv{value_dim}_Dp{pre_value_dim}_{rows // 1000}k_{name}"
            results.case(case, bench_lookup, ceilings, case, shape, make_rows, tables, False)
        write_results(out, "kernels", results.rows)
        del tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file kernels_<gpu>.json")
    parser.add_argument("--cases", default="227m,227m_zipf,decode,partial,120b,sweep", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="two sweep shapes, no comparisons")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU found")
    torch.manual_seed(0)
    results, cases = Results(), args.cases.split(",")
    ceilings = Ceilings(results)
    if {"227m", "227m_zipf", "decode"} & set(cases):
        shape = SHAPES["227m"]
        tables = make_tables(shape.rows, shape.value_dim, shape.pre_value_dim, True)
        if "227m" in cases:
            results.add("227m", "copy_gb_s", ceilings.copy_gb_s, "GB/s")
            results.case("227m", bench_lookup, ceilings, "227m", shape, uniform_rows, tables, not args.quick)
            results.case("227m", bench_layer, ceilings, "227m", shape, tables, not args.quick)
            write_results(args.out, "kernels", results.rows)
        if "227m_zipf" in cases:
            results.case("227m_zipf", bench_lookup, ceilings, "227m_zipf", shape, zipf_rows, tables, False)
        if "decode" in cases:
            results.case("decode", bench_decode, shape, tables)
            write_results(args.out, "kernels", results.rows)
        del tables
    if "partial" in cases:
        results.case("227m_columns_of_2", bench_partial, ceilings, "227m_columns_of_2", SHAPES["227m"], 2)
        write_results(args.out, "kernels", results.rows)
    if "120b" in cases:
        shape = SHAPES["120b"]
        tables = make_tables(shape.rows, shape.value_dim, shape.pre_value_dim, True)
        results.case("120b", bench_lookup, ceilings, "120b", shape, uniform_rows, tables, False)
        results.case("120b", bench_layer, ceilings, "120b", shape, tables, False)
        write_results(args.out, "kernels", results.rows)
        del tables
    if "sweep" in cases:
        bench_sweep(results, ceilings, args.quick, args.out)
    write_results(args.out, "kernels", results.rows)
    if results.wrong:
        sys.exit("\n".join(("wrong results, not reported:", *results.wrong)))


if __name__ == "__main__":
    main()
