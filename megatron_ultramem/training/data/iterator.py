"""Micro-batches as a pure function of the position in the data.

Micro-batch j of a step that starts after `consumed` samples holds, on data-parallel rank d of D, the samples

    consumed + (j*D + d)*b + [0, b)        (b: micro-batch size)

so consecutive steps read one arithmetic progression of samples whatever their number of micro-batches: nothing but
`consumed` has to be saved to resume exactly, and a batch ramp-up or another D continues where the last one stopped.

Legend: b micro-batch size, s sequence length, n documents (or parts of documents) in a micro-batch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_ultramem.errors import TrainingError

Batch = dict[str, Tensor]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class BatchIterator:
    """Reads the micro-batches of one data-parallel rank from a dataset of `build_datasets`.

    With `num_workers` > 0 that many processes read ahead; the batches are the same. Pipeline chunks that need the
    same micro-batches each get an iterator of their own. No global random state is used.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 0,
        *,
        dense_attention_mask: bool = True,
        wraps: bool = False,
    ) -> None:
        """
        Args:
            dense_attention_mask: if document boundaries are masked, make the [b, 1, s, s] mask beside `cu_seqlens`.
            wraps: begin anew after the last sample, for a run that may pass over data (`anomalies.rewind`).
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank}: legal: 0 to {dp_size - 1}")
        self._dataset = dataset
        self._length = len(cast(Sized, dataset))
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._num_workers, self._wraps = num_workers, wraps
        settings: Any = dataset.config  # type: ignore[attr-defined]  # a GPTDatasetConfig
        self._collate = Collate(
            eod=settings.tokenizer.eod, mask_documents=settings.reset_attention_mask, dense_mask=dense_attention_mask
        )
        self._loaded: Iterator[Batch] | None = None
        self._loaded_position = -1

    def step(self, consumed_samples: int, num_microbatches: int) -> Iterator[Batch]:
        """The micro-batches of the step that starts after `consumed_samples` samples (of all ranks), on the CPU:

        tokens, labels, position_ids int64 [b, s]; loss_mask fp32 [b, s]; and if the dataset masks document boundaries
        attention_mask bool [b, 1, s, s], True where attention is masked (if dense_attention_mask), cu_seqlens int32
        [n + 1], the bounds of the documents in the b*s tokens laid end to end, and max_seqlen int32 [], the longest.

        Raises TrainingError when the dataset is too short.
        """
        stride = self._micro_batch_size * self._dp_size
        last = consumed_samples + num_microbatches * stride
        if last > self._length and not self._wraps:
            raise TrainingError(
                f"samples {consumed_samples} to {last} are wanted, but the dataset was built for {self._length}; "
                "build it for all steps of the run"
            )
        if self._num_workers == 0:
            return (self._read(consumed_samples + j * stride) for j in range(num_microbatches))
        return self._read_ahead(consumed_samples, num_microbatches, stride)

    def close(self) -> None:
        """Ends the worker processes."""
        self._loaded, self._loaded_position = None, -1

    def _read(self, position: int) -> Batch:
        first = position + self._dp_rank * self._micro_batch_size
        return self._collate([self._dataset[i % self._length] for i in range(first, first + self._micro_batch_size)])

    def _read_ahead(self, consumed_samples: int, num_microbatches: int, stride: int) -> Iterator[Batch]:
        for j in range(num_microbatches):
            position = consumed_samples + j * stride
            if self._loaded is None or self._loaded_position != position:
                self._loaded = iter(self._loader(position))
            self._loaded_position = position + stride
            yield next(self._loaded)

    def _loader(self, position: int) -> DataLoader[Any]:
        return DataLoader(
            self._dataset,
            batch_sampler=Progression(
                position, self._length, self._micro_batch_size, self._dp_rank, self._dp_size, wraps=self._wraps
            ),
            num_workers=self._num_workers,
            collate_fn=self._collate,
            worker_init_fn=_outlive_termination,
            generator=torch.Generator().manual_seed(0),  # otherwise the loader draws a seed from the global one
        )


def _outlive_termination(worker: int) -> None:
    """A SIGTERM to a rank's process group is for the rank, which needs its workers until it has finished the step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Progression(Sampler[list[int]]):
    """Sample numbers of one rank's micro-batches from `position` on, to the last one that is whole on every rank; or
    without an end, if it wraps."""

    def __init__(
        self, position: int, length: int, micro_batch_size: int, dp_rank: int, dp_size: int, *, wraps: bool = False
    ) -> None:
        self._stride = micro_batch_size * dp_size
        self._offset = dp_rank * micro_batch_size
        self._micro_batch_size, self._length = micro_batch_size, length
        end = sys.maxsize if wraps else length - self._stride + 1
        self._starts = range(position, end, self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            first = start + self._offset
            yield [i % self._length for i in range(first, first + self._micro_batch_size)]

    def __len__(self) -> int:
        return len(self._starts)


class Collate:
    """Samples to a micro-batch, with the document structure if attention is to stay inside documents."""

    def __init__(self, eod: int, mask_documents: bool, dense_mask: bool) -> None:
        self._eod, self._mask_documents, self._dense_mask = eod, mask_documents, dense_mask

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        batch: Batch = {key: default_collate([sample[key] for sample in samples]) for key in _KEYS}
        if self._mask_documents:
            starts_BS = document_starts(batch["tokens"], self._eod)
            batch["cu_seqlens"], batch["max_seqlen"] = packed_bounds(starts_BS)
            if self._dense_mask:
                batch["attention_mask"] = document_mask(starts_BS)
        return batch


def document_starts(tokens_BS: Tensor, eod: int) -> Tensor:
    """True at the first token of each sequence and after each end-of-document token, bool [b, s]."""
    starts_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    starts_BS[:, 1:] = tokens_BS[:, :-1] == eod
    return starts_BS


def document_mask(starts_BS: Tensor) -> Tensor:
    """True where query i must not see key j: j comes later or is in another document, bool [b, 1, s, s]."""
    document_BS = starts_BS.cumsum(dim=1)
    length = starts_BS.shape[1]
    later_SS = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    return (later_SS | (document_BS[:, :, None] != document_BS[:, None, :])).unsqueeze(1)


def packed_bounds(starts_BS: Tensor) -> tuple[Tensor, Tensor]:
    """cu_seqlens int32 [n + 1] and max_seqlen int32 [] of the b*s tokens laid end to end."""
    bounds = starts_BS.flatten().nonzero().flatten()
    bounds = torch.cat((bounds, bounds.new_tensor([starts_BS.numel()]))).to(torch.int32)
    return bounds, bounds.diff().max()
