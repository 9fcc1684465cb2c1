"""Dense Llama-style models and OLMoE of transformers, imported: logits as theirs, training goes on from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, OlmoeConfig, PreTrainedModel, Qwen3Config
from transformers.models.mistral import MistralForCausalLM
from transformers.models.olmoe import OlmoeForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.tokenizer_files import write_for_transformers
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.checkpoint_folder import read_config, read_record
from megatron_ultramem.training.tokenizers import ByteTokenizer

Convert = Callable[..., tuple[int, str]]
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_theta=500.0, rms_norm_eps=1e-3)),
    "llama-tied-wide-heads": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=12)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False)),
    "olmoe-normalised": (
        OlmoeForCausalLM,
        OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
    ),
}


def save_folder(folder: Path, model: PreTrainedModel, **options: object) -> Path:
    """A model with gains that are not ones, and the byte tokenizer."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.dim() == 1:
            param.data.mul_(1 + 0.3 * torch.randn(param.shape, generator=generator))
    model.save_pretrained(str(folder), **options)
    write_for_transformers(TokenizerConfig(), ByteTokenizer(), folder, 64)
    return folder


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made, config = MODELS[name]
    return made(config)


@pytest.mark.parametrize("name", MODELS)
def test_the_import_computes_their_logits(tmp_path: Path, convert: Convert, name: str) -> None:
    source = save_folder(tmp_path / "theirs", build(name), max_shard_size="20KB")
    code, printed = convert("from-hf", source, tmp_path / "ours")
    assert code == 0, printed
    assert "top-1 agreement 100.0 %" in printed
    assert "none is left over, none is missing" in printed
    config, record = read_config(tmp_path / "ours"), read_record(tmp_path / "ours")
    assert record.weights_only
    assert (record.vocab_size, config.model.vocab_size_multiple) == (300, 4)  # no row that they do not have
    assert config.data.tokenizer == TokenizerConfig(
        "huggingface", str(tmp_path / "ours/tokenizer.json"), "<|endoftext|>"
    )


def test_a_bf16_model_stays_bf16_and_fp16_becomes_fp32(tmp_path: Path, convert: Convert) -> None:
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp32")):
        source = save_folder(tmp_path / f"theirs-{precision}", build("llama").to(dtype))
        code, printed = convert("from-hf", source, tmp_path / precision)
        assert code == 0, printed
        assert read_config(tmp_path / precision).train.precision == precision
        assert ("was float16" in printed) == (dtype == torch.float16)
        info = CheckpointReader(tmp_path / precision).tensors["embedding.word_embeddings.weight"]
        assert info.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_experts_in_one_tensor_are_read_too(tmp_path: Path, convert: Convert) -> None:
    """As transformers holds them in memory, and as our own folders have them."""
    source = save_folder(tmp_path / "theirs", build("olmoe"))
    weights = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}gate_up_proj" in weights:
            pytest.fail("transformers saves them so by now: the other form needs a test")
        gates, ups, downs = (
            [weights.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(6)]
            for name in ("gate", "up", "down")
        )
        weights[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
        weights[f"{prefix}down_proj"] = torch.stack(downs)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    code, printed = convert("from-hf", source, tmp_path / "ours")
    assert code == 0, printed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias = True (legal: False)"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' (legal: 'silu')"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.5}}, "rope_theta = 10.5"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2'; legal: ultramem, llama, mistral, qwen3, olmoe"),
        ({"num_hidden_layers": 3}, "tensors are missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "left over: model.layers.1."),
        ({"vocab_size": 304}, "model.embed_tokens.weight [300, 32] instead of [304, 32]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_trainer_cannot_be_is_refused(tmp_path: Path, convert: Convert, changes: dict, named: str) -> None:
    source = save_folder(tmp_path / "theirs", build("llama"))
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, printed = convert("from-hf", source, tmp_path / "ours")
    assert code == 2
    assert named in printed
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, convert: Convert) -> None:
    small = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 200}))
    code, printed = convert("from-hf", save_folder(tmp_path / "theirs", small), tmp_path / "ours")
    assert code == 2
    assert "has 257 tokens, the model's vocabulary 200" in printed


def test_a_folder_without_a_tokenizer_takes_the_one_of_the_settings(tmp_path: Path, convert: Convert) -> None:
    source = save_folder(tmp_path / "theirs", build("llama"))
    (source / "tokenizer.json").unlink()
    code, printed = convert("from-hf", source, tmp_path / "ours")
    assert code == 2
    assert "has no tokenizer.json or tokenizer.model" in printed
    code, printed = convert("from-hf", source, tmp_path / "ours", "data.tokenizer.kind=byte")
    assert code == 0, printed
    assert read_config(tmp_path / "ours").data.tokenizer == TokenizerConfig()
