#!/usr/bin/env python3
"""Draws what tools/fp8_curves.py measured: losses, their distance from bf16, where each seed ended, and gradient norms.

    python tools/draw_fp8_curves.py benchmarks/results/fp8_curves_h200.json docs/fp8_curves_h200.png

Seeds have data of their own: a distance is the mean over seeds of that to bf16 with the same seed, and losses and norms
are means over the seeds that all variants have.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ultramem.errors import UserError, exit_status
from megatron_ultramem.reporting.figure import COLORS, INK

Curve = dict[int, float]  # by step
Curves = dict[str, dict[str, dict[str, Curve]]]  # by variant, seed, and what it is of
Ends = dict[str, dict[str, float]]  # by variant and seed: mean loss of the last steps
SMOOTHED = 3  # points of the distance from bf16 that a line averages over


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a fp8_curves_<hardware>.json")
    parser.add_argument("picture", type=Path, help="the .png to write")
    args = parser.parse_args(arguments)
    return exit_status(lambda: draw(*read(args.results)).savefig(args.picture, dpi=110))


def read(path: Path) -> tuple[str, Curves, Ends, dict[str, str]]:
    """Hardware; losses and gradient norms of every variant and seed; where each ended; how far each variant ended from
    bf16, in words."""
    try:
        content = json.loads(path.read_text())
        hardware, rows = content["hardware"], content["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}; legal: a results file of tools/fp8_curves.py") from None
    curves: Curves = {}
    ends: Ends = {}
    said = {}
    for row in rows:
        variant, _, seed = row["case"].partition("/seed_")
        what, _, step = row["metric"].rpartition("_step_")
        if what and seed:
            curves.setdefault(variant, {}).setdefault(seed, {}).setdefault(what, {})[int(step)] = row["value"]
        elif row["metric"] == "loss_last_20" and seed:
            ends.setdefault(variant, {})[seed] = row["value"]
        elif row["metric"] == "loss_against_bf16":
            said[row["case"]] = f"{row['value']:+.2f} %"
        elif row["metric"] == "loss_against_bf16_error":
            said[row["case"]] += f" ± {row['value']:.2f}"
    if "bf16" not in curves:
        raise UserError(f"{path}: holds {', '.join(curves) or 'no curves'}; legal: a file with the variant bf16")
    return hardware, curves, ends, said


def draw(hardware: str, curves: Curves, ends: Ends, said: dict[str, str]) -> Figure:
    figure = Figure(figsize=(14, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss, distance, end, norm = figure.subplots(1, 4, width_ratios=[4, 4, 3, 4])
    shared = set.intersection(*(set(seeds) for seeds in curves.values())) or set(curves["bf16"])
    for (name, seeds), color in zip(curves.items(), COLORS, strict=False):
        style = {"color": color, "linewidth": 1.2}
        known = f", {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        label = name if name == "bf16" or name not in said else f"{name} ({said[name]} at the end{known})"
        drawn = [seeds[seed] for seed in sorted(shared & set(seeds) or seeds)]
        loss.plot(*_points(_mean([one["loss"] for one in drawn])), label=label, **style)
        norm.plot(*_points(_mean([one["grad_norm"] for one in drawn])), **style)
        both = [seed for seed in seeds if seed in curves["bf16"]]
        if name != "bf16" and both:
            distances = [_distance(seeds[seed]["loss"], curves["bf16"][seed]["loss"]) for seed in both]
            distance.plot(*_points(_mean(distances)), **style)
            of_seeds = [100 * (ends[name][seed] / ends["bf16"][seed] - 1) for seed in both]
            end.plot([name] * len(both), of_seeds, "o", color=color, markersize=4, alpha=0.6)
    loss.set_yscale("log")
    norm.set_yscale("log")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    for axes in (distance, end):
        axes.axhline(0, color=INK, linewidth=0.6)
    end.margins(x=0.2)
    end.set_xticks([])
    titles = ("training loss (nats/token)", "distance from bf16 (%)", "of each seed at the end (%)", "gradient norm")
    for axes, title in zip((loss, distance, end, norm), titles, strict=True):
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("variant" if axes is end else "step")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{hardware}, the same weights and data", fontsize=9, color=INK)
    return figure


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _mean(curves: list[Curve]) -> Curve:
    """At the steps that all have."""
    steps = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


def _distance(curve: Curve, bf16: Curve) -> Curve:
    """Per cent, at the steps that both have; means over `SMOOTHED` of them."""
    steps = [step for step in sorted(curve) if step in bf16]
    raw = [100 * (curve[step] / bf16[step] - 1) for step in steps]
    half = SMOOTHED // 2
    around = [raw[max(0, at - half) : at + half + 1] for at in range(len(raw))]
    return {step: sum(near) / len(near) for step, near in zip(steps, around, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
