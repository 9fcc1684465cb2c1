"""A layer computed by the kernels equals the one in plain PyTorch: outputs, gradients, tables' main_grad.

On the CPU the kernels compute by their own references, so that this holds the two implementations against each other;
with `-m gpu` it is the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SHARED = {"sharing": "block", "share_size": 2}
CASES = {
    "plain": {},
    "two_heads": {"num_heads": 2},
    "one_query_per_side": {"query_per_rank": False},
    "cap_and_gelu": {"coarse_top_k": 3, "top_m": 8, "activation": "gelu"},
    "recompute": {"recompute": True},
    "no_shuffle_three_cores": {"shuffle": False, "num_cores": 3},
}


def run(model: Any, x: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    model = model.to(device)
    model.attach_main_grads()
    x = x.to(device).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    found = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    found |= {f"{name}.main_grad": param.main_grad for name, param in model.table.named_parameters()}
    return {name: tensor.detach().cpu() for name, tensor in (found | {"out": out, "x": x.grad}).items()}


def compare(small_model: Callable[..., Any], x: torch.Tensor, settings: dict[str, Any], device: str) -> None:
    expected = run(small_model(2, kernels="reference", **SHARED, **settings), x, device)
    actual = run(small_model(2, kernels="fused", **SHARED, **settings), x, device)
    assert actual.keys() == expected.keys() and "table.values.main_grad" not in actual.keys() - expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            actual[name], wanted, rtol=1e-4, atol=2e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_kernels_references_equal_the_layer(
    small_model: Callable[..., Any], tokens: Callable[..., torch.Tensor], settings: dict[str, Any]
) -> None:
    compare(small_model, tokens(3, 7), settings, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_kernels_equal_the_layer(
    small_model: Callable[..., Any], tokens: Callable[..., torch.Tensor], settings: dict[str, Any]
) -> None:
    compare(small_model, tokens(3, 7), settings, "cuda")


@pytest.mark.parametrize("settings", [CASES["plain"], CASES["two_heads"]], ids=["plain", "two_heads"])
def test_recomputation_takes_over_the_kernels_selection(
    small_model: Callable[..., Any], tokens: Callable[..., torch.Tensor], settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from megatron_ultramem.memory import fused

    known = []
    original = fused.search

    def spy(*args: Any, **kwargs: Any) -> Any:
        known.append(kwargs["known_keys_STM"] is not None)
        return original(*args, **kwargs)

    monkeypatch.setattr(fused, "search", spy)
    model = small_model(1, kernels="fused", recompute=True, **settings)
    model(tokens(5)).sum().backward()
    heads = settings.get("num_heads", 1)
    assert known == [False] * heads + [True] * heads


def test_keys_are_normalised_once_in_a_step_and_anew_in_the_next(
    small_model: Callable[..., Any], tokens: Callable[..., torch.Tensor]
) -> None:
    model = small_model(1, kernels="fused")
    layer, x = next(m for m in model.modules() if hasattr(m, "retrieval")), tokens(5)
    layer.begin_step()
    before = model(x)
    (kept,) = layer.retrieval._kept_keys
    first = kept.keys_SRWD
    assert torch.equal(model(x), before) and kept.keys_SRWD is first
    layer.end_step()
    with torch.no_grad():
        layer.retrieval.keys.mul_(torch.randn_like(layer.retrieval.keys))
    after = model(x)
    assert not torch.equal(after, before)
    layer.begin_step()
    assert torch.equal(model(x), after)


def test_the_leading_vectors_that_kernels_read_are_the_buffers(small_model: Callable[..., Any]) -> None:
    model = small_model(1, kernels="fused", num_heads=2).to(torch.bfloat16)
    retrieval = next(m for m in model.modules() if hasattr(m, "retrieval")).retrieval
    leading = retrieval.leading()
    model.load_state_dict({name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()})
    assert leading.dtype == torch.float32 and (leading == 0.5).all()
    retrieval.u.neg_()
    assert retrieval.leading() is leading and (leading[:, 0] == -0.5).all() and (leading[:, 1] == 0.5).all()
