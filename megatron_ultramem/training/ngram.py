"""How well one can predict without a network: unigram and bigram losses of the very data a run trains and validates on.

A model that has learned anything about context is below the bigram's loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import DataError
from megatron_ultramem.training.data.index_file import read_index
from megatron_ultramem.training.data.sources import sources, split_bounds
from megatron_ultramem.training.tokenizers import Tokenizer

Tokens = npt.NDArray[np.integer]
CHUNK_TOKENS = 1 << 24


class Baselines(NamedTuple):
    """Losses in nats per token on the validation documents."""

    unigram: float
    bigram: float


def unigram_bigram_baselines(config: Config, tokenizer: Tokenizer, alpha: float = 0.1) -> Baselines:
    """Both baselines, counted on the training documents and evaluated on the validation ones of `config.data`.

    Several files are counted as they are, without the weights of their blend.
    """
    return ngram_losses(
        split_token_chunks(config, "train"),
        split_token_chunks(config, "valid"),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        alpha=alpha,
    )


def split_token_chunks(config: Config, split: str, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Tokens]:
    """The tokens of the documents of `split`, in chunks of whole documents of about `chunk_tokens`."""
    for source in sources(config.data, split):
        index = read_index(source.prefix)
        first, last = split_bounds(config.data, split, index.documents)
        ends = np.cumsum(index.lengths, dtype=np.int64)
        while first < last:
            end_of_chunk = ends[first] - index.lengths[first] + chunk_tokens
            stop = min(max(int(np.searchsorted(ends, end_of_chunk, side="right")), first + 1), last)
            yield index.read(first, stop)
            first = stop


def ngram_losses(
    train: Iterable[Tokens], valid: Iterable[Tokens], *, vocab_size: int, eod: int, alpha: float
) -> Baselines:
    """-mean log p over the tokens of `valid`, with p(t) = (c(t) + alpha) / (N + alpha V) and
    p(t | a) = (c(a, t) + alpha) / (c(a) + alpha V), c counted on `train`.

    The chunks [tokens] are whole documents that end with `eod`; the first token of a document follows `eod`, as in a
    packed training sequence.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: legal: above 0, or a pair that training lacks has no probability")
    train_counts = _PairCounts(vocab_size, eod)
    valid_counts = _PairCounts(vocab_size, eod)
    train_counts.add_all(train)
    valid_counts.add_all(valid)
    if not train_counts.total or not valid_counts.total:
        raise DataError("n-gram baselines need training and validation tokens; one of the two splits is empty")

    def log_probability(counts: Tokens, totals: Tokens | int) -> npt.NDArray[np.float64]:
        log_p: npt.NDArray[np.float64] = np.log(counts + alpha) - np.log(totals + alpha * vocab_size)
        return log_p

    unigram = train_counts.unigrams
    unigram_loss = -(valid_counts.unigrams @ log_probability(unigram, train_counts.total)) / valid_counts.total
    pairs, pair_counts = valid_counts.pairs()
    seen = train_counts.lookup(pairs)
    # Every token of training is the context of exactly one other, counting each document as following an eod.
    bigram_loss = -(pair_counts @ log_probability(seen, unigram[pairs // vocab_size])) / valid_counts.total
    return Baselines(float(unigram_loss), float(bigram_loss))


class _PairCounts:
    """Counts of tokens and of (previous, token) pairs, the pairs as sorted numbers previous * vocab_size + token."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self._vocab_size, self._eod = vocab_size, eod
        self.unigrams = np.zeros(vocab_size, dtype=np.int64)
        self._pairs = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)

    @property
    def total(self) -> int:
        return int(self.unigrams.sum())

    def add_all(self, chunks: Iterable[Tokens]) -> None:
        for tokens in chunks:
            ids = tokens.astype(np.int64)
            self.unigrams += np.bincount(ids, minlength=self._vocab_size)
            previous = np.concatenate(([self._eod], ids[:-1]))
            pairs, counts = self._count(previous * self._vocab_size + ids)
            self._pairs, inverse = np.unique(np.concatenate((self._pairs, pairs)), return_inverse=True)
            merged = np.zeros(len(self._pairs), dtype=np.int64)
            np.add.at(merged, inverse, np.concatenate((self._counts, counts)))
            self._counts = merged

    def pairs(self) -> tuple[Tokens, Tokens]:
        return self._pairs, self._counts

    def lookup(self, pairs: Tokens) -> npt.NDArray[np.int64]:
        """The count of each of `pairs`, 0 where it never occurred."""
        at = np.searchsorted(self._pairs, pairs).clip(max=len(self._pairs) - 1)
        return np.where(self._pairs[at] == pairs, self._counts[at], 0)

    def _count(self, pairs: Tokens) -> tuple[Tokens, Tokens]:
        if self._vocab_size**2 <= CHUNK_TOKENS:  # a table is faster than a sort
            table = np.bincount(pairs, minlength=self._vocab_size**2)
            found = np.flatnonzero(table)
            return found, table[found]
        return np.unique(pairs, return_counts=True)
