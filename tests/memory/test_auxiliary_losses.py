"""Balance loss and Tucker penalty: values, gradients, and the scale with which they enter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_ultramem.memory.auxiliary import AuxiliaryLoss, AuxiliaryLossScale, balance_loss, tucker_penalty

H, S, R, T, N, D, K = 2, 2, 2, 9, 5, 3, 2


@pytest.fixture(autouse=True)
def scale_of_one() -> Iterator[None]:
    AuxiliaryLossScale.set(1.0)
    yield
    AuxiliaryLossScale.set(1.0)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((H, S, R, T, D), (H, S, R, N, D), (H, S, R))
    )


def written_out(query: torch.Tensor, key: torch.Tensor, leading: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for h in range(H):
        for s in range(S):
            coarse = sum(leading[h, s, r] * query[h, s, r] @ key[h, s, r].T for r in range(R))
            picked = coarse.topk(K).indices.flatten().tolist()
            f = torch.tensor([picked.count(i) / len(picked) for i in range(N)], dtype=torch.float64)
            total = total + N * (f * coarse.softmax(-1).mean(0)).sum() / H
    return total


def test_balance_loss_equals_its_definition() -> None:
    query, key, leading = inputs()
    loss, counts = balance_loss(query, key, leading, K)
    torch.testing.assert_close(loss, written_out(query, key, leading))
    assert counts.sum(-1).tolist() == [[T * K] * S] * H


def test_balance_loss_gradients() -> None:
    query, key, leading = inputs()
    assert torch.autograd.gradcheck(
        lambda q, k: balance_loss(q, k, leading, K)[0], (query.requires_grad_(), key.requires_grad_())
    )


def test_local_balance_losses_with_the_counts_of_all_tokens_add_up() -> None:
    query, key, leading = inputs()
    whole, counts = balance_loss(query, key, leading, K)
    parts = [balance_loss(q, key, leading, K, counts_HSN=counts)[0] for q in query.split([2, 7], dim=3)]
    torch.testing.assert_close(sum(parts), whole)


def test_even_use_gives_one_per_side() -> None:
    query = torch.zeros(1, 2, 1, N, N)
    query[..., torch.arange(N), torch.arange(N)] = 3.0
    key = torch.eye(N).expand(1, 2, 1, N, N)
    loss, _ = balance_loss(query, key, torch.ones(1, 2, 1), 1)
    assert loss.item() == pytest.approx(2.0)


def test_tucker_penalty_equals_its_definition() -> None:
    cores = torch.tensor([[[[2.0, 0.0], [0.0, 0.3]], [[0.0, 0.0], [0.0, 0.25]]]])  # one head, singular values 2, 0.55
    assert tucker_penalty(cores, 0.15).item() == pytest.approx(0.4**2)
    assert tucker_penalty(cores, 0.6).item() == 0.0
    three = torch.diag(torch.tensor([3.0, 1.15, 0.65])).view(1, 1, 3, 3)
    assert tucker_penalty(three, 0.15).item() == pytest.approx((1.0 + 0.25) / 2)


@pytest.mark.parametrize("R", [2, 3])
def test_tucker_penalty_gradients(R: int) -> None:
    cores = torch.rand(2, 2, R, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: tucker_penalty(c, 0.05), cores.requires_grad_())


def test_tucker_penalty_of_rank_2_equals_that_by_a_singular_value_decomposition() -> None:
    cores = torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cores[3] = torch.diag(torch.tensor([1.0, 1.0]))  # equal singular values
    cores[4, :, 1] = 0.0  # rank one
    lesser = torch.linalg.svdvals(cores.sum(1))[:, 1]
    torch.testing.assert_close(tucker_penalty(cores, 0.15), (lesser - 0.15).clamp_min(0).square().sum())
    (gradient,) = torch.autograd.grad(tucker_penalty(cores.requires_grad_(), 0.15), cores)
    assert torch.isfinite(gradient).all()


def test_the_attached_loss_gets_the_scale_as_its_gradient() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    AuxiliaryLossScale.set(torch.tensor(0.25))
    out = AuxiliaryLoss.apply(2 * x, 3 * y)
    assert torch.equal(out, 2 * x)
    out.sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    assert y.grad.item() == 0.75


@pytest.mark.parametrize("setting", ["balance_loss_coeff", "tucker_penalty_coeff"])
def test_layer_adds_the_loss_in_training_alone(small_model, tokens, setting: str) -> None:
    plain, with_loss = small_model(), small_model(**{setting: 0.5})
    retrieval = with_loss.layers[0].retrieval
    query_HSRTD, key_HSRND = retrieval.normalised(with_loss.layers[0].query_proj(tokens(12)))
    if setting == "balance_loss_coeff":
        loss, _ = balance_loss(query_HSRTD, key_HSRND, retrieval.leading(), retrieval.coarse_k)
        param = "keys"
    else:
        loss, param = tucker_penalty(retrieval.cores, 0.15), "cores"
    (extra,) = torch.autograd.grad(2.0 * 0.5 * loss, getattr(retrieval, param))
    AuxiliaryLossScale.set(2.0)

    gradients = []
    for model in (plain, with_loss):
        out = model(tokens(12))
        out.sum().backward()
        gradients.append(getattr(model.layers[0].retrieval, param).grad)
    torch.testing.assert_close(gradients[1], gradients[0] + extra)
    with_loss.eval().zero_grad()
    with_loss(tokens(12)).sum().backward()
    assert torch.equal(getattr(retrieval, param).grad, gradients[0])
