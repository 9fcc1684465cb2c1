"""A whole memory layer: its retrieval, its passes in training, its latency when few tokens are decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ultramem_kernels.bench.layer import Layer
from ultramem_kernels.bench.record import Ceilings, Record, WrongResult, check
from ultramem_kernels.bench.shapes import DTYPE, Shape, Tables
from ultramem_kernels.retrieval import reference
from ultramem_kernels.timing import eager_ms, graph_ms, host_ms

DECODED_LAYERS = 20  # one behind the other


def bench_layer(record: Record, ceilings: Ceilings, case: str, shape: Shape, tables: Tables, compare: bool) -> None:
    """Retrieval alone, and the whole layer; with `compare` also the reference's retrieval and torch's top-k."""
    s, layer = shape, Layer(shape, tables)
    inputs = [torch.randn(s.tokens, s.hidden, device="cuda", dtype=DTYPE) for _ in range(2)]
    check_retrieval(case, layer, inputs[0])
    with torch.no_grad():
        keys = layer.normalised_keys()
        queries = [layer.queries(x) for x in inputs]
        time = graph_ms([functools.partial(layer.retrieve, query, keys) for query in queries])
        score_flops = 2.0 * 2 * s.ranks * s.tokens * s.keys * s.key_dim
        retrieval_bytes = 2 * 2 * s.ranks * (s.tokens + s.keys) * s.key_dim + s.tokens * s.m * (4 + 4 * s.cores)
        floor = ceilings.floor_ms(retrieval_bytes, score_flops)
        record.add(case, "retrieval_forward_ms", time, "ms")
        record.add(case, "retrieval_forward_floor_ms", floor, "ms")
        layer_time = graph_ms([functools.partial(layer, x) for x in inputs])
        linear_flops = 2.0 * s.tokens * s.hidden * (2 * s.ranks * s.key_dim + s.width)
        linear_floor = ceilings.floor_ms(2 * s.tokens * 2 * s.hidden, linear_flops)
        layer_floor = floor + linear_floor + ceilings.floor_ms(s.forward_bytes)
        record.add(case, "layer_forward_ms", layer_time, "ms")
        record.add(case, "layer_forward_floor_ms", layer_floor, "ms")
        record.add(case, "layer_forward_of_floor", layer_time / layer_floor, "x")
        record.add(case, "layer_forward_eager_ms", eager_ms(lambda: layer(inputs[0])), "ms")
    record.add(case, "layer_forward_host_ms", host_ms(lambda: layer(inputs[0])), "ms")
    with torch.no_grad():
        distinct = layer.retrieve(queries[0], keys)[0].unique().numel()
        if compare:
            few = max(1, s.tokens // 8)  # the reference's temporaries do not fit at once
            part = graph_ms([lambda: layer.retrieve(queries[0][:, :, :few], keys, "reference")], 3)
            record.add(case, "reference_retrieval_forward_ms", part * s.tokens / few, "ms")
            scores = torch.matmul(queries[0][0, 0], keys[0, 0].mT)
            record.add(case, "torch_topk_one_side_ms", graph_ms([lambda: scores.topk(s.coarse_k, dim=-1)]), "ms")
            del scores
    grad = torch.randn(s.tokens, s.hidden, device="cuda", dtype=DTYPE)
    leaf = inputs[0].clone().requires_grad_()

    def step(deterministic: bool) -> Callable[[], object]:
        def run() -> None:
            for tensor in [leaf, *layer.parameters()]:
                tensor.grad = None
            layer(leaf, deterministic).backward(grad)

        return run

    rows_floor = ceilings.floor_ms(s.tokens * s.m * s.width * 2 + distinct * s.width * 8)
    total_floor = layer_floor + 2 * (floor + ceilings.floor_ms(0, linear_flops)) + rows_floor
    for name, deterministic in (("", False), ("_deterministic", True)):
        time = graph_ms([step(deterministic)])
        record.add(case, f"layer_forward_backward{name}_ms", time, "ms")
        record.add(case, f"layer_forward_backward{name}_of_floor", time / total_floor, "x")
    record.add(case, "layer_forward_backward_floor_ms", total_floor, "ms")
    record.add(case, "layer_forward_backward_eager_ms", eager_ms(step(False)), "ms")
    record.add(case, "layer_forward_backward_host_ms", host_ms(step(False)), "ms")


def check_retrieval(case: str, layer: Layer, x_TH: torch.Tensor) -> None:
    """Selected indices and scores of some tokens against the reference; ties (to bf16 rounding) may fall either way.
    Raises WrongResult."""
    s = layer.shape
    with torch.no_grad():
        query, keys = layer.queries(x_TH)[:, :, -256:], layer.normalised_keys()
        indices, scores, _ = layer.retrieve(query, keys)
        side = reference.side_scores(query, keys)
        wanted_keys = reference.select(side, layer.leading, layer.cores.sum(0), s.coarse_k, s.m)
        wanted = reference.physical_rows(wanted_keys, s.keys, layer.permutation, layer.offset, s.rows)
        wanted_scores = reference.pair_scores(reference.gather_keys(side, wanted_keys), layer.cores)
    same = (indices.sort(1).values == wanted.sort(1).values).float().mean().item()
    if same < 0.99:
        raise WrongResult(f"{case}: retrieval agrees on {100 * same:.2f} % of the indices")
    check(f"{case}: sums of scores", scores.sum((1, 2)), wanted_scores.sum((1, 2)), 1e-2)


def bench_decode(record: Record, case: str, shape: Shape, tables: Tables) -> None:
    """Latency of a layer when few tokens are decoded: layers one behind the other in a CUDA graph."""
    layers = [Layer(shape, tables) for _ in range(DECODED_LAYERS)]
    with torch.no_grad():
        for layer in layers:
            layer.key_SRND = layer.normalised_keys()
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, shape.hidden, device="cuda", dtype=DTYPE)
            check(f"{case}: layer", layers[0](x), layers[0](x, backend="reference"), 3e-2)

            def run(x: torch.Tensor = x) -> torch.Tensor:
                for layer in layers:
                    x = layer(x)
                return x

            record.add(case, f"layer_t{tokens}_us", graph_ms([run]) * 1000 / len(layers), "us")
