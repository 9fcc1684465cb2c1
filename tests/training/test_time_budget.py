"""Runs by the clock: the final decay of the learning rate fills what is left of the time."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import prepare

PEAK, LOW = 1e-2, 1e-3
BY_CLOCK = ["schedule.kind=wsd", "checkpoint.load=none", "schedule.min_lr_ratio=0.1", f"optimizer.lr={PEAK}"]


def learning_rates(steps: int, seconds: float, slower: float = 1.0) -> list[float]:
    """Of a run of at most `steps` steps of a second each, of which the first, which is not counted, takes 50."""
    prepare("cpu")
    from megatron_ultramem.training.optimizer import _build_scheduler
    from megatron_ultramem.training.time_budget import TimeBudget

    settings = [f"train.steps={steps}", f"schedule.wsd_decay_steps={steps // 5}", f"train.minutes={seconds / 60}"]
    config = load_config(None, [*BY_CLOCK, *settings])
    scheduler = _build_scheduler(config, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    now = 0.0
    clocks = [lambda: now, lambda: slower * now]
    budgets = [TimeBudget(config, clock) for clock in clocks]
    budget, found = budgets[1], []
    for step in range(1, steps + 1):
        now += 50 if step == 1 else 1
        flags = sum(one.flag() for one in budgets)
        scheduler.step(1)
        found.append(scheduler.learning_rates()[0])
        for one in budgets:
            one.end_step(step, flags, scheduler)
        if budget.last_step == step:
            break
    assert budgets[0].last_step == budget.last_step
    return found


def decayed(steady: int, decay: int) -> list[float]:
    return [PEAK] * steady + [PEAK + (LOW - PEAK) * step / decay for step in range(1, decay + 1)]


def test_the_decay_fills_its_share_of_the_time_at_the_speed_of_the_run() -> None:
    # 80 of 100 s are over after the first step and 80 others; 20 more fit.
    assert learning_rates(1000, 100) == pytest.approx(decayed(81, 20))


def test_all_ranks_decay_as_soon_as_the_clock_of_one_says_so() -> None:
    assert learning_rates(1000, 100, slower=0.99) == pytest.approx(decayed(81, 20))


def test_a_run_that_is_done_before_its_time_keeps_its_schedule() -> None:
    assert learning_rates(50, 100) == pytest.approx(decayed(40, 10))


def test_a_schedule_that_decays_already_is_left_alone() -> None:
    assert learning_rates(100, 99) == pytest.approx(decayed(80, 20))


@pytest.mark.parametrize(
    "setting", ["schedule.kind=cosine", "checkpoint.load=auto", "checkpoint.interval=5", "train.exit_after_steps=3"]
)
def test_what_a_run_by_the_clock_could_not_know_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"train.minutes = 1.0 with {setting.replace('=', ' = ')}; legal: "):
        load_config(None, [*BY_CLOCK, "train.minutes=1", setting])
