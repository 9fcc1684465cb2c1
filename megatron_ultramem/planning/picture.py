"""A plan as one picture: memory as stacked bars, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from megatron_ultramem.errors import UserError
from megatron_ultramem.planning.evaluate import Evaluation
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.plan import Plan
from megatron_ultramem.planning.search import describe

INK, FAINT, LIMIT = "#1f2937", "#6b7280", "#dc2626"
PALETTE = (
    "#1d4ed8", "#60a5fa", "#bfdbfe", "#b45309", "#f59e0b", "#fde68a", "#6b7280", "#059669", "#7c3aed", "#db2777",
    "#0891b2", "#d1d5db", "#84cc16", "#f43f5e", "#312e81",
)  # fmt: skip
SHOWN_LAYOUTS = 6


def draw_plan(plan: Plan, output: Path) -> None:
    """Writes a PNG; raises UserError for another extension or a file that cannot be written."""
    if output.suffix.lower() != ".png":
        raise UserError(f"picture {output}: unknown extension {output.suffix!r}; legal: .png")
    found = plan.found.fitting[:SHOWN_LAYOUTS] if plan.found is not None else []
    figure = Figure(figsize=(14, 4.2 + (3.6 if found else 0)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{plan.parameters.total / 1e9:.3g}B parameters, {plan.parameters.active / 1e9:.3g}B active, on {plan.gpus} x "
        f"{plan.cluster.name}\n{describe(plan.shown.config, plan.shown.layout)}: "
        f"{plan.shown.time.tokens_per_s:,.0f} tokens/s, MFU {plan.shown.time.mfu:.1%}",
        fontsize=12, color=INK, parse_math=False,
    )  # fmt: skip
    grid = figure.subplots(2 if found else 1, 2, squeeze=False)
    modes = list(plan.modes.values())
    _memory(
        grid[0][0],
        plan,
        modes,
        [f"recompute {mode}" for mode in plan.modes],
        "Memory of the fullest rank (dashed: what it can use)",
    )
    _time(grid[0][1], modes, [f"recompute {mode}" for mode in plan.modes], "Time of a step")
    if found:
        names = [f"{number}: {describe(shown.config, shown.layout)}" for number, shown in enumerate(found, start=1)]
        _memory(grid[1][0], plan, found, names, "Memory of the layouts found (dashed: what a rank can use)")
        _time(grid[1][1], found, [str(number) for number in range(1, len(found) + 1)], "Time of a step")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise UserError(f"picture {output}: cannot be written ({error})") from error


def _memory(axes: Axes, plan: Plan, shown: Sequence[Evaluation], names: Sequence[str], title: str) -> None:
    parts = [{name: value / GIB for name, value in dataclasses.asdict(one.memory).items()} for one in shown]
    _stacked(axes, parts, names, title, "GiB", plan.cluster.usable_gib)
    axes.axvline(plan.cluster.usable_gib, color=LIMIT, linewidth=1.4, linestyle="--")


def _time(axes: Axes, shown: Sequence[Evaluation], names: Sequence[str], title: str) -> None:
    parts = [{name: value * 1e3 for name, value in dataclasses.asdict(one.time.times).items()} for one in shown]
    _stacked(axes, parts, names, title, "ms")


def _stacked(
    axes: Axes, bars: list[dict[str, float]], names: Sequence[str], title: str, unit: str, at_least: float = 0.0
) -> None:
    """Horizontal bars, first on top; parts that are nowhere more than a thousandth are left out of the legend."""
    largest = max(sum(bar.values()) for bar in bars)
    starts = [0.0] * len(bars)
    for color, part in zip(PALETTE, bars[0], strict=False):
        widths = [bar[part] for bar in bars]
        label = part.replace("_", " ") if max(widths) > 1e-3 * largest else None
        axes.barh(range(len(bars)), widths, left=starts, color=color, label=label, height=0.62)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for number, total in enumerate(starts):
        axes.text(
            total, number, f" {total:,.0f}" if total >= 1000 else f" {total:.4g}", va="center", fontsize=8, color=FAINT
        )
    axes.set_yticks(range(len(bars)), [textwrap.fill(name, 30) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.12 * largest, 1.03 * at_least))
    axes.set_xlabel(unit, fontsize=8.5, color=FAINT)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.legend(fontsize=7.5, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
