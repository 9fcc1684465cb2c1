"""Where documents come from: text files, folders of them, and JSON lines, gzipped or not.

Light on purpose (standard library only): the worker processes of preprocessing import it.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_ultramem.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class Piece:
    """A part of the input: a whole text file (`lines` None: one document), or some lines of a JSON-lines file.

    first_line: number of the first line, from 1.  disk_bytes: what this piece takes on disk, for the progress bar.
    """

    path: Path
    disk_bytes: int
    lines: list[bytes] | None = None
    first_line: int = 1


@dataclass(frozen=True)
class Document:
    """One document: its text, or why it has to be skipped, and where it is from ("file" or "file:line")."""

    place: str
    text: str = ""
    unusable: str | None = None


def collect_files(inputs: Sequence[Path], pattern: str = "**/*") -> list[Path]:
    """The files that `inputs` name, in that order; of a folder those that match `pattern`, sorted, without hidden ones.

    Raises DataError for a path that does not exist and a folder without a match.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(f for f in path.glob(pattern) if f.is_file() and not _hidden(f.relative_to(path)))
            if not found:
                raise DataError(f"no file in the folder {path} matches the pattern {pattern!r}")
            files.extend(found)
        else:
            raise DataError(f"input {path} does not exist")
    return files


def blocks(files: Iterable[Path], block_bytes: int = 1 << 20) -> Iterator[list[Piece]]:
    """The files cut into work items of about `block_bytes`, in order. A text file is never cut."""
    block: list[Piece] = []
    held = 0
    for piece in _pieces(files, block_bytes):
        block.append(piece)
        held += piece.disk_bytes if piece.lines is None else sum(map(len, piece.lines))
        if held >= block_bytes:
            yield block
            block, held = [], 0
    if block:
        yield block


def documents(piece: Piece, json_key: str) -> Iterator[Document]:
    """The documents of a piece. Blank JSON lines are passed over.

    Raises DataError for a file that cannot be read, and for a JSON line without the text `json_key`, naming the line.
    """
    if piece.lines is None:
        yield _text_file(piece.path)
        return
    for number, line in enumerate(piece.lines, start=piece.first_line):
        if line.strip():
            yield _json_line(f"{piece.path}:{number}", line, json_key)


def _text_file(path: Path) -> Document:
    try:
        contents = path.read_bytes()
        if path.suffix == ".gz":
            contents = gzip.decompress(contents)
        return Document(str(path), contents.decode())  # bytes, then decode: no newline is translated
    except UnicodeDecodeError as error:
        return Document(str(path), unusable=f"not UTF-8 at byte {error.start}")
    except GZIP_ERRORS as error:
        return Document(str(path), unusable=f"damaged gzip file ({error})")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_line(place: str, line: bytes, json_key: str) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Document(place, unusable=f"not UTF-8 at byte {error.start} of the line")
    except (json.JSONDecodeError, RecursionError) as error:
        return Document(place, unusable=f"not JSON ({error})")
    if not isinstance(record, dict) or json_key not in record:
        found = f"its keys are {', '.join(record) or 'none'}" if isinstance(record, dict) else "it is no object"
        raise DataError(f"{place}: this JSON line has no key {json_key!r} ({found}); set --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: the value of {json_key!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Document(place, unusable=f"half a surrogate pair at character {error.start}")
    return Document(place, text)


def _pieces(files: Iterable[Path], block_bytes: int) -> Iterator[Piece]:
    for path in files:
        try:
            if not path.name.endswith(JSON_LINES_SUFFIXES):
                yield Piece(path, disk_bytes=path.stat().st_size)
                continue
            with path.open("rb") as raw:
                yield from _json_pieces(path, raw, block_bytes)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_pieces(path: Path, raw: BinaryIO, block_bytes: int) -> Iterator[Piece]:
    number, seen = 1, 0
    stream: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
    while True:
        try:
            lines = stream.readlines(block_bytes)
        except GZIP_ERRORS as error:
            raise DataError(f"{path} is a damaged gzip file after line {number - 1} ({error})") from error
        position = raw.tell()
        if not lines:
            return
        yield Piece(path, disk_bytes=position - seen, lines=lines, first_line=number)
        number, seen = number + len(lines), position


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
