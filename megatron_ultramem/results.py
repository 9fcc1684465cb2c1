"""Benchmark results as files: one format for everything that this project quotes.

{"benchmark", "hardware", "versions": {}, "commit", "date", "command", "rows": [{"case", "metric", "value", "unit"}]}

Cases that an earlier call measured and the last did not are listed under "earlier": [{"cases": [], "versions",
"commit", "date", "command"}]. Without such cases it is not there.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ORIGIN = ("versions", "commit", "date", "command")  # of rows
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")


@dataclass(frozen=True)
class Row:
    """One figure."""

    case: str
    metric: str
    value: float
    unit: str


def hardware_name() -> str:
    """Name of the GPU as CUDA gives it, or 'CPU'."""
    if not torch.cuda.is_available():
        return "CPU"
    count = torch.cuda.device_count()
    return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name()


def short_hardware_name() -> str:
    """For file names: h100, h200, a100, cpu, …; with x2 behind it for two."""
    if not torch.cuda.is_available():
        return "cpu"
    found = re.search(r"[A-Z]+\d+", torch.cuda.get_device_name().replace("NVIDIA", ""))
    count = torch.cuda.device_count()
    return (found[0].lower() if found else "gpu") + (f"x{count}" if count > 1 else "")


def results_path(folder: Path, benchmark: str) -> Path:
    """Where the results of a benchmark on this machine are."""
    return folder / f"{benchmark}_{short_hardware_name()}.json"


def write_results(
    folder: Path,
    benchmark: str,
    rows: Sequence[Row],
    *,
    keep_other_cases: bool = True,
    measured: Collection[str] | None = None,
) -> Path:
    """Writes <benchmark>_<hardware>.json; with `keep_other_cases`, cases of an existing file not measured now stay.

    measured: the cases that this call measured, if `rows` has those of the existing file too; None: all of `rows`.
    """
    path = results_path(folder, benchmark)
    given = {row.case for row in rows}
    this = {
        "versions": _versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }
    kept, earlier = [], []
    if keep_other_cases and path.exists():
        before = json.loads(path.read_text())
        kept = [row for row in before["rows"] if row["case"] not in given]
        now = given if measured is None else measured
        cases = dict.fromkeys(row["case"] for row in before["rows"] if row["case"] not in now)
        earlier = [call for call in _earlier(before, list(cases)) if any(call[name] != this[name] for name in ORIGIN)]
    content = {
        "benchmark": benchmark,
        "hardware": hardware_name(),
        **this,
        **({"earlier": earlier} if earlier else {}),
        "rows": kept + [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a results file; a process that is ended meanwhile leaves the file that was there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _earlier(before: dict[str, Any], cases: list[str]) -> list[dict[str, Any]]:
    """Where cases of a file come from: what it says of earlier calls, and then its own last call."""
    known = [{**call, "cases": [case for case in call["cases"] if case in cases]} for call in before.get("earlier", ())]
    attributed = {case for call in known for case in call["cases"]}
    last = {"cases": [case for case in cases if case not in attributed], **{name: before[name] for name in ORIGIN}}
    return [call for call in (*known, last) if call["cases"]]


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The commit, from the variable COMMIT where a tree travels without its history, otherwise from git."""
    if named := os.environ.get("COMMIT"):
        return named
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
