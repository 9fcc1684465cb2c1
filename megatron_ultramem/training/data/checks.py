"""What can be known to be wrong with the data before anything is built from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, DataError
from megatron_ultramem.training.data.index_file import IndexFile, read_index
from megatron_ultramem.training.data.sources import SPLITS, Source, sources, split_bounds, split_tokens
from megatron_ultramem.training.tokenizers import Tokenizer

SAMPLED_DOCUMENTS = 64
SAMPLED_TOKENS = 1 << 20


def check_data(config: Config, tokenizer: Tokenizer, splits: Sequence[str] | None = None) -> None:
    """Checks the data of `splits`; None: train, and valid if there is evaluation. Needs no process group.

    Raises ConfigError for settings (no data named, `data.split`, weights, `data.sequence_length`, `model.vocab_size`)
    and DataError for files: missing, damaged, made by another tokenizer, ids beyond the vocabulary, no
    end-of-document ids where they are needed, a split too small for one sample.
    """
    data = config.data
    if data.sequence_length > config.model.max_sequence_length:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} exceeds model.max_sequence_length="
            f"{config.model.max_sequence_length}"
        )
    if config.model.vocab_size is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}; legal: at least that, or null"
        )
    if splits is None:
        splits = ("train", "valid") if config.train.eval_steps > 0 else ("train",)
    indices: dict[str, IndexFile] = {}
    for split in sorted(splits, key=SPLITS.index):
        found = sources(data, split)
        if not found:
            raise _nothing_named(config, split)
        for source in found:
            if source.prefix not in indices:
                indices[source.prefix] = read_index(source.prefix)
                _check_tokenizer(source, tokenizer)
                _check_ids(config, indices[source.prefix], tokenizer)
            _check_split(config, split, source, indices[source.prefix])


def _nothing_named(config: Config, split: str) -> ConfigError:
    if split == "train":
        return ConfigError(
            "no training data: set data.paths (or data.train_paths) to prefixes made by tools/preprocess_data.py"
        )
    reason = (
        f" and train.eval_steps={config.train.eval_steps}; set it to 0 for no evaluation" if split == "valid" else ""
    )
    return ConfigError(f"data.{split}_paths is empty{reason}")


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    summary = Path(f"{source.prefix}.json")
    if not summary.is_file():  # data made by other tools has none
        return
    try:
        identity = json.loads(summary.read_text())["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{summary} does not say which tokenizer made {source.prefix}.bin ({error!r}); make the data again with "
            "tools/preprocess_data.py --overwrite, or delete this file to go without the check"
        ) from error
    if identity != tokenizer.identity:
        raise DataError(
            f"{source.prefix}.bin was made with the tokenizer {identity}, but data.tokenizer is {tokenizer.identity}; "
            "set data.tokenizer to the one it was made with, or make the data again"
        )


def _check_ids(config: Config, index: IndexFile, tokenizer: Tokenizer) -> None:
    needs_eod = config.data.mask_document_boundaries or config.data.reset_position_ids
    count = min(SAMPLED_DOCUMENTS, index.documents)
    for document in np.linspace(0, index.documents - 1, count).astype(int).tolist():
        ids = index.read(document, document + 1)
        if not len(ids):
            continue
        checked = ids[:SAMPLED_TOKENS]
        low, high = int(checked.min()), int(checked.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise DataError(
                f"{index.prefix}.bin: document {document} has the token id {low if low < 0 else high}, outside the "
                f"tokenizer's vocabulary of {tokenizer.vocab_size}; it was made with another tokenizer"
            )
        if needs_eod and int(ids[-1]) != tokenizer.eod:
            raise DataError(
                f"{index.prefix}.bin: document {document} does not end with the end-of-document id {tokenizer.eod}, "
                "which data.mask_document_boundaries and data.reset_position_ids rely on"
            )


def _check_split(config: Config, split: str, source: Source, index: IndexFile) -> None:
    first, last = split_bounds(config.data, split, index.documents)
    where = f"{source.setting} {source.prefix}"
    if last <= first:
        raise DataError(
            f"{where}: data.split={config.data.split!r} leaves none of its {index.documents} documents for {split}; "
            f"give {split} a larger share, more documents, or its own data.{split}_paths"
        )
    tokens, needed = split_tokens(config.data, split, index), config.data.sequence_length + 1
    if tokens < needed:
        raise DataError(
            f"{where}: the {last - first} documents of {split} have {tokens} tokens, fewer than one sample of "
            f"data.sequence_length + 1 = {needed}; give {split} a larger share or shorten the sequence"
        )
