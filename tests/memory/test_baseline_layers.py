"""UltraMem, Memory+, PKM and PEER against their formulas written out token by token, and what belongs to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.memory.health import memory_health
from megatron_ultramem.memory.product_keys import best_pairs
from tests.memory.test_memory_layer import gradients

HIDDEN = 24
FP64 = torch.float64
KINDS: dict[str, dict[str, Any]] = {
    "ultramem": {"num_heads": 2, "value_expansion": 4, "top_m": 7, "tucker_penalty_coeff": 0.0},
    "ultramem_uneven": {"num_keys": 5, "value_expansion": 3, "num_cores": 3, "tucker_rank": 3, "shuffle": False,
                        "tucker_penalty_coeff": 0.0},
    "memory_plus": {"num_heads": 3, "top_m": 9},
    "memory_plus_batch": {"query_norm": "batch", "shuffle": False},
    "pkm": {"num_heads": 2, "value_dim": HIDDEN, "top_m": 5},
    "pkm_plain_capped": {"value_dim": HIDDEN, "query_norm": "none", "top_m": 9, "coarse_top_k": 3},
    "peer": {"num_heads": 2, "value_dim": HIDDEN, "pre_value_dim": HIDDEN, "top_m": 6},
    "peer_rms_shared": {
        "value_dim": HIDDEN, "pre_value_dim": HIDDEN, "query_norm": "rms", "sharing": "ring", "share_size": 2,
    },
}  # fmt: skip


def kind_of(case: str) -> str:
    return next(kind for kind in ("ultramem", "memory_plus", "pkm", "peer") if case.startswith(kind))


@pytest.fixture
def model_of(small_model):
    def build(case: str, num_layers: int | None = None, dtype: torch.dtype = FP64, **more: Any):
        num_layers = num_layers or (2 if case in ("memory_plus", "peer_rms_shared") else 1)
        settings = {"kind": kind_of(case), **KINDS[case], **more}
        if kind_of(case) != "peer":
            settings.setdefault("pre_value_dim", 192)
        return small_model(num_layers, dtype, **settings)

    return build


def rms(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def literal(layer, x_TH: torch.Tensor) -> torch.Tensor:
    """The layer's output by loops over tokens, heads and all n*n rows; in training mode."""
    return literal_ultramem(layer, x_TH) if layer.config.kind == "ultramem" else literal_product_keys(layer, x_TH)


def row_of(layer, i: int, j: int) -> int:
    index = i * layer.pool.keys_per_side + j
    return index if layer.permutation is None else int(layer.permutation[index])


def literal_ultramem(layer, x_TH: torch.Tensor) -> torch.Tensor:
    c, r = layer.config, layer.retrieval
    n, table_rows, width = layer.pool.keys_per_side, c.num_keys**2, c.value_dim // c.num_cores
    out = []
    for x in x_TH:
        query = (layer.query_proj.weight @ x).view(c.num_heads, 2, c.key_dim)
        pooled = [torch.zeros(c.value_dim, dtype=FP64) for _ in range(c.value_expansion)]
        for h in range(c.num_heads):
            q_row, q_column = rms(query[h], r.query_gain)
            keys = rms(r.keys[h], r.key_gain)
            s_row, s_column = keys[0] @ q_row, keys[1] @ q_column  # [n, rank]
            summed = r.cores[h].sum(0)
            left, _, right = torch.linalg.svd(summed.detach())
            sign = 1.0 if (left[:, 0] + right[0]).sum() > 0 else -1.0
            k = min(n, c.top_m)
            rows = (s_row @ (sign * left[:, 0])).topk(k).indices.tolist()
            columns = (s_column @ (sign * right[0])).topk(k).indices.tolist()
            pairs = sorted(
                ((i, j) for i in rows for j in columns), key=lambda p: -(s_row[p[0]] @ summed @ s_column[p[1]]).item()
            )
            for i, j in pairs[: c.top_m]:
                virtual = row_of(layer, i, j)
                block, value = virtual // table_rows, layer.table.values[virtual % table_rows]
                scores = [s_row[i] @ core @ s_column[j] for core in r.cores[h]]
                weighted = torch.cat([s * value[g * width : (g + 1) * width] for g, s in enumerate(scores)])
                pooled[block] = pooled[block] + weighted
        projections = layer.value_proj.weight.view(HIDDEN, c.value_expansion, c.value_dim)
        out.append(sum(projections[:, b] @ pooled[b] for b in range(c.value_expansion)))
    return torch.stack(out)


