"""Which documents make up each split: the one reading of `data.paths`, `data.split` and the per-split paths."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_ultramem.config.schema import DataConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.training.data.index_file import IndexFile

SPLITS = ("train", "valid", "test")
_NUMBER = r"\s*\d+(\.\d*)?\s*"
_SPLIT = re.compile(rf"{_NUMBER}(,{_NUMBER}){{0,2}}")


@dataclass(frozen=True)
class Source:
    """One .bin/.idx prefix of a split, and the setting that named it."""

    prefix: str
    setting: str


def sources(config: DataConfig, split: str) -> list[Source]:
    """Where the documents of `split` ('train', 'valid', 'test') come from; empty if nowhere.

    Raises ConfigError when both ways of naming data are used, or weights do not match their paths.
    """
    per_split = bool(config.train_paths or config.valid_paths or config.test_paths)
    if per_split and config.paths:
        raise ConfigError("data.paths and data.train_paths/valid_paths/test_paths are both set; legal: one of the two")
    setting = f"data.{split}_paths" if per_split else "data.paths"
    paths, weights = configured_blend(config, split)
    if weights and len(weights) != len(paths):
        raise ConfigError(
            f"{setting.replace('paths', 'weights')} has {len(weights)} entries for the {len(paths)} of {setting}; "
            "legal: as many, or none"
        )
    return [Source(path, setting) for path in paths]


def configured_blend(config: DataConfig, split: str) -> tuple[list[str], list[float]]:
    """Paths and weights of `split` as the settings give them."""
    if config.paths:
        return list(config.paths), list(config.weights)
    return list(getattr(config, f"{split}_paths")), list(getattr(config, f"{split}_weights"))


def split_bounds(config: DataConfig, split: str, documents: int) -> tuple[int, int]:
    """Documents [first, last) of a file with `documents` of them that belong to `split`, rounded as Megatron does.

    Raises ConfigError when `data.split` cannot be read.
    """
    if not config.paths:
        return 0, documents
    if not _SPLIT.fullmatch(config.split) or not sum(map(float, config.split.split(","))) > 0:
        raise ConfigError(
            f"data.split={config.split!r}: legal: one to three shares of train, validation and test such as '969,30,1'"
        )
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(config.split))
    share = shares[SPLITS.index(split)]
    if share is None:
        return 0, 0
    return round(share[0] * float(documents)), round(share[1] * float(documents))


def split_tokens(config: DataConfig, split: str, index: IndexFile) -> int:
    """Tokens of `split` in one file."""
    first, last = split_bounds(config, split, index.documents)
    return int(index.lengths[first:last].sum(dtype="int64"))
