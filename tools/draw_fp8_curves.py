#!/usr/bin/env python3
"""Draws what tools/fp8_curves.py measured: losses, their distance from bf16, and gradient norms.

python tools/draw_fp8_curves.py benchmarks/results/fp8_curves_h200.json docs/fp8_curves_h200.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ultramem.errors import UserError, exit_status
from megatron_ultramem.reporting.figure import COLORS, INK

Curve = dict[int, float]  # by step
SMOOTHED = 3  # points of the distance from bf16 that a line averages over


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a fp8_curves_<hardware>.json")
    parser.add_argument("picture", type=Path, help="the .png to write")
    args = parser.parse_args(arguments)
    return exit_status(lambda: draw(*read(args.results)).savefig(args.picture, dpi=110))


def read(path: Path) -> tuple[str, dict[str, dict[str, Curve]], dict[str, str]]:
    """Hardware and number of seeds; losses and gradient norms of every variant, means over seeds; how far each ended
    from bf16, in words."""
    try:
        content = json.loads(path.read_text())
        hardware, rows = content["hardware"], content["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}; legal: a results file of tools/fp8_curves.py") from None
    curves: dict[str, dict[str, Curve]] = {}
    ends = {}
    seeds = 1
    for row in rows:
        if "/seed_" in row["case"]:
            continue
        what, _, step = row["metric"].rpartition("_step_")
        if what:
            curves.setdefault(row["case"], {}).setdefault(what, {})[int(step)] = row["value"]
        elif row["metric"] == "loss_against_bf16":
            ends[row["case"]] = f"{row['value']:+.2f} %"
        elif row["metric"] == "loss_against_bf16_error":
            ends[row["case"]] += f" ± {row['value']:.2f}"
        elif row["metric"] == "seeds":
            seeds = max(seeds, int(row["value"]))
    if "bf16" not in curves:
        raise UserError(f"{path}: holds {', '.join(curves) or 'no curves'}; legal: a file with the variant bf16")
    return hardware + (f", means over up to {seeds} seeds" if seeds > 1 else ""), curves, ends


def draw(hardware: str, curves: dict[str, dict[str, Curve]], ends: dict[str, str]) -> Figure:
    figure = Figure(figsize=(13, 4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss, distance, norm = figure.subplots(1, 3)
    for (name, found), color in zip(curves.items(), COLORS, strict=False):
        style = {"color": color, "linewidth": 1.2}
        label = name if name == "bf16" or name not in ends else f"{name} ({ends[name]} at the end)"
        loss.plot(*_points(found["loss"]), label=label, **style)
        norm.plot(*_points(found["grad_norm"]), **style)
        if name != "bf16":
            distance.plot(*_points(_distance(found["loss"], curves["bf16"]["loss"])), **style)
    loss.set_yscale("log")
    norm.set_yscale("log")
    loss.legend(fontsize=7)
    distance.axhline(0, color=INK, linewidth=0.6)
    titles = ("training loss (nats per token)", "distance of the loss from bf16 (%)", "gradient norm")
    for axes, title in zip((loss, distance, norm), titles, strict=True):
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{hardware}, the same weights and data", fontsize=9, color=INK)
    return figure


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _distance(curve: Curve, bf16: Curve) -> Curve:
    """Per cent, at the steps that both have; means over `SMOOTHED` of them."""
    steps = [step for step in sorted(curve) if step in bf16]
    raw = [100 * (curve[step] / bf16[step] - 1) for step in steps]
    half = SMOOTHED // 2
    around = [raw[max(0, at - half) : at + half + 1] for at in range(len(raw))]
    return {step: sum(near) / len(near) for step, near in zip(steps, around, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
