"""Checksums find every change of a checkpoint's files, whichever rank looks at which of them."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from megatron_ultramem.training.checksums import (
    SUMS_FILE,
    complete_sums,
    find_damage,
    read_sums,
    take_part,
    write_and_sum,
)

SHARDS = {"__0_0.distcp": b"a" * 5000, "__0_1.distcp": b"b" * 300, "__1_0.distcp": b"c" * 9000, "__1_1.distcp": b""}


def write(rank: int, buckets: list[tuple[str]], *, leave_out: str = "") -> None:
    """What Megatron's writer does, as far as files go."""
    for (path,) in buckets:
        if Path(path).name != leave_out:
            Path(path).write_bytes(SHARDS[Path(path).name])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Written by ranks 0 and 1; rank 2 had nothing to write."""
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".metadata").write_bytes(b"m" * 100)
    parts: dict[str, str] = {}
    for rank in (0, 1):
        write_and_sum(write, rank, [(str(tmp_path / name),) for name in SHARDS if name.startswith(f"__{rank}_")])
    for rank in (0, 1, 2):
        parts |= take_part(tmp_path, rank)
    complete_sums(tmp_path, parts)
    return tmp_path


def test_every_file_has_its_sum_and_nothing_else_is_left(folder: Path) -> None:
    names = {*SHARDS, "run.json", ".metadata"}
    assert read_sums(folder / SUMS_FILE).keys() == names
    assert {path.name for path in folder.iterdir()} == {*names, SUMS_FILE}
    assert find_damage(folder) is None


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_coreutils_read_the_list(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("name", [*SHARDS, "run.json", ".metadata"])
@pytest.mark.parametrize("change", ["truncated", "longer", "a bit", "missing"])
def test_one_part_of_three_finds_the_change_and_names_the_file(folder: Path, name: str, change: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "longer":
        path.write_bytes(content + b"\0")
    elif not content:
        pytest.skip("an empty file cannot shrink")
    elif change == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    found = [damage for part in range(3) if (damage := find_damage(folder, part, 3))]
    assert len(found) == 1 and found[0].startswith(name)
    assert ("cannot be read" if change == "missing" else "is not what was written") in found[0]


@pytest.mark.parametrize("content", ["x", "0" * 64 + " __0_0.distcp", "0" * 64 + "  ../run.json"])
def test_a_damaged_list_is_damage(folder: Path, content: str) -> None:
    (folder / SUMS_FILE).write_text(content)
    assert "SHA256SUMS cannot be read" in str(find_damage(folder))


def test_a_checkpoint_without_a_list_passes(folder: Path) -> None:
    (folder / SUMS_FILE).unlink()
    (folder / "run.json").write_text("changed")
    assert find_damage(folder) is None


def test_a_shard_without_a_sum_is_refused(tmp_path: Path) -> None:
    buckets = [(str(tmp_path / "__0_0.distcp"),), (str(tmp_path / "__0_1.distcp"),)]
    write_and_sum(partial(write, leave_out="__0_1.distcp"), 0, buckets)  # as after a failed write
    with pytest.raises(OSError, match="no checksum of __0_0.distcp"):
        complete_sums(tmp_path, take_part(tmp_path, 0))
