"""Which rank is slow, and where the time of a step goes, as real ranks measure it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from megatron_ultramem.training.stragglers import Stragglers
from tests.distributed.workers import WorkerPool

STEPS = 5
DELAY = 0.1  # seconds a micro-batch


def measure(
    overrides: list[str], slow_rank: int | None = None, where: str = "forward", in_graphs: bool = False
) -> tuple[dict[str, float], str]:
    """Metrics and report of a few steps in which one rank is slow at something."""
    run = set_up(load_config(None, overrides))
    if torch.distributed.get_rank() == slow_rank:
        if where == "forward":
            run.model[0].register_forward_pre_hook(lambda *_: time.sleep(DELAY))
        else:
            read = run.train_data[0]._read

            def slow_read(position: int) -> Any:
                time.sleep(DELAY)
                return read(position)

            run.train_data[0]._read = slow_read  # type: ignore[method-assign]
    file = Path(run.config.train.run_dir) / f"times_{torch.distributed.get_rank()}.jsonl"
    stragglers = Stragglers(run.spans, run.platform.device, 1, file, exchange_in_graphs=in_graphs)
    assert stragglers.interval == (1 if run_ranks() > 1 else 0)
    for _ in range(STEPS):
        with run.spans.step():
            train_step(run)
    metrics = stragglers.read()
    report = stragglers.report(STEPS)
    (line,) = file.read_text().splitlines()
    file.unlink()
    written = json.loads(line)
    assert (written["step"], written["steps"], len(written["host"])) == (STEPS, STEPS - 1, run_ranks())
    assert max(written["own_s"]) == pytest.approx(metrics["rank_time/most_s"])
    assert ("exchange_s" in written) == ("time/exchange_s" in metrics) == (not in_graphs)
    assert sum(written["data_s"]) / run_ranks() == pytest.approx(metrics["time/data_s"])
    return metrics, report


def run_ranks() -> int:
    return torch.distributed.get_world_size()


@pytest.mark.parametrize("where", ["forward", "data"])
def test_the_slow_rank_is_named_though_all_steps_take_the_same_time(
    pool: WorkerPool, small_run: list[str], where: str
) -> None:
    settings = [*small_run, "train.global_batch_size=8", "train.micro_batch_size=2"]  # two micro-batches a rank
    for metrics, report in pool.run(2, measure, settings, 1, where):
        assert metrics["rank_time/slowest_rank"] == 1
        assert metrics["rank_time/most_s"] >= 2 * DELAY
        assert metrics["rank_time/least_s"] <= metrics["rank_time/median_s"] <= metrics["rank_time/most_s"]
        assert metrics["rank_time/least_s"] + DELAY < metrics["rank_time/most_s"]
        assert metrics["time/step_s"] >= metrics["rank_time/most_s"]
        assert (metrics["time/data_s"] >= DELAY) == (where == "data")  # the mean of the two ranks
        assert f"over {STEPS - 1} steps: rank 1 on " in report


def test_the_exchange_is_measured_and_is_not_a_ranks_own_time(pool: WorkerPool, small_run: list[str]) -> None:
    settings = [*small_run, "parallel.memory_parallel_size=2", "parallel.memory_placement=rows"]
    settings += ["model.memory.sharing=block", "model.memory.share_size=2"]
    for metrics, _ in pool.run(2, measure, settings, 1):
        # Rank 0 waits in its exchanges for rank 1, four micro-batches a step.
        assert metrics["time/exchange_s"] > 0.5 * 4 * DELAY / 2
        assert metrics["rank_time/slowest_rank"] == 1
        parts = metrics["time/forward_s"] + metrics["time/backward_s"] - metrics["time/exchange_s"]
        assert metrics["time/own_s"] == pytest.approx(parts)


def test_an_exchange_that_cannot_be_measured_is_no_metric_and_the_report_says_so(
    pool: WorkerPool, small_run: list[str]
) -> None:
    settings = [*small_run, "parallel.memory_parallel_size=2", "parallel.memory_placement=rows"]
    for _, report in pool.run(2, measure, settings, None, "forward", True):
        assert report.endswith("; with the memory exchange, which CUDA graphs hide, and in which ranks wait")


def test_a_slow_stage_makes_a_bubble_on_the_other(pool: WorkerPool, small_run: list[str]) -> None:
    settings = [*small_run, "parallel.pipeline_parallel_size=2", "train.global_batch_size=4"]
    metrics, _ = pool.run(2, measure, settings, 1)[0]
    # The first stage waits for the second one, four micro-batches a step; the mean is over both.
    assert 0.5 * 4 * DELAY / 2 < metrics["time/bubble_s"] < metrics["time/step_s"]
    assert metrics["rank_time/slowest_rank"] == 1
    single, _ = pool.run(1, measure, [*small_run, "train.global_batch_size=4"], 0)[0]
    assert single["time/bubble_s"] < 0.2 * single["time/own_s"]  # nobody to wait for
