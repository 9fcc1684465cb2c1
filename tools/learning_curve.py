#!/usr/bin/env python3
"""A first learning curve: an UltraMemV2 and an MoE of the same size, on the same text, for the same time.

    python tools/learning_curve.py --seconds 560 --seeds 1,2 --at-once 4 --output benchmarks/results

The recipes (benchmarks/configs) agree in active and total parameters within 1 %. The text is the code and the
documents of the Python packages of this machine: different files, every fiftieth held out; the tokenizer is a BPE
trained on them.
Each run trains until its share of the time is over, with the learning rate held and then decayed over the last fifth,
and is evaluated on the held-out text on the way. On GPUs both train with preset=throughput.

Everything ends after --seconds. Runs that still go on are ended, and shown by themselves as far as they got: means are
over those that ended in time. Writes
learning_curve.md, learning_curve.png and learning_curve_<hardware>.json. Settings as in tools/compare.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import UserError, exit_status

if TYPE_CHECKING:  # processes that tokenise import this file: torch would be most of their work
    from megatron_ultramem.reporting.trials import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [ROOT / "benchmarks" / "configs" / f"{name}.yaml" for name in ("ultramemv2_49m_228m", "moe_49m_228m")]
LARGEST_DIFFERENCE = 0.01  # in active and in total parameters
HELD_OUT = 0.02
ON_GPUS = ["preset=throughput", "data.num_workers=2"]
MOST_EPOCHS = 4  # of the text, whatever the time
# Of a run that are no training: start, model and kernels before it, the last checkpoint after it; and of the report.
START_SECONDS, REPORT_SECONDS = 75, 20
MOST_WORKERS = 48


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    args = _arguments(arguments)
    from megatron_ultramem.quiet import quiet_dependencies

    quiet_dependencies()
    with tempfile.TemporaryDirectory() as folder:
        return exit_status(lambda: _compare(args, began, Path(folder)))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default %(default)g)")
    parser.add_argument("--seeds", default="1", help="seeds of initialisation, a run for each (default %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on a GPU of its own (default 1)")
    parser.add_argument("--recipes", type=Path, nargs=2, default=RECIPES, help="default: those of benchmarks/configs")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="folders of text (default: what this Python has installed)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("settings", nargs="*", metavar="[RECIPE:]section.setting=value")
    return parser.parse_args(arguments)


def _compare(args: argparse.Namespace, began: float, folder: Path) -> int:
    import torch

    from megatron_ultramem.reporting.comparison_files import write_comparison
    from megatron_ultramem.reporting.trials import (
        Budget,
        Trial,
        check_recipes,
        gpus_of_places,
        load_recipe,
        parse_seeds,
        run_trials,
    )

    seeds = parse_seeds(args.seeds)
    gpus_of_places(args.at_once, 1)
    settings = [*(ON_GPUS if torch.cuda.is_available() else []), *args.settings]
    same_size([load_recipe(path, settings) for path in args.recipes])
    settings += make_text(args.text, _vocabulary(load_recipe(args.recipes[0], settings)), folder / "data")
    recipes = [load_recipe(path, settings) for path in args.recipes]
    check_recipes(recipes)
    rounds = -(-len(seeds) * len(recipes) // args.at_once)
    left = args.seconds - (time.monotonic() - began) - REPORT_SECONDS
    minutes = (left / rounds - START_SECONDS) / 60
    if minutes <= 0:
        raise UserError(f"--seconds {args.seconds:g}: legal: more; the text is made, and {left:.0f} s are left")
    print(f"{minutes:.1f} minutes of training for each of {len(seeds) * len(recipes)} runs", flush=True)
    budget = Budget(_most_steps(recipes[0]), minutes)
    # Pairs side by side, so that a comparison that ends early has both.
    trials = [Trial(recipe, seed, budget, 1, folder / "runs") for seed in seeds for recipe in recipes]
    failed = run_trials(trials, at_once=args.at_once, deadline=began + args.seconds - REPORT_SECONDS)
    for path in write_comparison(trials, args.output, "learning_curve"):
        print(path)
    for trial in failed:
        print(f"{trial.recipe.name}, seed {trial.seed}: failed, or was ended before its time", file=sys.stderr)
    return int(bool(failed))


def same_size(recipes: Sequence[Recipe]) -> None:
    """Raises UserError unless they have the same active and total parameters, within LARGEST_DIFFERENCE."""
    from megatron_ultramem.planning.parameters import count_parameters

    first, second = (count_parameters(recipe.config.model, _vocabulary(recipe)) for recipe in recipes)
    for what in ("active", "total"):
        counts = getattr(first, what), getattr(second, what)
        if max(counts) > (1 + LARGEST_DIFFERENCE) * min(counts):
            raise UserError(
                f"{recipes[0].name} has {counts[0]:,} {what} parameters and {recipes[1].name} {counts[1]:,}; legal: "
                f"at most {LARGEST_DIFFERENCE:.0%} apart"
            )


def _vocabulary(recipe: Recipe) -> int:
    """What the tokenizer gets."""
    if recipe.config.model.vocab_size is None:
        raise UserError(f"model.vocab_size = null in {recipe.name}; legal: a number, which the tokenizer gets")
    return recipe.config.model.vocab_size


def make_text(folders: Sequence[Path] | None, vocab_size: int, output: Path) -> list[str]:
    """Tokenizer and tokenised text, as settings."""
    from megatron_ultramem.training.package_corpus import package_files, train_tokenizer
    from megatron_ultramem.training.preprocess import preprocess

    began = time.monotonic()
    files = package_files(HELD_OUT, folders)
    tokenizer = TokenizerConfig(kind="huggingface", path=str(output / "tokenizer.json"))
    train_tokenizer(files.train, vocab_size, output / "tokenizer.json")
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    tokens = []
    for name, paths in (("train", files.train), ("valid", files.held_out)):
        tokens.append(preprocess(paths, output / name, tokenizer, workers=workers).tokens)
    print(
        f"text: {len(files.train):,} files, {files.train_bytes / 1e6:.0f} MB, {tokens[0] / 1e6:.1f}M tokens; held out: "
        f"{len(files.held_out):,} files, {tokens[1] / 1e6:.2f}M tokens; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return [
        f"data.train_paths=[{output}/train]", f"data.valid_paths=[{output}/valid]", "data.paths=[]",
        "data.tokenizer.kind=huggingface", f"data.tokenizer.path={output}/tokenizer.json",
    ]  # fmt: skip


def _most_steps(recipe: Recipe) -> int:
    from megatron_ultramem.training.data.index_file import read_index

    tokens = read_index(recipe.config.data.train_paths[0]).tokens
    return max(2, MOST_EPOCHS * tokens // recipe.tokens_per_step)


if __name__ == "__main__":
    raise SystemExit(main())
