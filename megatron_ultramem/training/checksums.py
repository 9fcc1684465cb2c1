"""Checksums of a checkpoint's files: taken by the ranks that wrote them, in the background where the save is, and
compared before anything is loaded.

They lie in the checkpoint as SHA256SUMS, in the format of coreutils: `sha256sum -c SHA256SUMS` checks a copy by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SUMS_FILE = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(file: Path) -> dict[str, str]:
    """SHA-256 by file name; raises OSError or ValueError if the list is missing or damaged."""
    sums = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or Path(name).name != name:
            raise ValueError(f"{file}: {line[:80]!r} is not a line of sha256sum")
        sums[name] = digest
    return sums


def write_sums(file: Path, sums: Mapping[str, str]) -> None:
    """The inverse of `read_sums`."""
    file.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), encoding="utf-8")


def write_and_sum(write: Callable[..., None], rank: int, buckets: list[Any], *rest: Any) -> None:
    """Runs Megatron's writer of this rank's shards, then takes the checksums of the files that it wrote.

    Stands in for `async_fn` of an AsyncRequest, whose arguments it has; runs in the background process of a save.

    Args:
        buckets: Megatron's write buckets, each of which begins with the path of its file.
    """
    write(rank, buckets, *rest)
    paths = [Path(bucket[0]) for bucket in buckets]
    # A shard that was not written is reported by Megatron, and found missing from the sums.
    with contextlib.suppress(OSError):
        write_sums(_part(paths[0].parent, rank), {path.name: sha256(path) for path in paths})


def take_part(draft: Path, rank: int) -> dict[str, str]:
    """The checksums that `write_and_sum` of a rank left in a draft; empty if that rank wrote no shard."""
    part = _part(draft, rank)
    if not part.exists():
        return {}
    sums = read_sums(part)
    part.unlink()
    return sums


def complete_sums(draft: Path, shards: Mapping[str, str]) -> None:
    """Writes SHA256SUMS of a draft whose other files are all there.

    Raises OSError if a shard has no checksum.
    """
    sums = dict(shards)
    for path in draft.iterdir():
        if path.suffix == ".distcp" and path.name not in sums:
            raise OSError(f"no checksum of {path.name} could be taken")
        if path.name not in sums:
            sums[path.name] = sha256(path)
    write_sums(draft / SUMS_FILE, sums)


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, by their checksums; None if nothing is, or if it has no checksums.

    Args:
        part, parts: compares every `parts`-th file from `part` on, so that ranks share the work.
    """
    if not (folder / SUMS_FILE).exists():
        return None
    try:
        sums = read_sums(folder / SUMS_FILE)
    except (OSError, ValueError) as error:
        return f"{SUMS_FILE} cannot be read ({error})"
    for name in _by_size(folder, sums)[part::parts]:
        try:
            found = sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if found != sums[name]:
            return f"{name} is not what was written (its SHA-256 is {found[:12]}…, it was {sums[name][:12]}…)"
    return None


def _by_size(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """Largest first, so that parts are about equal; the same order on every rank."""

    def size(name: str) -> int:
        try:
            return os.stat(folder / name).st_size
        except OSError:
            return 0

    return sorted(sums, key=lambda name: (-size(name), name))


def _part(draft: Path, rank: int) -> Path:
    return draft / f".sums-{rank}"
