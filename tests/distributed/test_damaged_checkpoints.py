"""A damaged checkpoint is found before it is loaded; the run goes on from the one before, to the same end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.checkpoint_folder import list_checkpoints
from megatron_ultramem.training.checksums import SUMS_FILE, find_damage, read_sums
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed.checkpoint_job import error_of_training, train_and_save
from tests.distributed.test_resume import assert_equal
from tests.distributed.workers import WorkerPool

PP2 = "parallel.pipeline_parallel_size=2"


def truncate(folder: Path, name: str) -> None:
    (path,) = folder.glob(name)
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.fixture(scope="module")
def original(pool: WorkerPool, small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Checkpoints of steps 1 and 2 of a run on two pipeline stages, each of which writes, and its end at step 3."""
    folder = tmp_path_factory.mktemp("original")
    return folder, pool.run(2, train_and_save, [*small_run, PP2, f"checkpoint.dir={folder}"], 3, (1, 2))


@pytest.fixture
def settings(small_run: list[str], original: tuple[Path, Any], tmp_path: Path) -> list[str]:
    shutil.copytree(original[0], tmp_path / "checkpoints", symlinks=True)
    return [*small_run, f"checkpoint.dir={tmp_path / 'checkpoints'}", "checkpoint.load=auto"]


def test_every_file_of_a_checkpoint_has_a_checksum(original: tuple[Path, Any]) -> None:
    for folder in list_checkpoints(original[0]):
        files = {path.name for path in folder.iterdir()}
        assert files == {*read_sums(folder / SUMS_FILE), SUMS_FILE}
        assert {"__0_0.distcp", "__1_0.distcp", "run.json", "common.pt", ".metadata"} < files
        assert find_damage(folder) is None


@pytest.mark.parametrize("name", ["__1_0.distcp", pytest.param("run.json", marks=pytest.mark.slow)])
def test_the_run_goes_on_from_the_checkpoint_before(
    pool: WorkerPool, settings: list[str], original: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "checkpoints"
    truncate(folder / "step_00000002", name)
    results = pool.run(2, train_and_save, [*settings, PP2], 3, (2,))
    for result, straight in zip(results, original[1], strict=True):
        assert result["first_step"] == 1
        assert_equal(result["end"], straight["end"])
    (warning,) = results[0]["warnings"]
    assert f"checkpoint {folder / 'step_00000002'} is damaged: {name}" in warning
    assert "step_00000001 is taken instead" in warning
    assert not results[1]["warnings"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_00000001", "step_00000002", "step_00000002.damaged"]
    assert (folder / "latest").resolve().name == "step_00000002"
    assert find_damage(folder / "step_00000002") is None


def test_with_nothing_to_fall_back_to_the_run_does_not_start_afresh(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        shard = max(path.name for path in folder.glob("__0_*.distcp"))  # of as many as this Megatron has writers
        truncate(folder, shard)
    for _ in range(2):  # nor the second time
        for kind, text, alike in pool.run(2, error_of_training, [*settings, PP2], 3):
            assert kind == "DamagedCheckpointError" and alike
            assert f"step_00000002 is damaged: {shard} is not what was written" in text
            assert "there is no other to go on from; legal: " in text
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "step_00000002"
    truncate(folder, "common.pt")
    ((kind, text, _),) = pool.run(1, error_of_training, [*settings, f"checkpoint.load={folder}"], 3)
    assert kind == "DamagedCheckpointError" and "common.pt" in text
    assert folder.exists()


def test_a_launch_that_is_restarted_goes_on_from_its_own_checkpoints(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    """Not from where `checkpoint.load` let it begin, nor with the weights alone."""
    folder = tmp_path / "checkpoints"
    begin = [*settings, f"checkpoint.load={folder / 'step_00000001'}", "checkpoint.load_optimizer=false"]
    begin += ["checkpoint.keep_last=0"]
    (first,) = pool.run(1, _launched, "0", begin, 4, (3,))
    assert first["first_step"] == 0
    (second,) = pool.run(1, _launched, "1", begin, 4)
    assert second["first_step"] == 3
    assert_equal(second["end"], first["end"])
    (other_launch,) = pool.run(1, train_and_save, begin, 1)
    assert other_launch["first_step"] == 0


def _launched(restarts: str, *args: Any) -> dict[str, Any]:
    """`train_and_save` under torchrun's agent, which has restarted it that often."""
    launcher = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": restarts}
    os.environ.update(launcher)
    try:
        return train_and_save(*args)
    finally:
        for name in launcher:
            del os.environ[name]


@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_a_background_writer_that_dies_or_hangs_is_noticed(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, fate: str
) -> None:
    settings = [*small_run, f"checkpoint.dir={tmp_path}", "checkpoint.async_save=true"]
    ((text, draft_is_left, writer_is_left),) = pool.run(1, _save_without_writer, settings, fate)
    assert f"checkpoint {tmp_path / 'step_00000001'} cannot be written: " in text
    assert "(rank 0 on " in text and "last good checkpoint: none" in text
    assert ("async_timeout_minutes" in text) == (fate == "hangs")
    assert not draft_is_left and not writer_is_left
    assert not list_checkpoints(tmp_path)


def _save_without_writer(overrides: list[str], fate: str) -> tuple[str, bool, bool]:
    """Stops the process of a background save as soon as there is one, and kills it or leaves it so."""
    run = set_up(load_config(None, [*overrides, "checkpoint.async_timeout_minutes=0.05"]))
    train_step(run)
    run.checkpoints.save(run.position)
    (call,) = run.checkpoints._queue.async_calls  # type: ignore[union-attr]
    writer = psutil.Process(call.async_caller.process.pid)
    writer.suspend()
    if fate == "dies":
        writer.kill()
    try:
        run.checkpoints.finish(blocking=True)
        return "no error", True, True
    except CheckpointError as error:
        _, alive = psutil.wait_procs([writer], timeout=10)
        return str(error), any(run.checkpoints.folder.glob(".saving-*")), bool(alive)
