"""Step timing with a clock that the test moves."""

import pytest
import torch

from megatron_ultramem.training.throughput import Throughput, peak_memory_gib

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, peak: float | None = None) -> Throughput:
    return Throughput(flops_per_token=1e9, devices=4, peak_flops=peak, device=CPU, clock=clock)


def run_step(timer: Throughput, clock: Clock, seconds: float, tokens: int = 1000) -> None:
    timer.begin_step()
    clock.now += seconds
    timer.end_step(tokens)


def test_the_first_step_is_left_out():
    clock = Clock()
    timer = make(clock)
    run_step(timer, clock, 100.0)
    assert timer.read() == {}
    run_step(timer, clock, 2.0)
    assert timer.read()["step_time_s"] == 2.0


def test_averages_cover_the_steps_since_the_last_read():
    clock = Clock()
    timer = make(clock, peak=1e13)
    for seconds in (9.0, 1.0, 3.0):
        run_step(timer, clock, seconds)
    values = timer.read()
    assert values == {
        "step_time_s": 2.0,
        "tokens_per_s": 500.0,
        "tflops_per_gpu": pytest.approx(500.0 * 1e9 / 4 / 1e12),
        "mfu": pytest.approx(500.0 * 1e9 / 4 / 1e13),
    }
    run_step(timer, clock, 5.0)
    assert timer.read()["step_time_s"] == 5.0


def test_time_after_a_pause_or_a_read_does_not_count():
    clock = Clock()
    timer = make(clock)
    run_step(timer, clock, 1.0)
    run_step(timer, clock, 2.0)
    timer.pause()
    clock.now += 50.0  # an evaluation
    run_step(timer, clock, 4.0)
    assert timer.read()["step_time_s"] == 3.0
    clock.now += 70.0  # writing metrics
    run_step(timer, clock, 6.0)
    assert timer.read()["step_time_s"] == 6.0


def test_time_between_steps_without_a_pause_counts():
    clock = Clock()
    timer = make(clock)
    run_step(timer, clock, 1.0)
    run_step(timer, clock, 2.0)
    clock.now += 1.0  # waiting for data
    run_step(timer, clock, 3.0)
    assert timer.read()["step_time_s"] == 3.0


def test_an_unknown_device_has_no_mfu():
    clock = Clock()
    timer = make(clock)
    run_step(timer, clock, 1.0)
    run_step(timer, clock, 1.0)
    assert "mfu" not in timer.read()


def test_peak_memory_on_cpu_does_not_fall_after_a_large_allocation_is_freed():
    before = peak_memory_gib(CPU)
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB, touched
    del block
    assert peak_memory_gib(CPU) >= before > 0.01


@pytest.mark.gpu
def test_work_queued_on_the_gpu_is_part_of_the_measured_time():
    device = torch.device("cuda")
    timer = Throughput(flops_per_token=1.0, devices=1, peak_flops=None, device=device)
    a = torch.randn(8192, 8192, device=device)
    for _ in range(2):
        timer.begin_step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            a @ a
        end.record()
        timer.end_step(1)
    seconds = timer.read()["step_time_s"]
    assert seconds >= 0.9 * start.elapsed_time(end) / 1e3
