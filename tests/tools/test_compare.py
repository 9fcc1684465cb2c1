"""tools/compare.py at toy size: same data in the same order, one table, one picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ultramem.config.load import config_to_dict
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.reporting import load_run
from megatron_ultramem.reporting.comparison_files import write_comparison
from megatron_ultramem.reporting.trials import Budget, Trial, load_recipe, run_trials
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.stdlib_corpus import stdlib_files
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
COMMON = """
data: {{paths: [{data}], split: "90,10,0", sequence_length: 32}}
train: {{micro_batch_size: 2, global_batch_size: 4, precision: fp32, eval_steps: 2}}
logging: {{tensorboard: false}}
"""
MODEL = "num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32"
RECIPES = {
    "dense": f"model: {{{MODEL}, memory: {{layers: none}}}}",
    "moe": f"model: {{{MODEL}, memory: {{layers: none}}, moe: {{layers: all, num_experts: 4, top_k: 2, "
    "ffn_hidden_size: 32}}",
}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recipes")
    preprocess(stdlib_files()[:30], folder / "text", TokenizerConfig())
    for name, model in RECIPES.items():
        (folder / f"{name}.yaml").write_text(model + COMMON.format(data=folder / "text"))
    return [str(folder / f"{name}.yaml") for name in RECIPES]


@pytest.mark.slow
def test_recipes_are_trained_on_the_same_tokens_and_shown_together(recipes: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [*recipes, "--tokens=2560", "--seeds=1,2", f"--output={output}", "moe:model.moe.ffn_hidden_size=16"]
    done = call(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    (written,) = output.glob("comparison_*.json")
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    for name in RECIPES:
        assert (rows[name, "tokens"], rows[name, "runs"]) == (2560, 2)
        assert rows[name, "train_loss"] > 0 and rows[name, "valid_loss"] > 0 and rows[name, "tokens_per_s"] > 0
    assert rows["moe", "parameters"] > rows["dense", "parameters"]
    assert rows["moe", "active"] < rows["dense", "active"]  # its own setting: narrower experts
    assert re.search(r"\| moe \|", (output / "comparison.md").read_text())
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*/*/checkpoints"))

    seeds = [load_run(output / "dense" / f"seed_{seed}") for seed in (1, 2)]
    assert seeds[0].metrics["loss"].values[0] != seeds[1].metrics["loss"].values[0]
    again = call(*arguments)
    assert again.returncode == 0 and "seed 1: " not in again.stdout  # nothing is trained twice
    other = call(*arguments, "moe:optimizer.lr=1e-3")
    assert other.returncode == 0
    assert "moe, seed 1: 20 steps" in other.stdout and "dense, seed 1: " not in other.stdout


@pytest.mark.slow
def test_runs_by_the_clock_go_on_side_by_side_and_read_the_same_data(recipes: list[str], tmp_path: Path) -> None:
    done = call(*recipes, "--tokens=2e5", "--minutes=0.2", "--at-once=2", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr + done.stdout
    laid_out = set()
    for name in RECIPES:
        run = load_run(tmp_path / name / "seed_1234")
        last, lr = run.metrics["loss"].steps[-1], run.metrics["lr"].values
        assert run.config is not None
        assert 3 <= last < run.config.train.steps == 1563
        assert lr[-1] < 0.6 * run.config.optimizer.lr == 0.6 * max(lr)  # decayed in time
        laid_out.add((run.config.train.steps, run.config.data.seed))
    assert len(laid_out) == 1  # of the number of steps the order of the data is made


@pytest.mark.slow
def test_a_run_that_fails_costs_the_others_nothing(recipes: list[str], tmp_path: Path) -> None:
    done = call(*recipes, "--tokens=512", "--at-once=2", "moe:train.device=cuda",
                f"--output={tmp_path}")  # fmt: skip
    assert done.returncode == 2 and "moe, seed 1234: the run in" in done.stderr
    assert "train.device" in done.stdout  # the end of its output
    assert re.search(r"\| dense \|", (tmp_path / "comparison.md").read_text())


@pytest.mark.slow
def test_runs_that_go_on_at_the_deadline_are_ended_and_what_they_logged_is_shown(
    recipes: list[str], tmp_path: Path
) -> None:
    budget = Budget(steps=20_000)
    trials = [Trial(load_recipe(Path(recipe), []), 1, budget, 1, tmp_path) for recipe in recipes]
    began = time.monotonic()
    failed = run_trials(trials, at_once=2, deadline=began + 30)
    assert failed == trials and 30 <= time.monotonic() - began < 40
    table, _, _ = write_comparison(trials, tmp_path / "out")
    for name in RECIPES:
        assert f"| {name}, seed 1, cut off |" in table.read_text()


def log_losses(trial: Trial, losses: list[float]) -> None:
    """What a run logs that goes on for so many steps."""
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(json.dumps(config_to_dict(trial.recipe.config)))
    shared = {"step_time_s": 1.0, "tokens_per_s": 128.0, "memory_gib": 1.0}
    records = [{"step": at, "loss": loss, "tokens": 128 * at, **shared} for at, loss in enumerate(losses, start=1)]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_runs_that_were_cut_off_are_not_averaged_with_whole_ones(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, moe = (load_recipe(Path(recipe), []) for recipe in recipes)
    whole, cut, alone = (Trial(*of, Budget(100), 1, tmp_path) for of in ((dense, 1), (dense, 2), (moe, 1)))
    log_losses(whole, [9.0] * 50 + [1.0] * 50)
    whole.finish(0)
    for trial, status in ((cut, 1), (alone, -9)):
        log_losses(trial, [9.0] * 10)
        trial.finish(status)
    table, _, results = write_comparison([whole, cut, alone], tmp_path / "out")
    found = {(row["case"], row["metric"]): row["value"] for row in json.loads(results.read_text())["rows"]}
    figures = {case: [found[case, name] for name in ("runs", "tokens", "train_loss")] for case, _ in found}
    assert figures == {
        "dense": [1, 12800, 1.0],
        "dense, seed 2, cut off": [1, 1280, 9.0],
        "moe, seed 1, cut off": [1, 1280, 9.0],
    }
    assert [line.split(" | ")[0] for line in table.read_text().splitlines()[2:]] == [f"| {case}" for case in figures]
    head = capsys.readouterr().out.splitlines()[2]  # no terminal: as wide as the names are
    assert all(case in head for case in figures)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens=10"], "--tokens 10: legal: at least the 128 of a step"),
        (["--tokens=1e4", "--minutes=0"], "--minutes 0: legal: more than 0"),
        (["--tokens=1e4", "--at-once=0"], "--at-once 0: legal: at least 1"),
        (["--tokens=1e4", "--seeds=1,1"], "--seeds 1,1: legal: different numbers"),
        (["--tokens=1e4", "moe:train.global_batch_size=8"], "train.global_batch_size = 8 in moe and 4 in dense"),
        (["--tokens=1e4", "model.num_layer=3"], "did you mean model.num_layers"),
    ],
)
def test_refused_before_anything_runs(
    recipes: list[str], tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("compare").main([*recipes, *arguments, f"--output={tmp_path}"]) == 2
    assert said in capsys.readouterr().err
