"""Text to Megatron's .bin/.idx: tokenised by several processes, written in the order of the input.

`<prefix>.bin` holds the ids of all documents, each ended by the end-of-document id; `<prefix>.idx` says where each
document lies; `<prefix>.json` says which tokenizer made them. All three are written in `<prefix>.partial/` and moved
into place at the end, so that a run that is killed leaves nothing that looks finished.

Torch and Megatron are imported where the files are written: worker processes import this module and need neither.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import DataError
from megatron_ultramem.training.corpus import Piece, blocks, documents
from megatron_ultramem.training.tokenizers import Tokenizer, build_tokenizer

SUFFIXES = (".bin", ".idx", ".json")
MAX_EXAMPLES = 20
"""Skipped documents that are named; the others are only counted."""


@dataclass
class Totals:
    """What was done so far, in how many seconds of reading, tokenising and writing.

    Bytes: `disk_bytes` of the input files as stored, `text_bytes` of text as UTF-8.
    """

    seconds: float = 0.0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    disk_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """The documents of one block: their ids one after the other [tokens], and how many each has [documents]."""

    tokens: npt.NDArray[Any]
    lengths: list[int]
    text_bytes: int
    disk_bytes: int
    empty: int
    skipped: list[str]


class BlockEncoder:
    """Tokenises blocks of documents; made once in every process."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, json_key: str, strict: bool) -> None:
        self.tokenizer, self.dtype, self.json_key, self.strict = tokenizer, dtype, json_key, strict

    def __call__(self, block: list[Piece]) -> Encoded:
        parts: list[npt.NDArray[Any]] = []
        lengths: list[int] = []
        skipped: list[str] = []
        text_bytes = empty = 0
        eod = np.array([self.tokenizer.eod], dtype=self.dtype)
        for document in (document for piece in block for document in documents(piece, self.json_key)):
            if document.unusable is not None:
                if self.strict:
                    raise DataError(f"{document.place}: {document.unusable}")
                skipped.append(f"{document.place}: {document.unusable}")
                continue
            ids = self.tokenizer.encode_array(document.text, self.dtype)
            if not len(ids):
                empty += 1
                continue
            parts += [ids, eod]
            lengths.append(len(ids) + 1)
            text_bytes += len(document.text.encode())
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)
        return Encoded(tokens, lengths, text_bytes, sum(piece.disk_bytes for piece in block), empty, skipped)


def preprocess(
    files: Sequence[Path],
    prefix: Path,
    tokenizer: TokenizerConfig,
    *,
    json_key: str = "text",
    workers: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    block_bytes: int = 1 << 20,
    on_progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """Tokenises `files` (see corpus.collect_files) into `prefix`.bin, .idx and .json.

    The files are the same bit by bit whatever `workers` and `block_bytes` (of one work item) are. Empty documents are
    left out; documents that are not UTF-8 or not JSON are skipped and counted, or with `strict` end the run.

    Raises DataError for bad input, output that exists (without `overwrite`), or another run on the same prefix.
    """
    _check_output(files, prefix, overwrite)
    tokenizer_object = build_tokenizer(tokenizer)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer_object.vocab_size)
    encoder_arguments = (np.dtype(dtype).name, json_key, strict)
    totals = Totals()
    with _partial_folder(prefix) as folder:
        started = time.monotonic()
        builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=dtype)
        if workers > 1:
            results = _encode_parallel(blocks(files, block_bytes), tokenizer, encoder_arguments, workers)
        else:
            results = map(BlockEncoder(tokenizer_object, *encoder_arguments), blocks(files, block_bytes))
        for encoded in results:
            for document in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths else ():
                builder.add_document(document, [len(document)])
            _add(totals, encoded)
            totals.seconds = time.monotonic() - started
            if on_progress is not None:
                on_progress(totals)
        if totals.documents == 0:
            skipped = f" ({totals.skipped} skipped: {'; '.join(totals.skipped_examples)})" if totals.skipped else ""
            raise DataError(f"the input of {len(files)} files holds no document that can be used{skipped}")
        builder.finalize(str(folder / "data.idx"))
        _write_summary(folder / "data.json", tokenizer, tokenizer_object, np.dtype(dtype).name, totals)
        _publish(folder, prefix)
    return totals


_worker_encoder: BlockEncoder | None = None


def _start_worker(tokenizer: TokenizerConfig, encoder_arguments: tuple[str, str, bool]) -> None:
    global _worker_encoder
    _worker_encoder = BlockEncoder(build_tokenizer(tokenizer), *encoder_arguments)


def _encode_in_worker(block: list[Piece]) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(block)


def _encode_parallel(
    work: Iterable[list[Piece]], tokenizer: TokenizerConfig, encoder_arguments: tuple[str, str, bool], workers: int
) -> Iterator[Encoded]:
    """Results in the order of `work`, at most a few blocks per worker ahead, so that memory stays bounded."""
    pending: deque[Future[Encoded]] = deque()
    # spawn: the caller has threads (torch, the progress bar), which a fork would break.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, encoder_arguments)
    )
    try:
        for block in work:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenizer process died, probably killed for its memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _add(totals: Totals, encoded: Encoded) -> None:
    totals.documents += len(encoded.lengths)
    totals.tokens += len(encoded.tokens)
    totals.text_bytes += encoded.text_bytes
    totals.disk_bytes += encoded.disk_bytes
    totals.empty += encoded.empty
    totals.skipped += len(encoded.skipped)
    totals.skipped_examples += encoded.skipped[: MAX_EXAMPLES - len(totals.skipped_examples)]


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _check_output(files: Sequence[Path], prefix: Path, overwrite: bool) -> None:
    if not files:
        raise DataError("no input file")
    outputs = [_path(prefix, suffix) for suffix in SUFFIXES]
    inputs = {path.resolve() for path in files}
    for output in outputs:
        if output.resolve() in inputs:
            raise DataError(f"the output {output} is also an input; choose another output prefix")
        if output.exists() and not overwrite:
            raise DataError(f"{output} exists; choose another output prefix or pass --overwrite")


@contextmanager
def _partial_folder(prefix: Path) -> Iterator[Path]:
    """A locked folder beside the output. One that a killed run left behind is used again."""
    folder = _path(prefix, ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another run is writing {prefix} (it holds {folder / 'lock'})") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_summary(path: Path, config: TokenizerConfig, tokenizer: Tokenizer, dtype: str, totals: Totals) -> None:
    summary = {
        "tokenizer": tokenizer.identity,
        "tokenizer_config": asdict(config),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "dtype": dtype,
        "documents": totals.documents,
        "tokens": totals.tokens,
        "text_bytes": totals.text_bytes,
        "empty": totals.empty,
        "skipped": totals.skipped,
        "skipped_examples": totals.skipped_examples,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def _publish(folder: Path, prefix: Path) -> None:
    """Moves the finished files into place. The .idx goes first and comes last: without it nothing reads a .bin."""
    for suffix in SUFFIXES:
        with (folder / f"data{suffix}").open("rb") as file:
            os.fsync(file.fileno())
    _path(prefix, ".idx").unlink(missing_ok=True)
    for suffix in (".bin", ".json", ".idx"):
        (folder / f"data{suffix}").replace(_path(prefix, suffix))
