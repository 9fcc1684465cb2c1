"""Mixture of experts, routed as Megatron's is.

Shapes: T tokens, H hidden size, E experts, K of them chosen per token, G groups of X experts.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_ultramem import UltraMemConfig
from .ultramem_blocks import UltraMemMLP
from .ultramem_common import Fp32Buffers


class UltraMemRouter(Fp32Buffers):
    """Chooses experts as Megatron's router does. `expert_bias`, where there is one, takes part in the choice alone."""

    expert_bias: torch.Tensor | None

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.top_k, self.score = config.num_experts_per_tok, config.router_score
        self.norm_topk_prob = config.norm_topk_prob
        self.scale, self.groups, self.groups_per_token = config.routed_scaling_factor, config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(config.router_dtype)
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [T, K], chosen experts [T, K])."""
        dtype = self.dtype or x_TH.dtype
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
            weights_TK, experts_TK = self._weights(logits_TE)
        return weights_TK * self.scale, experts_TK

    def _weights(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.score == "sigmoid":
            scores_TE = logits_TE.float().sigmoid().to(logits_TE.dtype)
            biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
            experts_TK = self._best(biased_TE)
            weights_TK = scores_TE.gather(1, experts_TK)
            return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) if self.top_k > 1 else weights_TK, experts_TK
        if self.norm_topk_prob:
            experts_TK = self._best(logits_TE)
            chosen_TK = logits_TE.gather(1, experts_TK)
            return chosen_TK.softmax(-1, dtype=torch.float32).to(logits_TE.dtype), experts_TK
        scores_TE = logits_TE.softmax(-1, dtype=torch.float32).to(logits_TE.dtype)
        experts_TK = self._best(scores_TE)
        return scores_TE.gather(1, experts_TK), experts_TK

    def _best(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The experts [T, K] with the largest scores, of the best groups where there are groups."""
        if self.groups is not None and self.groups_per_token is not None:
            scores_TGX = scores_TE.unflatten(-1, (self.groups, -1))
            best_TGX = scores_TGX.topk(self.top_k // self.groups_per_token, dim=-1).values
            groups_Tg = best_TGX.sum(-1).topk(self.groups_per_token, dim=-1).indices
            dropped_TG = torch.ones_like(best_TGX[..., 0], dtype=torch.bool).scatter(1, groups_Tg, False)
            scores_TE = scores_TGX.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return scores_TE.topk(self.top_k, dim=-1).indices


@use_experts_implementation
class UltraMemExperts(nn.Module):
    """The experts' matrices, gate and up projection in one. transformers may replace `forward` by a grouped product."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.num_experts, hidden_size, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] -> [T, H]: the weighted sum of the chosen experts' outputs."""
        output_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[tokens, place, None]
            output_TH.index_add_(0, tokens, weighted.to(output_TH.dtype))
        return output_TH


class UltraMemSparseMLP(nn.Module):
    """Mixture of experts, and an expert for every token where the config has one."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.gate = UltraMemRouter(config)
        self.experts = UltraMemExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = UltraMemMLP(config, width) if width else None
        gated = width and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        weights_TK, experts_TK = self.gate(x_TH)
        output = self.experts(x_TH, experts_TK, weights_TK).view(x.shape)
        if self.shared_expert is None:
            return output
        shared = self.shared_expert(x)
        return output + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
