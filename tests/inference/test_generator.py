"""Generation from a trained checkpoint: the cache, batches, ends, and agreement with the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.inference import Generator, Sampling
from megatron_ultramem.training.data import build_datasets, sample_counts
from tests.inference.train_job import SENTENCES

GREEDY = Sampling(max_new_tokens=20, temperature=0)
WARM = Sampling(max_new_tokens=20, temperature=1.2, top_k=50, top_p=0.98, seed=7)
PROMPTS = ["the cat", "a", "", "she sells sea shells. she s", "a dög ran to the høuse. a d", "the cat"]


def test_the_model_has_learnt_its_sentences(generator: Generator) -> None:
    (text,) = generator.generate(["the cat sat on the mat. the c"], Sampling(max_new_tokens=10, temperature=0))
    assert text == SENTENCES[0][5:15]


@pytest.mark.parametrize("prompt_length", [1, 2, 17])
def test_cached_and_uncached_logits_agree_at_every_position(generator: Generator, prompt_length: int) -> None:
    model = generator.model
    torch.manual_seed(0)
    tokens_BS = torch.randint(0, 256, (3, 40))
    full_BSV = model.logits(tokens_BS)
    session = model.session(3, 40, cached=True)
    known = 0
    for position in [prompt_length, *range(prompt_length + 1, 30), 40]:  # the last step appends many at once
        logits_BV = session.append(tokens_BS[:, known:position])
        torch.testing.assert_close(logits_BV, full_BSV[:, position - 1], rtol=1e-5, atol=1e-5)
        known = position


def test_a_prompt_costs_the_logits_of_its_last_position_alone(generator: Generator) -> None:
    model, tokens_BS = generator.model, torch.randint(0, 256, (2, 12))
    from megatron.core.inference.contexts import StaticInferenceContext

    with torch.no_grad():
        cached_BSV = model.forward(tokens_BS, StaticInferenceContext(2, 12))
    assert cached_BSV.shape[:2] == (2, 1) and model.logits(tokens_BS).shape[:2] == (2, 12)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_text_does_not_depend_on_batch_or_cache(generator: Generator, sampling: Sampling) -> None:
    together = generator.generate(PROMPTS, sampling)
    alone = [generator.generate([prompt], sampling)[0] for prompt in PROMPTS[:-1]]
    assert together[:-1] == alone
    small_batches = Generator(generator.model, batch_size=2).generate(PROMPTS, sampling)
    uncached = Generator(generator.model, cache=False).generate(PROMPTS, sampling)
    assert together == small_batches == uncached


def test_sampling_repeats_with_its_seed_and_only_with_it(generator: Generator) -> None:
    first = generator.generate(PROMPTS, WARM)
    assert generator.generate(PROMPTS, WARM) == first
    assert first[0] != first[-1], "a prompt given twice gets two texts"
    other = Sampling(max_new_tokens=20, temperature=1.2, top_k=50, top_p=0.98, seed=8)
    assert generator.generate(PROMPTS, other) != first


def test_generation_leaves_global_random_numbers_alone(generator: Generator) -> None:
    before = torch.get_rng_state()
    generator.generate(["a"], WARM)
    assert torch.equal(torch.get_rng_state(), before)


def test_streamed_pieces_join_to_the_text_and_are_whole_characters(generator: Generator) -> None:
    prompt = "a dög ran to the høuse. a d"
    pieces = list(generator.stream(prompt, GREEDY))
    assert "".join(pieces) == generator.generate([prompt], GREEDY)[0]
    assert "ö" in pieces and "\ufffd" not in "".join(pieces)


def test_an_end_of_document_ends_the_text_unless_ignored(generator: Generator) -> None:
    prompt = SENTENCES[2] + "fi"
    eod = generator.model.tokenizer.eod
    for ignore in (False, True):
        sampling = Sampling(max_new_tokens=20, temperature=0, ignore_eod=ignore)
        (one,) = list(generator.completions([prompt], sampling))
        ids = generator.model.tokenizer.encode(prompt)
        expected = []
        while len(expected) < sampling.max_new_tokens:
            token = int(generator.model.logits(torch.tensor([ids + expected]))[0, -1].argmax())
            if token == eod and not ignore:
                break
            expected.append(token)
        assert one.tokens == expected
        assert one.finish_reason == ("length" if ignore else "eod")
        assert (expected == list(b"n.")) is not ignore, "the model has learnt where texts end"


def test_text_ends_at_the_longest_sequence(generator: Generator) -> None:
    limit = generator.model.max_sequence_length
    sampling = Sampling(max_new_tokens=100, temperature=0, ignore_eod=True)
    full, short = sorted(generator.completions(["x" * (limit - 3), "y"], sampling), key=lambda c: c.index)
    assert (len(full.tokens), full.finish_reason) == (3, "context")
    assert (len(short.tokens), short.finish_reason) == (limit - 1, "context")


def test_a_prompt_that_fills_the_sequence_is_refused(generator: Generator) -> None:
    limit = generator.model.max_sequence_length
    with pytest.raises(
        ConfigError, match=rf"prompt 2 has {limit} tokens.*max_sequence_length = {limit}.*at most {limit - 1}"
    ):
        generator.generate(["fits", "x" * limit], GREEDY)


def test_a_prompt_that_is_no_text_is_refused(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="prompt 1 is not valid UTF-8"):
        generator.generate(["\udcff"], GREEDY)


def test_an_empty_prompt_starts_a_document(generator: Generator) -> None:
    (text,) = generator.generate([""], Sampling(max_new_tokens=1, temperature=0))
    eod = torch.tensor([[generator.model.tokenizer.eod]])
    assert ord(text) == int(generator.model.logits(eod)[0, -1].argmax())


def test_loss_equals_the_trainers_evaluation(generator: Generator, checkpoint: tuple[Path, float]) -> None:
    """One document per row of attention in the trainer's batch: so document by document here."""
    _, reported = checkpoint
    config = load_config(generator.model.folder / "config.yaml")
    counts = sample_counts(config)
    data = build_datasets(
        config,
        generator.model.tokenizer,
        train_samples=counts.train,
        valid_samples=counts.valid,
        test_samples=0,
        is_built_on_rank=lambda: True,
    ).valid
    assert data is not None
    total = count = 0.0
    for index in range(8):
        sample = data[index]
        tokens, labels = sample["tokens"], sample["labels"]
        ends = [i + 1 for i, token in enumerate(tokens.tolist()) if token == generator.model.tokenizer.eod]
        for low, high in zip([0, *ends], [*ends, len(tokens)], strict=True):
            if low < high:
                logits = generator.model.logits(tokens[None, low:high])[0]
                total += float(torch.nn.functional.cross_entropy(logits, labels[low:high], reduction="sum"))
                count += high - low
    assert math.isclose(total / count, reported, rel_tol=1e-5)
