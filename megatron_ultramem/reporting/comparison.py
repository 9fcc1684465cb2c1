"""Compares recipes that were trained on the same data: one table and one figure.

A recipe is one or several runs that differ in their seed. Curves are those of training and validation, against tokens,
FLOPs (tokens times the training FLOPs of a token) and the time that training steps took. A run that was cut off is
shown as far as it got, but never averaged with whole ones.
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

START_SHARE = 0.08  # of a curve, whose losses do not stretch the axis
LAST_SHARE = 0.1  # of the training losses, for a final loss that is less noisy than the last


@dataclass(frozen=True)
class Curve:
    """One run: training and validation loss (nats per token; NaN where it was not evaluated) at tokens, FLOPs and
    seconds of training."""

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    valid_loss: list[float]
    whole: bool = True  # not cut off before its end


@dataclass(frozen=True)
class Summary:
    """One recipe, or a run of it that was cut off. Losses are means over its runs, with the standard deviation where
    there are several."""

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


def curve(run: Run, vocab_size: int, *, whole: bool = True) -> Curve:
    """The curve of a run. A step whose time was not logged takes as long as those before it, and the first, which
    compiles, as long as the next ones."""
    config = run.config
    assert config is not None
    flops = flops_per_token(config.model, vocab_size, config.data.sequence_length).training
    loss = run.metrics["loss"]
    tokens = _at(run.metrics["tokens"])
    step_time = _at(run.metrics["step_time_s"])
    valid_loss = _at(run.metrics["valid_loss"]) if "valid_loss" in run.metrics else {}
    own = step_time[min(step_time)]
    seconds, elapsed, before = [], 0.0, 0
    for step in loss.steps:
        own = step_time.get(step, own)
        elapsed += (step - before) * own
        before = step
        seconds.append(elapsed)
    at_steps = [tokens[step] for step in loss.steps]
    valid = [valid_loss.get(step, math.nan) for step in loss.steps]
    return Curve(at_steps, [flops * number for number in at_steps], seconds, loss.values, valid, whole)


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """For the terminal: recipes side by side, so that a pair of them has room in 80 columns."""
    table = Table(title="Same data, same order", title_justify="left")
    table.add_column("", min_width=max(map(len, _SHORT)))
    for summary in summaries:
        table.add_column(summary.name, justify="right", overflow="fold")
    for name, *values in zip(_SHORT, *(_cells(summary)[1:] for summary in summaries), strict=True):
        table.add_row(name, *values)
    return table


def comparison_markdown(summaries: Sequence[Summary]) -> str:
    """The same for a file."""
    lines = [list(_HEADER), ["---"] * len(_HEADER), *(_cells(summary) for summary in summaries)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


_HEADER = (
    "recipe", "parameters", "active", "training FLOPs per token", "runs", "tokens", "training time", "training loss",
    "validation loss", "tokens/s", "peak GiB",
)  # fmt: skip
_SHORT = (
    "parameters", "active", "FLOPs/token", "runs", "tokens", "time", "train loss", "valid loss", "tokens/s", "peak GiB",
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
    """Loss against tokens, FLOPs and seconds; every run is a line in the colour of its recipe, dashed if it was cut
    off. Below, the same of the validation loss, if it was taken more than once. The steep start, which would hide the
    rest, is left out."""
    evaluated = any(len(_finite(c.valid_loss)) > 1 for _, curves in recipes for c in curves)
    figure = Figure(figsize=(15, 9.2 if evaluated else 4.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rows = [("loss", "training loss")] + [("valid_loss", "validation loss")] * evaluated
    for panels, (loss, title) in zip(figure.subplots(len(rows), 3, sharey="row", squeeze=False), rows, strict=True):
        _draw_row(list(panels), recipes, loss, title)
    figure.axes[2].legend(fontsize=9, labelcolor=INK, frameon=False)
    return figure


def _draw_row(panels: Sequence[Axes], recipes: Sequence[tuple[str, Sequence[Curve]]], loss: str, title: str) -> None:
    values = [_finite(getattr(c, loss)) for _, curves in recipes for c in curves]
    limits = loss_range([value for own in values for value in own[int(START_SHARE * len(own)) :]], [])
    against = (("tokens", "tokens"), ("flops", "training FLOPs"), ("seconds", "seconds of training"))
    for axes, (field, label) in zip(panels, against, strict=True):
        for number, (name, curves) in enumerate(recipes):
            for index, one in enumerate(curves):
                found = [point for point in zip(getattr(one, field), getattr(one, loss), strict=True)
                         if math.isfinite(point[1])]  # fmt: skip
                smooth = smoothed(Series(list(range(len(found))), [value for _, value in found])).values
                color = COLORS[number % len(COLORS)]
                axes.plot([place for place, _ in found], smooth, color=color, linewidth=1.6, alpha=0.85,
                          linestyle="-" if one.whole else "--",
                          label=_label(name, curves, index))  # fmt: skip
        _style(axes, f"{title} against {label}", limits)
        shown = (lambda value, _: f"{value:.2g}") if field == "flops" else (lambda value, _: format_count(value))
        axes.xaxis.set_major_formatter(FuncFormatter(shown))
    panels[0].set_ylabel("nats per token", fontsize=9, color=FAINT)


def _label(name: str, curves: Sequence[Curve], index: int) -> str | None:
    """In the legend: of the first whole run of a recipe, and of the first that was cut off."""
    first = [one.whole for one in curves].index(curves[index].whole) == index
    return (name if curves[index].whole else f"{name}, cut off") if first else None


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _style(axes: Axes, title: str, limits: tuple[float, float]) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#eef0f3", linewidth=0.9)
    axes.tick_params(colors=FAINT, labelsize=8.5)
    axes.set_ylim(*limits)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _loss(mean: float, deviation: float, runs: int) -> str:
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if runs > 1 else "")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _at(series: Series) -> dict[int, float]:
    return dict(zip(series.steps, series.values, strict=True))
