"""The report as one HTML file that needs nothing else: the figure as SVG, a table of key figures, the settings."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence

from megatron_ultramem.reporting.figure import draw
from megatron_ultramem.reporting.runs import Run, Series, config_items

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1250px; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #e5e7eb; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
details table { font-family: ui-monospace, monospace; font-size: 13px; }
summary { cursor: pointer; font-weight: 600; margin-top: 1.5rem; }
"""


def render_page(runs: Sequence[Run]) -> str:
    """The whole page."""
    buffer = io.StringIO()
    draw(runs).savefig(buffer, format="svg")
    svg = buffer.getvalue()
    title = html.escape("Run report: " + ", ".join(run.name for run in runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{svg[svg.index('<svg') :]}\n{_key_figures(runs)}\n"
        + "\n".join(_settings(run) for run in runs)
        + "\n</body></html>\n"
    )


def _key_figures(runs: Sequence[Run]) -> str:
    columns = ["run", "last step", "train loss", "best validation loss", "median tokens/s", "median MFU", "peak memory"]
    rows = []
    for run in runs:
        cells = [
            run.name,
            f"{max(series.steps[-1] for series in run.metrics.values()):,}",
            _format("{:.4f}", _finite(run, "loss")[-1:]),
            _format("{:.4f}", sorted(_finite(run, "valid_loss"))[:1]),
            _format("{:,.0f}", _median(_finite(run, "tokens_per_s"))),
            _format("{:.1%}", _median(_finite(run, "mfu"))),
            _format("{:.2f} GiB", sorted(_finite(run, "memory_gib"))[-1:]),
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _settings(run: Run) -> str:
    if run.config is None:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in config_items(run.config)
    )
    return f"<details><summary>Settings of {html.escape(run.name)}</summary><table>{rows}</table></details>"


def _finite(run: Run, name: str) -> list[float]:
    return [value for value in run.metrics.get(name, Series([], [])).values if math.isfinite(value)]


def _median(values: Sequence[float]) -> list[float]:
    return [sorted(values)[len(values) // 2]] if values else []


def _format(form: str, values: Sequence[float]) -> str:
    return form.format(values[0]) if values else "–"
