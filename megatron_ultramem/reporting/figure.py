"""Draws the report's figure: loss, learning rate, gradient norm, speed, and memory health per layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_ultramem.reporting.runs import Run, Series, format_count

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
INK, FAINT = "#1f2937", "#6b7280"
# Sizes in inches.
WIDTH, LEFT, RIGHT = 13.0, 0.75, 0.5
LOSS_HEIGHT, PANEL_HEIGHT, GAP, PANEL_SPACE = 3.6, 2.1, 0.85, 0.75
COLUMNS = 3

# Names of `memory.health.memory_health`, in the order in which they are shown.
_HEALTH_TITLES = {
    "rows_touched": "share of rows touched",
    "usage_kl": "KL of row usage to uniform (nats)",
    "top1_score": "mean top-1 score",
    "top_m_score": "mean top-m score",
    "output_std": "output std",
    "values_rms": "values RMS",
    "pre_values_rms": "pre-values RMS",
}


def draw(runs: Sequence[Run]) -> Figure:
    """One figure of all runs, 13 inches wide; panels without data are left out."""
    panels = [panel for panel in _PANELS if any(name in run.metrics for run in runs for name in panel[1])]
    health = health_order({name for run in runs for name in run.health()})
    rows = math.ceil(len(panels) / COLUMNS) + math.ceil(len(health) / COLUMNS)
    header = 0.85 + 0.23 * sum(len(run.describe()) for run in runs)
    height = header + LOSS_HEIGHT + rows * (GAP + PANEL_HEIGHT) + 0.6
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        """Axes with their upper left corner at (left, top), in inches from the figure's."""
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    def panel_at(index: int, first_top: float) -> Axes:
        row, column = divmod(index, COLUMNS)
        left = LEFT + column * (panel_width + PANEL_SPACE)
        return place(left, first_top + row * (PANEL_HEIGHT + GAP), panel_width, PANEL_HEIGHT)

    inner = WIDTH - LEFT - RIGHT
    panel_width = (inner - (COLUMNS - 1) * PANEL_SPACE) / COLUMNS
    _draw_header(figure, runs, height)
    _draw_loss(_style(place(LEFT, header, inner, LOSS_HEIGHT), "loss", runs, ticks=10), runs)
    top = header + LOSS_HEIGHT + GAP
    for index, (title, names) in enumerate(panels):
        _draw_lines(_style(panel_at(index, top), title, runs), runs, names)
    top += math.ceil(len(panels) / COLUMNS) * (PANEL_HEIGHT + GAP)
    for index, name in enumerate(health):
        _draw_health(panel_at(index, top), runs, name)
    return figure


def health_order(names: set[str]) -> list[str]:
    """The known metrics as they are listed above, then the others by name."""
    known = list(_HEALTH_TITLES)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


# (title, metrics drawn together)
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("learning rate", ("lr", "value_lr")),
    ("gradient norm", ("grad_norm",)),
    ("tokens per second", ("tokens_per_s",)),
    ("model TFLOP/s per device", ("tflops_per_gpu",)),
    ("step time (s)", ("step_time_s",)),
    ("peak memory (GiB)", ("memory_gib",)),
)


def _draw_header(figure: Figure, runs: Sequence[Run], height: float) -> None:
    """The names of the runs, and under them two lines on each; with several runs in the colours of their lines."""

    def write(y: float, text: str, size: float, color: str, weight: str = "normal") -> None:
        figure.text(
            LEFT / WIDTH, 1 - y / height, text, fontsize=size, color=color, fontweight=weight, va="center",
            parse_math=False,
        )  # fmt: skip

    y = 0.32
    title = "  vs  ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    write(y, title, 16, INK, "bold")
    y += 0.08
    for run, color in zip(runs, _cycle(len(runs)), strict=True):
        for index, line in enumerate(run.describe()):
            y += 0.23
            several = len(runs) > 1 and index == 0
            write(y, f"{run.name}:  {line}" if several else line, 9.5, color if several else FAINT)


