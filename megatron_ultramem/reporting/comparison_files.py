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

LOG_WIDTH = 400
_UNITS = {
    "tokens_per_s": "tokens/s", "seconds": "s", "peak_gib": "GiB", "training_flops": "FLOP per token", "tokens": "",
}  # fmt: skip


def write_comparison(trials: Sequence[Trial], output: Path, name: str = "comparison") -> list[Path]:
    """<name>.md, <name>.png and <name>_<hardware>.json in `output`, of the runs that logged enough; their paths.

    A recipe stands for its runs that ended by themselves. One that failed or was cut off has a name and figures of its
    own. Raises UserError if no run logged enough.
    """
    runs = [(trial, run) for trial in trials if (run := trial.result())]
    if not runs:
        raise UserError("no run logged enough to be shown; their output says why")
    vocab_size = vocabulary(trials[0].recipe.config)
    summaries: list[Summary] = []
    drawn: list[tuple[str, list[Curve]]] = []
    rows: list[Row] = []
    for recipe in dict.fromkeys(trial.recipe.name for trial, _ in runs):
        own = [(trial, run) for trial, run in runs if trial.recipe.name == recipe]
        groups = {recipe: [run for trial, run in own if trial.is_done()]}
        groups |= {f"{recipe}, seed {trial.seed}, cut off": [run] for trial, run in own if not trial.is_done()}
        curves: list[Curve] = []
        for case, group in groups.items():
            if group:
                summaries.append(summarise(case, group, vocab_size))
                found = [curve(run, vocab_size, whole=case == recipe) for run in group]
                rows += [*_rows(summaries[-1]), *_valid_rows(case, found)]
                curves += found
        size = f"{format_count(summaries[-1].active)} active of {format_count(summaries[-1].parameters)}"
        drawn.append((f"{recipe}: {size}", curves))
    # A file of logs has room for any table; only a terminal has a width to keep to.
    console = Console() if Console().is_terminal else Console(width=LOG_WIDTH)
    console.print(comparison_table(summaries))
    output.mkdir(parents=True, exist_ok=True)
    table, figure = output / f"{name}.md", output / f"{name}.png"
    table.write_text(comparison_markdown(summaries))
    draw_comparison(drawn).savefig(figure, dpi=130)
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
