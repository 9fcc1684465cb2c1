"""The configuration: what it refuses, and models made from it alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ultramem.checkpoints_convert.huggingface.configuration_ultramem import KINDS, UltraMemConfig
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.config import load_config
from tests.huggingface.cases import CASES
from tests.huggingface.megatron_models import BASE, VOCABULARY


def fields_of(case: str) -> dict:
    return hf_config(load_config(None, [*BASE, *CASES[case]], check=False), VOCABULARY)


@pytest.mark.parametrize("case", CASES)
def test_the_config_survives_json(case, tmp_path):
    config = UltraMemConfig(**fields_of(case))
    config.save_pretrained(tmp_path)
    read = UltraMemConfig.from_pretrained(tmp_path)
    assert read.to_dict() == {**config.to_dict(), "_name_or_path": read.name_or_path}
    saved = json.loads((tmp_path / "config.json").read_text())
    for name, value in fields_of(case).items():
        assert saved[name] == value, name


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("dense", {"format_version": 2}, "format_version = 2: this code reads versions up to 1"),
        ("dense", {"qk_norm": "heads"}, "qk_norm = 'heads'; legal: none, head, all_heads"),
        ("moe", {"num_experts_per_tok": 7}, "num_experts_per_tok = 7 with num_experts = 6"),
        ("moe", {"router_score": "relu"}, "router_score = 'relu'; legal: softmax, sigmoid"),
        ("ring", {"memory": {"kind": "ultramem_v3"}}, "memory.kind = 'ultramem_v3'; legal: ultramem_v2"),
        ("ring", {"memory": {"kind": "pkm"}}, "memory lacks num_heads, key_dim"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(case, change, message):
    with pytest.raises(ValueError, match=message):
        UltraMemConfig(**{**fields_of(case), **change})


@pytest.mark.parametrize("change", [{"layer": 4}, {"pool": 1}, {"join": 0}, {"join": 4}])
def test_memory_layers_that_do_not_fit_the_model_are_refused(change):
    fields = fields_of("ring")
    fields["memory"]["layers"][2] |= change
    with pytest.raises(ValueError, match="memory.layers has .*legal: layers below num_hidden_layers = 4"):
        UltraMemConfig(**fields)


def test_every_kind_has_a_case():
    made = {fields_of(case).get("memory", {}).get("kind") for case in CASES}
    assert made >= set(KINDS)


@pytest.mark.parametrize(
    "case", ["moe-sigmoid-bias-groups", "ring", "ultramem-skip-layer", "memory-plus", "pkm", "peer"]
)
def test_a_model_from_the_config_alone_is_drawn_completely(case):
    config = UltraMemConfig(**fields_of(case))
    torch.manual_seed(0)
    model = UltraMemForCausalLM(config).eval()
    tokens = torch.arange(40).view(2, 20)
    loss = model(tokens, labels=tokens).loss
    assert 3 < loss.item() < 8
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("permutation"):
            assert torch.equal(tensor.sort().values, torch.arange(len(tensor), dtype=tensor.dtype))
            assert not torch.equal(tensor, tensor.sort().values)
        elif name.endswith((".u", ".t")):
            torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(len(tensor)))
        elif name.endswith((".keys", ".values", "_proj.weight")):
            assert 0.005 < tensor.std() < 1, name


def test_a_default_config_is_a_dense_model():
    config = UltraMemConfig(
        num_hidden_layers=1, hidden_size=24, num_attention_heads=2, vocab_size=16, intermediate_size=8
    )
    assert config.mlp_layer_types == ["dense"]
    assert UltraMemForCausalLM(config)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 16)


def test_scaled_rotary_embeddings_are_transformers_own(reference):
    made = reference("dense")
    plain = made.hf_model()
    scaled = made.hf_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    positions = torch.arange(made.tokens.shape[1]).expand_as(made.tokens)
    with torch.no_grad():
        halved = scaled(made.tokens, position_ids=2 * positions).logits
        assert not torch.allclose(scaled(made.tokens).logits, made.logits, atol=1e-3)
    torch.testing.assert_close(halved, made.logits, rtol=0, atol=1e-5)
    assert plain.config.rope_parameters["rope_type"] == "default"


def test_the_auto_class_takes_registered_classes(reference):
    made = reference("ring")
    AutoModelForCausalLM.register(UltraMemConfig, UltraMemForCausalLM, exist_ok=True)
    assert type(AutoModelForCausalLM.from_config(made.hf_model().config)) is UltraMemForCausalLM
