#!/usr/bin/env python3
"""Trains several recipes on the same data in the same order, and shows who learns what from it.

    python tools/compare.py examples/configs/ultramemv2_227m_1b.yaml examples/configs/olmoe_227m_1b.yaml \\
        --tokens 2e8 --seeds 1,2,3 --output runs/comparison data.paths='[data/corpus]' train.global_batch_size=64

The budget is the same number of tokens for all (`--tokens`), or of minutes of training for each (`--minutes`: a few
steps of every recipe are timed first). The learning rate warms up over a twentieth of a run and decays to its end.
Settings apply to all recipes; with the name of a recipe before them (`olmoe_227m_1b:model.moe.dispatcher=allgather`) to
that one. Data, batch and vocabulary must be the same for all.

Every run is an `ultramem train`; its checkpoint is deleted when it is done. Runs that are there already, with
the same settings, are not repeated. Writes comparison.md, comparison.png and comparison_<hardware>.json to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from megatron_ultramem.config import load_config
from megatron_ultramem.config.load import config_to_dict, walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.reporting import Run, load_run
from megatron_ultramem.results import Row, write_results

ROOT = Path(__file__).resolve().parents[1]
TIMED_STEPS = 12  # for --minutes; the first is not counted
LOGGED_POINTS = 200  # of a curve
WARM_UP_SHARE = 20  # the reciprocal of the share of a run


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One contender: a config file and the settings on top of it."""

    name: str
    path: Path
    settings: list[str]
    config: Config

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.data.sequence_length


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    try:
        recipes = [_recipe(path, args) for path in args.recipes]
        _check(recipes)
        steps = _steps(recipes, args)
        runs = {recipe.name: _train(recipe, steps, args) for recipe in recipes}
        _report(recipes, runs, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE|SETTING", help="config files, and settings for all of them"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=float, help="tokens that every recipe is trained on")
    budget.add_argument("--minutes", type=float, help="minutes that every recipe is trained for")
    parser.add_argument("--seeds", default="1234", help="seeds of initialisation, a run for each (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder (default %(default)s)")
    args = parser.parse_intermixed_args(arguments)
    args.settings = [word for word in args.recipes if "=" in word]
    args.recipes = [Path(word) for word in args.recipes if "=" not in word]
    return args


def _recipe(path: Path, args: argparse.Namespace) -> Recipe:
    name = path.stem
    own = [word.removeprefix(f"{name}:") for word in args.settings if word.startswith(f"{name}:")]
    settings = [word for word in args.settings if ":" not in word.partition("=")[0]] + own
    return Recipe(name, path, settings, load_config(path, [*settings, "schedule.warmup_steps=0"]))


def _check(recipes: list[Recipe]) -> None:
    """Same data, batch and vocabulary; different names."""
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"recipes {', '.join(names)}: two have the same name")
    compared = [_what_must_agree(recipe.config) for recipe in recipes]
    for recipe, settings in zip(recipes, compared, strict=True):
        for name, value in settings.items():
            if value != compared[0][name]:
                raise UserError(
                    f"{name} = {value!r} in {recipe.name} and {compared[0][name]!r} in {names[0]}: recipes are "
                    f"compared on the same data; give {name}=... for all"
                )


def _what_must_agree(config: Config) -> dict[str, object]:
    found = {name: value for name, value, _ in walk(config.data, "data.")}
    for name in ("data.cache_dir", "data.num_workers"):
        del found[name]
    return found | {
        "train.global_batch_size": config.train.global_batch_size,
        "train.rampup_batch_size": config.train.rampup_batch_size,
        "model.vocab_size": config.model.vocab_size,
    }


