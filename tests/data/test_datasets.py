from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from corpus_helpers import WritePair, random_documents

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.training.data import Datasets, build_datasets, sample_counts
from megatron_ultramem.training.tokenizers import build_tokenizer

BYTE = build_tokenizer(TokenizerConfig())


def build(config: Config, train: int = 80, valid: int = 16, test: int = 0) -> Datasets:
    return build_datasets(
        config, BYTE, train_samples=train, valid_samples=valid, test_samples=test, is_built_on_rank=lambda: True
    )


def samples(dataset: Any, count: int) -> list[list[int]]:
    return [[*dataset[i]["tokens"].tolist(), dataset[i]["labels"][-1].item()] for i in range(count)]


def characters(dataset: Any) -> Counter[int]:
    return Counter(token for sample in samples(dataset, len(dataset)) for token in sample)


def test_splits_have_the_samples_asked_for_from_their_own_documents(config: Config, write_pair: WritePair) -> None:
    documents = ["A" * 60] * 70 + ["B" * 60] * 20 + ["C" * 60] * 10
    config.data.paths, config.data.split = [write_pair("data", documents)], "70,20,10"
    datasets = build(config, train=50, valid=20, test=5)
    for dataset, letter, count in zip((datasets.train, datasets.valid, datasets.test), "ABC", (50, 20, 5), strict=True):
        assert len(dataset) >= count  # type: ignore[arg-type]
        assert set(characters(dataset)) == {ord(letter), BYTE.eod}


def test_labels_are_the_next_tokens(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("data", random_documents(50))]
    train: Any = build(config).train
    sample = train[3]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["tokens"].shape == sample["labels"].shape == (32,)
    assert sample["loss_mask"].eq(1).all()
    assert torch.equal(sample["position_ids"], torch.arange(32))


def test_short_data_is_repeated_for_as_long_as_asked(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("data", random_documents(10))]
    datasets = build(config, train=500, valid=100)
    assert len(datasets.train) >= 500  # type: ignore[arg-type]
    assert len(datasets.valid) >= 100  # type: ignore[arg-type]


def test_splits_not_asked_for_are_not_built(config: Config, write_pair: WritePair) -> None:
    config.data.paths, config.data.split = [write_pair("data", random_documents(10))], "969,30,1"  # no test document
    datasets = build(config, train=8, valid=0)
    assert datasets.train is not None
    assert datasets.valid is None
    assert datasets.test is None


@pytest.mark.parametrize("per_split", [False, True])
@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 3.0], []], ids=["3:1", "1:3", "by size"])
def test_blend_follows_the_weights_beyond_one_pass(
    config: Config, write_pair: WritePair, weights: list[float], per_split: bool
) -> None:
    a, b = write_pair("a", ["A" * 99] * 40), write_pair("b", ["B" * 99] * 20)
    if per_split:
        config.data.train_paths, config.data.train_weights = [a, b], weights
        config.data.valid_paths = [a]
    else:
        config.data.paths, config.data.weights = [a, b], weights
    train = build(config, train=400).train  # about 190 fit into one pass
    counts = characters(train)
    assert len(train) >= 400  # type: ignore[arg-type]
    share = counts[ord("A")] / (counts[ord("A")] + counts[ord("B")])
    assert share == pytest.approx(weights[0] / sum(weights) if weights else 2 / 3, abs=0.01)


def test_blend_of_many_files_has_enough_samples(config: Config, write_pair: WritePair) -> None:
    config.data.train_paths = [write_pair(f"p{i}", [f"{i:02}" * 40]) for i in range(30)]
    config.data.train_weights = [30.0] + [1.0] * 29
    train = build(config, train=40, valid=0).train
    assert len(samples(train, 40)) == 40


def test_each_split_from_its_own_paths(config: Config, write_pair: WritePair) -> None:
    for letter, split in zip("ABC", ("train", "valid", "test"), strict=True):
        setattr(config.data, f"{split}_paths", [write_pair(split, [letter * 99] * 5)])
    datasets = build(config, train=40, valid=16, test=3)
    for letter, dataset in zip("ABC", (datasets.train, datasets.valid, datasets.test), strict=True):
        assert set(characters(dataset)) == {ord(letter), BYTE.eod}


def test_data_order_depends_on_the_data_seed_alone(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("data", random_documents(50))]
    first = samples(build(config).train, 80)
    torch.manual_seed(99)
    config.data.cache_dir = config.train.run_dir + "/other_cache"
    assert samples(build(config).train, 80) == first
    config.data.seed = 5
    assert samples(build(config).train, 80) != first


def test_global_random_state_and_process_groups_are_left_alone(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("a", random_documents(50)), write_pair("b", random_documents(50, seed=1))]
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    build(config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert not dist.is_initialized()


def test_eod_loss_mask_and_position_reset(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("data", ["abcde"] * 200)]
    config.data.mask_eod_loss = config.data.reset_position_ids = True
    train: Any = build(config).train
    for i in range(20):
        sample = train[i]
        eod = sample["tokens"] == BYTE.eod
        assert torch.equal(sample["loss_mask"], (~eod).float())
        expected, position = [], 0
        for is_eod in eod.tolist():
            expected.append(position)
            position = 0 if is_eod else position + 1
        assert sample["position_ids"].tolist() == expected


def test_data_made_anew_is_not_read_with_the_old_index(config: Config, write_pair: WritePair) -> None:
    prefix = write_pair("data", ["A" * 99] * 50)
    config.data.paths = [prefix]
    build(config)
    new = write_pair("new", [f"{i} " * 30 for i in range(20)])
    for suffix in (".bin", ".idx", ".json"):
        Path(new + suffix).replace(prefix + suffix)
    fresh = build(config).train
    config.data.cache_dir = config.train.run_dir + "/empty_cache"
    assert samples(fresh, 80) == samples(build(config).train, 80)


def test_cache_left_half_written_by_a_killed_run_is_rebuilt(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("a", random_documents(50)), write_pair("b", random_documents(50, seed=1))]
    expected = samples(build(config).train, 80)
    cached = sorted(Path(config.train.run_dir, "data_cache").rglob("*.npy"))
    assert len(cached) > 8
    for size, path in enumerate(cached):
        path.write_bytes(path.read_bytes()[: size * 16])
    assert samples(build(config).train, 80) == expected


def test_sample_counts_cover_a_batch_ramp_up(config: Config) -> None:
    config.train.rampup_batch_size = [2, 2, 16]
    counts = sample_counts(config)
    assert (counts.train, counts.valid) == (80, 16)
    consumed = 0
    for _ in range(config.train.steps):
        consumed += min(2 + 2 * (consumed // 5), 8)
    assert consumed <= counts.train
