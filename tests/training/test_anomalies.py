"""What counts as an anomaly, and what is remembered of good steps."""

from __future__ import annotations

import math

import pytest

from megatron_ultramem.config.schema import FaultsConfig
from megatron_ultramem.training.anomalies import AnomalyJudge


def judge(**settings: object) -> AnomalyJudge:
    return AnomalyJudge(FaultsConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_numbers_that_are_not_finite_are_anomalies(value: float, action: str) -> None:
    found = judge(on_nonfinite=action)
    loss, gradient = found.look(value, 1.0, []), found.look(2.0, value, [])
    assert loss is not None and (loss.kind, loss.action) == ("nonfinite_loss", action)
    assert gradient is not None and (gradient.kind, gradient.action) == ("nonfinite_gradient", action)
    assert found.wants_rewind == (action == "rewind")
    assert found.look(2.0, 1.0, []) is None and not found.wants_rewind


def test_a_leap_is_one_over_the_threshold_once_the_window_is_full() -> None:
    found, losses = judge(on_spike="skip", spike_window=4, spike_threshold=3.0), []
    for loss in (2.0, 9.0, 2.2, 1.8):  # too early to tell
        assert found.look(loss, 1.0, losses) is None
    assert losses == [2.0, 9.0, 2.2, 1.8]
    for loss in (2.1, 2.0, 1.9, 2.0):
        assert found.look(loss, 1.0, losses) is None
    assert losses == [2.1, 2.0, 1.9, 2.0]
    spread = math.sqrt(0.02 / 4)
    assert found.look(2.0 + 2.9 * spread, 1.0, list(losses)) is None
    anomaly = found.look(2.0 + 3.1 * spread, 1.0, losses)
    assert anomaly is not None and anomaly.kind == "loss_spike" and anomaly.action == "skip"
    assert "leaps to 2.2192, 3.1 spreads above its mean of 2.0000" in str(anomaly)
    assert losses == [2.1, 2.0, 1.9, 2.0]  # a leap is not what later ones are measured by
    assert found.look(0.1, 1.0, losses) is None  # downwards is no leap


def test_losses_that_hardly_vary_do_not_make_every_step_a_leap() -> None:
    found, losses = judge(on_spike="rewind", spike_window=3), [2.0, 2.0, 2.0]
    assert found.look(2.1, 1.0, losses) is None
    assert found.look(2.5, 1.0, losses) is not None


def test_nothing_is_remembered_where_leaps_are_not_looked_for() -> None:
    losses: list[float] = []
    assert judge().look(2.0, 1.0, losses) is None
    assert losses == []