def literal_product_keys(layer, x_TH: torch.Tensor) -> torch.Tensor:
    c, r = layer.config, layer.retrieval
    n = layer.pool.keys_per_side
    query_TQ = x_TH @ layer.query_proj.weight.T
    if r.norm == "batch":
        query_TQ = (query_TQ - query_TQ.mean(0)) / (query_TQ.var(0, unbiased=False) + 1e-5).sqrt()
        query_TQ = query_TQ * r.query_norm.weight + r.query_norm.bias
    out = []
    for x, q in zip(x_TH, query_TQ, strict=True):
        query, total = q.view(c.num_heads, 2, c.key_dim), torch.zeros(c.value_dim, dtype=FP64)
        for h in range(c.num_heads):
            sides = [query[h, 0], query[h, 1]]
            keys = [r.keys[h, 0], r.keys[h, 1]]
            if r.norm == "rms":
                sides, keys = [rms(s, r.query_gain) for s in sides], [rms(k, r.key_gain) for k in keys]
            s_row, s_column = keys[0] @ sides[0], keys[1] @ sides[1]
            k = c.coarse_top_k or n
            rows, columns = s_row.topk(min(k, n)).indices.tolist(), s_column.topk(min(k, n)).indices.tolist()
            pairs = sorted(
                ((i, j) for i in rows for j in columns), key=lambda p: -(s_row[p[0]] + s_column[p[1]]).item()
            )
            best = pairs[: c.top_m]
            weights = torch.stack([s_row[i] + s_column[j] for i, j in best]).softmax(0)
            for weight, (i, j) in zip(weights, best, strict=True):
                row = (row_of(layer, i, j) + layer.row_offset) % layer.pool.rows
                if c.kind == "peer":
                    dot = layer.table.pre_values[row] @ x
                    weight = weight * 0.5 * dot * (1 + torch.erf(dot / math.sqrt(2)))
                total = total + weight * layer.table.values[row]
        if c.kind == "memory_plus":
            gate = layer.gate_proj.weight @ x
            total = layer.value_proj.weight @ (total * gate * torch.sigmoid(gate))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("case", KINDS)
def test_forward_and_gradients_are_those_of_the_formulas_written_out(model_of, tokens, case: str) -> None:
    model = model_of(case)
    for name, param in model.named_parameters():
        if "query_norm" in name:
            torch.nn.init.uniform_(param, 0.5, 1.5)
    layer, x = model.layers[-1], tokens(6, dtype=FP64)
    wanted = dict(layer.named_parameters()) | dict(model.table.named_parameters())
    weights = torch.randn(6, HIDDEN, dtype=FP64, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (lambda given: layer(given), lambda given: literal(layer, given)):
        given = x.clone().requires_grad_()
        out = run(given)
        results.append((out, torch.autograd.grad((out * weights).sum(), [given, *wanted.values()])))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, got, expected in zip(["x", *wanted], results[0][1], results[1][1], strict=True):
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", KINDS)
def test_gradcheck_of_every_parameter(model_of, tokens, case: str) -> None:
    # Sizes at which the small steps of the check do not change the selection.
    model = model_of(case, num_keys=3, key_dim=3, top_m=4, coarse_top_k=None)
    names = [name for name, _ in model.named_parameters()]
    params = [param.detach().clone().requires_grad_() for _, param in model.named_parameters()]

    def run(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), x)

    assert torch.autograd.gradcheck(run, (tokens(3, dtype=FP64).requires_grad_(), *params), fast_mode=True)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("in_place", [False, True], ids=["dense", "main_grad"])
