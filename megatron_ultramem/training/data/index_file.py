"""Megatron's .bin/.idx pair, read with every check that Megatron leaves out.

Megatron asserts the first bytes of an .idx and trusts the rest: a truncated pair is found, if at all, when a sample
that is out of bounds is read, hours into a run.

Layout of an .idx, little-endian: magic [9 bytes], version u64 = 1, dtype code u8, S = sequences u64, D = documents + 1
u64, lengths int32 [S], byte offsets int64 [S], document boundaries int64 [D]. Here a document is one sequence.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultramem.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
FINGERPRINT_BYTES = 16 << 20


@dataclass(frozen=True)
class IndexFile:
    """A checked .bin/.idx pair.

    lengths: tokens of each document, int32 [documents].
    offsets: where each starts in the .bin, in bytes, int64 [documents].
    """

    prefix: str
    dtype: type[np.integer[Any]]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def read(self, first: int, last: int) -> npt.NDArray[Any]:
        """The tokens of the documents [first, last), one after the other; a read-only map of the file."""
        count = int(self.lengths[first:last].sum(dtype=np.int64))
        if count == 0:
            return np.empty(0, dtype=self.dtype)
        offset = int(self.offsets[first])
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r", offset=offset, shape=(count,))

    def fingerprint(self) -> str:
        """Hash that changes when the pair is made anew with other document lengths."""
        digest = hashlib.sha256(f"{np.dtype(self.dtype).name} {self.documents} {self.tokens} ".encode())
        digest.update(self.lengths[: FINGERPRINT_BYTES // 4].tobytes())
        return digest.hexdigest()[:16]


def read_index(prefix: str) -> IndexFile:
    """Opens and checks a pair.

    Raises DataError naming the file when one is missing, damaged, or does not belong to the other.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            hint = ""
            if prefix.endswith((".bin", ".idx")):
                hint = "; give the prefix without .bin or .idx"
            raise DataError(
                f"data file {path} does not exist{hint}; make it with tools/preprocess_data.py --output {prefix}"
            )
    dtype, sequences, boundaries = _read_header(prefix, idx_path)
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    size = idx_path.stat().st_size
    if size != expected:
        raise _damaged(prefix, idx_path, f"it has {size} bytes and should have {expected} for {sequences} documents")
    lengths, offsets, ends = _read_arrays(idx_path, sequences, boundaries)
    index = IndexFile(prefix, dtype, lengths, offsets)
    _check_arrays(index, ends, idx_path)
    bin_size = bin_path.stat().st_size
    if bin_size != index.tokens * np.dtype(dtype).itemsize:
        raise DataError(
            f"{bin_path} has {bin_size} bytes, but {idx_path} describes {index.tokens} tokens of "
            f"{np.dtype(dtype).itemsize} bytes: they do not belong together; {_rebuild(prefix)}"
        )
    return index


def _read_header(prefix: str, idx_path: Path) -> tuple[type[np.integer[Any]], int, int]:
    with idx_path.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise _damaged(prefix, idx_path, "it does not start like an index file")
    if len(header) < HEADER.size:
        raise _damaged(prefix, idx_path, f"it ends after {len(header)} bytes")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise _damaged(prefix, idx_path, f"version {version}, dtype code {code}; readable: version 1, {sorted(DTYPES)}")
    return DTYPES[code], sequences, boundaries


def _read_arrays(
    idx_path: Path, sequences: int, boundaries: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    contents = np.memmap(idx_path, dtype=np.uint8, mode="r")
    lengths_end = HEADER.size + 4 * sequences
    offsets_end = lengths_end + 8 * sequences
    return (
        np.frombuffer(contents, np.int32, sequences, HEADER.size),
        np.frombuffer(contents, np.int64, sequences, lengths_end),
        np.frombuffer(contents, np.int64, boundaries, offsets_end),
    )


def _check_arrays(index: IndexFile, ends: npt.NDArray[np.int64], idx_path: Path) -> None:
    if not index.documents:
        raise DataError(f"{idx_path} holds no document; {_rebuild(index.prefix)}")
    if (index.lengths < 0).any():
        raise _damaged(index.prefix, idx_path, "a document has a negative length")
    starts = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
    if not np.array_equal(starts * np.dtype(index.dtype).itemsize, index.offsets):
        raise _damaged(index.prefix, idx_path, "document offsets and lengths disagree")
    if not len(ends) or ends[-1] != index.documents:
        raise _damaged(index.prefix, idx_path, f"it does not end at its {index.documents} documents")


def _damaged(prefix: str, path: Path, what: str) -> DataError:
    return DataError(f"{path} is damaged: {what}; {_rebuild(prefix)}")


def _rebuild(prefix: str) -> str:
    return f"make it again with tools/preprocess_data.py --overwrite --output {prefix}"
