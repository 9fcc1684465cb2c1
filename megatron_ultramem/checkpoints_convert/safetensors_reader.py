"""Reads the weights of a Hugging Face folder, rows at a time.

The safetensors library checks the files; the numbers are then read from their places, because a file that is mapped
into memory, as the library does it, counts as memory of this process until the system takes it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert.safetensors_writer import DTYPES, INDEX, SINGLE
from megatron_ultramem.checkpoints_convert.tensors import TensorInfo, raw_bytes
from megatron_ultramem.errors import CheckpointError

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


class SafetensorsReader:
    """`TensorReader` of a folder with `model.safetensors`, or shards and their index.

    Raises CheckpointError on creation for missing, truncated or contradictory files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        index = _index(folder)
        self.files = [SINGLE] if index is None else sorted(set(index.values()))
        for name in self.files:
            self._add(folder / name)
        if index is not None:
            self._compare(index)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        info, place = self.tensors[name], self._places[name]
        stop = info.shape[0] if stop is None else stop
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        buffer = raw_bytes(rows)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.offset + start * info.row_bytes)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{place.file} is truncated: {name} ends too early")
                buffer = buffer[count:]
        return rows

    def _add(self, path: Path) -> None:
        for name, entry in _header(path).items():
            if name in self._places:
                raise CheckpointError(f"{path} and {self._places[name].file} both hold {name}")
            dtype = _TORCH_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(f"{path}: {name} is of dtype {entry['dtype']}; legal: {', '.join(_TORCH_DTYPES)}")
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), dtype)
            self._places[name] = _Place(path, entry["offset"])

    def _compare(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            place = self._places.get(name)
            if place is None or place.file.name != file:
                raise CheckpointError(f"{self.folder / INDEX} says that {name} is in {file}, and it is not there")
        extra = sorted(set(self._places) - set(index))
        if extra:
            raise CheckpointError(
                f"{self._places[extra[0]].file} holds {', '.join(extra[:4])}, which {self.folder / INDEX} does not name"
            )


def _index(folder: Path) -> dict[str, str] | None:
    """File by name of tensor; None for a folder with a single file."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / SINGLE).is_file():
            return None
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}"
            + (f", though it has {', '.join(found[:3])}: the index is missing" if found else "")
            + "; legal: a folder with safetensors weights"
        )
    try:
        index: Any = json.loads(path.read_text())["weight_map"]
        if not index or not all(isinstance(text, str) for pair in index.items() for text in pair):
            raise TypeError("weight_map does not map names to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for file in sorted(set(index.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{path} names {file}, which is not in {folder}")
    return dict(index)


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and place in the file of every tensor, after the library has found the file sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from None
    header.pop("__metadata__", None)
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"], "offset": 8 + length + entry["data_offsets"][0]}
        for name, entry in header.items()
    }
