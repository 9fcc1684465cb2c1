"""The whole layer: formula, gradients, recompute, precision, and what belongs to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_ultramem.memory.layer import UltraMemV2
from megatron_ultramem.memory.lookup import lookup

VARIANTS: list[Any] = [
    pytest.param({}, id="default"),
    pytest.param({"num_heads": 2, "activation": "gelu"}, id="two-heads-gelu"),
    pytest.param({"query_per_rank": False, "coarse_top_k": 3}, id="one-query-capped"),
    pytest.param({"sharing": "ring", "share_size": 2, "shuffle": False}, id="ring-unshuffled"),
    pytest.param({"balance_loss_coeff": 0.1, "tucker_penalty_coeff": 0.1}, id="auxiliary-losses"),
]


def gradients(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    found = {name: param.grad for name, param in model.named_parameters()}
    for name, table in model.table.named_parameters():
        if hasattr(table, "main_grad"):
            found[f"main_grad {name}"] = table.main_grad.clone()
            table.main_grad.zero_()
    return {"out": out.detach(), "x": x.grad, **found}


def test_forward_is_the_composition_of_its_parts(small_model, tokens) -> None:
    model = small_model(2, torch.float64, sharing="ring", share_size=2)
    layer, x = model.layers[1], tokens(9, dtype=torch.float64)
    indices, scores = layer.retrieval(x @ layer.query_proj.weight.T)
    rows = (layer.permutation.long()[indices] + model.pool.row_offset(1)) % model.pool.rows
    pooled = lookup(rows, scores, x @ layer.pre_value_proj.weight.T, model.table.values, model.table.pre_values)
    torch.testing.assert_close(layer(x), pooled @ layer.value_proj.weight.T)


def test_sequence_batch_input_equals_flat_tokens(small_model, tokens) -> None:
    model = small_model()
    x_SBH = tokens(3, 4)
    out = model.layers[0](x_SBH)
    assert out.shape == x_SBH.shape
    assert torch.equal(out.view(12, -1), model.layers[0](x_SBH.view(12, -1)))
    assert torch.equal(model.layers[0](x_SBH.transpose(0, 1)), out.transpose(0, 1))


@pytest.mark.parametrize("settings", VARIANTS[:4])
def test_gradcheck_of_every_parameter(small_model, tokens, settings: dict[str, Any]) -> None:
    model = small_model(
        2,
        torch.float64,
        num_keys=4,
        key_dim=3,
        value_dim=4,
        pre_value_dim=2,
        **{"sharing": "ring", "share_size": 2, **settings},
    )
    names = [name for name, _ in model.named_parameters()]
    params = [param.detach().clone().requires_grad_() for _, param in model.named_parameters()]
    assert {"table.values", "table.pre_values", "layers.0.retrieval.cores"} <= set(names)

    def run(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), x)

    x = tokens(2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *params), fast_mode=True)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("in_place", [False, True], ids=["dense", "main_grad"])
def test_recompute_changes_nothing_bitwise(small_model, tokens, settings: dict[str, Any], in_place: bool) -> None:
    settings = {"sharing": "ring", "share_size": 1, **settings}
    plain = small_model(2, **settings)
    again = small_model(2, recompute=True, **settings)
    for model in (plain, again):
        if in_place:
            model.attach_main_grads()
    expected, got = gradients(plain, tokens(17)), gradients(again, tokens(17))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (value is None and got[name] is None) or torch.equal(value, got[name]), name
    assert expected["out"].abs().sum() > 0


def test_recompute_keeps_the_first_selection(small_model, tokens) -> None:
    """Turning u and t around between forward and backward would select other keys if the search were repeated."""
    model = small_model(recompute=True)
    expected = gradients(model, tokens(5))
    model.zero_grad()
    out = model(tokens(5))
    retrieval = model.layers[0].retrieval
    retrieval.u.neg_(), retrieval.t.neg_()
    out.square().sum().backward()
    assert all(torch.equal(param.grad, expected[name]) for name, param in model.named_parameters())
    assert not torch.equal(model(tokens(5)), out)


def test_recompute_keeps_no_activations_but_the_input(small_model, tokens) -> None:
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        model = small_model(recompute=recompute)
        x = tokens(64).requires_grad_()
        own = {p.untyped_storage().data_ptr() for p in (x, *model.parameters())}
        out = model.layers[0](x)
        kept[recompute] = _bytes_reachable(out.grad_fn, own)
    assert kept[True] < kept[False] / 5


def _bytes_reachable(node: Any, known: set[int]) -> int:
    """Bytes that the graph below `node` holds, each storage once, without those in `known`."""
    seen, total, stack = set(known), 0, [node]
    visited = set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
        for name in dir(node):
            if not name.startswith("_raw_saved"):
                continue
            raw = getattr(node, name)
            for saved in raw if isinstance(raw, (tuple, list)) else [raw]:
                data = getattr(saved, "data", None)  # what was saved, or what a hook put in its place
                if isinstance(data, torch.Tensor) and data.untyped_storage().data_ptr() not in seen:
                    seen.add(data.untyped_storage().data_ptr())
                    total += data.untyped_storage().nbytes()
    return total


def test_the_pool_is_no_part_of_the_layer(small_model) -> None:
    model = small_model(2, sharing="block", share_size=2)
    layer = model.layers[0]
    assert layer.table is model.table
    assert not any("value" in name and "proj" not in name for name, _ in layer.named_parameters())
    assert all(param is not model.table.values for param in layer.parameters())
    assert [name for name in model.state_dict() if "values" in name] == ["table.values", "table.pre_values"]


def test_the_permutation_is_not_saved_but_has_a_checksum(small_model) -> None:
    layers = small_model(2, sharing="block", share_size=2).layers
    assert not any("permutation" in name for name in layers[0].state_dict())
    assert layers[0].shuffle_checksum() != layers[1].shuffle_checksum()
    assert small_model(1, shuffle=False).layers[0].shuffle_checksum() == ""


def test_a_kept_permutation_is_saved_loaded_and_used(small_model, tokens) -> None:
    kept, other = small_model(keep_shuffle=True), small_model(keep_shuffle=True, shuffle_seed=5)
    expected = kept(tokens(5))
    assert not torch.equal(other(tokens(5)), expected)
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other(tokens(5)), expected)
    assert kept.layers[0].shuffle_checksum() == other.layers[0].shuffle_checksum() == ""  # seeds do not matter


def test_every_parameter_carries_its_initializer(small_model) -> None:
    model = small_model(2, sharing="block", share_size=2)
    before = copy.deepcopy(model.state_dict())
    for name, param in model.named_parameters():
        assert hasattr(param, "initializer"), name
        torch.nn.init.constant_(param, torch.nan)
    for part in (model.table, *model.layers):
        part.reset_parameters(3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.layers[0].retrieval.keys, model.layers[1].retrieval.keys)


@pytest.mark.parametrize("init", ["paper", "released"])
def test_initial_scales(small_model, init: str) -> None:
    model = small_model(init=init, key_dim=16, value_dim=32)
    layer = model.layers[0]
    hidden = layer.value_proj.weight.shape[0]
    expected = {
        "paper": [(2 / (5 * hidden)) ** 0.5] * 3,
        "released": [16**-0.5, hidden**-0.5, 32**-0.5],
    }[init]
    linears = (layer.query_proj, layer.pre_value_proj, layer.value_proj)
    assert [linear.weight.initializer.std for linear in linears] == pytest.approx(expected)
    assert (layer.retrieval.query_gain == layer.retrieval.key_gain).all()
    if init == "released":
        assert layer.retrieval.key_gain[0].item() == pytest.approx(16**-0.4)


def test_projections_come_from_the_given_factory(small_model) -> None:
    model = small_model()
    made: list[tuple[int, int]] = []

    def factory(width_in: int, width_out: int) -> torch.nn.Module:
        made.append((width_in, width_out))
        return torch.nn.Linear(width_in, width_out)

    layer = model.layers[0]
    other = UltraMemV2(
        layer.config, hidden_size=24, layer=0, pool=model.pool, table=model.table, linear=factory, dtype=torch.float32
    )
    assert made == [(24, 2 * 2 * 8), (24, 5), (6, 24)]
    other.reset_parameters(0)
    assert torch.count_nonzero(other.value_proj.bias) == 0


def test_bf16_stays_near_fp32(small_model, tokens) -> None:
    """With every row selected, the two precisions cannot select differently."""
    wide = small_model(num_keys=4, top_m=16, init="released")
    narrow = copy.deepcopy(wide).bfloat16()
    wide.load_state_dict(narrow.state_dict())
    for model in (wide, narrow):
        model.attach_main_grads()
    x = tokens(50).bfloat16()
    expected, got = gradients(wide, x.float()), gradients(narrow, x)
    assert narrow.table.values.main_grad.dtype == torch.float32
    for name, value in expected.items():
        if value is not None:
            assert got[name].isfinite().all(), name
            error = (got[name].float() - value).norm() / value.norm()
            assert error < 0.02, (name, error)


def test_gradients_reach_every_parameter(small_model, tokens) -> None:
    model = small_model(2, sharing="ring", share_size=2)
    for name, gradient in gradients(model, tokens(30)).items():
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["ultramem_v2", "memory_plus"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_work_beside_the_lookup_is_begun_once_after_the_search(
    small_model, tokens, monkeypatch, kind: str, recompute: bool
) -> None:
    model = small_model(1, kind=kind, recompute=recompute)
    (layer,), seen = model.layers, []
    monkeypatch.setattr(layer.table, "lookup", lambda *args, of=layer.table.lookup: seen.append("lookup") or of(*args))
    monkeypatch.setattr(layer, "_rows", lambda *args, of=layer._rows: seen.append("search") or of(*args))
    plain = layer(x := tokens(5, dtype=torch.float32))
    assert torch.equal(layer(x, retrieved=lambda: seen.append("beside")), plain)
    del seen[: seen.index("lookup") + 1]
    assert seen == (["beside", "search", "lookup"] if recompute else ["search", "beside", "lookup"])
