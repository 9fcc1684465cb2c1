"""Small Megatron models of every block type, and their weights under the names of the Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch.nn import functional as F

from megatron_ultramem.checkpoints_convert.huggingface.configuration_ultramem import UltraMemConfig
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.model.build import build_chunks, memory_layers
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

VOCABULARY = 120  # padded to 128
BASE = [
    "model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.ffn_hidden_size=48", "model.max_sequence_length=64", "model.rope_base=500", "model.norm_eps=1e-4",
    "model.memory.num_keys=9", "model.memory.key_dim=8", "model.memory.top_m=6", "model.memory.value_dim=12",
    "model.memory.pre_value_dim=10", "model.memory.rows_multiple=64", "data.sequence_length=64",
    "train.precision=fp32",
]  # fmt: skip


@dataclass
class Reference:
    """What Megatron computes."""

    config: Config
    weights: dict[str, torch.Tensor]
    tokens: torch.Tensor
    logits: torch.Tensor
    loss: float  # of the next tokens
    grads: dict[str, torch.Tensor]

    def hf_model(self, **fields: object) -> UltraMemForCausalLM:
        """The Hugging Face model with the same weights, in evaluation mode."""
        model = UltraMemForCausalLM(UltraMemConfig(**{**hf_config(self.config, VOCABULARY), **fields}))
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        tied = ["lm_head.weight"] if self.config.model.tie_embeddings else []
        assert (missing, unexpected) == (tied, [])
        return model.eval()


def build_reference(settings: list[str]) -> Reference:
    """Builds Megatron's model on one CPU rank, with gains and biases drawn at random, and runs it."""
    platform = prepare()
    config = load_config(None, [*BASE, *settings], check=False)
    initialize_distributed(config, platform)
    try:
        _, (gpt,) = build_chunks(config, VOCABULARY, "local", platform.device)
        _disturb(gpt)
        for layer in memory_layers([gpt]):
            layer.refresh()
        tokens = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = gpt.eval()(tokens, positions, None).float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        state = state_with_permutations(gpt)
        grads = {name: param.grad for name, param in gpt.named_parameters()}
        return Reference(config, hf_names(state, config), tokens, logits.detach(), loss.item(), hf_names(grads, config))
    finally:
        destroy_distributed()


def _disturb(gpt: GPTModel) -> None:
    """Gives gains and biases values of their own: as ones and zeros they would not show where they are applied."""
    generator = torch.Generator().manual_seed(2)
    for param in gpt.parameters():
        if param.dim() == 1:
            param.data.mul_(1 + 0.3 * torch.randn(param.shape, generator=generator))
            param.data.add_(0.1 * torch.randn(param.shape, generator=generator))
    for name, buffer in gpt.named_buffers():
        if "running" in name or name.endswith("expert_bias"):
            buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))


def state_with_permutations(gpt: GPTModel) -> dict[str, torch.Tensor | None]:
    """Megatron's state dict and the shuffle permutations, which it does not have: they follow from a seed."""
    return {**gpt.state_dict(), **{name: made for name, made in gpt.named_buffers() if "permutation" in name}}


def hf_names(state: dict[str, torch.Tensor | None], config: Config) -> dict[str, torch.Tensor]:
    """Megatron's state dict (one rank, local layers), or gradients, under the names of the Hugging Face model."""
    m = config.model
    heads, groups = m.num_attention_heads, m.num_query_groups or m.num_attention_heads
    width = m.head_dim or m.hidden_size // heads
    weights: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in state.items():
        if "_extra_state" in name or tensor is None:
            continue
        tensor = tensor.detach().clone()
        name = name.replace("decoder.final_layernorm", "model.norm").replace("output_layer", "lm_head")
        name = name.replace("embedding.word_embeddings", "model.embed_tokens").replace("decoder.", "model.")
        name = name.replace("pre_mlp_layernorm", "post_attention_layernorm").replace("self_attention", "self_attn")
        name = name.replace("mlp.memory.", "memory.").replace("mlp.ffn.", "mlp.").replace("linear_proj", "o_proj")
        name = name.replace("q_layernorm", "q_norm").replace("k_layernorm", "k_norm").replace("router", "gate")
        name = name.replace("shared_experts.gate_weight", "shared_expert_gate.weight")
        name = name.replace("shared_experts", "shared_expert").replace("linear_fc2", "down_proj")
        if "linear_qkv" in name:
            q, k, v = tensor.view(groups, heads // groups + 2, width, -1).split([heads // groups, 1, 1], dim=1)
            for letter, part in zip("qkv", (q, k, v), strict=True):
                weights[name.replace("linear_qkv", f"{letter}_proj")] = part.reshape(-1, part.shape[-1])
        elif "local_experts" in name:
            layer, _, rest = name.partition(".local_experts.")
            number, _, rest = rest.partition(".")
            key = f"{layer}.{'gate_up_proj' if 'linear_fc1' in rest else 'down_proj'}"
            experts.setdefault(key, {})[int(number)] = tensor
        elif "linear_fc1" in name:
            for half, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                weights[name.replace("linear_fc1", half)] = part
        else:
            weights[name] = tensor
    for key, by_number in experts.items():
        weights[key] = torch.stack([by_number[number] for number in range(len(by_number))])
    if m.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return weights
