"""The retrieval's kernels select what their reference selects and give its scores and gradients."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import FAST_BACKENDS, relative_error
from ultramem_kernels import KeptKeys, retrieve, rms_norm_swapped, search
from ultramem_kernels.retrieval import reference

# tokens, keys, key width, ranks, cores, coarse k, m
SHAPES = [
    (1, 17, 8, 1, 1, 5, 1),
    (3, 50, 16, 2, 2, 8, 8),
    (2, 140, 24, 3, 2, 20, 33),
    (4, 64, 16, 2, 2, 32, 32),
    (2, 300, 8, 2, 1, 40, 70),  # beyond the hand-written exact pass
    (0, 20, 8, 2, 2, 4, 4),
    (1, 16, 8, 2, 2, 16, 256),  # every pair
]


def inputs(shape, dtype, device):
    T, N, D, R, C, _, _ = shape
    return (
        torch.randn(2, R, T, D, device=device).to(dtype),
        torch.randn(2, R, N, D, device=device).to(dtype),
        torch.rand(2, R, device=device),
        torch.rand(C, R, R, device=device),
    )


def by_index(indices_TM, scores_TMC):
    """Both in ascending order of the index: the order of a token's pairs is not defined."""
    order = indices_TM.long().sort(1)
    return order.values, scores_TMC.gather(1, order.indices.unsqueeze(-1).expand_as(scores_TMC))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_scores_and_gradients_equal_the_reference(shape, dtype, backend, device):
    k, m, n = shape[5], shape[6], shape[1]
    query, key, leading, cores = inputs(shape, dtype, device)
    permutation = torch.randperm(n * n, device=device).int()
    options = {"coarse_k": k, "top_m": m, "permutation": permutation, "offset": 7, "rows": n * n + 3}
    leaves = [t.clone().requires_grad_() for t in (query, key, cores)]
    wanted_leaves = [t.clone().requires_grad_() for t in (query, key, cores)]
    indices, scores, keys = retrieve(leaves[0], leaves[1], leading, leaves[2], backend=backend, **options)
    wanted = reference.retrieve(wanted_leaves[0], wanted_leaves[1], leading, wanted_leaves[2], **options)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int32 and keys.shape == (2, shape[0], m)
    got_sorted, wanted_sorted = by_index(indices, scores), by_index(wanted[0], wanted[1])
    # A tie (to rounding) may fall to either of two pairs; random fp32 scores have none.
    same = got_sorted[0] == wanted_sorted[0]
    assert same.all() if dtype == torch.float32 else same.float().mean() > 0.97 or same.numel() == 0
    if not same.all():
        return
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(got_sorted[1], wanted_sorted[1]) < tolerance
    slope_at_index = torch.randn(n * n + 3, cores.shape[0], device=device)
    got_grads = torch.autograd.grad(scores, leaves, slope_at_index[indices.long()])
    wanted_grads = torch.autograd.grad(wanted[1], wanted_leaves, slope_at_index[wanted[0].long()])
    for name, got, expected in zip(("query", "key", "cores"), got_grads, wanted_grads, strict=True):
        assert relative_error(got, expected) < tolerance, name


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_known_keys_skip_the_selection_and_give_the_same_result(backend, device):
    query, key, leading, cores = inputs((3, 50, 16, 2, 2, 8, 8), torch.float32, device)
    options = {"coarse_k": 8, "top_m": 8, "backend": backend}
    indices, scores, keys = retrieve(query, key, leading, cores, **options)
    again = retrieve(query, key, leading, cores, known_keys_STM=keys, **options)
    assert torch.equal(indices, again[0]) and relative_error(again[1], scores) < 2e-6 and torch.equal(keys, again[2])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_ties_give_distinct_pairs_and_the_same_ones_every_time(backend, device):
    query, key, leading, cores = inputs((2, 300, 16, 2, 2, 32, 32), torch.float32, device)
    results = [
        retrieve(torch.zeros_like(query), key, leading, cores, coarse_k=32, top_m=32, backend=backend) for _ in range(2)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert all(len(set(row.tolist())) == 32 for row in results[0][0])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("k", [1, 31, 100])
def test_negative_infinite_and_large_scores_keep_their_order(backend, k, device):
    side = torch.randn(2, 1, 2, 100, device=device) * 10.0 ** torch.randint(-30, 30, (2, 1, 2, 100), device=device)
    side[..., 3], side[..., 4], side[..., 5] = float("-inf"), float("inf"), -0.0
    if backend == "cuda":
        from ultramem_kernels.retrieval.cuda import coarse_pass
    else:
        from ultramem_kernels.retrieval.select_triton import coarse_pass
    padded = torch.zeros(2, 1, 2, 128, device=device)
    padded[..., :100] = side
    got = coarse_pass(padded[..., :100], torch.ones(2, 1, device=device), k).long()
    wanted = side[:, 0].topk(k, dim=-1).values.sort(-1).values
    assert torch.equal(side[:, 0].gather(-1, got.transpose(0, 1)).sort(-1).values, wanted)


def test_gradients_pass_gradcheck_in_fp64():
    query, key, leading, cores = inputs((2, 12, 6, 2, 2, 4, 5), torch.float64, torch.device("cpu"))
    keys = retrieve(query, key, leading.double(), cores.double(), coarse_k=4, top_m=5)[2]

    def scores(*tensors):
        options = {"coarse_k": 4, "top_m": 5, "known_keys_STM": keys}
        return retrieve(tensors[0], tensors[1], leading.double(), tensors[2], **options)[1]

    leaves = [t.double().requires_grad_() for t in (query, key, cores)]
    assert torch.autograd.gradcheck(scores, leaves)


def test_one_query_for_all_ranks_may_be_an_expanded_view(device):
    query, key, leading, cores = inputs((3, 40, 16, 2, 2, 8, 8), torch.float32, device)
    shared = query[:, :1]
    got = retrieve(shared.expand(2, 2, 3, 16), key, leading, cores, coarse_k=8, top_m=8, backend="triton")
    wanted = reference.retrieve(shared.repeat(1, 2, 1, 1), key, leading, cores, 8, 8)
    assert torch.equal(by_index(got[0], got[1])[0], by_index(wanted[0], wanted[1])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"coarse_k": 21}, "coarse_k=21"), ({"top_m": 17}, "top_m=17"), ({"permutation": torch.arange(5)}, "5 entries")],
    ids=["k", "m", "permutation"],
)
def test_sizes_that_do_not_fit_are_refused_with_the_number(change, message):
    arguments = inputs((2, 20, 8, 2, 2, 4, 4), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        retrieve(*arguments, **{"coarse_k": 4, "top_m": 4, **change})


def raw(T=5, N=50, D=16, R=2, Q=4, C=2, dtype=torch.float64, device="cpu"):
    """Inputs of `search`: before the norms."""
    return (
        torch.randn(T, Q, D, device=device).to(dtype), torch.randn(2, N, R, D, device=device).to(dtype),
        torch.rand(D, device=device).to(dtype), torch.rand(D, device=device).to(dtype),
        torch.rand(2, R, device=device), torch.rand(C, R, R, device=device).to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("queries", [4, 2], ids=["query_per_rank", "one_query_per_side"])
def test_the_search_equals_norms_and_retrieval_one_by_one(queries, backend, device):
    arguments = raw(Q=queries, dtype=torch.float32, device=device)
    options = {"coarse_k": 8, "top_m": 8, "offset": 3, "rows": 2600}
    leaves, wanted_leaves = ([t.clone().requires_grad_() for t in arguments] for _ in range(2))
    got = search(*leaves, eps=1e-5, backend=backend, **options)
    query, keys, query_gain, key_gain, leading, cores = wanted_leaves
    normed = rms_norm_swapped(query.unsqueeze(0), query_gain, 1e-5, backend=backend).view(2, queries // 2, 5, 16)
    wanted = retrieve(
        normed.expand(2, 2, 5, 16), rms_norm_swapped(keys, key_gain, 1e-5, backend=backend), leading, cores,
        backend=backend, **options,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    slope = torch.randn_like(got[1])
    inputs, wanted_inputs = ([leaf for i, leaf in enumerate(ls) if i != 4] for ls in (leaves, wanted_leaves))
    grads = zip(torch.autograd.grad(got[1], inputs, slope), torch.autograd.grad(wanted[1], wanted_inputs, slope),
                strict=True)  # fmt: skip
    assert all(relative_error(a, b) < 2e-6 for a, b in grads)


def test_kept_keys_are_normalised_once_and_change_nothing(device):
    arguments, options = raw(dtype=torch.float32, device=device), {"eps": 1e-5, "coarse_k": 8, "top_m": 8}
    wanted, kept = search(*arguments, **options), KeptKeys()
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in arguments]
        got = search(*leaves, kept_keys=kept, **options)
        first = kept.keys_SRWD
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert leaves[1].grad is None
        got[1].sum().backward()
        assert leaves[1].grad.abs().sum() > 0
    kept.keys_SRWD = first * 2  # what is kept is what is used
    assert not torch.equal(search(*arguments, kept_keys=kept, **options)[1], wanted[1])


def test_search_gradients_pass_gradcheck_in_fp64():
    arguments = raw()
    keys = search(*arguments, eps=1e-5, coarse_k=6, top_m=6)[2]

    def scores(*tensors):
        options = {"eps": 1e-5, "coarse_k": 6, "top_m": 6, "known_keys_STM": keys}
        return search(*tensors[:4], arguments[4], tensors[4], **options)[1]

    assert torch.autograd.gradcheck(scores, [t.requires_grad_() for i, t in enumerate(arguments) if i != 4])


def test_torch_compile_sees_one_graph_of_a_search():
    leaves = [t.requires_grad_() for t in raw(dtype=torch.float32)]

    def total(*tensors):
        return search(*tensors, eps=1e-5, coarse_k=8, top_m=8)[1].sum()

    inputs = [leaf for i, leaf in enumerate(leaves) if i != 4]
    plain = torch.autograd.grad(total(*leaves), inputs)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(
        relative_error(a, b) < 1e-6 for a, b in zip(torch.autograd.grad(compiled(*leaves), inputs), plain, strict=True)
    )
