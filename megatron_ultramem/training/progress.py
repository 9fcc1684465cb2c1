"""The progress line: a live bar in a terminal, one plain line per log interval elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far a run is.

    enabled: false on all ranks but the main one; then nothing is ever printed. Every rank logs what one prints.
    live: false asks for plain lines even in a terminal (`logging.progress`).

    `update` moves the bar at every step and shows `values` where they are given; outside a terminal it prints one line
    when they are given, and nothing otherwise. `message` prints a line above the bar.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        enabled: bool,
        *,
        live: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._enabled = total_steps, start_step, enabled
        self._console = console or Console()
        self._clock = clock
        self._began = clock()
        self._bar: RichProgress | None = None
        if enabled and live and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
                # Takes what is left: in a narrow terminal the metrics are cut off, never broken into lines.
                TextColumn(
                    "{task.fields[status]}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                TextColumn("{task.fields[eta]}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, status="", eta="")

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """`step` steps are done. `values` uses the metric names of `metrics.py`; those unknown here are not shown."""
        if self._bar:
            self._bar.update(self._task, completed=step)
        if not values:
            return
        status, eta = format_status(values), self._eta(step, values)
        line = " | ".join(part for part in (f"step {step}/{self._total}", status, eta) if part)
        logger.info("%s", line)
        if self._bar:
            self._bar.update(self._task, status=status, eta=eta)
        elif self._enabled:
            self._print(line)

    def message(self, text: str) -> None:
        """Prints `text` as it is (no markup), above the bar."""
        logger.info("%s", text)
        if self._enabled:
            self._print(text)

    def _print(self, text: str) -> None:
        # Text and soft_wrap: no markup, no colours guessed into numbers, and no line broken at 80 columns in log files.
        self._console.print(Text(text), soft_wrap=True)

    def _eta(self, step: int, values: Mapping[str, float]) -> str:
        """From the measured step time where there is one, else from the wall clock of this launch; "" at the end."""
        step_time = values.get("step_time_s")
        if step_time is None and step > self._start:
            step_time = (self._clock() - self._began) / (step - self._start)
        if step_time is None or step >= self._total:
            return ""
        return f"ETA {format_duration(step_time * (self._total - step))}"


_FIELDS: tuple[tuple[str, str], ...] = (
    ("loss", "loss {:.4f}"),
    ("valid_loss", "valid {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("tokens_per_s", "{:,.0f} tok/s"),
    ("tflops_per_gpu", "{:.0f} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("memory_gib", "{:.1f} GiB"),
    ("skipped", "skipped {:.0f}"),
)


def format_status(values: Mapping[str, float]) -> str:
    """`loss 2.3120 | lr 4.00e-04 | ...` for the known metrics among `values`; "skipped" only when it is not 0."""
    shown = [(name, form) for name, form in _FIELDS if name in values and (name != "skipped" or values[name])]
    return " | ".join(_format(name, form, values[name]) for name, form in shown)


def _format(name: str, form: str, value: float) -> str:
    if name == "tflops_per_gpu" and value < 1:  # CPUs
        return f"{1e3 * value:.1f} GFLOP/s"
    return form.format(value)


def format_duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h07m` or `3d04h`."""
    whole = max(0, round(seconds))
    for unit, parts, size, small in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{parts}"
    return f"{whole}s"