def _style(axes: Axes, title: str, runs: Sequence[Run], ticks: int = 4) -> Axes:
    """Title, light grid, and the step axis, which is the same in every panel of lines."""
    _title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d1d5db")
    axes.grid(True, color="#eef0f3", linewidth=0.9)
    axes.set_axisbelow(True)
    last = max(series.steps[-1] for run in runs for series in run.metrics.values())
    axes.set_xlim(-0.01 * last, 1.01 * last)
    _step_axis(axes, ticks)
    return axes


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def _step_axis(axes: Axes, ticks: int = 4) -> None:
    axes.tick_params(colors=FAINT, labelsize=8.5, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step", fontsize=8.5, color=FAINT, labelpad=2)


def _draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    """Train loss (raw, and smoothed where there are many points), validation points, baselines as horizontal lines."""
    several = len(runs) > 1
    shown: list[float] = []
    for run, color in zip(runs, _cycle(len(runs)), strict=True):
        label = f"{run.name}, train" if several else "train"
        if train := run.metrics.get("loss"):
            smooth = smoothed(train)
            if smooth is not train:
                axes.plot(train.steps, train.values, color=color, alpha=0.25, linewidth=0.9)
            last = _last_finite(smooth)
            axes.plot(smooth.steps, smooth.values, color=color, linewidth=1.8, label=f"{label} ({last:.3f})")
            shown += train.values
        if valid := run.metrics.get("valid_loss"):
            tone = color if several else COLORS[1]
            label = f"{run.name}, validation" if several else "validation"
            axes.plot(
                valid.steps,
                valid.values,
                "--" if several else "-",
                color=tone,
                linewidth=1.4,
                marker="o" if len(valid.steps) <= 40 else None,
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                label=f"{label} ({_last_finite(valid):.3f})",
            )
            shown += valid.values
    baselines = {name: loss for run in runs for name, loss in run.baselines.items()}
    for (name, loss), style in zip(sorted(baselines.items(), key=lambda item: -item[1]), _dashes(), strict=False):
        axes.axhline(loss, color=FAINT, linestyle=style, linewidth=1.2, label=f"{name} baseline ({loss:.3f})")
    axes.set_ylim(*loss_range([loss for loss in shown if math.isfinite(loss)], list(baselines.values())))
    axes.set_ylabel("nats per token", fontsize=8.5, color=FAINT)
    _legend(axes)


def loss_range(losses: Sequence[float], baselines: Sequence[float]) -> tuple[float, float]:
    """Limits of the loss axis: all losses and baselines, but a few spikes above the start are cut off."""
    if not losses:
        losses = baselines or [0.0, 1.0]
    ordered = sorted(losses)
    start = max(losses[: max(1, len(losses) // 50)])
    high = max([start, ordered[int(0.99 * (len(ordered) - 1))], *baselines])
    low = min([ordered[0], *baselines])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw_lines(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> None:
    several_runs, labelled = len(runs) > 1, False
    colors = _cycle(len(runs))
    for run, color in zip(runs, colors, strict=True):
        for index, name in enumerate(names):
            series = run.metrics.get(name)
            if series is None:
                continue
            if index and name == "value_lr" and series.values == run.metrics.get("lr", series).values:
                continue  # the values' rate is the common one: a second line would hide the first
            tone = color if several_runs else COLORS[index]
            style = "-" if index == 0 else "--"
            # Colours name the runs in every panel; only lines of the same run need a legend here.
            label = name if not several_runs and sum(other in run.metrics for other in names) > 1 else None
            labelled |= label is not None
            marker = "o" if len(series.steps) == 1 else None
            axes.plot(series.steps, series.values, style, color=tone, linewidth=1.5, label=label, marker=marker)
    if "lr" in names:
        _from_zero(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    elif "grad_norm" in names:
        _norm_axis(
            axes, [value for run in runs if "grad_norm" in run.metrics for value in run.metrics["grad_norm"].values]
        )
    else:
        _from_zero(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    if labelled:
        _legend(axes)


def _norm_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the norms span more than two decades, else from 0."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    if finite and max(finite) / min(finite) > 100:
        axes.set_yscale("log")
    else:
        _from_zero(axes)


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, 1.06 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)


def _draw_health(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """One run: layers x steps as a heat map. Several runs, one layer or one step: lines of the mean over layers."""
    title = _HEALTH_TITLES.get(name, name.replace("_", " "))
    layers = runs[0].health().get(name, {})
    steps = sorted({step for series in layers.values() for step in series.steps})
    if len(runs) == 1 and len(layers) > 1 and len(steps) > 1:
        _heat_map(axes, layers, steps, title)
        return
    _style(axes, title, runs)
    if any(len(run.health().get(name, {})) > 1 for run in runs):
        axes.set_ylabel("mean over layers", fontsize=8.5, color=FAINT, labelpad=2)
    for run, color in zip(runs, _cycle(len(runs)), strict=True):
        mean = mean_over_layers(run.health().get(name, {}))
        axes.plot(mean.steps, mean.values, color=color, linewidth=1.5, marker="o", markersize=3)


def _heat_map(axes: Axes, layers: dict[int, Series], steps: list[int], title: str) -> None:
    values = []
    for series in layers.values():
        at_step = dict(zip(series.steps, series.values, strict=True))
        values.append([at_step.get(step, math.nan) for step in steps])
    # Cell borders half-way between the measured steps, so that uneven intervals keep their true width.
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    edges = [1.5 * steps[0] - 0.5 * steps[1], *middles, 1.5 * steps[-1] - 0.5 * steps[-2]]
    _title(axes, title)
    mesh = axes.pcolormesh(
        edges, [row - 0.5 for row in range(len(layers) + 1)], values, cmap="viridis", rasterized=True
    )
    axes.set_yticks(*_layer_ticks(list(layers)))
    axes.set_ylabel("layer", fontsize=8.5, color=FAINT, labelpad=2)
    _step_axis(axes)
    for spine in axes.spines.values():
        spine.set_visible(False)
    assert isinstance(axes.figure, Figure)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.03, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=8, length=2)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _layer_ticks(layers: list[int]) -> tuple[list[int], list[str]]:
    """At most 8 labelled rows."""
    every = math.ceil(len(layers) / 8)
    rows = list(range(0, len(layers), every))
    return rows, [str(layers[row]) for row in rows]


def mean_over_layers(layers: dict[int, Series]) -> Series:
    """The mean over the layers that have a finite value at a step."""
    at_step: dict[int, list[float]] = {}
    for series in layers.values():
        for step, value in zip(series.steps, series.values, strict=True):
            at_step.setdefault(step, []).extend([value] if math.isfinite(value) else [])
    steps = sorted(at_step)
    return Series(steps, [sum(at_step[s]) / len(at_step[s]) if at_step[s] else math.nan for s in steps])


def smoothed(series: Series) -> Series:
    """Running median over 2 % of the points around each; the series itself when it has fewer than 100.

    Centred, so that it neither lags behind a falling loss nor shows a single spike.
    """
    count = len(series.values)
    if count < 100:
        return series
    reach = max(2, count // 100)
    # Near the start, where the loss falls fast, the window shrinks to stay centred; at the end it is cut off.
    windows = (series.values[i - min(reach, i) : i + min(reach, i) + 1] for i in range(count))
    finite = ([value for value in window if math.isfinite(value)] for window in windows)
    return Series(series.steps, [statistics.median(window) if window else math.nan for window in finite])


def _last_finite(series: Series) -> float:
    return next((value for value in reversed(series.values) if math.isfinite(value)), math.nan)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5, labelcolor=INK, loc="upper right", framealpha=0.85, edgecolor="none", fancybox=False)


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _dashes() -> tuple[str, ...]:
    return (":", "--", "-.") * 4
