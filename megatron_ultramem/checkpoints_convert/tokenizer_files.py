"""Carries the tokenizer of a run into a Hugging Face folder, and back.

Into the folder go the run's own file, which is what comes back, and a tokenizer.json for AutoTokenizer: the run's, or
one that is made from it and compared with it. Training puts no special tokens before a text; where AutoTokenizer does,
or reads a text in another way, the conversion says so.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ultramem.checkpoints_convert.sentencepiece_json import convert_sentencepiece
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.training.tokenizers import CL100K_PATTERN, EOD_NAMES, Tokenizer, build_tokenizer

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_CARRIED = {"huggingface": TOKENIZER_JSON, "sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}
SAMPLES = (
    "The memory of a model is what it keeps when the text is gone.",
    "def total(rows):\n    return sum(row['n'] for row in rows)  # 12,345.67\n",
    "  Größe, naïveté, 東京, Привет, 🙂🏽; tabs\tand\r\nlines \u00a0 end ",
)
"""Texts by which tokenizers are compared, and on which the logits of a conversion are."""


def write_for_transformers(config: TokenizerConfig, tokenizer: Tokenizer, folder: Path, max_length: int) -> list[str]:
    """Writes the tokenizer's files; returns what a user should know about them.

    Args:
        config: that `tokenizer` was built from.
        max_length: positions of the model.
    """
    if (source := _own_file(config)) is not None:
        shutil.copyfile(source, folder / _CARRIED[config.kind])
    try:
        if config.kind == "byte":
            _byte_tokenizer().save(str(folder / TOKENIZER_JSON))
        elif config.kind != "huggingface":
            _converted(config).save(str(folder / TOKENIZER_JSON))
    except Exception as error:  # the libraries' converters raise whatever they like
        return [f"no tokenizer.json: this {config.kind} tokenizer cannot be converted ({error})"]
    end = _library_tokenizer(folder / TOKENIZER_JSON).id_to_token(tokenizer.eod)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return _compare(tokenizer, folder, config.kind)


def _own_file(config: TokenizerConfig) -> Path | None:
    """The file that a tokenizer was made from; None for bytes and for tiktoken's own encodings."""
    if config.kind not in _CARRIED or config.path is None or not Path(config.path).exists():
        return None
    path = Path(config.path)
    return path / TOKENIZER_JSON if path.is_dir() else path


def _compare(tokenizer: Tokenizer, folder: Path, kind: str) -> list[str]:
    """Removes a made tokenizer.json that reads texts in another way; returns remarks."""
    from transformers import PreTrainedTokenizerFast  # which AutoTokenizer makes, after it has run the folder's code

    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    differing = [text for text in SAMPLES if theirs(text, add_special_tokens=False).input_ids != tokenizer.encode(text)]
    if theirs.eos_token_id != tokenizer.eod:
        differing.append(str(theirs.eos_token))
    if differing and kind != "huggingface":
        for name in (TOKENIZER_JSON, TOKENIZER_CONFIG):
            (folder / name).unlink()
        return [
            f"no tokenizer.json: what the tokenizers library makes of this {kind} tokenizer reads "
            f"{differing[0][:30]!r}… in another way"
        ]
    if differing:
        return [f"AutoTokenizer reads {differing[0][:30]!r}… in another way than training did"]
    if theirs(SAMPLES[0]).input_ids != tokenizer.encode(SAMPLES[0]):
        return [
            "AutoTokenizer adds special tokens to a text, training did not; add_special_tokens=False leaves them out"
        ]
    return []


def _library_tokenizer(path: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path))


