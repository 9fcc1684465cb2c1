"""Writes what compared runs found: a table, a figure, and the figures as benchmark results."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ultramem.errors import UserError
from megatron_ultramem.planning.command import vocabulary
from megatron_ultramem.reporting.comparison import (
    Curve,
    Summary,
    comparison_markdown,
    comparison_table,
    curve,
    draw_comparison,
    summarise,
)
from megatron_ultramem.reporting.runs import format_count
from megatron_ultramem.reporting.trials import Trial
from megatron_ultramem.results import Row, write_results

_UNITS = {
    "tokens_per_s": "tokens/s", "seconds": "s", "peak_gib": "GiB", "training_flops": "FLOP per token", "tokens": "",
}  # fmt: skip


def write_comparison(trials: Sequence[Trial], output: Path, name: str = "comparison") -> list[Path]:
    """<name>.md, <name>.png and <name>_<hardware>.json in `output`, of the runs that logged enough; their paths.

    Raises UserError if there is none.
    """
    found = {trial.recipe.name: trial.recipe for trial in trials}
    runs = {recipe: [run for trial in trials if trial.recipe.name == recipe and (run := trial.result())]
            for recipe in found}  # fmt: skip
    runs = {recipe: own for recipe, own in runs.items() if own}
    if not runs:
        raise UserError("no run logged enough to be shown; their output says why")
    vocab_size = vocabulary(trials[0].recipe.config)
    curves = {recipe: [curve(run, vocab_size) for run in own] for recipe, own in runs.items()}
    summaries = [summarise(recipe, own, vocab_size) for recipe, own in runs.items()]
    Console().print(comparison_table(summaries))
    output.mkdir(parents=True, exist_ok=True)
    table, figure = output / f"{name}.md", output / f"{name}.png"
    table.write_text(comparison_markdown(summaries))
    labels = [f"{s.name}: {format_count(s.active)} active of {format_count(s.parameters)}" for s in summaries]
    draw_comparison(list(zip(labels, curves.values(), strict=True))).savefig(figure, dpi=130)
    rows = [row for summary in summaries for row in [*_rows(summary), *_valid_rows(summary.name, curves[summary.name])]]
    return [table, figure, write_results(output, name, rows, keep_other_cases=False)]


def _rows(summary: Summary) -> list[Row]:
    return [
        Row(summary.name, field, value, _UNITS.get(field, "nats/token" if "loss" in field else ""))
        for field, value in dataclasses.asdict(summary).items()
        if field != "name" and value is not None
    ]


def _valid_rows(recipe: str, curves: Sequence[Curve]) -> list[Row]:
    """Validation losses on the way, means over the runs that got so far."""
    at_tokens: dict[float, list[float]] = {}
    for one in curves:
        for tokens, loss in zip(one.tokens, one.valid_loss, strict=True):
            if math.isfinite(loss):
                at_tokens.setdefault(tokens, []).append(loss)
    return [
        Row(recipe, f"valid_loss_after_{tokens:.0f}_tokens", statistics.fmean(losses), "nats/token")
        for tokens, losses in sorted(at_tokens.items())
    ]
