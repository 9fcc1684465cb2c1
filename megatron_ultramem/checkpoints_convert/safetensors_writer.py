"""Writes a Hugging Face folder's weights: safetensors in shards, block by block.

The library writes files from tensors that are all in memory; a shard alone may hold gigabytes. The format is simple
enough to write in order: the length of a JSON header, the header, then the bytes of one tensor after another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert.tensors import Made, raw_bytes, row_blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def write_safetensors(
    folder: Path, tensors: Sequence[Made], advance: Callable[[int], None], *, shard_bytes: int
) -> dict[str, str]:
    """Writes the tensors, and the index if there is more than one file; returns the SHA-256 of each file by its name.

    Args:
        advance: told the bytes of every block that has been written.
        shard_bytes: of a file at most; a larger tensor gets a file of its own.
    """
    shards = _shards(tensors, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    digests = {
        name: _write_file(folder / name, shard, advance) for name, shard in zip(names, shards, strict=True)
    }  # fmt: skip
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.info.nbytes for tensor in tensors)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }  # fmt: skip
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _shards(tensors: Sequence[Made], shard_bytes: int) -> list[list[Made]]:
    shards: list[list[Made]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.info.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[Made], advance: Callable[[int], None]) -> str:
    # The widest numbers first, so that every tensor begins at a multiple of the size of its numbers.
    ordered = sorted(tensors, key=lambda tensor: -tensor.info.dtype.itemsize)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(ordered)
        digest.update(header)
        file.write(header)
        for tensor in ordered:
            for start, stop in row_blocks(tensor.info):
                block = tensor.block(start, stop)
                digest.update(raw_bytes(block))
                file.write(raw_bytes(block))
                advance(block.nbytes)
                del block  # before the next one is made
    return digest.hexdigest()


def _header(tensors: Sequence[Made]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        info = tensor.info
        entries[tensor.name] = {
            "dtype": DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
