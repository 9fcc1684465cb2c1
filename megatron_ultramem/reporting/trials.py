"""Trains several recipes on the same data in the same order: the runs of `tools/compare.py` and
`tools/learning_curve.py`. Every run is an `ultramem train` of its own; several can go on at once, each on its GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_ultramem.config import load_config
from megatron_ultramem.config.load import config_to_dict, walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.reporting.runs import Run, load_run
from megatron_ultramem.side_by_side import gpu_names

LOGGED_POINTS = 200  # of a curve
WARM_UP_SHARE = 20  # the reciprocal of the share of a run
DECAY_SHARE = 5  # likewise, of runs by the clock
POLL_SECONDS = 0.2


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


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a run lasts, the same for all: optimizer steps, which also lay out the data, or minutes if they end it
    sooner. By steps the learning rate is the recipe's schedule over all of them; by the clock it is held and decays
    over the last fifth of the time (wsd), because a schedule that falls from the start would have to know the speed.
    """

    steps: int
    minutes: float | None = None

    def settings(self) -> list[str]:
        if self.minutes is None:
            return [f"train.steps={self.steps}", f"schedule.warmup_steps={self.steps // WARM_UP_SHARE}"]
        decay = max(1, self.steps // DECAY_SHARE)
        return [
            f"train.steps={self.steps}", f"train.minutes={self.minutes}", "schedule.kind=wsd",
            f"schedule.wsd_decay_steps={decay}", f"schedule.warmup_steps={self.steps // WARM_UP_SHARE // 2}",
        ]  # fmt: skip


def load_recipe(path: Path, settings: Sequence[str]) -> Recipe:
    """`settings` are for all recipes, or begin with the name of the only one that they are for, and a colon."""
    name = path.stem
    own = [word.removeprefix(f"{name}:") for word in settings if word.startswith(f"{name}:")]
    chosen = [word for word in settings if ":" not in word.partition("=")[0]] + own
    return Recipe(name, path, chosen, load_config(path, [*chosen, "schedule.warmup_steps=0"]))


def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Raises UserError unless they differ in their names, and agree in data, batch and vocabulary."""
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


def parse_seeds(text: str) -> list[int]:
    """Numbers between commas, all different."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: legal: numbers, such as 1,2,3") from None
    if min(found) < 0 or len(set(found)) < len(found):
        raise UserError(f"--seeds {text}: legal: different numbers from 0 on")
    return found


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a recipe, with a seed of initialisation."""

    recipe: Recipe
    seed: int
    budget: Budget
    ranks: int
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / self.recipe.name / f"seed_{self.seed}"

    def is_done(self) -> bool:
        """Whether it was run before, with the same settings."""
        done = self.folder / "done.json"
        return done.exists() and done.read_text() == self._identity()

    def start(self, gpus: str | None, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
        """On these GPUs, or on all; prints to the terminal or into a file."""
        settings = [
            *self.recipe.settings, *self.budget.settings(), f"train.run_dir={self.folder}", "schedule.decay_steps=null",
            f"train.seed={self.seed}", f"logging.interval={max(1, self.budget.steps // LOGGED_POINTS)}",
            "logging.progress=false", "logging.memory_health_interval=0", "logging.straggler_interval=0",
            "checkpoint.load=none", "checkpoint.interval=0", f"data.cache_dir={self.output}/data_cache",
        ]  # fmt: skip
        # A single rank needs no launcher, and ends when it is ended.
        ranks = [f"--ranks={self.ranks}"] if self.ranks > 1 else []
        command = [sys.executable, "-m", "megatron_ultramem", "train", f"--config={self.recipe.path}", *ranks]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {})
        print(f"{self.recipe.name}, seed {self.seed}: {self.budget.steps} steps", flush=True)
        return subprocess.Popen([*command, *settings], env=environment, stdout=log, stderr=log and subprocess.STDOUT)

    def finish(self, status: int) -> None:
        """Marks it as done if it is; the checkpoint goes."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        if status == 0:
            (self.folder / "done.json").write_text(self._identity())

    def result(self) -> Run | None:
        """What it logged, if that is enough for a curve: a run that was ended early has one too."""
        try:
            run = load_run(self.folder)
        except UserError:
            return None
        return run if "tokens_per_s" in run.metrics and run.config is not None else None

    def _identity(self) -> str:
        what = [config_to_dict(self.recipe.config), dataclasses.asdict(self.budget), self.ranks]
        return json.dumps(what)


def run_trials(trials: Sequence[Trial], *, at_once: int, deadline: float | None = None) -> list[Trial]:
    """Runs what is not done yet, `at_once` at a time; returns those that failed, or went on at the deadline and were
    ended (seconds of time.monotonic)."""
    waiting = [trial for trial in trials if not trial.is_done()]
    gpus = gpus_of_places(at_once, max((trial.ranks for trial in trials), default=1))
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}
    failed: list[Trial] = []
    with contextlib.ExitStack() as files:
        try:
            while waiting or running:
                for place in range(at_once):
                    if place not in running and waiting:
                        trial = waiting.pop(0)
                        shutil.rmtree(trial.folder, ignore_errors=True)
                        trial.folder.mkdir(parents=True)
                        log = files.enter_context((trial.folder / "log").open("wb")) if at_once > 1 else None
                        running[place] = trial, trial.start(gpus[place] if gpus else None, log)
                for place, trial, status in _ended(running):
                    del running[place]
                    trial.finish(status)
                    if status:
                        failed.append(trial)
                        _show_end(trial)
                if deadline is not None and time.monotonic() > deadline:
                    return failed + [trial for trial, _ in running.values()] + waiting
                time.sleep(POLL_SECONDS)
        finally:
            for _, process in running.values():
                process.kill()
                process.wait()
    return failed


def _ended(running: dict[int, tuple[Trial, subprocess.Popen[bytes]]]) -> Iterator[tuple[int, Trial, int]]:
    for place, (trial, process) in list(running.items()):
        if (status := process.poll()) is not None:
            yield place, trial, status


def _show_end(trial: Trial) -> None:
    log = trial.folder / "log"
    text = log.read_text(errors="replace") if log.exists() else ""
    print(f"{trial.recipe.name}, seed {trial.seed} failed", *text.splitlines()[-25:], sep="\n", flush=True)


def gpus_of_places(at_once: int, ranks: int) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each of the runs of `ranks` ranks that go on `at_once`; None where they see all GPUs, as
    there are none, or there is one run at a time. Raises UserError where there are too few."""
    import torch

    if at_once < 1:
        raise UserError(f"--at-once {at_once}: legal: at least 1")
    if at_once == 1 or not torch.cuda.is_available():
        return None
    every = gpu_names(torch.cuda.device_count())
    if len(every) < at_once * ranks:
        raise UserError(f"--at-once {at_once}: legal with {len(every)} GPUs and {ranks} ranks: {len(every) // ranks}")
    return [",".join(every[place * ranks : (place + 1) * ranks]) for place in range(at_once)]
