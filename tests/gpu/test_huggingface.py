"""The Hugging Face model on a GPU: memory layers on the kernels, caches, and placement by device_map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import is_flash_attn_2_available, logging

from megatron_ultramem.checkpoints_convert.huggingface import ultramem_common
from megatron_ultramem.checkpoints_convert.huggingface.configuration_ultramem import UltraMemConfig
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.config import load_config

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SIZES = [
    "model.num_layers=4", "model.hidden_size=128", "model.num_attention_heads=2", "model.num_query_groups=1",
    "model.ffn_hidden_size=256", "model.max_sequence_length=128", "model.memory.num_keys=40",
    "model.memory.key_dim=64", "model.memory.top_m=16", "model.memory.value_dim=128",
    "model.memory.pre_value_dim=128", "data.sequence_length=128",
]  # fmt: skip
KINDS = {
    "ultramem_v2": ["model.memory.sharing=ring", "model.memory.share_size=2"],
    "ultramem": ["model.memory.kind=ultramem", "model.memory.layers='0,1'", "model.memory.join_layers='2,3'"],
    "memory_plus": ["model.memory.kind=memory_plus", "model.memory.layers='0,2'"],
    "peer": ["model.memory.kind=peer", "model.memory.layers='1'"],
    "moe": ["model.memory.layers=none", "model.moe.layers=all", "model.moe.num_experts=8", "model.moe.top_k=2",
            "model.moe.ffn_hidden_size=64"],
}  # fmt: skip
TOKENS = torch.randint(250, (2, 60), generator=torch.Generator().manual_seed(3))


def build(kind: str, **fields: object) -> UltraMemForCausalLM:
    """A model drawn at random, the same whatever the fields."""
    torch.manual_seed(0)
    config = load_config(None, [*SIZES, *KINDS[kind]], check=False)
    return UltraMemForCausalLM(UltraMemConfig(**{**hf_config(config, 250), **fields})).eval()


@torch.no_grad()
def logits_of(model: UltraMemForCausalLM) -> torch.Tensor:
    return model(TOKENS.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_on_a_gpu_equal_those_on_the_cpu(kind):
    ultramem_common._installed_kernels.cache_clear()
    found = []
    with CaptureLogger(logging.get_logger(ultramem_common.__name__)) as log:
        for device in ("cpu", DEVICE):
            model = build(kind).to(device)
            tokens = TOKENS.to(device)
            model(tokens, labels=tokens).loss.backward()
            grads = {name: param.grad.cpu() for name, param in model.named_parameters()}
            found.append((logits_of(model), grads))
    assert log.out.count("memory layers run on the kernels") == (kind != "moe")
    (expected, expected_grads), (logits, grads) = found
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-2, atol=2e-3 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_kernels_are_as_near_to_fp32_as_plain_pytorch(kind):
    exact = logits_of(build(kind).to(torch.bfloat16).float())
    errors = [
        (logits_of(build(kind, memory_kernels=kernels).to(DEVICE, torch.bfloat16)) - exact).abs().mean().item()
        for kernels in ("auto", "reference")
    ]
    assert errors[0] < 1.5 * errors[1] < 0.1


@pytest.mark.parametrize("kind", ["ultramem_v2", "moe"])
def test_both_caches_generate_the_same(kind):
    model = build(kind).to(DEVICE)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(TOKENS.to(DEVICE), **options)
    assert torch.equal(dynamic, model.generate(TOKENS.to(DEVICE), cache_implementation="static", **options))
    assert torch.equal(dynamic, model.generate(TOKENS.to(DEVICE), use_cache=False, **options))


def test_device_map_puts_the_model_on_the_gpu(tmp_path: Path):
    model = build("ultramem_v2")
    model.save_pretrained(tmp_path)
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert {param.device.type for param in loaded.parameters()} == {DEVICE}
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("elsewhere", ["model.pools", "model.layers.1"])
def test_a_part_may_stay_on_the_cpu(tmp_path: Path, elsewhere: str):
    model = build("ultramem_v2")
    model.save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.pools"]
    places = dict.fromkeys([*names, *(f"model.layers.{layer}" for layer in range(4))], 0)
    places[elsewhere] = "cpu"
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path, device_map=places)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash_attn is not installed")
def test_flash_attention_gives_the_logits_of_sdpa():
    sdpa, flash = (
        logits_of(build("ultramem_v2", attn_implementation=name).to(DEVICE, torch.bfloat16))
        for name in ("sdpa", "flash_attention_2")
    )
    assert (sdpa - flash).abs().mean() < 0.02