def _steps(recipes: list[Recipe], args: argparse.Namespace) -> dict[str, int]:
    """Optimizer steps of a run of every recipe."""
    if args.tokens is not None:
        if not math.isfinite(args.tokens) or args.tokens < recipes[0].tokens_per_step:
            raise UserError(f"--tokens {args.tokens:g}: legal: at least the {recipes[0].tokens_per_step} of a step")
        return {recipe.name: math.ceil(args.tokens / recipe.tokens_per_step) for recipe in recipes}
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes:g}: legal: more than 0")
    known = args.output / "steps.json"  # so that a comparison that is called again goes on with the same budget
    key = json.dumps([args.minutes, args.ranks, args.settings])
    steps = json.loads(known.read_text()).get(key, {}) if known.exists() else {}
    for recipe in recipes:
        if recipe.name not in steps:
            folder = args.output / recipe.name / "timing"
            _run(recipe, folder, TIMED_STEPS, TIMED_STEPS, 0, args, interval=TIMED_STEPS, evaluate=False)
            seconds = statistics.fmean(load_run(folder).metrics["step_time_s"].values)
            steps[recipe.name] = max(2, round(60 * args.minutes / seconds))
    known.write_text(json.dumps({key: steps}))
    return steps


def _train(recipe: Recipe, steps: dict[str, int], args: argparse.Namespace) -> list[Run]:
    """A run for every seed."""
    runs = []
    own, most = steps[recipe.name], max(steps.values())
    for seed in _seeds(args.seeds):
        folder = args.output / recipe.name / f"seed_{seed}_{own}_steps"
        done, what = folder / "done.json", json.dumps([config_to_dict(recipe.config), most, args.ranks])
        if not done.exists() or done.read_text() != what:
            _run(recipe, folder, own, most, seed, args, interval=max(1, own // LOGGED_POINTS), evaluate=True)
            done.write_text(what)
        runs.append(load_run(folder))
    return runs


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: legal: numbers, such as 1,2,3") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: legal: different numbers from 0 on")
    return seeds


def _run(
    recipe: Recipe,
    folder: Path,
    own: int,
    most: int,
    seed: int,
    args: argparse.Namespace,
    *,
    interval: int,
    evaluate: bool,
) -> None:
    """One run of `own` steps. Every run is given data for `most`, because the order depends on how much is wanted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = [
        *recipe.settings, f"train.run_dir={folder}", f"train.steps={most}", f"train.exit_after_steps={own}",
        f"schedule.decay_steps={own}", f"optimizer.value_lr_rate={recipe.config.optimizer.value_lr_rate * own / most}",
        f"schedule.warmup_steps={own // WARM_UP_SHARE}", f"train.seed={seed}",
        f"logging.interval={interval}", "logging.progress=false", "logging.memory_health_interval=0",
        "checkpoint.load=none", "checkpoint.interval=0", f"data.cache_dir={args.output}/data_cache",
        *([] if evaluate else ["train.eval_steps=0"]),
    ]  # fmt: skip
    command = [sys.executable, "-m", "megatron_ultramem", "train", f"--config={recipe.path}", f"--ranks={args.ranks}"]
    print(f"{recipe.name}, seed {seed}: {own} steps", flush=True)
    done = subprocess.run([*command, *settings])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if done.returncode != 0:
        raise UserError(f"{recipe.name}, seed {seed}: the run in {folder} failed; its output says why")


def _report(recipes: list[Recipe], runs: dict[str, list[Run]], output: Path) -> None:
    from megatron_ultramem.planning.command import vocabulary
    from megatron_ultramem.reporting.comparison import (
        comparison_markdown,
        comparison_table,
        curve,
        draw_comparison,
        summarise,
    )

    vocab_size = vocabulary(recipes[0].config)
    summaries = [summarise(recipe.name, runs[recipe.name], vocab_size) for recipe in recipes]
    Console().print(comparison_table(summaries))
    (output / "comparison.md").write_text(comparison_markdown(summaries))
    drawn = [(recipe.name, [curve(run, vocab_size) for run in runs[recipe.name]]) for recipe in recipes]
    draw_comparison(drawn).savefig(output / "comparison.png", dpi=130)
    units = {"tokens_per_s": "tokens/s", "seconds": "s", "peak_gib": "GiB", "training_flops": "FLOP per token"}
    rows = [
        Row(summary.name, field, value, units.get(field, "nats/token" if "loss" in field else ""))
        for summary in summaries
        for field, value in dataclasses.asdict(summary).items()
        if field != "name" and value is not None
    ]
    written = write_results(output, "comparison", rows, keep_other_cases=False)
    print(f"{output / 'comparison.md'}  {output / 'comparison.png'}  {written}")


if __name__ == "__main__":
    raise SystemExit(main())
