"""The pool of ranks, and one small corpus and model, that all distributed tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess
from tests.distributed.layout_job import STEPS, train_job
from tests.distributed.workers import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte-tokenised data set of short documents of made-up words."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, 5)) for _ in range(60)]
    files = []
    for number in range(40):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(" ".join(generator.choice(words, generator.integers(5, 60))))
    preprocess(files, folder / "words", TokenizerConfig())
    return folder / "words"


@pytest.fixture(scope="session")
def small_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a small model, in fp32, with everything that a layout could get wrong; no memory sharing yet."""
    return [
        "model.num_layers=4",
        "model.hidden_size=32",
        "model.num_attention_heads=4",
        "model.num_query_groups=2",
        "model.ffn_hidden_size=64",
        "model.max_sequence_length=32",
        "model.memory.num_keys=12",
        "model.memory.key_dim=8",
        "model.memory.top_m=6",
        "model.memory.value_dim=16",
        "model.memory.pre_value_dim=12",
        f"data.paths=[{corpus}]",
        "data.split='80,20,0'",
        "data.sequence_length=32",
        "optimizer.lr=1e-3",
        "optimizer.eps=1e-4",
        "optimizer.clip_grad=0.5",
        "optimizer.value_lr_times=4.0",
        "schedule.warmup_steps=2",
        "train.steps=20",
        "train.global_batch_size=8",
        "train.micro_batch_size=1",
        "train.precision=fp32",
        "train.eval_steps=1",
        "checkpoint.load=none",
        "logging.progress=false",
        "logging.tensorboard=false",
        f"train.run_dir={tmp_path_factory.mktemp('runs')}",
    ]


@pytest.fixture(scope="session")
def one_rank(pool: WorkerPool, small_run: list[str]) -> Callable[[list[str]], dict[str, Any]]:
    """What `train_job` gives on one rank for settings on top of `small_run`; computed once for each."""
    cache: dict[tuple[str, ...], dict[str, Any]] = {}

    def reference(settings: list[str]) -> dict[str, Any]:
        if tuple(settings) not in cache:
            (cache[tuple(settings)],) = pool.run(1, train_job, [*small_run, *settings], STEPS, True)
        return cache[tuple(settings)]

    return reference
