"""Norm, rotary embedding, attention and FFN of the blocks: what Megatron's modules compute.

Shapes: B sequences, S positions, H hidden size, A attention heads, G key/value heads, D width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ultramem import UltraMemConfig


class UltraMemRMSNorm(nn.RMSNorm):
    """Computed in fp32 and rounded once, after the multiplication by the weight."""


def head_width(config: UltraMemConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rope_parameters(config: UltraMemConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


class UltraMemRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding: of `config.rope_parameters`, in the layout transformers knows."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = rope_parameters(config)["rope_type"]
        init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: UltraMemConfig, device: torch.device | None = None, seq_len: int | None = None
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [D/2], and the factor of cosines and sines; called by transformers after loading."""
        width = head_width(config)
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / (rope_parameters(config)["rope_theta"] ** steps), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] each, in the dtype of x."""
        angles_BSF = position_ids_BS[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles_BSD = torch.cat((angles_BSF, angles_BSF), dim=-1)
        cos, sin = angles_BSD.cos() * self.attention_scaling, angles_BSD.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(x_BASD: torch.Tensor, cos_B1SD: torch.Tensor, sin_B1SD: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (d, d + D/2)."""
    first, second = x_BASD.chunk(2, dim=-1)
    return x_BASD * cos_B1SD + torch.cat((-second, first), dim=-1) * sin_B1SD


def eager_attention_forward(
    module: "UltraMemAttention",
    query_BASD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, S, A, D] and its weights [B, A, S, S], softmax in fp32."""
    key_BASD, value_BASD = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key_BGSD, value_BGSD))
    scores_BASS = query_BASD @ key_BASD.mT * scaling
    if attention_mask is not None:
        scores_BASS = scores_BASS + attention_mask
    weights_BASS = scores_BASS.softmax(dim=-1, dtype=torch.float32).to(query_BASD.dtype)
    weights_BASS = F.dropout(weights_BASS, dropout, module.training)
    return (weights_BASS @ value_BASD).transpose(1, 2).contiguous(), weights_BASS


class UltraMemAttention(nn.Module):
    """Grouped-query attention; queries and keys are normalised, per head or over all of them, then rotated."""

    is_causal = True

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head_width(config)
        heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = heads // groups
        self.scaling = self.head_dim**-0.5
        query_width, key_width = heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.norm_width = config.qk_norm
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = UltraMemRMSNorm(self.head_dim if per_head else query_width, eps=config.rms_norm_eps)
            self.k_norm = UltraMemRMSNorm(self.head_dim if per_head else key_width, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] -> [B, S, H], and the attention weights where the implementation has them."""
        batch_shape = hidden_states.shape[:-1]
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.norm_width == "all_heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.view(*batch_shape, -1, self.head_dim).transpose(1, 2) for x in (query, key, value))
        if self.norm_width == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        cos_B1SD, sin_B1SD = (x.unsqueeze(1) for x in position_embeddings)
        query, key = apply_rotary(query, cos_B1SD, sin_B1SD), apply_rotary(key, cos_B1SD, sin_B1SD)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*batch_shape, -1)), weights


class UltraMemMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x)."""

    def __init__(self, config: UltraMemConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
