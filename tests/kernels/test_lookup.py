"""The lookup's kernels agree with their reference, forward and backward, on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import FAST_BACKENDS, relative_error
from ultramem_kernels import lookup, pre_value_dot, weighted_sum
from ultramem_kernels.lookup import reference
from ultramem_kernels.lookup.ops import lookup_backward, run_lookup_backward, sort_for_backwards

# tokens, m, rows, Dp, Dv, cores
SHAPES = [
    (1, 1, 3, 16, 16, 1),
    (5, 7, 50, 72, 48, 2),
    (3, 33, 40, 24, 72, 3),
    (4, 32, 64, 192, 192, 2),
    (0, 4, 10, 16, 32, 2),
    (20, 16, 1, 16, 16, 1),  # all entries on one row: many hot tiles
    (24, 9, 4, 8, 16, 2),  # a few rows, each over several tiles
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# In the interpreter both 16-bit types take the same way.
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    """In the interpreter the deterministic backward gets small tiles, so that small inputs cross many of them."""
    if device.type == "cpu":
        from ultramem_kernels.lookup import segments_triton

        monkeypatch.setattr(segments_triton, "TILE", 4)
        monkeypatch.setattr(segments_triton, "FAN", 4)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, index_dtype: torch.dtype = torch.int32):
    T, M, N, P, V, C = shape
    return (
        torch.randint(0, N, (T, M), dtype=index_dtype, device=device),
        torch.randn(T, M, C, device=device),
        torch.randn(T, P, device=device).to(dtype),
        torch.randn(N, V, device=device).to(dtype),
        torch.randn(N, P, device=device).to(dtype),
    )


def exact(indices: torch.Tensor, scores, x, values, pre_values, grad, **options):
    """Output and gradients of the reference in fp64."""
    leaves = [t.double().requires_grad_() for t in (scores, x, values, pre_values)]
    out = reference.lookup(indices, *leaves, **options)
    return out, torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_output_and_gradients_equal_the_reference(shape, dtype, backend, deterministic, device):
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels read 16-bit tables")
    indices, *floats = inputs(shape, dtype, device)
    leaves = [t.clone().requires_grad_() for t in floats]
    grad = torch.randn(shape[0], shape[4], device=device).to(dtype)
    wanted, wanted_grads = exact(indices, *floats, grad, activation="gelu")
    got = lookup(indices, *leaves, activation="gelu", deterministic=deterministic, backend=backend)
    assert got.dtype == dtype and got.shape == (shape[0], shape[4])
    assert relative_error(got, wanted) < TOLERANCE[dtype]
    for name, gradient, wanted_grad in zip(
        ("scores", "pre_input", "values", "pre_values"),
        torch.autograd.grad(got, leaves, grad),
        wanted_grads,
        strict=True,
    ):
        assert relative_error(gradient, wanted_grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_table_gradients_are_added_to_main_grad_and_nowhere_else(backend, device):
    indices, scores, x, values, pre_values = inputs((6, 8, 20, 16, 32, 2), torch.bfloat16, device)
    values, pre_values = torch.nn.Parameter(values), torch.nn.Parameter(pre_values)
    values.main_grad = torch.full(values.shape, 0.5, device=device)
    pre_values.main_grad = torch.full(pre_values.shape, -0.5, device=device)
    grad = torch.randn(6, 32, device=device).bfloat16()
    _, wanted = exact(indices, scores, x, values.detach(), pre_values.detach(), grad)
    lookup(indices, scores, x, values, pre_values, deterministic=True, backend=backend).backward(grad)
    assert values.grad is None and pre_values.grad is None
    assert relative_error(values.main_grad - 0.5, wanted[2]) < 1e-5
    assert relative_error(pre_values.main_grad + 0.5, wanted[3]) < 1e-5


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("padding", [None, 3])
def test_backwards_over_the_same_rows_can_share_their_sort(backend, padding, device):
    indices, weights, x, values, pre_values = inputs((24, 9, 14, 16, 32, 2), torch.bfloat16, device)
    grad_out, grad_dots = torch.randn(24, 32, device=device).bfloat16(), torch.randn(24, 9, device=device)
    place = (16, 0)  # core width, first column
    how = {"deterministic": True, "backend": backend}
    entries = sort_for_backwards(indices, weights, values, *place, padding_index=padding, **how)
    assert entries is not None

    def gradients(**shared):
        buffers = [torch.zeros(table.shape, device=device) for table in (values, pre_values)]
        options = {"activation": "none", "core_width": 16, "column_start": 0, "row_start": 0, "padding_index": padding}
        of_sum = run_lookup_backward(
            indices, weights, None, values, None, grad_out, buffers[0], None, **options, **how, **shared
        )
        of_dots = run_lookup_backward(
            indices, None, x, None, pre_values, grad_dots, None, buffers[1], **options, **how, **shared
        )
        return [*of_sum, *of_dots, *buffers]

    alone = gradients()
    shared = gradients(sorted_rows=entries[0], sorted_order=entries[1])
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    wrong = gradients(sorted_rows=entries[0], sorted_order=entries[1].flip(0))
    assert not torch.equal(alone[-1], wrong[-1])  # it was used


def test_what_runs_by_atomics_or_by_the_reference_sorts_nothing(device):
    indices, weights, _, values, _ = inputs((24, 9, 14, 16, 32, 2), torch.bfloat16, device)
    for how in ({"backend": "reference", "deterministic": True}, {"backend": "triton", "deterministic": False}):
        assert sort_for_backwards(indices, weights, values, 16, 0, padding_index=None, **how) is None


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_shards_of_rows_add_up_and_padding_contributes_nothing(backend, device):
    indices, scores, x, values, pre_values = inputs((5, 6, 24, 16, 32, 2), torch.float16, device)
    indices[:, 0] = 7
    grad = torch.randn(5, 32, device=device).half()
    kept = (indices != 7).unsqueeze(-1)
    wanted, wanted_grads = exact(indices, scores * kept, x, values, pre_values, grad)
    total, grads = 0, [0, 0, [], []]
    for low, high in ((0, 10), (10, 24)):
        leaves = [t.clone().requires_grad_() for t in (scores, x, values[low:high], pre_values[low:high])]
        out = lookup(indices, *leaves, row_start=low, padding_index=7, deterministic=True, backend=backend)
        total = total + out.float()
        part = torch.autograd.grad(out, leaves, grad)
        grads[0], grads[1] = grads[0] + part[0], grads[1] + part[1].float()
        grads[2].append(part[2])
        grads[3].append(part[3])
    assert relative_error(total, wanted) < 2e-3
    assert relative_error(grads[0], wanted_grads[0] * kept) < 2e-3
    assert (grads[0][:, 0] == 0).all()
    assert relative_error(grads[1], wanted_grads[1]) < 2e-3
    assert relative_error(torch.cat(grads[2]), wanted_grads[2]) < 2e-3
    assert relative_error(torch.cat(grads[3]), wanted_grads[3]) < 2e-3


@pytest.mark.parametrize(
    "backend", ["reference", "triton", pytest.param("triton", marks=pytest.mark.gpu, id="triton_compiled")]
)
def test_shards_of_columns_give_the_whole_lookup_in_two_modes(backend, device):
    T, M, N, P, V, C, shards = 5, 6, 24, 32, 48, 2, 4
    indices, scores, x, values, pre_values = inputs((T, M, N, P, V, C), torch.float32, device)
    grad = torch.randn(T, V, device=device)
    wanted, wanted_grads = exact(indices, scores, x, values, pre_values, grad)
    leaves = [t.clone().requires_grad_() for t in (scores, x, values, pre_values)]
    dots, outs = 0, []
    for s in range(shards):  # what each rank computes, then what is added up and put side by side
        part = slice(s * P // shards, (s + 1) * P // shards)
        shard = leaves[3][:, part].contiguous()
        dots = dots + pre_value_dot(indices, leaves[1][:, part], shard, backend=backend, deterministic=True)
    for s in range(shards):
        start = s * V // shards
        shard = leaves[2][:, start : start + V // shards].contiguous()
        weights = dots.unsqueeze(-1) * leaves[0]
        outs.append(weighted_sum(indices, weights, shard, core_width=V // C, column_start=start, backend=backend))
    out = torch.cat(outs, dim=1)
    assert relative_error(out, wanted) < 2e-6
    for gradient, wanted_grad in zip(torch.autograd.grad(out, leaves, grad), wanted_grads, strict=True):
        assert relative_error(gradient, wanted_grad) < 2e-6


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 2000], ids=lambda rows: f"{rows}rows")
def test_deterministic_gradients_are_bitwise_equal_and_right_for_hot_rows(backend, rows, device):
    T, M, P, V, C = (160, 32, 16, 16, 2) if device.type == "cuda" else (12, 12, 16, 16, 2)  # several levels of merging
    indices, scores, x, values, pre_values = inputs((T, M, rows, P, V, C), torch.bfloat16, device)
    indices[T // 4 : T // 2] = indices[0, 0]
    grad = torch.randn(T, V, device=device).bfloat16()
    _, wanted = exact(indices, scores, x, values, pre_values, grad)
    results = []
    for _ in range(2):
        buffers = [torch.zeros(t.shape, device=device) for t in (values, pre_values)]
        lookup_backward(
            indices, scores, x, values, pre_values, grad, *buffers, "none", V // C, 0, 0, None, True, backend
        )
        results.append(buffers)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert relative_error(results[0][0], wanted[2]) < 1e-5
    assert relative_error(results[0][1], wanted[3]) < 1e-5


@pytest.mark.parametrize("segments", [[9, 1, 5], [4, 4, 5], [3, 2, 12, 1], [75, 3], [65, 1, 30], [32, 32, 33]], ids=str)
def test_segments_of_every_position_relative_to_tiles_are_summed_once(segments, device):
    from ultramem_kernels.lookup.segments_triton import add_segments_
    from ultramem_kernels.lookup.table_gradients import sort_entries

    rows = torch.cat([torch.full((length,), row) for row, length in enumerate(segments)]).to(device).int()
    weights, x = torch.randn(len(rows), 1, 1, device=device), torch.randn(len(rows), 16, device=device)
    grad = torch.zeros(len(segments), 16, device=device)
    add_segments_(grad, *sort_entries(rows.view(-1, 1), len(segments)), weights, x, 16)
    wanted = torch.stack([part.sum(0) for part in (weights[:, 0] * x).double().split(segments)])
    assert relative_error(grad, wanted) < 2e-6


def test_rows_beyond_2_to_the_31_elements_are_addressed(device):
    """Row numbers times the width exceed 32 bits: the shard starts so far in that its indices need 64 bits."""
    start = 2**31 - 3
    indices, scores, x, values, pre_values = inputs((4, 5, 8, 16, 16, 1), torch.float32, device, torch.int64)
    wanted = reference.lookup(indices, scores, x, values, pre_values)
    got = lookup(indices + start, scores, x, values, pre_values, row_start=start, backend="triton")
    assert relative_error(got, wanted) < 2e-6


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_table_of_more_than_2_to_the_31_elements_is_read_and_written_at_its_end(backend):
    N, D = 2**31 // 16 + 64, 16
    table = torch.zeros(N, D, dtype=torch.bfloat16, device="cuda")
    table[-4:] = torch.randn(4, D, device="cuda")
    indices = torch.arange(N - 4, N, device="cuda").view(1, 4)
    scores, x = torch.randn(1, 4, 1, device="cuda"), torch.randn(1, D, device="cuda").bfloat16()
    wanted = reference.lookup(indices - (N - 4), scores, x, table[-4:], table[-4:])
    assert relative_error(lookup(indices, scores, x, table, table, backend=backend), wanted) < 5e-3
    buffer = torch.zeros(N, D, device="cuda")
    grad = torch.randn(1, D, device="cuda").bfloat16()
    lookup_backward(indices, scores, x, table, table, grad, buffer, None, "none", D, 0, 0, None, True, backend)
    assert (buffer[-4:].abs().sum(1) > 0).all() and (buffer[:-4] == 0).all()


def test_gradients_pass_gradcheck_in_fp64():
    indices, *floats = inputs((3, 4, 10, 8, 8, 2), torch.float64, torch.device("cpu"))
    leaves = [t.double().requires_grad_() for t in floats]
    assert torch.autograd.gradcheck(lambda *t: lookup(indices, *t, activation="gelu"), leaves)


@pytest.mark.parametrize(
    "backend", ["reference", "triton", pytest.param("triton", marks=pytest.mark.gpu, id="triton_compiled")]
)
def test_activation_recompute_gives_the_same_gradients(backend, device):
    indices, *floats = inputs((4, 5, 12, 16, 16, 1), torch.float32, device)
    results = []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in floats]

        def run(*tensors):
            return lookup(indices, *tensors, deterministic=True, backend=backend)

        out = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False) if recompute else run(*leaves)
        results.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_compile_sees_one_graph_without_breaks():
    indices, *floats = inputs((4, 5, 12, 16, 16, 1), torch.float32, torch.device("cpu"))
    leaves = [t.requires_grad_() for t in floats]
    compiled = torch.compile(lambda *t: lookup(indices, *t).sum(), fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(lookup(indices, *leaves).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(change, message):
    arguments = inputs((2, 3, 8, 16, 16, 1), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        lookup(*arguments, **change)


def test_shapes_that_do_not_fit_are_refused():
    indices, scores, x, values, pre_values = inputs((2, 3, 8, 16, 16, 1), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="do not fit"):
        lookup(indices, scores, x[:, :8], values, pre_values)
    with pytest.raises(ValueError, match="rows"):
        lookup(indices, scores, x, values[:4], pre_values)