def _byte_tokenizer() -> Any:
    """The 256 bytes as a byte-level BPE without merges, whose ids are the bytes; end of document is the id after."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(EOD_NAMES[0], special=True)])
    return made


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it prints, else one from 256 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    moved = {byte: 256 + number for number, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def _converted(config: TokenizerConfig) -> Any:
    """A SentencePiece or tiktoken tokenizer as one of the tokenizers library."""
    file = _own_file(config)
    if file is None:
        raise ConfigError(f"{config.path} is one of tiktoken's own encodings, of which there is no file")
    if config.kind == "sentencepiece":
        return convert_sentencepiece(file)
    return (
        importlib.import_module("transformers.convert_slow_tokenizer")
        .TikTokenConverter(
            vocab_file=str(file),
            pattern=config.pattern or CL100K_PATTERN,
            extra_special_tokens=[config.eod_token or EOD_NAMES[0]],
        )
        .converted()
    )


@dataclass(frozen=True)
class Found:
    """The tokenizer of a folder that is imported.

    Attributes:
        config: as the checkpoint will describe it, with its file beside the checkpoint's own.
        file: that has to be copied there; None: nothing has.
        tokenizer: itself.
    """

    config: TokenizerConfig
    file: Path | None
    tokenizer: Tokenizer


def find_tokenizer(folder: Path, home: Path, saved: TokenizerConfig | None = None) -> Found:
    """The tokenizer in a Hugging Face folder.

    Args:
        home: folder of the checkpoint, at the end.
        saved: of the run that the folder was converted from, if it was.

    Raises CheckpointError if there is none that we can use, or tokenizer.json has changed since it was made from the
    saved one, and ConfigError if it is damaged.
    """
    found = _find(folder, home, saved)
    if saved is not None and saved.kind != "huggingface" and (folder / TOKENIZER_JSON).is_file():
        _check_unchanged(folder / TOKENIZER_JSON, found)
    return found


def _check_unchanged(path: Path, saved: Found) -> None:
    """Raises CheckpointError if a tokenizer.json reads texts in another way than the tokenizer it was made from."""
    ours = saved.tokenizer
    try:
        theirs = _library_tokenizer(path)
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    differing = [text for text in SAMPLES if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text)]
    # Fewer are legal: tiktoken counts ids that it leaves unused.
    if differing or theirs.get_vocab_size() > ours.vocab_size:
        what = f"reads {differing[0][:30]!r}… in another way" if differing else "has more tokens"
        raise CheckpointError(
            f"{path} ({theirs.get_vocab_size()} tokens) {what} than the {saved.config.kind} tokenizer of the run "
            f"({saved.config.path or ours.identity}, {ours.vocab_size} tokens); legal: the tokenizer.json that was "
            "written with the folder, or none"
        )


def _find(folder: Path, home: Path, saved: TokenizerConfig | None) -> Found:
    """As `find_tokenizer`, from the file of the saved kind alone."""
    if saved is not None and (saved.kind == "byte" or not (folder / _CARRIED[saved.kind]).is_file()):
        return Found(saved, None, build_tokenizer(saved))  # bytes, one of tiktoken's own, or where it was then
    for kind in [saved.kind] if saved is not None else ["huggingface", "sentencepiece"]:
        file = folder / _CARRIED[kind]
        if not file.is_file():
            continue
        described = saved or TokenizerConfig(kind=kind, eod_token=_eos_token(folder))
        tokenizer = build_tokenizer(replace(described, path=str(file)))
        if saved is not None and _leads_to(saved, tokenizer):
            return Found(saved, None, tokenizer)
        return Found(replace(described, path=str(home / file.name)), file, tokenizer)
    raise CheckpointError(
        f"{folder} has no tokenizer.json or tokenizer.model; legal: a folder with one, or the settings "
        "data.tokenizer.kind and data.tokenizer.path"
    )


def _leads_to(saved: TokenizerConfig, tokenizer: Tokenizer) -> bool:
    """Whether the path in saved settings still leads to the tokenizer that was carried along."""
    try:
        return build_tokenizer(saved).identity == tokenizer.identity
    except ConfigError:
        return False


def _eos_token(folder: Path) -> str | None:
    """The end-of-text token that tokenizer_config.json names; None: to be found by the usual names."""
    try:
        token = json.loads((folder / TOKENIZER_CONFIG).read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
