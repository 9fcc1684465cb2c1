"""Turns the metrics of runs into one picture or one web page.

write_report([load_run(folder)], output)    # output: .png or .html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ultramem.errors import UserError
from megatron_ultramem.reporting.runs import Run, load_run

__all__ = ["Run", "load_run", "write_report"]


def write_report(runs: Sequence[Run], output: str | Path) -> Path:
    """Writes the report of `runs` (several are overlaid) to `output` and returns its path.

    Raises UserError for an extension other than .png, .html and .htm, and for a file that cannot be written.
    """
    path = Path(output)
    extension = path.suffix.lower()
    if extension not in (".png", ".html", ".htm"):
        raise UserError(f"report file {path}: unknown extension {extension!r}; legal: .png, .html")
    # Here, so that reading runs does not cost the import of matplotlib.
    from megatron_ultramem.reporting.figure import draw
    from megatron_ultramem.reporting.page import render_page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if extension == ".png":
            draw(runs).savefig(path, dpi=130)
        else:
            path.write_text(render_page(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"report file {path}: cannot be written ({error})") from error
    return path
