"""tools/learning_curve.py: a pair of one size, trained for the same time; at toy size on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultramem.reporting.trials import load_recipe
from megatron_ultramem.training.stdlib_corpus import stdlib_files
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
COMMON = """
data: {sequence_length: 32}
train: {micro_batch_size: 2, global_batch_size: 4, precision: fp32, eval_interval: 5, eval_steps: 2}
logging: {tensorboard: false}
"""
SHAPE = "num_layers: 2, hidden_size: 32, num_attention_heads: 4, max_sequence_length: 32, vocab_size: 512"
MOE = (
    f"model: {{{SHAPE}, memory: {{layers: none}}, moe: {{layers: all, num_experts: 8, top_k: 2, ffn_hidden_size: 32}}}}"
)
ULTRAMEM = (
    f"model: {{{SHAPE}, ffn_hidden_size: 32, memory: {{num_keys: 24, key_dim: 8, top_m: 4, value_dim: 16, "
    "pre_value_dim: 16, sharing: ring, share_size: 2, pool_size: 2}}"
)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    for name, model in (("ours", ULTRAMEM), ("moe", MOE)):
        (tmp_path / f"{name}.yaml").write_text(model + COMMON)
    return ["--recipes", str(tmp_path / "ours.yaml"), str(tmp_path / "moe.yaml")]


def test_the_recipes_are_of_one_size() -> None:
    tool = script("learning_curve")
    recipes = [load_recipe(path, []) for path in tool.RECIPES]
    tool.same_size(recipes)
    assert [recipe.config.model.memory.layers for recipe in recipes] == ["all", "none"]


def test_recipes_of_different_sizes_are_refused(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script("learning_curve").main([*pair, "moe:model.moe.num_experts=16"]) == 2
    assert "ours has 37,424 active parameters and moe 38,080; legal: at most 1% apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--seeds=1,1", "--seeds 1,1: legal: different numbers"), ("--at-once=0", "--at-once 0: legal: at least 1")],
)
def test_refused_before_any_text_is_made(
    pair: list[str], argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("learning_curve").main([*pair, argument]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_pair_is_trained_on_the_text_of_a_folder_until_its_time_is_over(pair: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for path in stdlib_files()[:150]:
        (text / path.name).write_bytes(path.read_bytes())
    tool = script("learning_curve")
    command = [sys.executable, tool.__file__, *pair, f"--text={text}", f"--output={tmp_path / 'out'}", "--at-once=2"]
    # What is left for training is what the allowances for the start and the report leave of it.
    seconds = 45 + tool.START_SECONDS + tool.REPORT_SECONDS
    done = subprocess.run([*command, f"--seconds={seconds}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "learning_curve.md", "learning_curve.png", "learning_curve_cpu.json"
    ]  # fmt: skip
    written = json.loads((tmp_path / "out" / "learning_curve_cpu.json").read_text())
    rows = {(row["case"], row["metric"]): row["value"] for row in written["rows"]}
    for case in ("ours", "moe"):
        assert rows[case, "tokens"] > 0 and rows[case, "valid_loss"] < 6.5
        assert (case, f"valid_loss_after_{5 * 4 * 32}_tokens") in rows
