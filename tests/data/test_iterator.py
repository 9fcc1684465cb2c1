from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from corpus_helpers import WritePair, random_documents
from torch import Tensor

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.training.data import BatchIterator, build_datasets
from megatron_ultramem.training.data.iterator import document_mask, document_starts, packed_bounds
from megatron_ultramem.training.tokenizers import build_tokenizer

BYTE = build_tokenizer(TokenizerConfig())
MICRO_BATCH = 2
Batch = dict[str, Tensor]


@pytest.fixture
def dataset(config: Config, write_pair: WritePair) -> Any:
    """At least 80 samples of 32 tokens, no two alike, blended from two files."""
    config.data.paths = [write_pair("a", random_documents(60)), write_pair("b", random_documents(40, seed=1))]
    return train_dataset(config)


def train_dataset(config: Config) -> Any:
    return build_datasets(
        config, BYTE, train_samples=80, valid_samples=0, test_samples=0, is_built_on_rank=lambda: True
    ).train


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def read(iterator: BatchIterator, consumed: int, steps: list[int], stride: int) -> list[Batch]:
    """All micro-batches of steps of so many micro-batches each."""
    batches = []
    for num_microbatches in steps:
        batches += list(iterator.step(consumed, num_microbatches))
        consumed += num_microbatches * stride
    return batches


