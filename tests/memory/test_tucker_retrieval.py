"""TDQKR against brute force and against a literal, slow implementation of its two passes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_ultramem.memory import numerics, retrieval
from megatron_ultramem.memory.init import fill_
from megatron_ultramem.memory.retrieval import TuckerRetrieval, refresh_all, side_scores_at

SHAPES = [
    # keys per side, key width, rank, cores, heads, m, k, query per rank
    pytest.param(7, 4, 2, 2, 1, 5, 7, True, id="plain"),
    pytest.param(6, 8, 2, 2, 2, 4, 6, True, id="two-heads"),
    pytest.param(6, 8, 2, 2, 1, 4, 6, False, id="one-query-per-side"),
    pytest.param(5, 4, 3, 1, 2, 25, 5, False, id="rank-3-everything-selected"),
    pytest.param(9, 4, 1, 3, 1, 6, 9, True, id="rank-1-three-cores"),
]


def make(
    n: int, key_dim: int, rank: int, cores: int, heads: int, m: int, k: int, query_per_rank: bool
) -> TuckerRetrieval:
    made = TuckerRetrieval(
        keys_per_side=n,
        key_dim=key_dim,
        top_m=m,
        coarse_k=k,
        num_heads=heads,
        tucker_rank=rank,
        num_cores=cores,
        query_per_rank=query_per_rank,
        gain=0.7,
        dtype=torch.float64,
    )
    for name, param in made.named_parameters():
        fill_(param, param.initializer, 11, name)
    with torch.no_grad():
        made.query_gain *= 1 + 0.1 * torch.arange(key_dim)
        made.key_gain *= 1 - 0.05 * torch.arange(key_dim)
    made.refresh()
    return made


def queries(made: TuckerRetrieval, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(tokens, made.query_width, generator=generator, dtype=torch.float64)


def normalise(vector: list[float], gain: list[float], eps: float) -> list[float]:
    rms = math.sqrt(sum(v * v for v in vector) / len(vector) + eps)
    return [v / rms * g for v, g in zip(vector, gain, strict=True)]


def literal_scores(made: TuckerRetrieval, query: list[float], head: int) -> list[list[list[float]]]:
    """S[side][i][a] of one token, in scalar arithmetic."""
    d, ranks = made.key_dim, made.query_ranks
    per_head = 2 * ranks * d
    result = []
    for side in range(2):
        rows = []
        for i in range(made.keys_per_side):
            row = []
            for a in range(made.tucker_rank):
                start = head * per_head + (side * ranks + (a if ranks > 1 else 0)) * d
                q = normalise(query[start : start + d], made.query_gain.tolist(), made.norm_eps)
                key = normalise(made.keys[head, side, i, a].tolist(), made.key_gain.tolist(), made.norm_eps)
                row.append(sum(x * y for x, y in zip(q, key, strict=True)))
            rows.append(row)
        result.append(rows)
    return result


def literal_core(row: list[float], core: list[list[float]], column: list[float]) -> float:
    return sum(row[a] * core[a][b] * column[b] for a in range(len(row)) for b in range(len(row)))


def literal_retrieval(made: TuckerRetrieval, query: list[float], head: int, k: int) -> list[tuple[int, list[float]]]:
    """(grid index, score of every core) of one token's best m pairs, by two literal passes with k candidates."""
    side = literal_scores(made, query, head)
    cores = made.cores[head].tolist()
    leading = [made.u[head].tolist(), made.t[head].tolist()]
    candidates = []
    for s in range(2):
        coarse = [sum(x * w for x, w in zip(row, leading[s], strict=True)) for row in side[s]]
        candidates.append(sorted(range(len(coarse)), key=lambda i, c=coarse: -c[i])[:k])
    pairs = []
    for i in candidates[0]:
        for j in candidates[1]:
            scores = [literal_core(side[0][i], core, side[1][j]) for core in cores]
            pairs.append((i * made.keys_per_side + j, scores))
    return sorted(pairs, key=lambda pair: -sum(pair[1]))[: made.top_m]


