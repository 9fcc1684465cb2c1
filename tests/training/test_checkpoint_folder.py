"""Folders of checkpoints: what counts as whole, and that no kill at any moment makes half a checkpoint count."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.load import save_config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.checkpoint_folder import (
    LATEST,
    Record,
    check_writable,
    list_checkpoints,
    new_draft,
    own_checkpoints,
    publish,
    read_config,
    read_record,
    remove_leftovers,
    resolve_checkpoint,
    set_aside,
    wanted_checkpoints,
)
from megatron_ultramem.training.restarts import launch_id

RECORD = Record(
    step=3,
    consumed_samples=24,
    consumed_tokens=768,
    tokenizer="byte",
    vocab_size=257,
    layout={"tensor_parallel_size": 1},
    shuffles={"0": "00112233aabbccdd"},
    versions={"torch": "2"},
    saved_at="2026-01-01T00:00:00Z",
)


def make_whole(folder: Path, step: int) -> Path:
    """What a save leaves in its draft."""
    folder.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_text(f"{name} of step {step}")
    save_config(load_config(None, []), folder / "config.yaml")
    (folder / "run.json").write_text(replace(RECORD, step=step).to_json())
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish_new(folder: Path, step: int, keep_last: int = 0, keep_every: int = 0) -> None:
    target = folder / f"step_{step:08d}"
    publish(make_whole(new_draft(target, "token"), step), target, keep_last, keep_every)
    assert (folder / LATEST).resolve() == target == resolve_checkpoint(folder / LATEST)


def test_only_published_folders_count(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000009", "step_100000000"):
        make_whole(tmp_path / name, 1)
    for name in (".saving-step_00000011-aa", ".deleting-step_00000012", "step_00000013.abandoned", "step_x", "other"):
        make_whole(tmp_path / name, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000010", "step_100000000"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_a_checkpoint_is_found_from_its_folder_its_parent_and_the_run(tmp_path: Path) -> None:
    newest = make_whole(tmp_path / "checkpoints" / "step_00000020", 20)
    make_whole(tmp_path / "checkpoints" / "step_00000003", 3)
    assert resolve_checkpoint(newest) == resolve_checkpoint(newest.parent) == resolve_checkpoint(tmp_path) == newest
    with pytest.raises(CheckpointError, match="elsewhere: no checkpoint there; legal: a step_N folder"):
        resolve_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize(("load", "steps"), [("auto", [20, 3]), ("none", []), ("path", [3])])
def test_what_checkpoint_load_asks_for(tmp_path: Path, load: str, steps: list[int]) -> None:
    make_whole(tmp_path / "checkpoints" / "step_00000020", 20)
    old = make_whole(tmp_path / "checkpoints" / "step_00000003", 3)
    wish = str(old) if load == "path" else load
    found = wanted_checkpoints(load_config(None, [f"train.run_dir={tmp_path}", f"checkpoint.load={wish}"]))
    assert [read_record(path).step for path in found] == steps


def test_a_fresh_run_has_nothing_to_resume(tmp_path: Path) -> None:
    assert wanted_checkpoints(load_config(None, [f"train.run_dir={tmp_path}"])) == []


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "none"])
def test_a_restarted_launch_knows_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if launcher == "slurm":
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    elif launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    config = load_config(None, [f"train.run_dir={tmp_path}", "checkpoint.load=none"])
    for step, launch in ((4, launch_id()), (5, launch_id()), (6, "another"), (7, "")):
        folder = make_whole(tmp_path / "checkpoints" / f"step_{step:08d}", step)
        (folder / "run.json").write_text(replace(RECORD, step=step, launch=launch).to_json())
    assert own_checkpoints(config) == []  # the first time
    restarts = "SLURM_RESTART_COUNT" if launcher == "slurm" else "TORCHELASTIC_RESTART_COUNT"
    monkeypatch.setenv(restarts, "1")
    expected = [] if launcher == "none" else [5, 4]
    assert [read_record(path).step for path in own_checkpoints(config)] == expected


def test_a_record_of_before_launches_were_recorded_is_read(tmp_path: Path) -> None:
    folder = make_whole(tmp_path / "step_00000003", 3)
    content = json.loads(RECORD.to_json())
    del content["launch"]
    (folder / "run.json").write_text(json.dumps(content))
    assert read_record(folder) == RECORD


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    assert read_record(make_whole(tmp_path / "step_00000003", 3)) == RECORD
    assert read_config(tmp_path / "step_00000003") == load_config(None, [])


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metadata.json", ".metadata", "common.pt", "*.distcp"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = make_whole(tmp_path / "step_00000003", 3)
    for path in folder.glob(name):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"step_00000003 is damaged: .*{name.lstrip('*')}.* is missing; legal"):
        read_record(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", json.dumps({"step": 3}), RECORD.to_json().replace("768", '"many"')]
)
def test_a_broken_run_json_is_said_to_be_broken(tmp_path: Path, content: str) -> None:
    folder = make_whole(tmp_path / "step_00000003", 3)
    (folder / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"step_00000003 is damaged: run\.json cannot be read \(.+\); legal"):
        read_record(folder)


@pytest.mark.parametrize("content", ["model: [", "modle: {}", "model: {num_layers: many}"])
def test_broken_settings_are_said_to_be_broken(tmp_path: Path, content: str) -> None:
    folder = make_whole(tmp_path / "step_00000003", 3)
    (folder / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match="step_00000003: its settings cannot be read: "):
        read_config(folder)


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc"])
def test_an_unwritable_folder_is_refused_and_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "/proc": Path("/proc/ultramem")}
    with pytest.raises(CheckpointError, match=f"checkpoint.dir = {folder[place]} cannot be written: .*; legal"):
        check_writable(folder[place], "checkpoint.dir")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "checkpoint.dir")
    assert names(tmp_path / "a" / "b") == []


@pytest.mark.parametrize(("keep_last", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_k_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        publish_new(tmp_path, step, keep_last)
    assert names(tmp_path) == [LATEST, *(f"step_{step:08d}" for step in kept)]


def test_multiples_are_kept_beside_the_last(tmp_path: Path) -> None:
    for step in range(1, 10):
        publish_new(tmp_path, step, keep_last=2, keep_every=3)
    assert names(tmp_path) == [LATEST, *(f"step_{step:08d}" for step in (3, 6, 8, 9))]


def test_a_branch_left_behind_is_kept_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish_new(tmp_path, step)
    for _ in range(2):
        publish_new(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == [
        LATEST,
        "step_00000002",
        "step_00000002.abandoned",
        "step_00000002.abandoned-2",
        "step_00000003.abandoned",
    ]


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".saving-step_00000004-aa", ".deleting-step_00000001", "step_00000003", "step_00000009.abandoned"):
        make_whole(tmp_path / name, 1)
    (tmp_path / ".write-test-123").write_text("x")
    (tmp_path / ".latest-123").symlink_to("step_00000003")
    (tmp_path / LATEST).symlink_to("step_00000001")
    (tmp_path / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [LATEST, "notes.txt", "step_00000003", "step_00000009.abandoned"]
    assert (tmp_path / LATEST).resolve() == tmp_path / "step_00000003"


def test_latest_goes_with_the_last_checkpoint(tmp_path: Path) -> None:
    make_whole(tmp_path / "step_00000003.abandoned", 3)
    (tmp_path / LATEST).symlink_to("step_00000003")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step_00000003.abandoned"]


def test_a_damaged_checkpoint_is_set_aside_and_latest_leads_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        publish_new(tmp_path, step)
    assert set_aside(tmp_path / "step_00000002") == tmp_path / "step_00000002.damaged"
    assert names(tmp_path) == [LATEST, "step_00000001", "step_00000002.damaged"]
    assert (tmp_path / LATEST).resolve() == tmp_path / "step_00000001"
    publish_new(tmp_path, 2)
    assert set_aside(tmp_path / "step_00000002") == tmp_path / "step_00000002.damaged-2"


def test_a_copy_of_a_checkpoint_in_the_place_of_latest_is_moved_away(tmp_path: Path) -> None:
    make_whole(tmp_path / LATEST, 1)
    publish_new(tmp_path, 2)
    assert names(tmp_path) == [LATEST, "latest.copied", "step_00000002"]


def test_where_links_cannot_be_made_there_is_no_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    target = tmp_path / "step_00000001"
    publish(make_whole(new_draft(target, "token"), 1), target, 1)
    assert names(tmp_path) == ["step_00000001"]


def killed_at_file_operation(number: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a process that ends on the spot before its file operation of that number; False if it got to
    its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, _: tuple[Any, ...]) -> None:
            nonlocal seen
            if event == "open" or event.startswith(("os.", "shutil.")):
                if seen == number:
                    os._exit(9)
                seen += 1

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("step", [3, 2], ids=["next", "of_another_branch"])
def test_a_kill_at_any_file_operation_leaves_whole_checkpoints_alone(tmp_path: Path, step: int) -> None:
    kills = 0
    while True:
        folder = tmp_path / f"kill_{kills}"
        for old in (1, 2):
            publish_new(folder, old)
        target = folder / f"step_{step:08d}"
        draft = make_whole(new_draft(target, "token"), step)
        killed = killed_at_file_operation(kills, lambda d=draft, t=target: publish(d, t, keep_last=2))
        for _ in range(2):  # as the killed run left it, and as the next run finds it
            whole = list_checkpoints(folder)
            assert whole, f"killed at file operation {kills}: no checkpoint is left"
            for path in whole:
                assert read_record(path).step == int(path.name.removeprefix("step_"))
                assert len(list(path.iterdir())) == 7
            assert (folder / LATEST).resolve() in whole, f"killed at file operation {kills}: latest is wrong"
            remove_leftovers(folder)
            assert (folder / LATEST).resolve() == whole[-1]
        if not killed:
            break
        kills += 1
    assert kills > 10
    assert list_checkpoints(folder)[-1] == target
