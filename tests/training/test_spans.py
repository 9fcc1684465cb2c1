"""Times of the parts of a step: what counts, what does not, and how they add up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from megatron_ultramem.training.spans import DATA, STEP, Spans
from megatron_ultramem.training.stragglers import PARTS, parts_of_step

CPU = torch.device("cpu")


def one_step(spans: Spans, seconds: float) -> None:
    with spans.step():
        spans("forward-compute", log_level=2).start(barrier=False)  # as Megatron does
        time.sleep(seconds)
        spans("forward-compute").stop()


def test_the_first_step_and_what_is_outside_steps_do_not_count() -> None:
    spans = Spans(CPU)
    one_step(spans, 0.2)
    assert spans.read() == (0, {})
    for _ in range(2):
        one_step(spans, 0.02)
        with spans.measure("forward-compute"):  # an evaluation
            time.sleep(0.2)
    steps, seconds = spans.read()
    assert steps == 2
    assert 0.04 <= seconds["forward-compute"] <= seconds[STEP] < 0.2
    assert spans.read() == (0, {})


def test_loading_counts_the_wait_for_each_batch_and_changes_none() -> None:
    def batches(chunk: int) -> Iterator[tuple[int, int]]:
        for number in range(3):
            time.sleep(0.01)
            yield chunk, number

    spans = Spans(CPU)
    one_step(spans, 0)
    with spans.step():
        for batch in (loaded := list(spans.loading(batches)(1))):
            assert batch[0] == 1
            time.sleep(0.03)
    assert loaded == [(1, 0), (1, 1), (1, 2)]
    seconds = spans.read()[1]
    assert 0.03 <= seconds[DATA] < 0.09 <= seconds[STEP]


def test_an_error_within_a_step_leaves_spans_that_measure_the_next_one() -> None:
    spans = Spans(CPU)
    one_step(spans, 0)
    with pytest.raises(RuntimeError), spans.step():
        spans("forward-compute").start()
        raise RuntimeError
    spans.read()
    one_step(spans, 0.01)
    steps, seconds = spans.read()
    assert steps == 1 and 0.01 <= seconds["forward-compute"] < 0.1


def test_the_bubble_is_what_passes_and_gradient_sync_leave_of_the_schedule() -> None:
    seconds = {"step": 10.0, "data": 0.5, "exchange": 1.0, "grad_sync": 0.75, "optimizer": 1.0}
    seconds |= {"forward-compute": 2.0, "backward-compute": 4.0, "forward-backward": 8.5}
    parts = parts_of_step(seconds)
    assert parts.keys() == set(PARTS)
    assert parts["bubble"] == pytest.approx(1.75) and parts["own"] == pytest.approx(5.0)
    assert parts["data"] == 0.5 and parts["optimizer"] == 1.0
    assert set(parts_of_step({}).values()) == {0.0}


@pytest.mark.gpu
def test_events_measure_the_work_of_the_gpu_and_ranges_can_be_marked() -> None:
    device = torch.device("cuda")
    spans = Spans(device, nvtx=True)
    a = torch.randn(4096, 4096, device=device)
    inside = []
    for _ in range(3):
        with spans.step(), spans.measure("forward-compute"):
            inside.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            inside[-1][0].record()
            for _ in range(20):
                a @ a
            inside[-1][1].record()
    steps, seconds = spans.read()
    assert steps == 2
    assert seconds["forward-compute"] >= 0.9 * sum(begin.elapsed_time(end) for begin, end in inside[1:]) / 1e3
