"""Weak-scaling efficiency and speed over the MoE's, from the figures of several cases of tools/bench_scaling.py."""

from __future__ import annotations

import pytest

from megatron_ultramem.planning import scaling
from megatron_ultramem.planning.scaling_ratios import COMPARED, compared, efficiency_base
from megatron_ultramem.results import Row


def test_efficiency_is_against_the_fewest_ranks_and_speed_against_the_best_moe() -> None:
    speeds = {
        f"{scaling.MEMORY}/rows_x1": 10.0, f"{scaling.MEMORY}/rows_x4": 36.0, f"{scaling.MOE}/moe_x4": 9.0,
        f"{scaling.MOE}/moe_tp2_x4": 12.0, f"{scaling.LARGE}/cut_rows_x2": 5.0, f"{scaling.LARGE}/cut_rows_x4": 5.0,
        f"{scaling.LARGE}/cut_of_2_columns_x2": 5.0, f"{scaling.LARGE}/cut_of_2_columns_x4": 8.0,
    }  # fmt: skip
    rows = [Row(case, "tokens_per_s", value, "") for case, value in speeds.items()]
    rows += [Row(f"{scaling.MEMORY}/rows_x{ranks}", "tokens_per_s_with_optimizer", 2.0 * ranks, "") for ranks in (1, 4)]
    rows.append(Row(f"{scaling.MOE}/moe_x4", "tokens_per_s_with_optimizer", 2.0, ""))
    rows.append(Row(f"{scaling.LARGE}/cut_rows_x1", "fits", 0.0, ""))
    values = {(row.case, row.metric): row.value for row in compared(rows) if row.metric in COMPARED}
    assert values == {
        (f"{scaling.MEMORY}/rows_x4", "scaling_efficiency_percent"): pytest.approx(90.0),
        (f"{scaling.MEMORY}/rows_x4", "step_scaling_efficiency_percent"): pytest.approx(100.0),
        (f"{scaling.MEMORY}/rows_x4", "times_the_moe"): pytest.approx(3.0),
        (f"{scaling.MEMORY}/rows_x4", "step_times_the_moe"): pytest.approx(4.0),
        (f"{scaling.LARGE}/cut_of_2_columns_x4", "scaling_efficiency_percent"): pytest.approx(80.0),
    }


def test_a_split_model_is_against_the_whole_one_on_one_rank_in_the_same_precision() -> None:
    speeds = {
        f"{scaling.MEMORY}/columns_x1": 10.0, f"{scaling.MEMORY}/columns_fp8_x1": 12.0,
        f"{scaling.MEMORY}/columns_tp2_x2": 15.0, f"{scaling.MEMORY}/columns_tp2_x4": 20.0,
        f"{scaling.MEMORY}/rows_x2": 14.0, f"{scaling.MEMORY}/columns_fp8_x2": 18.0,
        f"{scaling.MOE}/moe_x1": 4.0, f"{scaling.MOE}/moe_pp2_x2": 6.0,
    }  # fmt: skip
    found = compared([Row(case, "tokens_per_s", value, "") for case, value in speeds.items()])
    shares = {
        row.case.partition("/")[2]: (row.value, row.unit) for row in found if row.metric == "scaling_efficiency_percent"
    }
    assert shares == {
        "columns_tp2_x2": (pytest.approx(75.0), "% of columns_x1"),
        "columns_tp2_x4": (pytest.approx(50.0), "% of columns_x1"),
        "rows_x2": (pytest.approx(70.0), "% of columns_x1"),
        "columns_fp8_x2": (pytest.approx(75.0), "% of x1"),
        "moe_pp2_x2": (pytest.approx(75.0), "% of moe_x1"),
    }
    without = [f"{scaling.MEMORY}/columns_tp2_x2", f"{scaling.MEMORY}/columns_tp2_x4"]
    assert efficiency_base(without[1], without) == without[0] and efficiency_base(without[0], without) is None
