"""Every block type and sharing pattern: settings on top of `megatron_models.BASE`."""

from __future__ import annotations

MOE = [
    "model.memory.layers=none", "model.moe.layers='1,2'", "model.moe.num_experts=6", "model.moe.top_k=3",
    "model.moe.ffn_hidden_size=20",
]  # fmt: skip
CASES = {
    "dense": ["model.memory.layers=none"],
    "dense-untied-no-qk-norm-head-width": [
        "model.memory.layers=none", "model.tie_embeddings=false", "model.qk_norm=false", "model.head_dim=12",
        "model.num_query_groups=1",
    ],
    "norm-over-all-heads": ["model.memory.layers=none", "model.qk_norm_width=all_heads"],
    "moe": MOE,
    "moe-weights-of-all-experts": [*MOE, "model.moe.normalize_top_k=false"],
    "moe-shared-expert": [*MOE, "model.moe.shared_expert_hidden_size=16"],
    "moe-gated-shared-expert-scaled": [
        *MOE, "model.moe.shared_expert_hidden_size=16", "model.moe.shared_expert_gate=true",
        "model.moe.router_scale=2.5", "model.moe.router_dtype=params",
    ],
    "moe-sigmoid-bias-groups": [
        *MOE, "model.moe.router_score=sigmoid", "model.moe.expert_bias=true", "model.moe.router_groups=3",
        "model.moe.router_group_top_k=2", "model.moe.top_k=2", "model.moe.router_dtype=fp64",
    ],
    "moe-groups": [*MOE, "model.moe.router_groups=2", "model.moe.router_group_top_k=1"],
    "moe-sigmoid": [*MOE, "model.moe.router_score=sigmoid"],
    "moe-and-memory": [*MOE, "model.memory.layers='0,1'"],
    "own-tables": [],
    "no-shuffle": ["model.memory.shuffle=false"],
    "heads": ["model.memory.num_heads=3", "model.memory.sharing=block", "model.memory.share_size=2"],
    "one-query": ["model.memory.query_per_rank=false"],
    "one-core-rank-3": ["model.memory.num_cores=1", "model.memory.tucker_rank=3"],
    "three-cores-capped": ["model.memory.num_cores=3", "model.memory.coarse_top_k=3"],
    "gelu": ["model.memory.activation=gelu"],
    "block": ["model.memory.sharing=block", "model.memory.share_size=2"],
    "ring": ["model.memory.sharing=ring", "model.memory.share_size=3"],
    "ring-from-start": [
        "model.memory.sharing=ring", "model.memory.share_size=2", "model.memory.pool_size=2",
        "model.memory.window=start",
    ],
    "no-ring": ["model.memory.sharing=no_ring", "model.memory.share_size=3"],
    "ultramem": ["model.memory.kind=ultramem", "model.memory.value_expansion=3"],
    "ultramem-skip-layer": [
        "model.memory.kind=ultramem", "model.memory.layers='0,1'", "model.memory.join_layers='2,3'",
        "model.memory.num_heads=2",
    ],
    "memory-plus": ["model.memory.kind=memory_plus", "model.memory.layers='0,2'", "model.memory.num_heads=2"],
    "memory-plus-beside-moe": [
        "model.memory.kind=memory_plus", "model.memory.replaces_ffn=false", *MOE[1:], "model.memory.shuffle=false",
    ],
    "pkm": ["model.memory.kind=pkm", "model.memory.layers='1'", "model.memory.value_dim=32"],
    "pkm-ring-no-norm": [
        "model.memory.kind=pkm", "model.memory.value_dim=32", "model.memory.sharing=ring",
        "model.memory.share_size=2", "model.memory.query_norm=none", "model.memory.coarse_top_k=4",
    ],
    "peer": [
        "model.memory.kind=peer", "model.memory.value_dim=32", "model.memory.pre_value_dim=32",
        "model.memory.num_heads=2",
    ],
    "some-layers": ["model.memory.layers='0,3'", "model.memory.sharing=ring", "model.memory.share_size=2"],
}  # fmt: skip
