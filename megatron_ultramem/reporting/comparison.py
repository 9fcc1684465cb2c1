"""Compares recipes that were trained on the same data: one table and one figure.

A recipe is one or several runs that differ in their seed. Curves are those of training, against tokens, against FLOPs
(tokens times the training FLOPs of a token) and against the time that training steps took.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table

from megatron_ultramem.planning.flops import flops_per_token
from megatron_ultramem.planning.parameters import count_parameters
from megatron_ultramem.reporting.figure import COLORS, FAINT, INK, loss_range, smoothed
from megatron_ultramem.reporting.runs import Run, Series, format_count

LAST_SHARE = 0.1  # of the training losses, for a final loss that is less noisy than the last


@dataclass(frozen=True)
class Curve:
    """One run: training loss (nats per token) at tokens, FLOPs and seconds of training."""

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Summary:
    """One recipe. Losses are means over its runs, with the standard deviation where there are several."""

    name: str
    parameters: int
    active: int
    training_flops: float  # per token
    runs: int
    tokens: float  # of one run
    seconds: float  # of training steps of one run, mean
    train_loss: float  # of the last tenth of the run
    train_loss_deviation: float
    valid_loss: float | None  # the last
    valid_loss_deviation: float
    tokens_per_s: float  # median over logged intervals and runs
    peak_gib: float


def summarise(name: str, runs: Sequence[Run], vocab_size: int) -> Summary:
    """`runs` of one recipe, each with its config and at least two logged steps."""
    config = runs[0].config
    assert config is not None
    counts = count_parameters(config.model, vocab_size)
    curves = [curve(run, vocab_size) for run in runs]
    last = [statistics.fmean(c.loss[-max(1, round(LAST_SHARE * len(c.loss))) :]) for c in curves]
    valid = [run.metrics["valid_loss"].values[-1] for run in runs if "valid_loss" in run.metrics]
    speeds = [speed for run in runs for speed in run.metrics["tokens_per_s"].values]
    return Summary(
        name,
        counts.total,
        counts.active,
        flops_per_token(config.model, vocab_size, config.data.sequence_length).training,
        len(runs),
        max(c.tokens[-1] for c in curves),
        statistics.fmean(c.seconds[-1] for c in curves),
        statistics.fmean(last),
        _deviation(last),
        statistics.fmean(valid) if valid else None,
        _deviation(valid),
        statistics.median(speeds),
        max(max(run.metrics["memory_gib"].values) for run in runs),
    )


def curve(run: Run, vocab_size: int) -> Curve:
    """The training curve of a run; the time of the first step, which compiles, is taken as that of the next ones."""
    config = run.config
    assert config is not None
    flops = flops_per_token(config.model, vocab_size, config.data.sequence_length).training
    loss = run.metrics["loss"]
    tokens = _at(run.metrics["tokens"])
    step_time = _at(run.metrics["step_time_s"])
    first = step_time[min(step_time)]
    seconds, elapsed, before = [], 0.0, 0
    for step in loss.steps:
        elapsed += (step - before) * step_time.get(step, first)
        before = step
        seconds.append(elapsed)
    at_steps = [tokens[step] for step in loss.steps]
    return Curve(at_steps, [flops * number for number in at_steps], seconds, loss.values)


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """For the terminal."""
    table = Table(*_HEADER, title="Same data, same order", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for summary in summaries:
        table.add_row(*_cells(summary))
    return table


def comparison_markdown(summaries: Sequence[Summary]) -> str:
    """The same for a file."""
    lines = [list(_HEADER), ["---"] * len(_HEADER), *(_cells(summary) for summary in summaries)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


_HEADER = (
    "recipe", "parameters", "active", "training FLOPs per token", "runs", "tokens", "training time", "training loss",
    "validation loss", "tokens/s", "peak GiB",
)  # fmt: skip


def _cells(s: Summary) -> list[str]:
    return [
        s.name,
        format_count(s.parameters),
        format_count(s.active),
        format_count(s.training_flops),
        str(s.runs),
        format_count(s.tokens),
        f"{s.seconds:,.0f} s",
        _loss(s.train_loss, s.train_loss_deviation, s.runs),
        "-" if s.valid_loss is None else _loss(s.valid_loss, s.valid_loss_deviation, s.runs),
        f"{s.tokens_per_s:,.0f}",
        f"{s.peak_gib:.2f}",
    ]


def draw_comparison(recipes: Sequence[tuple[str, Sequence[Curve]]]) -> Figure:
    """Loss against tokens, FLOPs and seconds; every run is a line in the colour of its recipe."""
    figure = Figure(figsize=(15, 4.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    losses = [loss for _, curves in recipes for c in curves for loss in c.loss if math.isfinite(loss)]
    panels: tuple[tuple[str, str], ...] = (
        ("tokens", "tokens"),
        ("flops", "training FLOPs"),
        ("seconds", "seconds of training"),
    )
    for axes, (field, label) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for number, (name, curves) in enumerate(recipes):
            for index, one in enumerate(curves):
                places: list[float] = getattr(one, field)
                smooth = smoothed(Series(list(range(len(places))), one.loss)).values
                color = COLORS[number % len(COLORS)]
                axes.plot(places, smooth, color=color, linewidth=1.6, alpha=0.85, label=name if index == 0 else None)
        _style(axes, f"training loss against {label}", loss_range(losses, []))
    figure.axes[0].set_ylabel("nats per token", fontsize=9, color=FAINT)
    figure.axes[-1].legend(fontsize=9, labelcolor=INK, frameon=False)
    return figure


def _style(axes: Axes, title: str, limits: tuple[float, float]) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#eef0f3", linewidth=0.9)
    axes.tick_params(colors=FAINT, labelsize=8.5)
    axes.set_ylim(*limits)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _loss(mean: float, deviation: float, runs: int) -> str:
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if runs > 1 else "")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _at(series: Series) -> dict[int, float]:
    return dict(zip(series.steps, series.values, strict=True))
