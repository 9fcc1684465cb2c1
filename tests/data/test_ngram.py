from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from corpus_helpers import WritePair, random_documents

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import DataError
from megatron_ultramem.training.ngram import ngram_losses, split_token_chunks, unigram_bigram_baselines
from megatron_ultramem.training.tokenizers import build_tokenizer

BYTE = build_tokenizer(TokenizerConfig())
EOD = BYTE.eod


def literal_losses(train: list[str], valid: list[str], vocab_size: int, alpha: float) -> tuple[float, float]:
    """The definition, token by token."""

    def pairs(documents: list[str]) -> list[tuple[int, int]]:
        found = []
        for document in documents:
            ids = [EOD, *document.encode(), EOD]
            found += list(zip(ids[:-1], ids[1:], strict=True))
        return found

    pair_counts = Counter(pairs(train))
    counts, contexts = Counter[int](), Counter[int]()
    for (previous, token), count in pair_counts.items():
        counts[token] += count
        contexts[previous] += count
    total, evaluated = sum(counts.values()), pairs(valid)
    unigram = [math.log((counts[t] + alpha) / (total + alpha * vocab_size)) for _, t in evaluated]
    bigram = [math.log((pair_counts[p] + alpha) / (contexts[p[0]] + alpha * vocab_size)) for p in evaluated]
    return -sum(unigram) / len(evaluated), -sum(bigram) / len(evaluated)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_losses_equal_the_definition_on_the_documents_of_the_split(
    config: Config, write_pair: WritePair, alpha: float
) -> None:
    documents = random_documents(40)
    config.data.paths, config.data.split = [write_pair("data", documents)], "75,25"
    found = unigram_bigram_baselines(config, BYTE, alpha)
    assert found == pytest.approx(literal_losses(documents[:30], documents[30:], 257, alpha), rel=1e-12)


def test_chunks_and_a_sparse_table_change_nothing(config: Config, write_pair: WritePair) -> None:
    config.data.paths = [write_pair("a", random_documents(40)), write_pair("b", random_documents(30, seed=1))]

    def losses(chunk_tokens: int) -> tuple[float, float]:
        train, valid = (split_token_chunks(config, split, chunk_tokens) for split in ("train", "valid"))
        return ngram_losses(train, valid, vocab_size=257, eod=EOD, alpha=0.1)

    assert losses(1) == pytest.approx(losses(200), rel=1e-12)
    assert losses(1) == pytest.approx(losses(1 << 20), rel=1e-12)
    assert len(list(split_token_chunks(config, "train", 1))) == 32 + 24


def test_vocabulary_too_large_for_a_table_gives_the_same_counts() -> None:
    train, valid = np.array([1, 2, 1, 2, 3, 0]), np.array([1, 2, 3, 0])
    losses = ngram_losses([train], [valid], vocab_size=100_000, eod=0, alpha=0.1)
    smooth = 0.1 * 100_000
    expected = -sum(math.log((c + 0.1) / (n + smooth)) for c, n in ((1, 1), (2, 2), (1, 2), (1, 1))) / 4
    assert losses.bigram == pytest.approx(expected)


def test_text_that_a_bigram_predicts_has_a_bigram_loss_near_zero() -> None:
    tokens = np.array([0, 1, 2, 3] * 1000)
    losses = ngram_losses([tokens], [tokens], vocab_size=4, eod=3, alpha=0.01)
    assert losses.unigram == pytest.approx(math.log(4), rel=1e-3)
    assert losses.bigram < 0.001


def test_empty_split_and_alpha_zero_are_refused() -> None:
    with pytest.raises(DataError, match="one of the two splits is empty"):
        ngram_losses([np.array([1, 0])], [], vocab_size=4, eod=0, alpha=0.1)
    with pytest.raises(ValueError, match="alpha=0"):
        ngram_losses([np.array([1, 0])], [np.array([1, 0])], vocab_size=4, eod=0, alpha=0)
