"""The README quotes what benchmarks/results holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "tools/readme_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
