"""The progress line in a terminal and outside of one."""

import io

import pytest
from rich.console import Console

from megatron_ultramem.training.progress import Progress, format_duration, format_status

VALUES = {"loss": 2.31256, "lr": 4e-4, "tokens_per_s": 123456.7, "tflops_per_gpu": 412.34, "mfu": 0.4167,
          "memory_gib": 61.25, "step_time_s": 2.0, "memory/layer_00/rows_touched": 0.1}  # fmt: skip


def shown(terminal: bool, **settings) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    return Progress(100, settings.pop("start_step", 0), settings.pop("enabled", True), console=console, **settings), out


def test_outside_a_terminal_there_is_one_plain_line_per_log_interval():
    progress, out = shown(terminal=False)
    with progress:
        for step in range(1, 21):
            progress.update(step, VALUES if step % 10 == 0 else None)
    assert out.getvalue().splitlines() == [
        f"step {step}/100 | loss 2.3126 | lr 4.00e-04 | 123,457 tok/s | 412 TFLOP/s | MFU 41.7% | 61.2 GiB | ETA {eta}"
        for step, eta in ((10, "3m00s"), (20, "2m40s"))
    ]


def test_a_live_bar_is_drawn_in_a_terminal_and_messages_stay_above_it():
    progress, out = shown(terminal=True)
    with progress:
        progress.update(10, VALUES)
        progress.message("validation loss 2.5 [saved to runs/a[1]]")
    text = out.getvalue()
    assert "validation loss 2.5 [saved to runs/a[1]]" in text
    last_frame = text[text.rindex("validation loss") :]
    assert "10/100" in last_frame and "loss 2.3126" in last_frame and "ETA 3m00s" in last_frame


def test_in_a_narrow_terminal_the_bar_stays_on_one_line_with_count_and_eta():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=70, color_system=None)
    with Progress(20000, 0, True, console=console) as progress:
        progress.update(1234, VALUES)
    last = [line for line in out.getvalue().splitlines() if "1234/20000" in line][-1]
    assert "loss 2.3126" in last and "ETA 10h25m" in last


def test_live_false_gives_plain_lines_even_in_a_terminal():
    progress, out = shown(terminal=True, live=False)
    with progress:
        progress.update(10, VALUES)
    assert out.getvalue().startswith("step 10/100 | loss 2.3126")
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_disabled_ranks_print_nothing(terminal):
    progress, out = shown(terminal, enabled=False)
    with progress:
        progress.update(1, VALUES)
        progress.message("text")
    assert out.getvalue() == ""


def test_lines_are_not_broken_at_the_width_of_the_console():
    out = io.StringIO()
    with Progress(100, 0, True, console=Console(file=out, width=40)) as progress:
        progress.update(10, VALUES)
    assert out.getvalue().count("\n") == 1


def test_without_a_measured_step_time_the_eta_follows_the_wall_clock_of_this_launch():
    now = [0.0]
    progress, out = shown(terminal=False, start_step=50, clock=lambda: now[0])
    with progress:
        now[0] = 30.0
        progress.update(60, {"loss": 1.0})
    assert out.getvalue() == "step 60/100 | loss 1.0000 | ETA 2m00s\n"


def test_the_last_step_has_no_eta_and_skipped_steps_show_only_when_there_are_some():
    progress, out = shown(terminal=False)
    with progress:
        progress.update(100, {"loss": 1.0, "skipped": 0, "step_time_s": 1.0})
    assert out.getvalue() == "step 100/100 | loss 1.0000\n"
    assert format_status({"skipped": 2}) == "skipped 2"


def test_a_slow_device_without_a_known_peak_shows_gflops_and_no_mfu():
    assert format_status({"loss": 1.0, "tflops_per_gpu": 0.0223}) == "loss 1.0000 | 22.3 GFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3725, "1h02m"), (273600, "3d04h")]
)
def test_durations_have_two_units(seconds, text):
    assert format_duration(seconds) == text
