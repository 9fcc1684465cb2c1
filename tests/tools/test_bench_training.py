"""tools/bench_training.py on a tiny recipe, on the CPU: what it can measure there, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultramem.errors import ConfigError
from tests.distributed.conftest import corpus  # noqa: F401
from tests.tools.scripts import script
from tests.tools.test_check_plan import RECIPE, ROOT


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench_training.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_a_recipe_is_measured_under_the_name_of_its_preset(recipe: Path, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    done = call(
        "--config", str(recipe), "--steps=3", "--warmup-steps=1", "--micro-batches=2", f"--output={tmp_path}",
        f"data.paths=[{corpus}]", f"train.run_dir={tmp_path}/run", "train.norms=ultramem",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "training_cpu.json").read_text())
    found = {row["metric"]: row["value"] for row in content["rows"]}
    assert {row["case"] for row in content["rows"]} == {"tiny/none"}
    assert min(found["tokens_per_s"], found["tokens_per_s_with_optimizer"]) > 0
    assert "--only" not in content["command"]
    assert 0 < found["loss_step_3"] < 10
    assert "mfu" not in found and "gpu_busy_ms" not in found  # there is no GPU


def test_an_ablation_takes_one_setting_of_the_preset_back_at_a_time(recipe: Path, tmp_path: Path) -> None:
    tool = script("bench_training")
    settings = ["train.cuda_graphs", "train.cross_entropy", "train.norms", "train.fused_weight_gradients"]
    args = tool.parse(["--config", str(recipe), "--presets=none,throughput", "--ablate", "train.seed=7"])
    cases = {case: (config, whole) for case, config, _, whole in tool.cases(args)}
    names = [name.split(".")[1] for name in settings]
    assert list(cases) == ["tiny/none", "tiny/throughput", *(f"tiny/throughput-{name}" for name in names)]
    plain, all_of_it = (cases[f"tiny/{preset}"][0].train for preset in ("none", "throughput"))
    assert all(getattr(plain, name) != getattr(all_of_it, name) for name in names)
    for name in names:
        config, whole = cases[f"tiny/throughput-{name}"]
        assert config.train.seed == 7 and not whole
        assert getattr(config.train, name) == getattr(plain, name)
        assert all(getattr(config.train, other) == getattr(all_of_it, other) for other in names if other != name)


def test_settings_may_be_named_for_an_ablation() -> None:
    tool = script("bench_training")
    config = str(ROOT / "benchmarks" / "configs" / "ultramemv2_1b_7b_cut.yaml")
    options = ["--config", config, "--presets=throughput,throughput_fp8", "--ablate"]
    cases = tool.cases(tool.parse([*options, "--ablated=train.fp8.recipe,model.memory.table_read"]))
    ablated = ["throughput_fp8-fp8.recipe", "throughput_fp8-memory.table_read"]
    assert [case.split("/")[1] for case, *_ in cases] == ["throughput", "throughput_fp8", *ablated]
    with pytest.raises(ConfigError, match="--ablated train.seed: legal: train.cuda_graphs"):
        tool.cases(tool.parse([*options, "--ablated=train.seed"]))


def test_a_preset_for_gpus_is_refused_without_one(recipe: Path, tmp_path: Path) -> None:
    done = call("--config", str(recipe), "--presets=throughput", f"train.run_dir={tmp_path}/run")
    assert done.returncode == 2
    assert "train.cuda_graphs = full (preset = throughput may have set it): there is no GPU" in done.stderr
