"""Megatron's GPTDataset and BlendedDataset for train, validation and test."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import DataError
from megatron_ultramem.training.data.checks import check_data
from megatron_ultramem.training.data.index_file import read_index
from megatron_ultramem.training.data.sources import SPLITS, configured_blend, split_tokens
from megatron_ultramem.training.tokenizers import Tokenizer

Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True)
class SampleCounts:
    """Samples of `data.sequence_length` tokens that a run reads."""

    train: int
    valid: int


@dataclass(frozen=True)
class Datasets:
    """One dataset per split; None where it was not asked for, or on a rank that builds none.

    dataset[i] is a dict of `tokens`, `labels`, `position_ids` int64 [s] and `loss_mask` fp32 [s].
    """

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


def sample_counts(config: Config) -> SampleCounts:
    """Samples that cover the run under any layout: a batch ramp-up only makes steps smaller.

    The counts depend on `train.steps`, and data that is read several times is shuffled over all its epochs together: a
    run that is resumed with more steps sees those epochs in another order. Data read once keeps its order.
    """
    train = config.train
    return SampleCounts(train.steps * train.global_batch_size, train.eval_steps * train.global_batch_size)


def build_datasets(
    config: Config,
    tokenizer: Tokenizer,
    *,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    is_built_on_rank: Callable[[], bool],
) -> Datasets:
    """Builds the splits of which samples are wanted, each long enough, repeating its documents if need be.

    With torch.distributed initialised every rank must call this; rank 0, on which `is_built_on_rank` must be true,
    builds the index files and the others read them. Works without torch.distributed too.

    Raises what `check_data` raises, and DataError when the cache folder cannot be written.
    """
    wanted = {"train": train_samples, "valid": valid_samples, "test": test_samples}
    check_data(config, tokenizer, [split for split in SPLITS if wanted[split] > 0])
    cache_dir = _cache_dir(config)
    with _process_group(), _prepared_cache(cache_dir):
        builder = BlendedMegatronDatasetBuilder(
            GPTDataset, list(wanted.values()), is_built_on_rank, _megatron_config(config, tokenizer, wanted, cache_dir)
        )
        return Datasets(*builder.build())


def _megatron_config(config: Config, tokenizer: Tokenizer, wanted: dict[str, int], cache_dir: Path) -> GPTDatasetConfig:
    data = config.data
    files = max(len(configured_blend(data, split)[0]) for split in SPLITS)
    shared: dict[str, object] = {
        "random_seed": data.seed,
        "sequence_length": data.sequence_length,
        "path_to_cache": str(cache_dir),
        "tokenizer": tokenizer,
        "reset_position_ids": data.reset_position_ids,
        "reset_attention_mask": data.mask_document_boundaries,
        "eod_mask_loss": data.mask_eod_loss,
        # Whole samples per file round up, which draws more from a blend of many files than Megatron's default expects.
        "mid_level_dataset_surplus": max(0.005, 2 * files / min(filter(None, wanted.values()))),
        # GPTDataset fills an fp32 [s, s] mask in a loop over documents; BatchIterator makes it from the tokens.
        "create_attention_mask": False,
    }
    if not data.paths:
        per_split = [_blend(config, split) if wanted[split] > 0 else None for split in SPLITS]
        return GPTDatasetConfig(blend_per_split=per_split, **shared)
    result = GPTDatasetConfig(blend=_blend(config, "train"), split=data.split, **shared)
    # A split that nobody asked for is not built: with no document in it Megatron would count epochs for ever.
    assert result.split_matrix is not None
    result.split_matrix = [
        share if wanted[split] > 0 else None for split, share in zip(SPLITS, result.split_matrix, strict=True)
    ]
    return result


def _blend(config: Config, split: str) -> Blend:
    """Prefixes and weights. Without weights Megatron would read each of several files once and then stop, so the files
    get their tokens as weights, which mixes them in the same proportions for as long as is asked."""
    paths, weights = configured_blend(config.data, split)
    if len(paths) == 1:
        return paths, None
    return paths, weights or [float(split_tokens(config.data, split, read_index(path))) for path in paths]


def _cache_dir(config: Config) -> Path:
    """Cached index files are named after settings and paths, not contents: data made anew under the same prefix would
    be read with the old index. So each state of the data gets a folder of its own."""
    data = config.data
    root = Path(data.cache_dir) if data.cache_dir is not None else Path(config.train.run_dir) / "data_cache"
    prefixes = dict.fromkeys([*data.paths, *data.train_paths, *data.valid_paths, *data.test_paths])
    state = " ".join(f"{prefix}:{_fingerprint(prefix)}" for prefix in prefixes)
    return root / hashlib.sha256(state.encode()).hexdigest()[:16]


def _fingerprint(prefix: str) -> str:
    return read_index(prefix).fingerprint()


@contextmanager
def _prepared_cache(cache_dir: Path) -> Iterator[None]:
    """Makes the folder; on rank 0, which writes, drops files that a killed build left half written and holds a lock, so
    that runs that share the folder build one after the other."""
    with _lock_file(cache_dir) as lock:
        if dist.get_rank() == 0:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            for path in cache_dir.glob("*.npy"):
                if not _is_whole(path):
                    path.unlink()
        yield


def _lock_file(cache_dir: Path) -> IO[str]:
    """Opened on every rank, so that all of them see it when the folder cannot be written."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return (cache_dir / "lock").open("w")
    except OSError as error:
        raise DataError(
            f"the cache of data indices {cache_dir} cannot be written ({error.strerror or error}); set data.cache_dir"
        ) from error


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    return True


@contextmanager
def _process_group() -> Iterator[None]:
    """A group of this process alone while building, if there is none: 0.16's BlendedDataset asks for its rank."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
