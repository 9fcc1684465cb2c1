"""What the benchmark reports has passed its gates, and the gates let through what is right and nothing else."""

from __future__ import annotations

import pytest
import torch
from ultramem_kernels.bench import lookup_gate
from ultramem_kernels.bench.layer import Layer
from ultramem_kernels.bench.layers import check_retrieval
from ultramem_kernels.bench.record import Ceilings, Record, WrongResult, check
from ultramem_kernels.bench.shapes import DTYPE, Shape, Tables, make_tables, uniform_rows, zipf_rows

SHAPE = Shape(
    tokens=80, keys=24, key_dim=16, coarse_k=8, m=5, value_dim=16, pre_value_dim=24, rows=24 * 24 + 17, hidden=32
)


@pytest.fixture
def tables(device: torch.device) -> Tables:
    return make_tables(SHAPE, str(device))


def run_gate(tables: Tables) -> None:
    s, device = SHAPE, tables.values.device
    indices = torch.randint(0, s.rows, (s.tokens, s.m), device=device, dtype=torch.int32)
    indices[:, 0] = 3  # a row that every token reads
    x, grad = (torch.randn(s.tokens, width, device=device, dtype=DTYPE) for width in (s.pre_value_dim, s.value_dim))
    scores = torch.randn(s.tokens, s.m, s.cores, device=device)
    lookup_gate.check_lookup("case", indices, scores, x, tables, grad)


def test_a_right_lookup_passes(tables: Tables) -> None:
    run_gate(tables)
    assert all(grad.abs().sum() > 0 for grad in tables.grads)


@pytest.mark.parametrize("fault", ["output", "input gradient", "values", "pre-values", "one row", "not repeatable"])
def test_a_wrong_lookup_does_not(tables: Tables, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right, calls = lookup_gate._run, []

    def wrong(*arguments, deterministic):
        calls.append(deterministic)
        out, grad_scores, grad_x = right(*arguments, deterministic=deterministic)
        if fault == "output":
            out = out * 1.02
        elif fault == "input gradient":
            grad_x = grad_x * 1.02
        elif fault in ("values", "pre-values"):
            tables.grads[fault == "pre-values"].mul_(1.01)
        elif fault == "one row":
            tables.grads[0][3, 0] += 1.0
        elif len(calls) == 2:
            tables.grads[0][3, 0] *= 1 + 1e-6
        return out, grad_scores, grad_x

    monkeypatch.setattr(lookup_gate, "_run", wrong)
    with pytest.raises(WrongResult, match="case"):
        run_gate(tables)


def test_a_layer_finds_the_reference_s_rows_and_trains(tables: Tables) -> None:
    layer = Layer(SHAPE, tables)
    x = torch.randn(SHAPE.tokens, SHAPE.hidden, device=tables.values.device, dtype=DTYPE)
    check_retrieval("case", layer, x)
    layer(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    with torch.no_grad():
        wanted = layer(x)
        layer.key_SRND = layer.normalised_keys()
        check("decoding", layer(x), wanted, 1e-2)


def test_a_case_with_a_wrong_result_loses_its_figures_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    def bench(record: Record, case: str, error: float) -> None:
        record.add(case, "time_ms", 1.0, "ms")
        check(f"{case}: result", torch.full((4,), 1 + error), torch.ones(4), 1e-3)

    record = Record()
    for case, error in (("right", 1e-4), ("wrong", 1e-2), ("nan", float("nan"))):
        record.case(case, bench, case, error)
    assert [figure.case for figure in record.figures] == ["right"]
    assert [text.split(":")[0] for text in record.wrong] == ["wrong", "nan"]
    assert "dropped" in capsys.readouterr().out


def test_floors_are_the_longer_of_moving_and_computing() -> None:
    ceilings = Ceilings(copy_gb_s=1000.0, tflops=100.0)
    assert ceilings.floor_ms(2e9) == pytest.approx(2.0)
    assert ceilings.floor_ms(2e9, 5e11) == pytest.approx(5.0)


@pytest.mark.gpu
def test_row_choices_stay_within_the_table() -> None:
    for choose in (uniform_rows, zipf_rows):
        rows = choose(1000, 7, 500)
        assert rows.shape == (1000, 7) and rows.min() >= 0 and rows.max() < 500
    counts = zipf_rows(1000, 7, 500).flatten().long().bincount(minlength=500).sort(descending=True).values
    assert counts[0] > 10 * counts[250]
