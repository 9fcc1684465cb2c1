"""`ultramem plan` as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultramem.cli import main

RECIPE = str(Path(__file__).parents[2] / "examples" / "configs" / "ultramemv2_227m_1b.yaml")


def test_every_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", RECIPE, "--gpus", "8", "--cluster", "h200", "--top", "2"]) == 0
    said = capsys.readouterr().out
    for text in (
        "1,231,379,360", "FLOPs per token", "exact scores", "equal MoE", "decoding", "On 8 x h200", "fits",
        "table optimizer", "selective", "received by a rank in a step", "expert data", "predicted time of a step",
        "MFU", "roofline", "parallel.memory_placement = auto", "Layouts that fit, best first (2 of", "as settings",
    ):  # fmt: skip
        assert text in said, text


def test_json_holds_the_same_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", RECIPE, "--gpus", "8", "--json", "train.micro_batch_size=2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == 1_231_379_360
    assert plan["cluster"]["gpus"] == 8 and plan["layout"]["fits"] and plan["problem"] == ""
    memory = plan["layout"]["memory_of_rank"]
    parts = [value for name, value in memory.items() if name not in ("peak", "required")]
    assert sum(parts) == pytest.approx(memory["required"])
    assert sum(plan["layout"]["seconds_by_part"].values()) == pytest.approx(plan["layout"]["step_seconds"])
    assert set(plan["recompute"]) == {"none", "selective", "memory", "full"}
    assert plan["layouts"][0]["settings"]["parallel.memory_parallel_size"] >= 1
    assert plan["flops_per_token"]["training"] == 3 * plan["flops_per_token"]["forward"]


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", RECIPE, "--gpus", "2", "--picture", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--config", RECIPE, "--picture", str(tmp_path / "plan.jpeg")]) == 2
    assert "legal: .png" in capsys.readouterr().err


def test_without_gpus_the_layout_of_the_config_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", RECIPE, "parallel.memory_parallel_size=4"]) == 0
    said = capsys.readouterr().out
    assert "On 4 x h100" in said and "Layouts that fit" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus 0: legal: 1 or more"),
        (["--top", "0"], "--top 0: legal"),
        (["--cluster", "tpu"], "--cluster tpu: unknown"),
        (["cluster.memory_gb=3"], "cluster.memory_gb: unknown setting"),
        (["parallel.tensor_parallel_size=5"], "parallel.tensor_parallel_size = 5 does not divide"),
        (["--gpus", "2", "cluster.memory_gib=8"], "no layout fits 2 x h100: memory binds"),
        (["--gpus", "2", "cluster.memory_gib=8"], "the config's own layout: a rank of stage 0 needs"),
        (["--gpus", "2", "cluster.memory_gib=1"], "cluster.memory_gib = 1: legal: above"),
        (["model.num_layer=2"], "did you mean model.num_layers"),
    ],
)
def test_refused_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", RECIPE, *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and said in errors[0]
