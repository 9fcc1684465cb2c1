"""Steps of a real run that are recorded: those that the settings name, and those after touching a file."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from tests.distributed.workers import WorkerPool


def train_and_touch(settings: list[str], touched: dict[int, str]) -> None:
    """Trains; at the beginning of some steps, rank 0's operator touches a file in the run folder."""
    from megatron_ultramem.training import loop

    config = load_config(None, settings)
    begin, step = loop.begin_step, 0

    def begin_step(hooks: Any) -> None:
        nonlocal step
        step += 1
        if step in touched and os.environ["RANK"] == "0":
            (Path(config.train.run_dir) / touched[step]).touch()
        begin(hooks)

    loop.begin_step = begin_step
    try:
        loop.train(config)
    finally:
        loop.begin_step = begin


def ranges(path: Path) -> dict[str, int]:
    """How often each annotated range is in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            found[event["name"]] = found.get(event["name"], 0) + 1
    return found


def test_chosen_ranks_record_chosen_steps_and_the_steps_after_a_file_was_touched(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.steps=10", "train.global_batch_size=4"]
    settings += ["logging.profile_steps=2-3", "logging.profile_ranks=[1]", "logging.profile_length=1"]
    pool.run(2, train_and_touch, settings, {6: "profile", 8: "memory", 10: "profile"})
    names = sorted(path.name for path in (tmp_path / "profiles").iterdir())
    # A request is agreed on in the step in which it is found, and followed in the next one.
    assert names == [
        "step_00000002-00000003.rank_00001.trace.json.gz",
        "step_00000007-00000007.rank_00001.trace.json.gz",
    ]
    for name, steps in zip(names, (2, 1), strict=True):
        found = ranges(tmp_path / "profiles" / name)
        assert found["step"] == found["optimizer"] == found["grad_sync"] == steps
        assert found["forward-compute"] == found["backward-compute"] == 2 * steps  # micro-batches
    assert not (tmp_path / "profile").exists() and not (tmp_path / "memory").exists()
    log = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert "step 9 training.profiling: the memory of step 9 is not recorded: that needs a GPU" in log


@pytest.mark.parametrize("steps", ["x", "0", "5-3", "1-", "-4"])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"logging.profile_steps = .* legal"):
        load_config(None, [f"logging.profile_steps={steps}"])


@pytest.mark.parametrize("setting", ["nvtx=true", "profile_with=nsys", "profile_memory=true"])
def test_what_needs_a_gpu_is_refused_where_there_is_none(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, setting: str
) -> None:
    (message,) = pool.run(1, refusal, [*small_run, f"logging.{setting}", f"train.run_dir={tmp_path / 'run'}"])
    assert message.startswith(f"logging.{setting.replace('=', ' = ')}: there is no GPU")
    assert not (tmp_path / "run").exists()


def refusal(settings: list[str]) -> str:
    from megatron_ultramem.training.loop import train

    try:
        train(load_config(None, settings))
    except ConfigError as error:
        return str(error)
    return "accepted"
