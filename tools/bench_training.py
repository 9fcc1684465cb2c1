#!/usr/bin/env python3
"""Trains a recipe for some steps and measures it: speed, memory, where the time goes, and whether the loss falls.

    python tools/bench_training.py --config examples/configs/ultramemv2_227m_1b.yaml data.paths='[data/corpus]'
    python tools/bench_training.py --config ... --presets none,throughput --ablate data.paths='[data/corpus]'
    python tools/bench_training.py --config benchmarks/configs/ultramemv2_1b_7b_cut.yaml \
        --presets throughput,throughput_fp8 data.paths='[data/corpus]'

`tokens_per_s` counts forward and backward alone, `tokens_per_s_with_optimizer` whole steps of 8 micro-batches; `tflops`
and `mfu` are of forward and backward. `gpu_busy_ms` is the time in which the GPU computes in one forward and backward;
`<component>_ms` splits the kernels of a step of one micro-batch without CUDA graphs; `host_waits` counts where the host
waits for the GPU in a forward and backward. The case is <name of the config file>/<preset>. With --ablate every preset
is also measured without each of its settings in turn, speed and memory alone, in cases <recipe>/<preset>-<setting>.
Results go to benchmarks/results/training_<hardware>.json. Start it with torchrun for several ranks (and one preset).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import Config, load_config
from megatron_ultramem.config.load import walk
from megatron_ultramem.config.presets import graph_settings, preset_settings
from megatron_ultramem.errors import ConfigError, UserError, exit_status
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
ONLY = "--only="
ABLATION_STEPS = 3  # before an ablation is measured: compilation, recording, one more


def main() -> int:
    args = parse()
    quiet_dependencies()
    return exit_status(lambda: _one(args) if args.only or "RANK" in os.environ else _all(args))


def _all(args: argparse.Namespace) -> None:
    """Every case in a process of its own, as what a model leaves behind would count for the next; one that fails costs
    the others nothing."""
    if not torch.cuda.is_available():  # where there is a GPU, it is the cases' alone
        prepare()
    failed = [
        case for case, *_ in cases(args) if subprocess.run([sys.executable, *sys.argv, f"{ONLY}{case}"]).returncode != 0
    ]
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, as said above")


def _one(args: argparse.Namespace) -> None:
    sys.argv = [argument for argument in sys.argv if not argument.startswith(ONLY)]  # results quote the command
    prepare()
    found = {case: (config, steps, whole) for case, config, steps, whole in cases(args)}
    if not args.only and len(found) > 1:
        raise ConfigError(f"{', '.join(found)}: ranks that are started by torchrun measure one case; legal: one preset")
    case = args.only or next(iter(found))
    config, steps, whole = found[case]
    prepare(config.train.device)
    from megatron_ultramem.training.benchmark import measure

    rows = measure(config, case, steps, whole=whole)
    if rows:
        _show(case, rows)
        print(write_results(args.output, "training", rows), flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--presets", help="such as none,throughput; default: that of the config")
    parser.add_argument("--ablate", action="store_true", help="also the presets without each of their settings")
    parser.add_argument("--ablated", help="comma-separated settings for --ablate (default: all of a preset)")
    parser.add_argument("--case", help="instead of <recipe>/<preset>, for one preset with other settings")
    parser.add_argument("--steps", type=int, default=50, help="steps of training (default 50)")
    parser.add_argument("--micro-batches", type=int, default=8, help="per step of the training (default 8)")
    parser.add_argument("--warmup-steps", type=int, default=10, help="of the learning rate (default 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument(ONLY.rstrip("="), help=argparse.SUPPRESS)  # this case, in this process
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    return parser.parse_intermixed_args(arguments)


def cases(args: argparse.Namespace) -> list[tuple[str, Config, int, bool]]:
    """Case, settings, steps before it is measured, and whether all of it is measured."""
    presets = args.presets.split(",") if args.presets else [load_config(args.config, args.overrides).preset]
    if args.case and (len(presets) > 1 or args.ablate):
        raise ConfigError("--case names one case; legal: one preset, without --ablate")
    found = []
    for preset in presets:
        config = _load(args, args.steps, f"preset={preset}")
        found.append((args.case or f"{args.config.stem}/{preset}", config, args.steps, True))
    plain = {name: value for name, value, _ in walk(Config())}
    for preset, name in _ablations(args, presets):
        config = _load(args, ABLATION_STEPS, f"preset={preset}", f"{name}={str(plain[name]).lower()}")
        found.append((f"{args.config.stem}/{preset}-{name.split('.', 1)[1]}", config, ABLATION_STEPS, False))
    return found


def _ablations(args: argparse.Namespace, presets: list[str]) -> list[tuple[str, str]]:
    """Presets, each with a setting to be taken back."""
    if not args.ablate:
        return []
    loaded = {preset: _load(args, ABLATION_STEPS, f"preset={preset}") for preset in presets}
    parts = {preset: [*graph_settings(config, {}), *preset_settings(config)] for preset, config in loaded.items()}
    legal = list(dict.fromkeys(name for names in parts.values() for name in names))
    wanted = args.ablated.split(",") if args.ablated else legal
    if unknown := [name for name in wanted if name not in legal]:
        raise ConfigError(f"--ablated {unknown[0]}: legal: {', '.join(legal) or 'a preset other than none'}")
    return [(preset, name) for preset, names in parts.items() for name in names if name in wanted]


def _load(args: argparse.Namespace, steps: int, *more: str) -> Config:
    from megatron_ultramem.training.benchmark import steps_measured

    micro = load_config(args.config, args.overrides, check=False).train.micro_batch_size
    # Data for the measured steps too.
    all_steps = steps + steps_measured(args.micro_batches)
    return load_config(args.config, [
        f"train.steps={all_steps}", f"schedule.decay_steps={args.steps}", f"schedule.warmup_steps={args.warmup_steps}",
        f"train.global_batch_size={micro * args.micro_batches}", "train.eval_steps=0", "checkpoint.load=none",
        *args.overrides, *more,
    ])  # fmt: skip


def _show(case: str, rows: list[Row]) -> None:
    table = Table("metric", "value", "unit", title=case)
    for row in rows:
        table.add_row(row.metric, f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}", row.unit)
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