def assert_same_selection(made: TuckerRetrieval, k: int) -> None:
    query_TQ = queries(made, 6)
    indices_TM, scores_TMC = made(query_TQ)
    m, heads = made.top_m, made.num_heads
    assert indices_TM.shape == (6, heads * m) and indices_TM.dtype == torch.int64
    assert scores_TMC.shape == (6, heads * m, made.cores.shape[1])
    for token in range(6):
        for head in range(heads):
            expected = literal_retrieval(made, query_TQ[token].tolist(), head, k)
            part = slice(head * m, (head + 1) * m)
            assert indices_TM[token, part].tolist() == [index for index, _ in expected]
            torch.testing.assert_close(
                scores_TMC[token, part], torch.tensor([s for _, s in expected], dtype=torch.float64)
            )


@pytest.mark.parametrize("shape", [param.values for param in SHAPES], ids=[param.id for param in SHAPES])
def test_equals_brute_force_over_all_pairs_when_the_coarse_pass_keeps_all_keys(shape: tuple) -> None:
    made = make(*shape)
    query_TQ = queries(made, 20)
    query_HSRTD, key_HSRND = made.normalised(query_TQ)
    row_HTNR, column_HTNR = torch.einsum("hsrtd,hsrnd->shtnr", query_HSRTD, key_HSRND).unbind(0)
    every_HTCNN = torch.einsum("htia,hcab,htjb->htcij", row_HTNR, made.cores, column_HTNR)
    best = every_HTCNN.sum(2).flatten(2).topk(made.top_m)
    expected_TMC = every_HTCNN.flatten(3).gather(3, best.indices.unsqueeze(2).expand(-1, -1, shape[3], -1))
    indices_TM, scores_TMC = made(query_TQ)
    assert torch.equal(indices_TM, best.indices.transpose(0, 1).flatten(1))
    torch.testing.assert_close(scores_TMC, expected_TMC.permute(1, 0, 3, 2).flatten(1, 2))


@pytest.mark.parametrize("shape", [param.values for param in SHAPES], ids=[param.id for param in SHAPES])
def test_equals_a_literal_implementation_of_both_passes(shape: tuple) -> None:
    assert_same_selection(make(*shape), k=shape[6])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_equals_the_literal_implementation_with_a_cap_that_binds(k: int) -> None:
    made = make(12, 4, 2, 2, 2, 4, k, True)
    assert_same_selection(made, k)
    full = make(12, 4, 2, 2, 2, 4, 12, True)
    assert not torch.equal(made(queries(made, 6))[0], full(queries(made, 6))[0])  # the cap does bind


def test_chunks_of_tokens_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(12, 4, 2, 2, 2, 4, 4, True)
    query_TQ = queries(made, 11).requires_grad_()
    expected_indices, expected_scores = made(query_TQ)
    expected = torch.autograd.grad(expected_scores.square().sum(), [query_TQ, made.keys])
    monkeypatch.setattr(retrieval, "tokens_per_chunk", lambda elements, is_cuda: 3)
    indices, scores = made(query_TQ)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(torch.autograd.grad(scores.square().sum(), [query_TQ, made.keys]), expected)


