"""Draws the metrics of one run, or of several overlaid, as one PNG or one self-contained HTML page.

python tools/report_run.py runs/a                        # runs/a/report.png
python tools/report_run.py runs/a runs/b -o compare.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ultramem.errors import UserError
from megatron_ultramem.reporting import load_run, write_report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after printing what is wrong with the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (with metrics.jsonl)")
    parser.add_argument("-o", "--output", help=".png or .html; default: report.png in the (first) run folder")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(folder) for folder in options.runs]
        default = Path(options.runs[0]) if Path(options.runs[0]).is_dir() else Path(options.runs[0]).parent
        print(write_report(runs, options.output or default / "report.png"))
    except UserError as error:
        print(f"report_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
