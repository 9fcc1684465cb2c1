"""Curves and summaries of compared runs."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.flops import flops_per_token
from megatron_ultramem.reporting.comparison import (
    comparison_markdown,
    comparison_table,
    curve,
    draw_comparison,
    summarise,
)
from megatron_ultramem.reporting.runs import Run, Series

VOCABULARY = 300
CONFIG = load_config(None, ["model.num_layers=2", "data.sequence_length=64"])


def run(losses: list[float], *valid: float) -> Run:
    """Logged every 10 steps of 100 tokens; a step takes 2 s, and those of the last interval 4 s. Evaluated last."""
    steps = [1, *range(10, 10 * len(losses), 10)]
    slow = [2.0] * (len(losses) - 2) + [4.0]
    return Run(
        "r",
        {
            "loss": Series(steps, losses),
            "tokens": Series(steps, [100.0 * step for step in steps]),
            "step_time_s": Series(steps[1:], slow),  # the first step is not timed
            "tokens_per_s": Series(steps[1:], [100 / seconds for seconds in slow]),
            "memory_gib": Series(steps, [1.0] * (len(steps) - 1) + [1.5]),
            "valid_loss": Series(steps[-len(valid) :], list(valid)),
        },
        CONFIG,
    )


def test_a_curve_has_tokens_flops_and_the_time_of_steps() -> None:
    found = curve(run([6.0, 5.0, 4.0, 3.0], 3.5), VOCABULARY)
    assert found.tokens == [100, 1000, 2000, 3000]
    flops = flops_per_token(CONFIG.model, VOCABULARY, 64).training
    assert found.flops == [flops * tokens for tokens in found.tokens]
    assert found.seconds == [2, 2 + 9 * 2, 20 + 10 * 2, 40 + 10 * 4]
    assert found.valid_loss == pytest.approx([math.nan, math.nan, math.nan, 3.5], nan_ok=True)


def test_a_summary_is_over_all_seeds() -> None:
    summary = summarise("a", [run([6.0, 5.0, 4.0, 3.0], 3.5), run([6.0, 5.0, 4.0, 2.0], 2.5)], VOCABULARY)
    assert (summary.runs, summary.tokens, summary.seconds, summary.peak_gib) == (2, 3000, 80, 1.5)
    assert (summary.train_loss, summary.valid_loss) == (2.5, 3.0)
    assert summary.train_loss_deviation == pytest.approx(0.5**0.5)
    assert summary.tokens_per_s == 50  # the median: a slow interval does not count for more
    assert summary.parameters > summary.active


def test_the_table_says_the_spread_only_of_several_runs() -> None:
    runs = [run([6.0, 5.0, 4.0, 3.0], 3.5), run([6.0, 5.0, 4.0, 2.0], 2.5)]
    two, one = summarise("two", runs, VOCABULARY), summarise("one", runs[:1], VOCABULARY)
    lines = comparison_markdown([two, one]).splitlines()
    assert "2.5000 ± 0.7071" in lines[2] and "±" not in lines[3]
    console = Console(file=io.StringIO(), width=300)
    console.print(comparison_table([two, one]))
    assert "2.5000 ± 0.7071" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipes", [2, 5])
def test_a_terminal_of_80_columns_shows_every_figure_and_name(recipes: int) -> None:
    runs = [run([6.0, 5.0, 4.0, 3.0], 3.5), run([6.0, 5.0, 4.0, 2.0], 2.5)]
    names = [f"ultramemv2_{number}27m_1b" for number in range(recipes)]
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_table([summarise(name, runs, VOCABULARY) for name in names]))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    assert (said.count("2.5000"), said.count("0.7071")) == (recipes, 2 * recipes)
    assert "FLOPs/token" in said and "train loss" in said
    if recipes == 2:  # of more the names take several lines
        assert all(name in said for name in names)


def test_every_run_is_a_line_in_each_of_three_panels() -> None:
    curves = [curve(run([6.0, 5.0, 4.0, last], 3.5), VOCABULARY) for last in (3.0, 2.0)]
    figure = draw_comparison([("a", curves), ("b", curves[:1])])
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3]
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors[0] == colors[1] != colors[2]


def test_validation_losses_get_panels_of_their_own() -> None:
    curves = [curve(run([6.0, 5.0, 4.0, 3.0], 4.5, 3.5), VOCABULARY)]
    figure = draw_comparison([("a", curves)])
    assert len(figure.axes) == 6
    for axes, places in zip(figure.axes[3:], (curves[0].tokens, curves[0].flops, curves[0].seconds), strict=True):
        (line,) = axes.lines
        assert list(line.get_xdata()) == places[-2:] and list(line.get_ydata()) == [4.5, 3.5]


def test_the_steep_start_is_cut_off() -> None:
    losses = [10.0 if step < 4 else 2.0 - step / 100 for step in range(100)]
    figure = draw_comparison([("a", [curve(run(losses, 1.0), VOCABULARY)])])
    low, high = figure.axes[0].get_ylim()
    assert low < min(losses) and 1.9 < high < 2.1
    figure.axes[1].xaxis.set_ticks([2e15])
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["2e+15"]


def test_runs_that_were_cut_off_are_dashed_and_named() -> None:
    losses = [6.0, 5.0, 4.0, 3.0]
    curves = [curve(run(losses[:length], 3.5), VOCABULARY, whole=length == 4) for length in (4, 3, 4, 3)]
    for axes in draw_comparison([("a", curves)]).axes:
        assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-", "--"]
        assert len({line.get_color() for line in axes.lines}) == 1
    assert axes.get_legend_handles_labels()[1] == ["a", "a, cut off"]