@pytest.mark.parametrize("known", [True, False], ids=["values-at-hand", "values-computed-again"])
@pytest.mark.parametrize("query_per_rank", [True, False])
def test_gradients_of_scores(query_per_rank: bool, known: bool) -> None:
    made = make(5, 3, 2, 2, 2, 4, 5, query_per_rank)
    query_TQ = queries(made, 3)
    keys_HSTM, known_HSRTM = made.select(*(x.detach() for x in made.normalised(query_TQ)))

    def scores(query_TQ: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        given = dict(zip(("keys", "cores", "query_gain", "key_gain"), params, strict=True))
        return torch.func.functional_call(Scorer(made, keys_HSTM), {f"made.{k}": v for k, v in given.items()}, query_TQ)

    class Scorer(torch.nn.Module):
        def __init__(self, made: TuckerRetrieval, keys_HSTM: torch.Tensor) -> None:
            super().__init__()
            self.made, self.keys_HSTM = made, keys_HSTM

        def forward(self, query_TQ: torch.Tensor) -> torch.Tensor:
            if known:  # the whole forward: the selection is stable under the small steps of gradcheck
                return self.made(query_TQ)[1]
            return self.made.score_at(*self.made.normalised(query_TQ), self.keys_HSTM)

    params = [p.detach().clone().requires_grad_() for p in (made.keys, made.cores, made.query_gain, made.key_gain)]
    assert torch.autograd.gradcheck(scores, (query_TQ.requires_grad_(), *params))


def test_values_at_hand_equal_values_computed_again_bitwise() -> None:
    made = make(12, 4, 2, 2, 2, 4, 3, True).float()
    query_HSRTD, key_HSRND = made.normalised(queries(made, 9).float())
    keys_HSTM, known_HSRTM = made.select(query_HSRTD, key_HSRND)
    assert torch.equal(side_scores_at(query_HSRTD, key_HSRND, keys_HSTM), known_HSRTM)


def test_selection_keeps_no_gradient_and_no_full_score_matrix() -> None:
    made = make(40, 4, 2, 2, 1, 4, 4, True)
    saved: list[torch.Tensor] = []
    query_TQ = queries(made, 50).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(query_TQ)
    assert saved
    assert max(tensor.numel() for tensor in saved) < 50 * 40 * 2  # tokens x keys x ranks: one side alone


def test_leading_vectors_are_those_of_the_summed_cores() -> None:
    made = make(6, 4, 2, 2, 2, 4, 6, True)
    left, values, right = torch.linalg.svd(made.cores.detach().sum(1))
    for head in range(2):
        product = made.u[head].double() @ made.summed_cores()[head] @ made.t[head].double()
        assert product.item() == pytest.approx(values[head, 0].item())
        assert abs((made.u[head].double() @ left[head, :, 0]).item()) == pytest.approx(1.0)


def test_the_sign_never_flips_between_refreshes() -> None:
    made = make(6, 4, 2, 2, 1, 4, 6, True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        before = made.leading().clone()
        with torch.no_grad():
            made.cores += 0.05 * torch.randn(made.cores.shape, generator=generator)
        made.refresh()
        assert (before * made.leading()).sum() > 0


def test_a_negative_sign_is_kept() -> None:
    made = make(6, 4, 2, 2, 1, 4, 6, True)
    flipped = -made.leading().clone()
    made.u.neg_(), made.t.neg_()
    made.refresh()
    torch.testing.assert_close(made.leading(), flipped)


def test_refreshing_together_equals_refreshing_one_by_one() -> None:
    layers = [make(6, 4, 2, 2, 2, 4, 6, True) for _ in range(3)]
    with torch.no_grad():
        for step, layer in enumerate(layers):
            layer.cores.mul_(1 + step).add_(torch.eye(2, dtype=torch.float64) * step)
    alone = copy.deepcopy(layers)
    for layer in alone:
        layer.refresh()
    refresh_all(layers)
    assert all(torch.equal(a.leading(), b.leading()) for a, b in zip(layers, alone, strict=True))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_u_and_t_stay_unrounded_fp32_when_the_module_is_cast(cast: torch.dtype) -> None:
    made = make(6, 4, 2, 2, 1, 4, 6, True)
    before = made.leading().clone()
    made.to(cast)
    assert made.u.dtype == made.t.dtype == torch.float32
    assert torch.equal(made.leading(), before)
    assert made.keys.dtype == cast
    assert {"u", "t"} <= set(made.state_dict())


def test_scores_of_bf16_parameters_are_accumulated_in_fp32() -> None:
    made = make(6, 64, 2, 2, 1, 4, 6, True).bfloat16()
    indices, scores = made(queries(made, 5).bfloat16())
    exact = copy.deepcopy(made).double()
    query_HSRTD, key_HSRND = made.normalised(queries(made, 5).bfloat16())
    keys_HSTM, _ = made.select(query_HSRTD, key_HSRND)
    reference = exact.score_at(query_HSRTD.double(), key_HSRND.double(), keys_HSTM)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), reference, rtol=1e-5, atol=1e-5)


def test_no_tokens_are_no_special_case() -> None:
    made = make(6, 4, 2, 2, 2, 4, 6, True)
    indices, scores = made(queries(made, 0).requires_grad_())
    assert indices.shape == (0, 8) and scores.shape == (0, 8, 2)
    scores.sum().backward()
    assert torch.count_nonzero(made.keys.grad) == 0


def test_chunk_budget_never_stops_at_zero_tokens() -> None:
    assert numerics.tokens_per_chunk(1 << 40, False) == 1