def test_one_rank_reads_the_samples_in_order(dataset: Any) -> None:
    batches = list(BatchIterator(dataset, MICRO_BATCH, 0, 1).step(6, 4))
    assert [batch["tokens"].shape for batch in batches] == [(MICRO_BATCH, 32)] * 4
    assert {key: value.dtype for key, value in batches[0].items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "loss_mask": torch.float32,
    }
    for key in batches[0]:
        expected = torch.stack([dataset[i][key] for i in range(6, 14)])
        assert torch.equal(torch.cat([batch[key] for batch in batches]), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_interleave_to_the_stream_of_one_rank(dataset: Any, dp_size: int, num_workers: int) -> None:
    alone = list(BatchIterator(dataset, MICRO_BATCH, 0, 1).step(8, 8))
    ranks = [
        list(BatchIterator(dataset, MICRO_BATCH, rank, dp_size, num_workers).step(8, 8 // dp_size))
        for rank in range(dp_size)
    ]
    assert equal([batch for row in zip(*ranks, strict=True) for batch in row], alone)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resuming_anywhere_continues_the_stream(dataset: Any, stop: int, num_workers: int) -> None:
    steps = [1, 1, 2, 3, 3]  # as in a batch ramp-up
    stride = MICRO_BATCH * 2
    straight = read(BatchIterator(dataset, MICRO_BATCH, 1, 2), 4, steps, stride)
    before = read(BatchIterator(dataset, MICRO_BATCH, 1, 2, num_workers), 4, steps[:stop], stride)
    consumed = 4 + sum(steps[:stop]) * stride
    after = read(BatchIterator(dataset, MICRO_BATCH, 1, 2, num_workers), consumed, steps[stop:], stride)
    assert equal(before + after, straight)


def test_resuming_with_another_layout_continues_the_stream(dataset: Any) -> None:
    """Global batches of 16: two steps on 1 rank with micro-batches of 4, then two on 4 ranks with ones of 2."""
    seen = [batch["tokens"] for step in range(2) for batch in BatchIterator(dataset, 4, 0, 1).step(step * 16, 4)]
    ranks = [BatchIterator(dataset, 2, rank, 4) for rank in range(4)]
    for step in range(2, 4):
        rows = zip(*(iterator.step(step * 16, 2) for iterator in ranks), strict=True)
        seen += [batch["tokens"] for row in rows for batch in row]
    assert torch.equal(torch.cat(seen), torch.stack([dataset[i]["tokens"] for i in range(64)]))


def test_workers_change_nothing_and_are_kept_between_consecutive_steps(dataset: Any) -> None:
    ahead = BatchIterator(dataset, MICRO_BATCH, 0, 2, num_workers=2)
    assert equal(read(ahead, 0, [2, 2, 1], 4), read(BatchIterator(dataset, MICRO_BATCH, 0, 2), 0, [2, 2, 1], 4))
    workers = ahead._loaded
    list(ahead.step(20, 1))
    assert ahead._loaded is workers
    ahead.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_can_be_read_again_and_left_half_way(dataset: Any, num_workers: int) -> None:
    iterator = BatchIterator(dataset, MICRO_BATCH, 0, 1, num_workers)
    first = list(iterator.step(12, 3))
    assert equal(list(iterator.step(12, 3)), first)
    next(iter(iterator.step(12, 3)))
    assert equal(list(iterator.step(12, 3)), first)
    chunks = [BatchIterator(dataset, MICRO_BATCH, 0, 1, num_workers).step(12, 3) for _ in range(2)]
    for pair in zip(*chunks, strict=True):
        assert equal(list(pair[:1]), list(pair[1:]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_state_is_left_alone(dataset: Any, num_workers: int) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    read(BatchIterator(dataset, MICRO_BATCH, 0, 2, num_workers), 0, [2, 2], 4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_last_whole_step_is_read_and_the_next_refused(dataset: Any, num_workers: int) -> None:
    iterator = BatchIterator(dataset, MICRO_BATCH, 1, 2, num_workers)
    length = len(dataset)
    last = length // 4 * 4
    assert len(list(iterator.step(last - 8, 2))) == 2
    with pytest.raises(TrainingError, match=rf"samples {last} to {last + 4} are wanted, but .* built for {length}"):
        iterator.step(last, 1)


def test_rank_outside_the_group_is_refused(dataset: Any) -> None:
    with pytest.raises(ValueError, match="dp_rank=2: legal: 0 to 1"):
        BatchIterator(dataset, MICRO_BATCH, 2, 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_document_boundaries_are_masked(config: Config, write_pair: WritePair, num_workers: int) -> None:
    config.data.paths = [write_pair("data", random_documents(60))]
    config.data.mask_document_boundaries = True
    dataset = train_dataset(config)
    batches = list(BatchIterator(dataset, 3, 0, 1, num_workers).step(0, 5))
    assert any((batch["tokens"] == BYTE.eod).any() for batch in batches)
    for batch in batches:
        tokens, mask = batch["tokens"].tolist(), batch["attention_mask"]
        assert (mask.shape, mask.dtype) == ((3, 1, 32, 32), torch.bool)
        for row in range(3):
            for i in range(32):
                for j in range(32):
                    visible = j <= i and BYTE.eod not in tokens[row][j:i]
                    assert mask[row, 0, i, j].item() is not visible
        bounds = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == batch["max_seqlen"].dtype == torch.int32
        flat = [token for row in tokens for token in row]
        assert bounds == [p for p in range(96) if p % 32 == 0 or flat[p - 1] == BYTE.eod] + [96]
        assert batch["max_seqlen"].item() == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))


def test_dense_mask_is_left_out_on_request(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("data", random_documents(60))]
    config.data.mask_document_boundaries = True
    batch = next(BatchIterator(train_dataset(config), 2, 0, 1, dense_attention_mask=False).step(0, 1))
    assert {"cu_seqlens", "max_seqlen"} <= batch.keys()
    assert "attention_mask" not in batch


def test_mask_equals_megatrons_own(config: Config, write_pair: WritePair) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    tokens = torch.tensor([[5, 256, 6, 7, 256, 256, 8, 9], [256, 1, 2, 3, 4, 5, 6, 256], [1, 2, 3, 4, 5, 6, 7, 8]])
    ours = document_mask(document_starts(tokens, 256))
    theirs = [_get_ltor_masks_and_position_ids(row, 256, False, True, False, True)[0] for row in tokens]
    assert torch.equal(ours, torch.stack(theirs))
    bounds, longest = packed_bounds(document_starts(tokens, 256))
    assert (bounds.tolist(), longest.item()) == ([0, 2, 5, 6, 8, 9, 16, 24], 8)
