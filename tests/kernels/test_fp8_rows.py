"""Rows as E4M3 codes: quantisation, and the lookup in such tables, agree with their references on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import COMPILER, Emulated
from kernel_helpers import FAST_BACKENDS, relative_error
from ultramem_kernels.lookup import cuda, fp8_rows, reference
from ultramem_kernels.lookup.ops import run_lookup_backward, run_lookup_forward

TRITON = [backend for backend in FAST_BACKENDS if "cuda" not in str(backend)]
# tokens, m, rows, Dp, Dv, cores
SHAPES = [(1, 1, 3, 16, 16, 1), (5, 7, 50, 72, 48, 2), (3, 33, 40, 24, 72, 3), (4, 32, 64, 192, 192, 2)]
EMULATED = [
    (9, 7, 50, 64, 96, 3),
    (1, 1, 4, 16, 16, 1),
    pytest.param((19, 33, 40, 192, 192, 2), marks=pytest.mark.slow),
    pytest.param((3, 70, 64, 256, 768, 2), marks=pytest.mark.slow),
]


def quantized(
    table: torch.Tensor, backend: str | None = None, scales: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(table.shape, dtype=torch.uint8, device=table.device)
    scales = torch.empty(len(table), device=table.device) if scales is None else scales
    fp8_rows.quantize_(table, codes, scales, backend=backend, **options)
    return codes, scales


def awkward_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of every size, one of zeros, one of numbers next to zero, one with a single large number."""
    table = torch.randn(rows, width, device=device) * 10.0 ** torch.randint(-12, 12, (rows, 1), device=device)
    table[0], table[-1], table[rows // 2] = 0.0, 1e-38, 1e-3
    table[rows // 2, -1] = 5.0
    return table.to(dtype)


@pytest.mark.parametrize("backend", ["reference", *TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (33, 72), (300, 192), (5, 1024)], ids=str)
def test_rows_keep_four_significant_bits(shape, dtype, backend, device):
    table = awkward_rows(*shape, dtype, device)
    codes, scales = quantized(table, backend)
    read = fp8_rows.decode(codes) * scales[:, None]
    assert read.isfinite().all()
    error, exact = (read.double() - table.double()).abs(), table.double()
    assert (error <= exact.abs() / 16 + scales[:, None].double() / 1000 + 1e-30).all()
    assert (scales[0], scales[-1]) == (0.0, 0.0)
    some = scales > 0
    top = exact[some].abs().amax(1)
    assert ((read[some].double().abs().amax(1) - top).abs() <= 1e-6 * top).all()  # the largest number is exact


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_the_kernel_gives_the_codes_of_the_reference(backend, given, device):
    table = awkward_rows(200, 96, torch.bfloat16, device)
    # Numbers at and between codes: every tie, the largest subnormal, both zeros.
    grid = fp8_rows.decode(torch.arange(127, dtype=torch.uint8, device=device))
    numbers = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, -grid, grid * 1.0001))[:480].view(5, 96)
    numbers[:, 0] = 448.0
    for rows in (table, numbers):
        amax = {"amax_N": fp8_rows.row_amax(rows) * 1.7} if given else {}
        for got, wanted in zip(quantized(rows, backend, **amax), quantized(rows, "reference", **amax), strict=True):
            assert torch.equal(got, wanted)


def test_shards_of_columns_have_the_codes_of_the_whole_rows(device):
    table = awkward_rows(40, 96, torch.bfloat16, device)
    codes, scales = quantized(table)
    shards = [table[:, low : low + 48].contiguous() for low in (0, 48)]
    amax = torch.stack([fp8_rows.row_amax(shard) for shard in shards]).amax(0)
    parts = [quantized(shard, amax_N=amax) for shard in shards]
    assert torch.equal(torch.cat([part[0] for part in parts], dim=1), codes)
    assert all(torch.equal(part[1], scales) for part in parts)


def test_codes_of_bf16_parameters_are_as_good_as_those_of_fp32_masters(device):
    """bf16 has 8 significant bits, E4M3 has 4: what rounding twice adds is lost in what rounding once takes."""
    master = torch.randn(2000, 192, device=device) * 0.02

    def error(table: torch.Tensor) -> float:
        codes, scales = quantized(table)
        return relative_error(fp8_rows.decode(codes) * scales[:, None], master)

    assert error(master.bfloat16()) < 1.005 * error(master)


def inputs(shape, device, paired=True):
    """paired: the scales of both tables lie side by side."""
    T, M, N, P, V, C = shape
    scales = torch.empty(N, 2, device=device).unbind(1) if paired else (None, None)
    indices = torch.randint(-3, N + 3, (T, M), dtype=torch.int32, device=device)  # some outside the shard
    weights, x = torch.randn(T, M, C, device=device), torch.randn(T, P, device=device).bfloat16()
    values, pre_values = awkward_table(N, V, device, scales[1]), awkward_table(N, P, device, scales[0])
    return indices, weights, x, values, pre_values


