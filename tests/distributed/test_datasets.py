"""Ranks that build data sets together build the same as one alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess
from tests.distributed.workers import WorkerPool


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    """Two tokenised corpora of 50 documents of random letters each."""
    generator, made = np.random.default_rng(0), []
    for name in "ab":
        files = []
        for number in range(50):
            files.append(tmp_path / f"{name}{number}.txt")
            files[-1].write_text("".join(chr(97 + letter) for letter in generator.integers(0, 26, 80)))
        preprocess(files, tmp_path / name, TokenizerConfig())
        made.append(str(tmp_path / name))
    return made


def built_tokens(prefixes: list[str], cache_dir: Path) -> list[list[int]]:
    """All samples for training and the last for validation of a blend."""
    from megatron_ultramem.training.data import build_datasets
    from megatron_ultramem.training.tokenizers import build_tokenizer

    store, rank, ranks = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    config = Config()
    config.data.paths, config.data.split, config.data.sequence_length = prefixes, "80,20", 32
    config.data.cache_dir = str(cache_dir)
    data = build_datasets(
        config, build_tokenizer(config.data.tokenizer), train_samples=80, valid_samples=16, test_samples=0,
        is_built_on_rank=lambda: True,
    )  # fmt: skip
    assert data.train is not None and data.valid is not None
    return [*(data.train[i]["tokens"].tolist() for i in range(80)), data.valid[15]["tokens"].tolist()]


def test_two_ranks_with_one_cache_build_the_same_as_one(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    first, second = pool.run(2, built_tokens, prefixes, tmp_path / "shared")
    (alone,) = pool.run(1, built_tokens, prefixes, tmp_path / "own")
    assert first == second == alone and len({tuple(tokens) for tokens in alone}) > 60
