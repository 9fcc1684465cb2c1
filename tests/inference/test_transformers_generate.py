"""`ultramem generate` and `transformers.generate` give the same greedy text."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.checkpoints_convert.huggingface.configuration_ultramem import UltraMemConfig
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.inference.sampling import Sampling
from tests.huggingface.megatron_models import hf_names, state_with_permutations

PROMPTS = ["the cat", "she sells sea shells. she", "a d", "s"]


@pytest.fixture(scope="module")
def hf_model(generator):
    """The model behind `generator`, for transformers."""
    made, tokenizer = generator.model, generator.model.tokenizer
    fields = hf_config(made.config, tokenizer.vocab_size)
    model = UltraMemForCausalLM(UltraMemConfig(**fields, eos_token_id=tokenizer.eod, pad_token_id=tokenizer.eod)).eval()
    missing, unexpected = model.load_state_dict(hf_names(state_with_permutations(made.gpt), made.config), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_the_trainers(generator, hf_model, cache):
    tokenizer = generator.model.tokenizer
    expected = list(generator.completions(PROMPTS, Sampling(max_new_tokens=30, temperature=0.0)))
    expected.sort(key=lambda completion: completion.index)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, ids))
    padded = torch.tensor([[tokenizer.eod] * (longest - len(prompt)) + prompt for prompt in ids])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids])
    found = hf_model.generate(
        padded, attention_mask=mask, max_new_tokens=30, do_sample=False, cache_implementation=cache
    )[:, longest:]
    assert len({completion.text for completion in expected}) == len(PROMPTS)
    for completion, row in zip(expected, found.tolist(), strict=True):
        text = row[: row.index(tokenizer.eod)] if tokenizer.eod in row else row
        assert text == completion.tokens
        assert tokenizer.decode(text) == completion.text
