#!/usr/bin/env python3
"""Trains several recipes on the same data in the same order, and shows who learns what from it.

    python tools/compare.py examples/configs/ultramemv2_227m_1b.yaml examples/configs/olmoe_227m_1b.yaml \\
        --tokens 2e8 --seeds 1,2,3 --output runs/comparison data.paths='[data/corpus]' train.global_batch_size=64

The budget is the same number of tokens for all (`--tokens`), or with `--minutes` as many of them as each can train on
in that time: then the learning rate is held and decays over the last fifth. It warms up over a twentieth of the tokens.
Settings apply to all recipes; with the name of a recipe before them (`olmoe_227m_1b:model.moe.dispatcher=allgather`) to
that one. Data, batch and vocabulary must be the same for all.

Every run is an `ultramem train`; its checkpoint is deleted when it is done. Runs that are there already, with
the same settings, are not repeated; those that fail are shown as far as they got, outside of the means. Writes
comparison.md, comparison.png and comparison_<hardware>.json to --output.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from megatron_ultramem.errors import UserError
from megatron_ultramem.quiet import quiet_dependencies
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


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    try:
        recipes = [load_recipe(path, args.settings) for path in args.recipes]
        check_recipes(recipes)
        budget = _budget(args, recipes[0].tokens_per_step)
        trials = [
            Trial(recipe, seed, budget, args.ranks, args.output)
            for seed in parse_seeds(args.seeds)
            for recipe in recipes
        ]  # fmt: skip
        failed = run_trials(trials, at_once=args.at_once)
        for path in write_comparison(trials, args.output):
            print(path)
        if failed:
            raise UserError(f"{failed[0].recipe.name}, seed {failed[0].seed}: the run in {failed[0].folder} failed")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE|SETTING", help="config files, and settings for all of them"
    )
    parser.add_argument("--tokens", type=float, required=True, help="tokens that a run is trained on, at most")
    parser.add_argument("--minutes", type=float, help="minutes that a run is trained for, at most")
    parser.add_argument("--seeds", default="1234", help="seeds of initialisation, a run for each (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default 1)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on GPUs of its own (default 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder (default %(default)s)")
    args = parser.parse_intermixed_args(arguments)
    args.settings = [word for word in args.recipes if "=" in word]
    args.recipes = [Path(word) for word in args.recipes if "=" not in word]
    return args


def _budget(args: argparse.Namespace, tokens_per_step: int) -> Budget:
    if not math.isfinite(args.tokens) or args.tokens < tokens_per_step:
        raise UserError(f"--tokens {args.tokens:g}: legal: at least the {tokens_per_step} of a step")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes:g}: legal: more than 0")
    if args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: legal: at least 1")
    gpus_of_places(args.at_once, args.ranks)
    return Budget(math.ceil(args.tokens / tokens_per_step), args.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
