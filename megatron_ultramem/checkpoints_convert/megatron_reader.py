"""Reads the weights of a checkpoint that the trainer saved, rows at a time, whatever layout it was saved under.

Megatron's torch_dist format is that of torch.distributed.checkpoint: `.metadata` says which part of which tensor lies
where in the files, and each part is what torch.save wrote. torch would load whole parts; here torch only says where in
the file the numbers of a part begin (`torch.load` under FakeTensorMode), and the rows wanted are read from there.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_ultramem.checkpoints_convert.tensors import Shape, TensorInfo, raw_bytes
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.checkpoint_folder import is_weight
from megatron_ultramem.training.checkpoint_safety import read_metadata


@dataclass(frozen=True)
class _Part:
    """A rank's shard of a tensor: its place there, and its bytes in a file."""

    place: Shape
    shape: Shape
    file: Path
    offset: int
    length: int


class CheckpointReader:
    """`TensorReader` of a checkpoint folder.

    Attributes:
        left_behind: entries that are not weights: optimizer, random states, Transformer Engine's FP8 state.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the folder's metadata cannot be read."""
        self.folder = folder
        try:
            metadata = read_metadata(folder)
            stored = metadata.storage_data
            self._parts: dict[str, list[_Part]] = {}
            for index, info in stored.items():
                entry = metadata.state_dict_metadata[index.fqn]
                if isinstance(entry, TensorStorageMetadata) and is_weight(index.fqn):
                    shape = next(tuple(chunk.sizes) for chunk in entry.chunks if chunk.offsets == index.offset)
                    part = _Part(tuple(index.offset), shape, folder / info.relative_path, info.offset, info.length)
                    self._parts.setdefault(index.fqn, []).append(part)
            self.tensors = {
                name: TensorInfo(tuple(entry.size), entry.properties.dtype)
                for name, entry in metadata.state_dict_metadata.items()
                if name in self._parts and isinstance(entry, TensorStorageMetadata)
            }
            self.left_behind = [name for name in metadata.state_dict_metadata if name not in self._parts]
        except Exception as error:  # unpickling a damaged file can raise anything
            raise CheckpointError(f"checkpoint {folder} is damaged: .metadata cannot be read ({error})") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        info = self.tensors[name]
        stop = info.shape[0] if stop is None else stop
        out = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        filled = 0
        for part in self._parts[name]:
            low, high = max(start, part.place[0]), min(stop, part.place[0] + part.shape[0])
            if low >= high:
                continue
            columns = tuple(slice(at, at + size) for at, size in zip(part.place[1:], part.shape[1:], strict=True))
            place = out[(slice(low - start, high - start), *columns)]
            _read_rows(part, low - part.place[0], high - part.place[0], place)
            filled += place.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"checkpoint {self.folder} is damaged: of {name} {list(info.shape)} only {filled} of {out.numel()} "
                f"numbers of rows {start} to {stop} are there"
            )
        return out


def _read_rows(part: _Part, start: int, stop: int, place: torch.Tensor) -> None:
    """Fills `place` with rows [start, stop) of a part."""
    try:
        data_offset = _data_offset(part)
        if data_offset is None:
            with _Window(part.file, part.offset, part.length) as window:
                whole: torch.Tensor = torch.load(cast(IO[bytes], window), weights_only=True)
            place.copy_(whole.view(part.shape)[start:stop])
            return
        rows = place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype)
        row_bytes = math.prod(part.shape[1:]) * place.dtype.itemsize
        with part.file.open("rb", buffering=0) as file:
            file.seek(part.offset + data_offset + start * row_bytes)
            _read_into(file, raw_bytes(rows))
        if rows is not place:
            place.copy_(rows)
    except Exception as error:  # what is read is damaged, and torch's unpickler can then raise anything
        raise CheckpointError(
            f"checkpoint file {part.file} is damaged: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


@functools.lru_cache(maxsize=4096)
def _data_offset(part: _Part) -> int | None:
    """Where the numbers of a part begin, in bytes after the part's own offset; None where they lie in another order."""
    with _Window(part.file, part.offset, part.length) as window, FakeTensorMode():
        tensor = torch.load(cast(IO[bytes], window), weights_only=True)
    if tensor.numel() != math.prod(part.shape):
        raise ValueError(f"a shard has {list(tensor.shape)}, its metadata says {list(part.shape)}")
    if not tensor.is_contiguous() or tensor.storage_offset():
        return None
    offset: int | None = tensor.untyped_storage()._checkpoint_offset
    return offset


def _read_into(file: io.RawIOBase | io.FileIO, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("the file ends too early")
        buffer = buffer[count:]


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file of their own."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(wanted)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
