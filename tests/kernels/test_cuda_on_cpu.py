"""The hand-written CUDA kernels agree with the references when their sources run on the CPU (see cuda_on_cpu.py)."""

from __future__ import annotations

import types

import pytest
import torch
from cuda_on_cpu import COMPILER, Emulated
from kernel_helpers import relative_error
from ultramem_kernels.lookup import cuda as lookup_cuda
from ultramem_kernels.lookup import reference as lookup_reference
from ultramem_kernels.lookup.table_gradients import sort_entries
from ultramem_kernels.retrieval import cuda as retrieval_cuda
from ultramem_kernels.retrieval import reference as retrieval_reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(Emulated, "folder", tmp_path, raising=False)
    monkeypatch.setattr(
        lookup_cuda, "_module", lambda name, device, **d: Emulated(lookup_cuda._source(name), d, device)
    )
    monkeypatch.setattr(
        retrieval_cuda, "_module", lambda name, device, **d: Emulated(retrieval_cuda._source(name), d, device)
    )
    one = types.SimpleNamespace(multi_processor_count=1)  # one multiprocessor: blocks walk over several tokens
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one)


@pytest.mark.parametrize(
    "shape",
    [
        (5, 7, 50, 72, 48, 3),
        pytest.param((19, 33, 40, 192, 192, 2), marks=pytest.mark.slow),
        pytest.param((2, 32, 64, 256, 768, 2), marks=pytest.mark.slow),
        pytest.param((1, 1, 4, 16, 16, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lookup_by_token_equals_the_reference(shape):
    T, M, N, P, V, C = shape
    indices = torch.randint(-3, N + 3, (T, M), dtype=torch.int32)  # some outside the shard
    scores, x, grad = torch.randn(T, M, C), torch.randn(T, P).bfloat16(), torch.randn(T, V).bfloat16()
    values, pre_values = torch.randn(N, V).bfloat16(), torch.randn(N, P).bfloat16()
    options = {"activation": "gelu", "padding_index": 2}
    got = lookup_cuda.forward(indices, scores, x, values, pre_values, **options)
    wanted = lookup_reference.lookup(indices, scores, x, values, pre_values, **options)
    assert relative_error(got, wanted) < 1e-3
    results = lookup_cuda.backward_by_token(indices, scores, x, values, pre_values, grad, **options)
    expected = lookup_reference.backward_by_token(
        indices, scores, x, values, pre_values, grad, core_width=V // C, **options
    )
    exists = lookup_reference.local_rows(indices, N, 0, 2)[1].unsqueeze(-1)
    assert relative_error(results[0], expected[0]) < 1e-3
    assert relative_error(results[1], expected[1]) < 1e-5
    assert relative_error(results[2], expected[2]) < 1e-5
    assert relative_error(results[3] * exists, expected[3] * exists) < 1e-5


@pytest.mark.parametrize("rows", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 60, 5000))])
def test_segments_equal_the_reference(rows):
    T, M, P, V, C = 45, 32, 16, 48, 2
    indices = torch.randint(0, rows, (T, M), dtype=torch.int32)
    indices[4:9] = rows // 2
    x, grad = torch.randn(T, P).bfloat16(), torch.randn(T, V).bfloat16()
    d_dots, weights = torch.randn(T, M), torch.randn(T, M, C)
    got = torch.ones(rows, P), torch.ones(rows, V)
    wanted = torch.ones(rows, P), torch.ones(rows, V)
    sorted_rows, order = sort_entries(indices, rows)
    lookup_cuda.add_segments_(sorted_rows, order, M, (got[0], x, d_dots), (got[1], grad, weights), V // C)
    local, exists = lookup_reference.local_rows(indices, rows)
    lookup_reference.add_rows_(wanted[0], local, exists, d_dots.unsqueeze(-1), x, P)
    lookup_reference.add_rows_(wanted[1], local, exists, weights, grad, V // C)
    assert relative_error(got[0], wanted[0]) < 1e-5 and relative_error(got[1], wanted[1]) < 1e-5


@pytest.mark.parametrize(
    "shape",
    [
        (5, 300, 32, 32),
        (2, 200, 128, 256),
        pytest.param((2, 140, 20, 33), marks=pytest.mark.slow),
        pytest.param((1, 100, 70, 64), marks=pytest.mark.slow),
        pytest.param((1, 40, 16, 256), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_selection_and_its_backward_equal_the_reference(shape):
    T, N, K, M = shape
    R, C, width = 2, 2, 320
    side = torch.zeros(2, R, T, width, dtype=torch.bfloat16)
    side[..., :N] = torch.randn(2, R, T, N)
    side = side[..., :N]
    leading, cores, permutation = torch.rand(2, R), torch.rand(C, R, R), torch.randperm(N * N).int()
    candidates = retrieval_cuda.coarse_pass(side, leading, K)
    coarse = torch.einsum("srtn,sr->stn", side.float(), leading)
    got = coarse.gather(-1, candidates.transpose(0, 1).long()).sort(-1).values
    assert torch.equal(got, coarse.topk(K, -1).values.sort(-1).values)
    indices, scores, keys, kept = retrieval_cuda.exact_pass(side, candidates, cores, M, permutation, 7, N * N)
    wanted_keys = retrieval_reference.select(side, leading, cores.sum(0), K, M)
    wanted = retrieval_reference.physical_rows(wanted_keys, N, permutation, 7, N * N)
    assert torch.equal(indices.sort(1).values, wanted.sort(1).values)
    assert torch.equal(retrieval_reference.physical_rows(keys, N, permutation, 7, N * N), indices)
    assert torch.equal(kept, retrieval_reference.gather_keys(side, keys).float())
    assert relative_error(scores, retrieval_reference.pair_scores(kept, cores)) < 1e-5
    slope = torch.randn_like(scores)
    got_dense = retrieval_cuda.dense_gradient(slope, kept, cores, keys, width, torch.float32)
    wanted_dense = retrieval_reference.dense_gradient(slope, kept, cores, keys, width)
    assert relative_error(got_dense[0], wanted_dense[0]) < 1e-5
    assert relative_error(got_dense[1], wanted_dense[1]) < 1e-5


def test_ties_in_the_selection_give_distinct_keys():
    side = torch.zeros(2, 2, 1, 320, dtype=torch.bfloat16)[..., :300]
    candidates = retrieval_cuda.coarse_pass(side, torch.ones(2, 2), 32)
    indices = retrieval_cuda.exact_pass(side, candidates, torch.ones(1, 2, 2), 32, None, 0, 300 * 300)[0]
    assert len(set(indices[0].tolist())) == 32