def test_recompute_changes_nothing_bitwise(model_of, tokens, case: str, in_place: bool) -> None:
    models = [model_of(case, dtype=torch.float32, recompute=recompute) for recompute in (False, True)]
    results = []
    for model in models:
        if in_place:
            model.attach_main_grads()
        results.append(gradients(model, tokens(17)))
        model.layers[0].end_step()
    for name, value in results[0].items():
        assert (value is None and results[1][name] is None) or torch.equal(value, results[1][name]), name
    for (name, value), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(value, other), name
    if in_place:
        assert all(table.grad is None and table.main_grad is not None for table in models[0].table.parameters())


@pytest.mark.parametrize("case", KINDS)
def test_every_parameter_carries_its_initializer(model_of, case: str) -> None:
    model = model_of(case, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for param in model.parameters():
        torch.nn.init.constant_(param, torch.nan)
    for part in (model.table, *model.layers):
        part.reset_parameters(3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_initial_scales(model_of) -> None:
    ultramem, memory_plus, pkm, peer = (model_of(case) for case in ("ultramem", "memory_plus", "pkm", "peer"))
    assert ultramem.table.values.initializer.std == pytest.approx(math.sqrt(4 / (2 * 7 * 2 * 1)))  # E / (2 m H L)
    assert ultramem.layers[0].retrieval.query_gain[0].item() == pytest.approx(8**-0.33)
    assert memory_plus.table.values.initializer.std == pytest.approx(6**-0.5)
    assert pkm.table.values.initializer.std == pytest.approx(HIDDEN**-0.5)
    assert peer.table.values.initializer.std == pytest.approx((2 / (5 * HIDDEN)) ** 0.5)
    for model in (memory_plus, pkm, peer):
        keys = model.layers[0].retrieval.keys
        assert keys.initializer.high == -keys.initializer.low == pytest.approx(16**-0.5)


def test_layers_of_memory_plus_share_one_table_and_not_their_keys(model_of) -> None:
    model = model_of("memory_plus", 3)
    assert model.pool.rows == 100 and model.table.values.shape[0] == 112 and model.table.num_users == 3
    assert all(layer.table is model.table and layer.row_offset == 0 for layer in model.layers)
    assert not torch.equal(model.layers[0].retrieval.keys, model.layers[1].retrieval.keys)


def test_ultramem_sees_its_table_value_expansion_times_over(model_of, tokens) -> None:
    model = model_of("ultramem")
    layer = model.layers[0]
    assert layer.pool.keys_per_side == 20 and layer.pool.rows == 100
    rows, _ = layer.retrieve(tokens(200, dtype=FP64))
    assert set((rows // 100).unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(layer.physical(rows), rows % 100)


def test_tucker_penalty_is_on_for_ultramem_alone(small_model, tokens) -> None:
    def core_gradient(**settings: Any) -> torch.Tensor:
        model = small_model(1, FP64, tucker_penalty_threshold=0.0, **settings)
        with torch.no_grad():
            model.table.values.zero_()  # so that nothing but the penalty has a gradient
        model.layers[0](tokens(3, dtype=FP64)).sum().backward()
        return model.layers[0].retrieval.cores.grad

    assert core_gradient(kind="ultramem", pre_value_dim=192).abs().sum() > 0
    assert core_gradient(kind="ultramem", pre_value_dim=192, tucker_penalty_coeff=0.0).abs().sum() == 0
    assert core_gradient(kind="ultramem_v2").abs().sum() == 0


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 4), (9, 80), (80, 80), (32, 7), (5, 25)])
def test_pairs_that_can_be_among_the_best_hold_the_best(k: int, m: int) -> None:
    rows, columns = best_pairs(k, m)
    assert len(rows) >= m
    generator = torch.Generator().manual_seed(k * m)
    for _ in range(20):
        sides = torch.randn(2, k, generator=generator, dtype=FP64).sort(-1, descending=True).values
        every = (sides[0, :, None] + sides[1]).flatten().topk(m).values
        some = (sides[0, list(rows)] + sides[1, list(columns)]).topk(m).values
        assert torch.equal(every, some)


def test_batch_norm_in_evaluation_uses_the_mean_statistics_of_steps(model_of, tokens) -> None:
    model = model_of("pkm")
    layer, norm = model.layers[0], model.layers[0].retrieval.query_norm
    batches = [tokens(8, dtype=FP64), 3 * tokens(9, dtype=FP64)[1:]]
    for x in batches:
        layer(x)
    layer.end_step()
    queries = [x @ layer.query_proj.weight.T for x in batches]
    mean = 0.1 * sum(q.mean(0) for q in queries) / 2
    var = 0.9 + 0.1 * sum(q.var(0) for q in queries) / 2
    torch.testing.assert_close(norm.running_mean, mean.float())
    torch.testing.assert_close(norm.running_var, var.float())
    layer.eval()
    got = norm(queries[0])
    torch.testing.assert_close(got, (queries[0] - norm.running_mean) / (norm.running_var + 1e-5).sqrt())
    before = norm.running_mean.clone()
    layer(batches[0]), layer.end_step()
    assert torch.equal(norm.running_mean, before)


def test_running_statistics_stay_fp32_when_the_model_is_cast(model_of, tokens) -> None:
    model = model_of("peer", dtype=torch.float32).bfloat16()
    norm = model.layers[0].retrieval.query_norm
    assert norm.running_var.dtype == torch.float32 and norm.weight.dtype == torch.bfloat16
    assert model.layers[0](tokens(5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["ultramem", "memory_plus", "pkm", "peer"])
def test_bf16_stays_near_fp32(model_of, tokens, case: str) -> None:
    """With every row selected, the two precisions cannot select differently."""
    every = {"num_keys": 4, "top_m": 64 if case == "ultramem" else 16, "num_heads": 1}
    wide = model_of(case, dtype=torch.float32, **every)
    narrow = model_of(case, dtype=torch.float32, **every).bfloat16()
    wide.load_state_dict(narrow.state_dict())
    for model in (wide, narrow):
        model.attach_main_grads()
    x = tokens(50).bfloat16()
    expected, got = gradients(wide, x.float()), gradients(narrow, x)
    for name, value in expected.items():
        if value is not None:
            assert got[name].isfinite().all(), name
            assert (got[name].float() - value).norm() < 0.03 * value.norm(), name


@pytest.mark.parametrize("case", KINDS)
def test_the_kernels_references_equal_the_layer(model_of, tokens, case: str) -> None:
    plain, fused = (model_of(case, dtype=torch.float32, kernels=name) for name in ("reference", "fused"))
    for model in (plain, fused):
        model.attach_main_grads()
    expected, got = gradients(plain, tokens(11)), gradients(fused, tokens(11))
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("case", ["ultramem", "memory_plus", "pkm", "peer"])
def test_health_measures_what_the_kind_has(model_of, tokens, case: str) -> None:
    layer, x = model_of(case, dtype=torch.float32).layers[0], tokens(40)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found = memory_health(layer, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())  # nothing was counted
    rows, scores = layer.retrieve(x)
    used = layer.physical(rows).unique()
    assert found["rows_touched"] == pytest.approx(len(used) / 100) and 0 < found["rows_touched"] <= 1
    assert ("tucker_singular_values" in found) == (case == "ultramem")
    assert ("pre_values_rms" in found) == (case == "peer")
    if case != "ultramem":
        assert found["top_m_score"].item() == pytest.approx(1 / layer.config.top_m)  # after a softmax
    torch.testing.assert_close(found["output_std"], layer.output(x, rows, scores).std())


class HostTalk(TorchDispatchMode):
    """Which operations make tensors of numbers of the host, or ask a tensor for a number."""

    ASKS = ("lift_fresh", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.ASKS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", KINDS)
def test_a_repeated_pass_could_be_a_cuda_graph(model_of, tokens, case: str) -> None:
    model, x_TH = model_of(case, dtype=torch.float32), tokens(9).requires_grad_()
    model(x_TH).sum().backward()  # may make constants
    with HostTalk() as talk:
        model(x_TH).sum().backward()
    assert talk.found == []
    with talk:
        assert torch.tensor([3]).item() == 3
    assert talk.found == ["lift_fresh", "_local_scalar_dense"]  # what it would have found
