"""The Hugging Face model computes what Megatron's GPTModel computes from the same config and weights."""

from __future__ import annotations

import pytest
import torch

from tests.huggingface.cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_megatrons(reference, case):
    made = reference(case)
    model = made.hf_model()
    with torch.no_grad():
        logits = model(made.tokens).logits
    assert made.logits.std() > 0.1
    torch.testing.assert_close(logits, made.logits, rtol=0, atol=1e-5)
    if model.model.pools:  # it would be seen if other rows were looked up
        model.model.pools[0].values.data = model.model.pools[0].values.roll(1, 0)
        with torch.no_grad():
            assert (model(made.tokens).logits - made.logits).abs().max() > 1e-2


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_gives_the_same_logits(reference, experts):
    made = reference("moe-gated-shared-expert-scaled")
    with torch.no_grad():
        logits = made.hf_model(experts_implementation=experts)(made.tokens).logits
    torch.testing.assert_close(logits, made.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_same_logits(reference, attention):
    made = reference("ring")
    with torch.no_grad():
        logits = made.hf_model(attn_implementation=attention)(made.tokens).logits
    torch.testing.assert_close(logits, made.logits, rtol=0, atol=1e-5)
