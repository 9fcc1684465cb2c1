"""The layer's kernels can be captured in a CUDA graph, forward and backward, and replayed on other inputs."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_helpers import relative_error
from ultramem_kernels import lookup, search

pytestmark = pytest.mark.gpu
T, N, D, R, C, M = 600, 100, 64, 2, 2, 32


class Layer:
    """Search and lookup with everything that gets a gradient."""

    def __init__(self) -> None:
        def weight(*size: int) -> torch.Tensor:
            return torch.randn(size, device="cuda").bfloat16().requires_grad_()

        self.query, self.keys, self.gain, self.pre_input = (
            weight(T, 2 * R, D),
            weight(2, N, R, D),
            weight(D),
            weight(T, D),
        )
        self.cores = torch.rand(C, R, R, device="cuda").requires_grad_()
        self.leading = torch.rand(2, R, device="cuda")
        self.tables = [torch.nn.Parameter(torch.randn(N * N, D, device="cuda").bfloat16()) for _ in range(2)]
        for table in self.tables:
            table.main_grad = torch.zeros(N * N, D, device="cuda")  # type: ignore[attr-defined]
        self.leaves = [self.query, self.keys, self.gain, self.pre_input, self.cores]

    def step(self, deterministic: bool) -> list[torch.Tensor]:
        options = {"eps": 1e-5, "coarse_k": 32, "top_m": M}
        indices, scores, _ = search(self.query, self.keys, self.gain, self.gain, self.leading, self.cores, **options)
        out = lookup(indices, scores, self.pre_input, *self.tables, deterministic=deterministic)
        for leaf in self.leaves:
            leaf.grad = None
        out.float().square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in self.leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_a_replayed_graph_gives_what_eager_calls_give(deterministic):
    layer = Layer()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.step(deterministic)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step(deterministic)
    with torch.no_grad():
        layer.query.copy_(torch.randn_like(layer.query))
    for table in layer.tables:
        table.main_grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(table.main_grad.abs().sum() > 0 for table in layer.tables)
    got = [t.clone() for t in (*captured, *(table.main_grad for table in layer.tables))]
    for table in layer.tables:
        table.main_grad.zero_()
    wanted = [*layer.step(deterministic), *(table.main_grad for table in layer.tables)]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b) if deterministic else relative_error(a, b) < 1e-3


def test_the_first_kernel_of_a_thread_finds_the_context():
    layer, results = Layer(), []
    thread = threading.Thread(target=lambda: results.append(layer.step(True)))
    thread.start()
    thread.join()
    assert len(results) == 1 and torch.isfinite(results[0][0].float()).all()
