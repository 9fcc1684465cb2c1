"""Learning rates of every schedule, and the value tables' own, at each step against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.platform import prepare

PEAK, WARMUP, STEPS, LOW = 1e-2, 4, 20, 1e-3


def rates(*overrides: str) -> tuple[list[float], list[float]]:
    """What AdamW gets for ordinary parameters and for value tables in steps 1 to STEPS."""
    prepare("cpu")
    from megatron_ultramem.training.optimizer import _build_scheduler

    settings = [f"optimizer.lr={PEAK}", f"train.steps={STEPS}", f"schedule.warmup_steps={WARMUP}", *overrides]
    ordinary, tables = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [ordinary]}, {"params": [tables], "is_decoupled_lr": True}])
    scheduler = _build_scheduler(load_config(None, settings), optimizer)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        scheduler.step(1)
        for lrs, group in zip(found, optimizer.param_groups, strict=True):
            lrs.append(group["lr"])
        assert scheduler.learning_rates() == tuple(group["lr"] for group in optimizer.param_groups)
    return found


def cosine(step: int) -> float:
    return LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def wsd(step: int) -> float:
    """The last 5 steps fall in a straight line."""
    return PEAK if step <= STEPS - 5 else PEAK + (LOW - PEAK) * (step - (STEPS - 5)) / 5


@pytest.mark.parametrize(
    ("kind", "after_warmup"),
    [("cosine", cosine), ("wsd", wsd), ("constant", lambda step: PEAK)],
    ids=["cosine", "wsd", "constant"],
)
def test_a_linear_warm_up_and_then_the_shape(kind: str, after_warmup) -> None:
    settings = [f"schedule.kind={kind}", *(["schedule.wsd_decay_steps=5"] if kind == "wsd" else [])]
    ordinary, tables = rates(*settings)
    wanted = [PEAK * step / WARMUP if step <= WARMUP else after_warmup(step) for step in range(1, STEPS + 1)]
    assert ordinary == pytest.approx(wanted)
    assert tables == ordinary  # value_lr_times is 1 by default


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_multiplier_of_value_tables_falls_to_one(share: float) -> None:
    """1 + (times - 1) * max(0, 1 - step / (steps * rate)) (UltraMemV2, section 4.2.9)."""
    ordinary, tables = rates("optimizer.value_lr_times=4", f"optimizer.value_lr_rate={share}")
    multipliers = [1 + 3 * max(0.0, 1 - step / (STEPS * share)) for step in range(1, STEPS + 1)]
    assert tables == pytest.approx([lr * factor for lr, factor in zip(ordinary, multipliers, strict=True)])


def test_a_fixed_rate_of_value_tables_follows_no_schedule() -> None:
    assert rates("optimizer.value_lr=1e-3")[1] == [1e-3] * STEPS
    assert rates("optimizer.value_lr=1e-3")[0] == rates()[0]


def test_a_decay_that_ends_before_the_run_stays_at_its_end() -> None:
    ordinary, _ = rates("schedule.decay_steps=10")
    assert ordinary[9:] == pytest.approx([LOW] * 11)