def awkward_table(
    rows: int, width: int, device: torch.device, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.randn(rows, width, device=device) * torch.rand(rows, 1, device=device)
    table[0] = 0.0
    return quantized(table.bfloat16(), scales=scales)


def dequantized(table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return fp8_rows.decode(table[0]).double() * table[1].double()[:, None]


MODES = ["both", "both_apart", "dots", "sum"]  # apart: the two tables' scales do not lie side by side


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_a_lookup_in_codes_is_that_of_the_numbers_they_stand_for(shape, backend, mode, deterministic, device):
    if backend == "cuda" and any(width % 16 for width in (shape[3], shape[4], shape[4] // shape[5])):
        pytest.skip("the CUDA kernels read 16 columns of a core at a time")
    indices, weights, x, values, pre_values = inputs(shape, device, mode != "both_apart")
    T, M, N, P, V, C = shape
    mode = mode.removesuffix("_apart")
    grad = torch.randn((T, M) if mode == "dots" else (T, V), device=device).bfloat16()
    v, p = (None if mode == "dots" else values), (None if mode == "sum" else pre_values)
    w, x = (None if mode == "dots" else weights), (None if mode == "sum" else x)
    options = ("gelu" if mode == "both" else "none", V // C, 0, 0, 2)
    scales = (None if v is None else v[1], None if p is None else p[1], torch.bfloat16)
    exact = [None if t is None else t.double().requires_grad_() for t in (w, x)]
    exact += [None if t is None else dequantized(t).requires_grad_() for t in (v, p)]
    if mode == "both":
        wanted = reference.lookup(indices, *exact, "gelu", 0, 2)
    elif mode == "dots":
        wanted = reference.pre_value_dot(indices, exact[1], exact[3], 0, 2)
    else:
        wanted = reference.weighted_sum(indices, exact[0], exact[2], V // C, 0, 0, 2)
    tables = (None if v is None else v[0], None if p is None else p[0])
    got = run_lookup_forward(indices, w, x, *tables, *options, backend, *scales)
    assert got.dtype == (torch.float32 if mode == "dots" else torch.bfloat16)
    assert relative_error(got, wanted) < 5e-3
    buffers = [None if t is None else torch.zeros(t.shape, device=device) for t in tables]
    d_input, d_weights = run_lookup_backward(
        indices, w, x, *tables, grad, *buffers, *options, deterministic, backend, *scales
    )
    leaves = [t for t in exact if t is not None]
    expected = iter(torch.autograd.grad(wanted, leaves, grad.double()))
    for leaf, found in zip(exact, (d_weights, d_input, *buffers), strict=True):
        if leaf is not None:
            assert relative_error(found, next(expected)) < 5e-3


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", EMULATED, ids=str)
def test_the_cuda_source_reads_codes(shape, mode, monkeypatch, tmp_path):
    monkeypatch.setattr(Emulated, "folder", tmp_path, raising=False)
    monkeypatch.setattr(cuda, "make_module", lambda name, device, defines: Emulated(cuda.source(name), defines, device))
    monkeypatch.setattr(cuda, "_plans", {})
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1)
    indices, weights, x, values, pre_values = inputs(shape, torch.device("cpu"), mode != "both_apart")
    T, M, N, P, V, C = shape
    mode = mode.removesuffix("_apart")
    grad_out, grad_dots = torch.randn(T, V).bfloat16(), None
    if mode == "dots":
        values, weights, grad_out, grad_dots = (None, None), None, None, torch.randn(T, M)
    if mode == "sum":
        pre_values, x = (None, None), None
    options = {
        "activation": "gelu" if mode == "both" else "none", "core_width": V // C, "column_start": 0, "row_start": 0,
        "padding_index": 2, "value_scales_N": values[1], "pre_value_scales_N": pre_values[1],
    }  # fmt: skip
    place = (options["activation"], V // C, 0, 0, 2, "reference", values[1], pre_values[1], torch.bfloat16)
    wanted = run_lookup_forward(indices, weights, x, values[0], pre_values[0], *place)
    blocks = {"dtype": torch.bfloat16, "blocks": cuda.Blocks(2, 3, 2)}
    got = cuda.forward(indices, weights, x, values[0], pre_values[0], **options, **blocks)
    assert got.dtype == wanted.dtype and relative_error(got, wanted) < 1e-3
    grad = grad_out if grad_out is not None else grad_dots
    expected = reference.backward_by_token(indices, weights, x, values[0], pre_values[0], grad, **options)
    for atomic in (False, True):
        buffers = [None if t[0] is None else torch.zeros(t[0].shape) for t in (values, pre_values)]
        results = cuda.backward_by_token(
            indices, weights, x, values[0], pre_values[0], grad_out, grad_dots, atomic=atomic,
            grad_values_NV=buffers[0], grad_pre_values_NP=buffers[1], **options, **blocks,
        )  # fmt: skip
        for got, wanted in zip(results[:2], expected[:2], strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or relative_error(got, wanted) < 2e-3
        if atomic:
            assert all(buffer is None or (buffer.isfinite().all() and buffer.any()) for buffer in buffers)
