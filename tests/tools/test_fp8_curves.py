"""tools/fp8_curves.py at toy size: a process for each variant; what fails costs the others nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.stdlib_corpus import stdlib_files
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32,
  memory: {{num_keys: 12, key_dim: 8, top_m: 4, value_dim: 16, pre_value_dim: 16}}}}
data: {{paths: [{data}], sequence_length: 32}}
train: {{micro_batch_size: 2}}
logging: {{tensorboard: false, progress: false}}
"""


@pytest.mark.slow
def test_variants_are_compared_with_bf16_and_failures_named(tmp_path: Path) -> None:
    preprocess(stdlib_files()[:6], tmp_path / "data", TokenizerConfig(), workers=1)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(data=tmp_path / "data"))
    command = [sys.executable, str(ROOT / "tools" / "fp8_curves.py"), "--config", str(tmp_path / "tiny.yaml"),
               "--steps", "21", "--output", str(tmp_path), "--variants"]  # fmt: skip
    done = subprocess.run([*command, "bf16,fp8_delayed,fp8_tables"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "failed: fp8_delayed" in done.stderr  # no GPU here
    assert "train.fp8.recipe = delayed needs Transformer Engine on a GPU" in done.stderr
    (path,) = tmp_path.glob("fp8_curves_*.json")
    before = figures(json.loads(path.read_text()))
    assert {case for case, _ in before} == {name + of for name in ("bf16", "fp8_tables") for of in ("", "/seed_1234")}
    assert before["bf16", "loss_against_bf16"] == 0.0 and abs(before["fp8_tables", "loss_against_bf16"]) < 2.0
    assert before["bf16", "loss_step_1"] > before["bf16", "loss_step_21"]
    assert before["fp8_tables", "not_finite"] == 0
    again = subprocess.run(
        [*command, "fp8_tables", "--gpus", "0,1", "--seeds", "1234,5"], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    rows = figures(json.loads(path.read_text()))
    assert rows["fp8_tables", "seeds"] == 2 and rows["bf16", "seeds"] == 1
    assert 0 < abs(rows["fp8_tables", "loss_last_20"] - before["fp8_tables", "loss_last_20"]) < 0.2


def test_a_results_file_is_drawn_with_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {
        name: {"1": {"losses": [4 / (1 + step) + shift for step in range(40)], "grad_norms": [1.0 + shift] * 40}}
        for name, shift in (("bf16", 1.0), ("fp8_tables", 1.001))
    }
    # Another seed, with other data: bf16 has it too, the tables do not.
    curves["bf16"]["2"] = {what: [9 * number for number in own] for what, own in curves["bf16"]["1"].items()}
    tool, draw = script("fp8_curves"), script("draw_fp8_curves")
    kept = {name: {seed: tool.figures_of(own) for seed, own in by_seed.items()} for name, by_seed in curves.items()}
    rows = [asdict(row) for row in tool.rows_of(kept)]
    (tmp_path / "curves.json").write_text(json.dumps({"hardware": "a GPU", "rows": rows}))
    assert draw.main([str(tmp_path / "curves.json"), str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10000
    loss, distance, end, _ = draw.draw(*draw.read(tmp_path / "curves.json")).axes
    assert loss.get_legend_handles_labels()[1] == ["bf16", "fp8_tables (+0.09 % at the end, 1 seed)"]
    assert min(distance.lines[0].get_ydata()) > 0 and max(distance.lines[0].get_ydata()) < 0.1
    assert list(end.lines[0].get_ydata()) == pytest.approx([100 * 0.001 / 1.13616], rel=1e-4)
    assert max(loss.lines[0].get_ydata()) == pytest.approx(5.0)
    (tmp_path / "other.json").write_text(json.dumps({"hardware": "a GPU", "rows": []}))
    assert draw.main([str(tmp_path / "other.json"), str(tmp_path / "x.png")]) == 2
    assert "other.json: holds no curves; legal: a file with the variant bf16" in capsys.readouterr().err


def run(tool: ModuleType, end: float) -> dict[str, float]:
    return tool.figures_of({"losses": [9.0, *[end] * 20], "grad_norms": [end] * 21})


def test_seeds_are_compared_one_by_one() -> None:
    tool = script("fp8_curves")
    ends = {"bf16": {"1": 2.0, "2": 4.0}, "fp8_tables": {"1": 2.02, "2": 3.96, "3": 100.0}}
    curves = {name: {seed: run(tool, end) for seed, end in by_seed.items()} for name, by_seed in ends.items()}
    found = {(row.case, row.metric): row.value for row in tool.rows_of(curves)}
    assert found["fp8_tables", "loss_against_bf16"] == pytest.approx(0.0, abs=1e-9)
    assert found["fp8_tables", "loss_against_bf16_error"] == pytest.approx(1.0)
    assert found["bf16", "loss_last_20"] == 3.0 and found["bf16", "loss_step_1"] == 9.0
    assert found["bf16", "loss_against_bf16_error"] == 0.0 and found["fp8_tables", "seeds"] == 3
    assert found["fp8_tables/seed_3", "loss_last_20"] == 100.0


def test_an_interrupted_call_begins_no_further_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.py").write_text(
        "import pathlib, sys\npathlib.Path(__file__).with_name(sys.argv[-1]).touch()\nprint('{}')\n"
    )
    monkeypatch.setattr("sys.argv", [str(tmp_path / "run.py")])
    curves = script("fp8_curves")._all_curves([f"bf16_{seed}" for seed in range(40)], ["0"], 60)
    assert next(curves)[1] == {}
    with pytest.raises(KeyboardInterrupt):
        curves.throw(KeyboardInterrupt)
    assert len(list(tmp_path.glob("bf16_*"))) < 10


CALL = ["tools/fp8_curves.py", "--config", "recipes/a.yaml", "--steps", "21", "--seeds"]


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], ends: dict[str, float]) -> dict:
    """What the results file says after a call whose runs, `<variant>:<seed>`, end with these losses."""
    tool = script("fp8_curves")

    def curves(runs: list[str], gpus: list[str], limit: float) -> Iterator[tuple[str, dict[str, list[float]]]]:
        assert runs == list(ends)
        for name, end in ends.items():
            yield name, {"losses": [9.0, *[end] * 20], "grad_norms": [end] * 21}

    monkeypatch.setattr(tool, "_all_curves", curves)
    monkeypatch.setattr("sys.argv", [*CALL, *arguments, "--output", str(folder)])
    assert tool.main() == 0
    (path,) = folder.glob("fp8_curves_*.json")
    content: dict = json.loads(path.read_text())
    return content


def figures(content: dict) -> dict[tuple[str, str], float]:
    return {(row["case"], row["metric"]): row["value"] for row in content["rows"]}


def test_a_later_call_adds_seeds_to_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "one")
    pair = ["--variants", "bf16,fp8_tables"]
    first = {"bf16:1234": 2.0, "fp8_tables:1234": 2.02}
    call(tmp_path, monkeypatch, ["1234", *pair, "train.cuda_graphs=full", "data.paths=[here/text]"], first)
    monkeypatch.setenv("COMMIT", "two")
    more = {"bf16:1": 4.0, "fp8_tables:1": 4.12, "bf16:2": 3.0, "fp8_tables:2": 3.06}
    content = call(tmp_path, monkeypatch, ["1,2", *pair, "data.paths=[there/text]"], more)
    found = figures(content)
    assert found["fp8_tables", "seeds"] == found["bf16", "seeds"] == 3
    assert found["bf16", "loss_last_20"] == pytest.approx(3.0)
    assert found["fp8_tables", "loss_against_bf16"] == pytest.approx(2.0)
    assert found["fp8_tables", "loss_against_bf16_error"] == pytest.approx(1 / 3**0.5)
    assert found["fp8_tables", "loss_step_21"] == pytest.approx((2.02 + 4.12 + 3.06) / 3)
    (earlier,) = content["earlier"]
    assert earlier["commit"] == "one" and set(earlier["cases"]) == {"bf16/seed_1234", "fp8_tables/seed_1234"}
    again = figures(
        call(tmp_path, monkeypatch, ["2", *pair, "data.paths=[text]"], {"bf16:2": 6.0, "fp8_tables:2": 6.0})
    )
    assert again["bf16", "seeds"] == 3 and again["bf16", "loss_last_20"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    "other",
    [["--steps", "40"], ["--micro-batches", "2"], ["optimizer.lr=1"], ["data.paths=[b]"], ["preset=throughput"]],
)
def test_seeds_of_another_run_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str]) -> None:
    settings = ["1", "--variants", "bf16"]
    call(tmp_path, monkeypatch, [*settings, *other], {"bf16:1": 2.0})
    settings[0] = "2"
    assert figures(call(tmp_path, monkeypatch, settings, {"bf16:2": 4.0}))["bf16", "seeds"] == 1


def test_the_results_of_the_repository_can_be_added_to() -> None:
    tool = script("fp8_curves")
    content = json.loads((ROOT / "benchmarks" / "results" / "fp8_curves_h200.json").read_text())
    earlier = content.get("earlier", [])
    last = {case for case, _ in figures(content)}.difference(*(call["cases"] for call in earlier))
    args = ["--config", "a/ultramemv2_227m_1b.yaml", "--steps", "300", "preset=throughput", "data.paths=[stdlib]"]
    counted: set[str] = set()
    for call in (*earlier, {"command": content["command"], "cases": last}):
        counted |= set(call["cases"]) if tool._same_runs(call["command"], tool._parser().parse_args(args)) else set()
    for name, seeds in (("bf16", (1234, 1, 2)), ("fp8_tensorwise", (1234, 1, 2)), ("fp8_tables", (1,))):
        assert counted >= {f"{name}/seed_{seed}" for seed in seeds}
