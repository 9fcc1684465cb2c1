#!/usr/bin/env python3
"""A small run on two ranks of this machine under random faults, with automatic restart: it must end with the very bits
of a run without faults.

    python tools/soak.py --faults 30 --seed 1

The faults: kill -9 of a random rank, at a random moment and in the middle of saving; SIGTERM; SIGSTOP; a full disk (a
small tmpfs, which only root may mount; left out otherwise); a truncated checkpoint file. The seed is printed, and with
it the faults come in the same order at the same steps. Every checkpoint (parameters and optimizer state) is compared
with that of the run without faults, none may be missing, `latest` must lead to a whole one whenever one looks, and no
process may be left behind. Results go to benchmarks/results/soak_<hardware>.json; exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the runs are on the CPU, where they are bitwise reproducible

from megatron_ultramem.quiet import quiet_dependencies  # noqa: E402
from megatron_ultramem.results import Row, write_results  # noqa: E402
from megatron_ultramem.soak.faults import KINDS, plan  # noqa: E402
from megatron_ultramem.soak.run import Outcome, soak  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="how many (default 30)")
    parser.add_argument("--seed", type=int, help="of the faults (default: a random one)")
    parser.add_argument("--steps", type=int, help="of the run (default: 5 for each fault, and 10)")
    parser.add_argument("--save", choices=("sync", "async"), default="async", help="how checkpoints are written")
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="give up after so long (default 60)")
    parser.add_argument("--folder", type=Path, help="where to work, kept afterwards (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    args = parser.parse_args()
    quiet_dependencies()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    steps = args.steps or 5 * args.faults + 10
    kinds = KINDS if os.geteuid() == 0 else tuple(kind for kind in KINDS if kind != "full_disk")
    _say(f"seed {seed}: {args.faults} faults of {', '.join(kinds)}")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    outcome = soak(
        folder,
        plan(seed, args.faults, steps, kinds),
        steps,
        async_save=args.save == "async",
        limit_seconds=60 * args.limit_minutes,
        say=_say,
    )
    for problem in outcome.problems:
        _say(f"PROBLEM: {problem}")
    if outcome.problems:
        _say(f"seed {seed} failed; everything is in {folder}")
        return 1
    _say(f"seed {seed} passed in {outcome.seconds:.0f} s: {outcome.restarts} restarts")
    print(write_results(args.output, "soak", _rows(seed, args.save, outcome)))
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def _rows(seed: int, save: str, outcome: Outcome) -> list[Row]:
    case = f"{len(outcome.faults)}_faults_{save}"
    rows = [
        Row(case, "passed", 1.0, ""),
        Row(case, "seed", seed, ""),
        Row(case, "steps", outcome.steps, ""),
        Row(case, "seconds", round(outcome.seconds, 1), "s"),
        Row(case, "restarts", outcome.restarts, ""),
        Row(case, "launches", outcome.launches, ""),
        Row(case, "checkpoints_equal_by_every_bit", outcome.checkpoints, ""),
        Row(case, "checkpoints_lost", 0.0, ""),
        Row(case, "damaged_checkpoints_passed_over", outcome.fallbacks, ""),
    ]
    for kind in KINDS:
        number = sum(fault.kind == kind for fault, _ in outcome.faults)
        seconds = [value for found, value in outcome.recovery_seconds if found == kind]
        rows.append(Row(case, f"faults_{kind}", number, ""))
        if seconds:
            rows.append(Row(case, f"recovery_median_{kind}", round(statistics.median(seconds), 1), "s"))
            rows.append(Row(case, f"recovery_longest_{kind}", round(max(seconds), 1), "s"))
    return rows


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
