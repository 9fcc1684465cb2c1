"""What benchmarks make of the times they measured."""

from __future__ import annotations

import pytest

from megatron_ultramem.training.measure import Timing, speed_rows


def test_speeds_are_of_the_median_and_say_how_far_the_times_lie_apart() -> None:
    step, forward_backward = Timing((4.0, 2.0, 9.0, 3.0, 5.0)), Timing((1.0, 1.0, 2.0, 1.0, 1.0))
    found = {row.metric: row.value for row in speed_rows("case", 100, step=step, forward_backward=forward_backward)}
    assert found == {
        "tokens_per_s": pytest.approx(100.0), "tokens_per_s_spread_percent": pytest.approx(100.0),
        "tokens_per_s_with_optimizer": pytest.approx(25.0), "step_ms": pytest.approx(4000.0),
        "step_ms_spread_percent": pytest.approx(175.0),
    }  # fmt: skip
