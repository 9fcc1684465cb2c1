"""Generation: caches, padding, the vocabulary's padding, and the same greedy text as the trainer's own generation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

KINDS = ["dense", "moe", "ring", "heads", "ultramem-skip-layer", "memory-plus", "peer"]
PROMPTS = [[5, 17, 3, 99, 42, 7, 64], [11, 2], [8, 8, 31, 110]]


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_logits_with_a_cache_equal_those_without(reference, case, cache):
    made = reference(case)
    model = made.hf_model()
    tokens = made.tokens[:, :12]
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [
            model(part, past_key_values=past, use_cache=True).logits for part in tokens.split([5, 1, 1, 4, 1], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", KINDS)
def test_static_cache_generates_what_the_dynamic_one_does(reference, case):
    model = reference(case).hf_model()
    prompt = torch.tensor([PROMPTS[0]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    texts = [
        model.generate(prompt, **options, **cache)
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    ]
    assert texts[0].shape == (1, len(PROMPTS[0]) + 12)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", KINDS)
def test_prompts_padded_on_the_left_continue_as_they_do_alone(reference, case, attention):
    model = reference(case).hf_model(attn_implementation=attention, pad_token_id=0)
    longest = max(len(prompt) for prompt in PROMPTS)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(padded, attention_mask=mask, **options)
    for number, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert torch.equal(together.sequences[number, longest:], alone.sequences[0, len(prompt) :])
        for found, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(found[number], expected[0], rtol=0, atol=1e-5)


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(reference):
    model = reference("ring").hf_model()
    # Makes the ids of the padding by far the likeliest.
    model.lm_head.weight.data[120:] = 40 * model.lm_head.weight.data[:8]
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert model(tokens).logits[0, -1].argmax() >= 120
    for sampling in ({"do_sample": False}, {"do_sample": True}):
        text = model.generate(tokens, max_new_tokens=8, eos_token_id=None, **sampling)
        assert text[0, tokens.shape[1] :].max() < 120


def test_ids_added_to_the_tokenizer_may_be_chosen(reference):
    model = reference("ring").hf_model()
    model.resize_token_embeddings(123, pad_to_multiple_of=16)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 128
    assert model.generation_config.suppress_tokens == [123, 124, 125, 126, 127]


def test_sampling_and_beam_search_run(reference):
    model = reference("ring").hf_model()
    tokens = torch.tensor([PROMPTS[0], PROMPTS[0]])
    for options in ({"num_beams": 3}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2, "do_sample": True}):
        text = model.generate(tokens, max_new_tokens=5, eos_token_id=None, pad_token_id=0, **options)
        assert text.shape == (2, tokens.shape[1] + 5)
