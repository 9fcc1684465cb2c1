"""Text that every machine with a few Python packages has: the sources and documents of what is installed, and a
tokenizer trained on them. Hundreds of megabytes where PyTorch and its like are, without a download.
"""

from __future__ import annotations

import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ultramem.errors import ConfigError, DataError

SUFFIXES = frozenset(
    {".py", ".pyi", ".md", ".rst", ".txt", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
)  # fmt: skip
LARGEST_BYTES = 1 << 20  # what is larger is data or generated
EOD = "<|endoftext|>"
READERS = 32


@dataclass(frozen=True)
class PackageFiles:
    """Documents in an order that their contents decide, no two of which are equal; the held-out ones are a share of all
    that does not depend on what else is installed. Bytes of text of both."""

    train: list[Path]
    held_out: list[Path]
    train_bytes: int
    held_out_bytes: int


def package_files(held_out_share: float, folders: Sequence[Path] | None = None) -> PackageFiles:
    """Text and code files below `folders`: by default the standard library and installed packages of this interpreter.

    Raises DataError where one of the two parts would be empty.
    """
    if not 0 < held_out_share < 1:
        raise DataError(f"held-out share {held_out_share}: legal: above 0 and below 1")
    folders = _installed() if folders is None else folders
    found: dict[str, tuple[Path, int]] = {}
    with ThreadPoolExecutor(READERS) as readers:  # reading is waiting for the disk
        for path, digest, size in readers.map(_digest, _candidates(folders), chunksize=64):
            if digest is not None and digest not in found:
                found[digest] = path, size
    limit = int(held_out_share * 2**32)
    parts: tuple[list[tuple[Path, int]], list[tuple[Path, int]]] = ([], [])
    for digest, document in sorted(found.items()):
        # Other digits than those that sort, so that both parts have the same mixture.
        parts[int(digest[-8:], 16) < limit].append(document)
    if not all(parts):
        raise DataError(
            f"{len(found)} different text and code files in {', '.join(map(str, folders))} are too few to hold "
            f"{held_out_share:.0%} out"
        )
    (train, held_out), (train_bytes, held_out_bytes) = (
        [[path for path, _ in part] for part in parts],
        [sum(size for _, size in part) for part in parts],
    )
    return PackageFiles(train, held_out, train_bytes, held_out_bytes)


def train_tokenizer(files: Sequence[Path], vocab_size: int, path: Path, sample_bytes: int = 40_000_000) -> None:
    """Writes a tokenizer.json: byte-level BPE of at most `vocab_size` tokens, trained on the first `sample_bytes`.

    Raises ConfigError where the vocabulary is too small for all bytes, or `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ConfigError("a tokenizer is trained with `tokenizers`: pip install tokenizers") from error
    if vocab_size < 257:
        raise ConfigError(f"vocabulary of {vocab_size}: legal: at least 257, the bytes and the end of a document")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, sample_bytes), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def _installed() -> list[Path]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")] + site.getsitepackages()
    return sorted({Path(path).resolve() for path in paths if Path(path).is_dir()})


def _candidates(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for root, inner, names in os.walk(folder):
            inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
            yield from (Path(root, name) for name in names if os.path.splitext(name)[1] in SUFFIXES)


def _digest(path: Path) -> tuple[Path, str | None, int]:
    """Hash and size of the contents; no hash of what is empty, too large, or no UTF-8 text."""
    try:
        if not 0 < path.stat().st_size <= LARGEST_BYTES:
            return path, None, 0
        contents = path.read_bytes()
        contents.decode()
    except (OSError, UnicodeDecodeError):
        return path, None, 0
    return path, hashlib.sha256(contents).hexdigest(), len(contents)


def _texts(files: Sequence[Path], sample_bytes: int) -> Iterator[str]:
    for path in files:
        if sample_bytes <= 0:
            return
        text = path.read_text(encoding="utf-8")
        sample_bytes -= len(text)
        yield text
