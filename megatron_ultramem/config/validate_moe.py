"""Checks of the MoE settings that involve several of them."""

from __future__ import annotations

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers


def validate_moe(config: Config) -> None:
    """Raises ConfigError for the first contradiction; nothing is asked of a model without MoE layers."""
    moe, p = config.model.moe, config.parallel
    if not parse_layers(moe.layers, config.model.num_layers, "model.moe.layers"):
        return
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            f"model.moe.top_k = {moe.top_k} exceeds model.moe.num_experts = {moe.num_experts}; legal: at most that"
        )
    if moe.num_experts % p.expert_parallel_size:
        raise ConfigError(
            f"parallel.expert_parallel_size = {p.expert_parallel_size} does not divide "
            f"model.moe.num_experts = {moe.num_experts}; legal: a divisor"
        )
    if moe.top_k == 1 and moe.router_score == "softmax" and moe.normalize_top_k:
        raise ConfigError(
            "model.moe.normalize_top_k = true with model.moe.top_k = 1: the softmax of one logit is 1, and the router "
            "would not learn; legal: normalize_top_k=false, or router_score=sigmoid"
        )
    if moe.expert_bias and moe.router_score != "sigmoid":
        raise ConfigError(
            f"model.moe.expert_bias = true with model.moe.router_score = {moe.router_score}; legal: router_score="
            "sigmoid, or expert_bias=false"
        )
    _validate_groups(config)
    for name in ("shared_expert_gate", "shared_expert_overlap"):
        if getattr(moe, name) and not moe.shared_expert_hidden_size:
            raise ConfigError(
                f"model.moe.{name} = true would be ignored without a shared expert "
                "(model.moe.shared_expert_hidden_size = 0); legal: false"
            )
    if moe.shared_expert_overlap and moe.dispatcher != "alltoall":
        raise ConfigError(
            f"model.moe.shared_expert_overlap = true with model.moe.dispatcher = {moe.dispatcher}; legal: dispatcher="
            "alltoall, or shared_expert_overlap=false"
        )
    ranks = p.expert_parallel_size * p.tensor_parallel_size
    if moe.dispatcher == "flex" and ranks == 1:
        raise ConfigError(
            "model.moe.dispatcher = flex with parallel.expert_parallel_size = 1 and tensor_parallel_size = 1: there is "
            "nobody to send tokens to; legal: alltoall or allgather, or one of these sizes above 1"
        )


def _validate_groups(config: Config) -> None:
    moe = config.model.moe
    groups, chosen = moe.router_groups, moe.router_group_top_k
    shown = f"model.moe.router_groups = {groups} with model.moe.router_group_top_k = {chosen}"
    if (groups is None) != (chosen is None):
        raise ConfigError(f"{shown.replace('None', 'null')}: one without the other; legal: both, or both null")
    if groups is None or chosen is None:
        return
    if moe.num_experts % groups or chosen > groups:
        raise ConfigError(
            f"{shown}: legal: a divisor of model.moe.num_experts ({moe.num_experts}), and at most as many chosen groups"
        )
    if moe.top_k % chosen or moe.top_k > chosen * (moe.num_experts // groups):
        raise ConfigError(
            f"{shown}: a token's {moe.top_k} experts (model.moe.top_k) must be a multiple of the {chosen} groups they "
            f"come from, which have {moe.num_experts // groups} each; legal: another router_group_top_k"
        )
