"""Settings of the trainer for dense Llama-style models and OLMoE of transformers.

What these models have and ours have not is refused by name, so that what is imported is the same model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_ultramem.errors import CheckpointError

DENSE = ("llama", "mistral", "qwen3")
MODEL_TYPES = (*DENSE, "olmoe")


def model_settings(folder: Path) -> dict[str, Any]:
    """The `model` section for the folder's config.json.

    Raises CheckpointError naming what the trainer has no counterpart for.
    """
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from None
    rope = theirs.rope_parameters
    _refuse_others(folder, theirs, rope)
    settings: dict[str, Any] = {
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_query_groups": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "ffn_hidden_size": theirs.intermediate_size,
        "max_sequence_length": theirs.max_position_embeddings,
        "rope_base": int(rope["rope_theta"]),
        "qk_norm": theirs.model_type in ("qwen3", "olmoe"),
        "norm_eps": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "vocab_size": theirs.vocab_size,
        # No row more than theirs: padding would take part in the softmax.
        "vocab_size_multiple": math.gcd(theirs.vocab_size, 128),
        "attention_dropout": theirs.attention_dropout,
        "memory": {"layers": "none"},
    }
    if theirs.model_type == "olmoe":
        settings["qk_norm_width"] = "all_heads"
        settings["moe"] = {
            "layers": "all",
            "num_experts": theirs.num_experts,
            "top_k": theirs.num_experts_per_tok,
            "ffn_hidden_size": theirs.intermediate_size,
            "normalize_top_k": theirs.norm_topk_prob,
            "aux_loss_coeff": theirs.router_aux_loss_coef,
        }
    return settings


def _refuse_others(folder: Path, theirs: Any, rope: dict[str, Any]) -> None:
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "clip_qkv": None,
        "sliding_window": None,
    }
    wrong = [
        f"{name} = {getattr(theirs, name)!r} (legal: {legal!r})"
        for name, legal in expected.items()
        if getattr(theirs, name, legal) != legal
    ]
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"rope_parameters = {rope} (legal: rope_type 'default', over whole heads)")
    if rope["rope_theta"] != int(rope["rope_theta"]):
        wrong.append(f"rope_theta = {rope['rope_theta']} (legal: a whole number)")
    if wrong:
        raise CheckpointError(f"{folder / 'config.json'}: the trainer has no counterpart for {'; '.join(wrong)}")
