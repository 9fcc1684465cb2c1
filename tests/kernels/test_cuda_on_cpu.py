"""The hand-written CUDA kernels agree with the references when their sources run on the CPU (see cuda_on_cpu.py)."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import COMPILER, Emulated
from kernel_helpers import relative_error
from ultramem_kernels import column_sums
from ultramem_kernels.lookup import cuda as lookup_cuda
from ultramem_kernels.lookup import cuda_gradients, reference
from ultramem_kernels.lookup.table_gradients import add_by_reference, sort_entries
from ultramem_kernels.retrieval import cuda as retrieval_cuda
from ultramem_kernels.retrieval import reference as retrieval_reference
from ultramem_kernels.rms_norm import cuda as norm_cuda
from ultramem_kernels.rms_norm import reference as norm_reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(Emulated, "folder", tmp_path, raising=False)
    for module, source in (
        (lookup_cuda, lookup_cuda.source),
        (cuda_gradients, lookup_cuda.source),
        (retrieval_cuda, retrieval_cuda.source),
    ):

        def emulated(name, device, defines, source=source):
            return Emulated(source(name), defines, device)

        monkeypatch.setattr(module, "make_module", emulated)
    monkeypatch.setattr(norm_cuda, "make_module", lambda device, defines: Emulated(norm_cuda.source(), defines, device))
    monkeypatch.setattr(
        column_sums, "make_module", lambda device, defines: Emulated(column_sums.source(), defines, device)
    )
    monkeypatch.setattr(norm_cuda, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(lookup_cuda, "_plans", {})
    monkeypatch.setattr(cuda_gradients, "_sorts", {})
    monkeypatch.setattr(cuda_gradients, "_segments", {})
    for module in (retrieval_cuda, norm_cuda, column_sums):
        monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(lookup_cuda, "multiprocessors", lambda device: 1)  # blocks walk over several tokens


def table(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width).bfloat16()


MODES = ["both", "dots", "sum"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [
        (9, 7, 50, 72, 48, 3),
        pytest.param((19, 33, 40, 192, 192, 2), marks=pytest.mark.slow),
        pytest.param((3, 70, 64, 256, 768, 2), marks=pytest.mark.slow),
        pytest.param((1, 1, 4, 16, 16, 1), marks=pytest.mark.slow),
        pytest.param((40, 32, 100, 96, 96, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lookup_by_token_equals_the_reference(shape, mode):
    T, M, N, P, V, C = shape
    indices = torch.randint(-3, N + 3, (T, M), dtype=torch.int32)  # some outside the shard
    weights, x, grad_out = torch.randn(T, M, C), torch.randn(T, P).bfloat16(), torch.randn(T, V).bfloat16()
    values, pre_values, grad_dots = table(N, V), table(N, P), None
    place = {"row_start": 0, "padding_index": 2, "core_width": V // C, "column_start": 0}
    activation = "gelu" if mode == "both" else "none"
    if mode == "dots":
        values = weights = grad_out = None
        grad_dots = torch.randn(T, M).bfloat16()
        wanted = reference.pre_value_dot(indices, x, pre_values, 0, 2)
    elif mode == "sum":
        pre_values = x = None
        weights = weights.bfloat16()
        wanted = reference.weighted_sum(indices, weights, values, V // C, 0, 0, 2)
    else:
        wanted = reference.lookup(indices, weights, x, values, pre_values, "gelu", 0, 2)
    options = {"activation": activation, "blocks": lookup_cuda.Blocks(2, 3, 2), **place}
    got = lookup_cuda.forward(indices, weights, x, values, pre_values, **options)
    assert relative_error(got, wanted) < 1e-3
    grad = grad_out if grad_out is not None else grad_dots
    expected = reference.backward_by_token(
        indices, weights, x, values, pre_values, grad, activation=activation, **place
    )
    exists = reference.local_rows(indices, N, 0, 2)[1]
    for atomic in (False, True):
        buffers = [None if t is None else torch.ones(t.shape) for t in (values, pre_values)]
        results = lookup_cuda.backward_by_token(
            indices, weights, x, values, pre_values, grad_out, grad_dots, atomic=atomic,
            grad_values_NV=buffers[0], grad_pre_values_NP=buffers[1], **options,
        )  # fmt: skip
        for got, wanted in zip(results[:2], expected[:2], strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or relative_error(got, wanted) < 2e-3
        if not atomic:
            for got, wanted in zip(results[2:], expected[2:], strict=True):
                mask = None if got is None else exists.view(*exists.shape, *(1,) * (got.dim() - 2))
                assert got is None or relative_error(got * mask, wanted * mask) < 1e-5
            continue
        assert results[2:] == (None, None)
        wanted_buffers = [None if t is None else torch.ones(t.shape) for t in (values, pre_values)]
        add_by_reference(
            indices, (wanted_buffers[1], x, expected[2]), (wanted_buffers[0], grad_out, expected[3]), V // C, 0, 0, 2
        )
        assert all(w is None or relative_error(b, w) < 1e-5 for b, w in zip(buffers, wanted_buffers, strict=True))


@pytest.mark.parametrize(
    "shape", [(300, 15, 2**20), pytest.param((1, 1, 1), marks=pytest.mark.slow), (7, 3, 200), (1100, 15, 9)], ids=str
)
def test_the_sort_is_stable_and_puts_missing_rows_last(shape):
    T, M, rows = shape
    indices = torch.randint(-rows // 8, rows + rows // 8, (T, M), dtype=torch.int64)
    indices[: T // 2] = indices[:1]  # many entries of a few rows
    for options in ({}, {"row_start": rows // 4, "padding_index": int(indices[-1, -1])}):
        wanted_rows, wanted_order = sort_entries(indices, rows, **options)
        got_rows, got_order = cuda_gradients.sort_entries(indices, rows, **options)
        real = (wanted_rows >= 0) & (wanted_rows < rows)
        assert torch.equal(got_rows[: real.sum()].long(), wanted_rows[real])
        assert torch.equal(got_order[: real.sum()].long(), wanted_order[real])
        assert (got_rows[real.sum() :] == rows).all()


LOOKING_BACK = """
// A thread of the first half looks back for its digit; one of the second publishes what is missing.
extern "C" __global__ void __launch_bounds__(64)
look_back(int* published, const int* later, int* sums, int before) {
    const int digit = threadIdx.x % DIGITS;
    if (threadIdx.x < DIGITS) sums[digit] = sum_before(published + digit, before);
    else
        for (int at = (before - 1) * DIGITS + digit; at >= 0; at -= DIGITS)
            *(volatile int*)(published + at) = later[at];
}
"""


@pytest.mark.parametrize("block", [1, 16, 17, 70])
def test_a_block_of_the_sort_looks_back_to_the_nearest_known_sum(tmp_path, block):
    digits, own, upto = 32, 0x40000000, -0x80000000
    defines = {"FP16": 0, "INDEX": "int", "BITS": 5, "PASSES": 1, "PADDING": 0}
    source = lookup_cuda.source("sort.cu") + LOOKING_BACK
    kernel = Emulated(source, defines, torch.device("cpu")).kernel("look_back", "PPPi")
    counts = torch.randint(0, 4096, (block, digits), dtype=torch.int32)
    is_sum = torch.rand(block, digits) < 0.03
    is_sum[0] = True
    everything = torch.where(is_sum, counts.cumsum(0).int() + upto, counts + own).int()
    published = torch.where(torch.rand(block, digits) < 0.2, 0, everything).int()
    sums = torch.empty(digits, dtype=torch.int32)
    kernel((1, 1), 2 * digits, published.data_ptr(), everything.data_ptr(), sums.data_ptr(), block)
    assert torch.equal(sums, counts.sum(0).int())


@pytest.mark.parametrize(
    ("rows", "span", "columns", "tables"),
    [
        (3, 32, 384, "both"),
        (60, 4, 32, "both"),
        (3, 8, 64, "values"),
        *(
            pytest.param(rows, span, 48, tables, marks=pytest.mark.slow)
            for rows in (1, 20, 5000)
            for span in (4, 32)
            for tables in ("both", "pre_values")
        ),
    ],
)
def test_segments_equal_the_reference(rows, span, columns, tables):
    T, M, P, V, C = 45, 32, 16, 48, 2
    indices = torch.randint(0, rows + 2, (T, M), dtype=torch.int32)
    indices[4:9] = rows // 2
    indices[20:, :5] = rows // 3
    x, grad = torch.randn(T, P).bfloat16(), torch.randn(T, V).bfloat16()
    d_dots, weights = torch.randn(T, M), torch.randn(T, M, C)
    sorted_rows, order = (t.int() for t in sort_entries(indices, rows))
    local, exists = reference.local_rows(indices, rows)
    got, wanted = ((torch.ones(rows, P), torch.ones(rows, V)) for _ in range(2))
    spans = cuda_gradients.Spans(span, 2, 2, columns)
    cuda_gradients.add_segments_(
        sorted_rows, order, M, (got[0], x, d_dots) if tables != "values" else None,
        (got[1], grad, weights) if tables != "pre_values" else None, V // C, spans=spans,
    )  # fmt: skip
    if tables != "values":
        reference.add_rows_(wanted[0], local, exists, d_dots.unsqueeze(-1), x, P)
    if tables != "pre_values":
        reference.add_rows_(wanted[1], local, exists, weights, grad, V // C)
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


@pytest.mark.parametrize("core_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_from_known_keys_equals_the_selection(core_dtype):
    T, N, K, M = 3, 60, 16, 40
    side = torch.zeros(2, 2, T, 64, dtype=torch.bfloat16)
    side[..., :N] = torch.randn(2, 2, T, N)
    side = side[..., :N]
    cores, permutation = torch.rand(2, 2, 2).to(core_dtype), torch.randperm(N * N).int()
    candidates = retrieval_cuda.coarse_pass(side, torch.rand(2, 2), K)
    indices, scores, keys, kept = retrieval_cuda.exact_pass(side, candidates, cores, M, permutation, 7, N * N + 5)
    again = retrieval_cuda.scores_at(side, keys, cores, permutation, 7, N * N + 5)
    assert all(torch.equal(got, wanted) for got, wanted in zip(again, (indices, scores, kept), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 9, 2, 40, 12), pytest.param((1, 20, 3, 520, 20), marks=pytest.mark.slow)], ids=str
)
def test_the_norm_and_its_backward_equal_the_reference(shape, dtype):
    G, B, A, D, rows_out = shape
    x = torch.randn(G, B, 2 * A, D).to(dtype)[:, :, :A]
    gain, slope = torch.rand(D).to(dtype), torch.randn(G, A, rows_out, D).to(dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    got = norm_cuda.forward(x, gain, 1e-5, rows_out)
    assert relative_error(got, norm_reference.rms_norm_swapped(x, gain, 1e-5, rows_out)) < tolerance
    assert (got[:, :, B:] == 0).all()
    wanted = norm_reference.backward_swapped(x, gain, slope, 1e-5)
    for got, expected in zip(norm_cuda.backward(x, gain, slope, 1e-5), wanted, strict=True):
        assert got.dtype == dtype and relative_error(got, expected) < tolerance
