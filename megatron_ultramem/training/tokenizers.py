"""Text to token ids and back: four kinds of tokenizer behind one small interface.

Megatron-Core brings tokenizers of its own, but its Hugging Face one needs `transformers`, its tiktoken one a JSON file
of its own make, and none of them can tell whether two files are the same. So this file talks to the three libraries
directly. It imports neither torch nor Megatron, so that the worker processes of the preprocessing tool start
quickly; the libraries are imported only when a tokenizer of their kind is made.

No tokenizer here reads special tokens out of text: '<|endoftext|>' inside a document is ordinary characters.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import ConfigError

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "<eod>", "<EOD>", "</s>", "<eos>", "<EOS>", "[EOS]")
"""Names under which an end-of-document token is looked for when `data.tokenizer.eod_token` is not set."""

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How the public cl100k_base encoding cuts text before merging; most published rank files expect it."""


class Tokenizer(ABC):
    """Text to ids and back.

    vocab_size: ids are in [0, vocab_size), `eod` included.
    eod: id of the end-of-document token.
    identity: short stable text from the kind and the file's contents; two tokenizers with the same identity give
        the same ids. It is saved with datasets and checkpoints.
    """

    def __init__(self, kind: str, vocab_size: int, eod: int, contents: bytes) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        self.identity = f"{kind}-{vocab_size}-{hashlib.sha256(contents + b'|eod=%d' % eod).hexdigest()[:16]}"

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron's datasets put into the name of their cached index files."""
        return {"tokenizer": self.identity}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens before or after it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; `eod` decodes to nothing, bytes that are no UTF-8 to U+FFFD."""

    def encode_array(self, text: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """`encode` as an array of `dtype`, [tokens]."""
        return np.asarray(self.encode(text), dtype=dtype)


class StreamDecoder:
    """Decodes ids one at a time and gives out complete characters only.

    The texts returned by `push`, followed by that of `flush`, joined, are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Ids that are still of use: those of the piece given out last (how a token decodes may depend on
        # whether one stands before it: SentencePiece drops the space of the first), then the ones held back.
        self._window: list[int] = []
        self._given_out = 0

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._given_out :]
        self._given_out = len(self._window)
        return text

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        text = self._pending()
        self._window, self._given_out = [], 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given_out])
        return self._tokenizer.decode(self._window)[len(before) :]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 as ids 0 to 255, end of document as 256. Needs no file."""

    def __init__(self) -> None:
        super().__init__("byte", vocab_size=257, eod=256, contents=b"utf-8")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_array(self, text: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(dtype)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, or a folder that holds one."""

    def __init__(self, path: Path, eod_token: str | None) -> None:
        tokenizers = _library("tokenizers")
        if path.is_dir():
            path = path / "tokenizer.json"
        contents = _contents(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(contents)
        except Exception as error:  # the library raises bare Exception
            raise _wrong_kind(path, "huggingface", "a tokenizer.json of the tokenizers library", error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"data.tokenizer.path={path}: the vocabulary is empty")
        eod = _find_eod(path, eod_token, vocabulary.get)
        super().__init__("huggingface", max(vocabulary.values()) + 1, eod, contents)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([token for token in ids if token != self.eod], skip_special_tokens=False)
        return text


class SentencePieceTokenizer(Tokenizer):
    """A .model file of SentencePiece."""

    def __init__(self, path: Path, eod_token: str | None) -> None:
        sentencepiece = _library("sentencepiece")
        contents = _contents(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(contents)
        except (RuntimeError, OSError) as error:
            raise _wrong_kind(path, "sentencepiece", "a SentencePiece .model", error) from error

        def find(name: str) -> int | None:
            token: int = self._model.piece_to_id(name)
            return None if token == self._model.unk_id() else token

        eod: int = self._model.eos_id()
        if eod_token is not None or eod < 0:
            eod = _find_eod(path, eod_token, find)
        super().__init__("sentencepiece", self._model.get_piece_size(), eod, contents)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([token for token in ids if token != self.eod])
        return text


class TiktokenTokenizer(Tokenizer):
    """A .tiktoken rank file (lines of base64 bytes and a rank), or one of tiktoken's own encodings by name.

    A rank file holds neither special tokens nor the pattern that cuts text: its end-of-document token gets the first id
    after the ranks, and the pattern is `data.tokenizer.pattern`, or that of cl100k_base.
    """

    def __init__(self, path: str, eod_token: str | None, pattern: str | None) -> None:
        tiktoken = _library("tiktoken")
        if Path(path).is_file():
            contents = _contents(Path(path))
            ranks = _parse_ranks(Path(path), contents)
            pattern = pattern or CL100K_PATTERN
            special = {eod_token or EOD_NAMES[0]: max(ranks.values()) + 1}
            contents += b"|pattern=" + pattern.encode()
            try:
                self._encoding = tiktoken.Encoding(
                    Path(path).name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
                )
            except ValueError as error:
                raise ConfigError(f"data.tokenizer.pattern={pattern!r} is no regular expression: {error}") from error
        else:
            if pattern is not None:
                raise ConfigError(f"data.tokenizer.pattern is for a rank file, and there is no file {path!r}")
            self._encoding = _builtin_encoding(tiktoken, path)
            contents = path.encode()
        names = self._encoding.special_tokens_set
        eod = _find_eod(
            path, eod_token, lambda name: self._encoding.encode_single_token(name) if name in names else None
        )
        super().__init__("tiktoken", self._encoding.n_vocab, eod, contents)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([token for token in ids if token != self.eod])
        return text


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` describes.

    Raises ConfigError when the file is missing, is of another kind, or has no end-of-document token.
    """
    if config.pattern is not None and config.kind != "tiktoken":
        raise ConfigError(f"data.tokenizer.pattern is for kind=tiktoken, but kind={config.kind}; leave it null")
    if config.kind == "byte":
        for name, value in (("path", config.path), ("eod_token", config.eod_token)):
            if value is not None:
                raise ConfigError(f"data.tokenizer.{name}={value!r}: the byte tokenizer has none; leave it null")
        return ByteTokenizer()
    if config.path is None:
        raise ConfigError(f"data.tokenizer.path is not set, but data.tokenizer.kind={config.kind} needs one")
    if config.kind == "huggingface":
        return HuggingFaceTokenizer(Path(config.path), config.eod_token)
    if config.kind == "sentencepiece":
        return SentencePieceTokenizer(Path(config.path), config.eod_token)
    if config.kind == "tiktoken":
        return TiktokenTokenizer(config.path, config.eod_token, config.pattern)
    raise ConfigError(f"data.tokenizer.kind={config.kind!r}: legal are byte, huggingface, sentencepiece, tiktoken")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this data.tokenizer.kind needs the package {name!r}, which is not installed: "
            "pip install 'megatron-ultramem[tokenizers]'"
        ) from error


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.tokenizer.path={path} cannot be read: {error.strerror or error}") from error


def _wrong_kind(path: Path | str, kind: str, expected: str, error: object) -> ConfigError:
    return ConfigError(f"data.tokenizer.path={path}: kind={kind} needs {expected}, and this is not one ({error})")


def _find_eod(path: Path | str, eod_token: str | None, find: Callable[[str], int | None]) -> int:
    for name in (eod_token,) if eod_token is not None else EOD_NAMES:
        token = find(name)
        if token is not None:
            return token
    missing = f"no token {eod_token!r}" if eod_token is not None else f"none of {', '.join(EOD_NAMES)}"
    raise ConfigError(
        f"data.tokenizer.path={path} has {missing}: set data.tokenizer.eod_token to its end-of-document token's name"
    )


def _parse_ranks(path: Path, contents: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise _wrong_kind(path, "tiktoken", "a rank file", f"line {number}: {error}") from error
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise _wrong_kind(path, "tiktoken", "a rank file with all 256 single bytes", f"{missing} are missing")
    return ranks


def _builtin_encoding(tiktoken: Any, name: str) -> Any:
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ConfigError(
            f"data.tokenizer.path={name}: neither a file nor one of tiktoken's encodings: {', '.join(names)}"
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer.path={name}: tiktoken has no local copy of this encoding and cannot download it; put it "
            f"into TIKTOKEN_CACHE_DIR on a machine with a network, or give the path of a rank file ({error})"
        ) from error
