"""The counts equal what Megatron builds."""

import pytest

from megatron_ultramem import platform

TINY = [
    "model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4", "model.ffn_hidden_size=96",
    "model.memory.num_keys=20", "model.memory.key_dim=8", "model.memory.top_m=8", "model.memory.value_dim=16",
    "model.memory.pre_value_dim=8", "model.max_sequence_length=64", "data.sequence_length=64", "train.precision=fp32",
]  # fmt: skip
MIXED = [
    "model.tie_embeddings=false", "model.num_query_groups=2", "model.memory.layers='0,2'",
    "model.memory.query_per_rank=false", "model.memory.num_heads=2", "model.moe.layers='1,3'",
    "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=24",
    "model.moe.shared_expert_hidden_size=16",
]  # fmt: skip
NO_PRE_VALUES = "model.memory.pre_value_dim=192"
KINDS = {
    "ultramem": [
        "model.memory.layers='0,2'", "model.memory.join_layers='1,2'", "model.memory.num_heads=2", NO_PRE_VALUES,
    ],
    "memory_plus": ["model.memory.layers='1-3'", "model.memory.num_heads=2", NO_PRE_VALUES],
    "pkm": ["model.memory.value_dim=64", NO_PRE_VALUES, "model.memory.query_norm=none"],
    "peer": ["model.memory.layers='3'", "model.memory.value_dim=64", "model.memory.pre_value_dim=64"],
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        *([f"model.memory.kind={kind}", *settings] for kind, settings in KINDS.items()),
        ["model.memory.kind=memory_plus", NO_PRE_VALUES, "model.memory.query_norm=batch"],
        ["model.memory.sharing=ring", "model.memory.share_size=2"],
        MIXED,
        ["model.memory.layers=none", "model.qk_norm=false"],
        ["model.memory.layers=none", "model.qk_norm_width=all_heads", "model.num_query_groups=2"],
    ],
    ids=[*KINDS, "memory-plus-batch-norm", "ring", "moe-and-memory-untied", "dense", "norms-over-all-heads"],
)
def test_total_is_the_number_of_parameters_that_megatron_builds(settings):
    where = platform.prepare()
    from megatron_ultramem.config.load import load_config
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.planning.parameters import count_parameters
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    config = load_config(None, [*TINY, *settings], check=False)
    initialize_distributed(config, where)
    try:
        _, chunks = build_chunks(config, 300, "local", where.device)
        built = sum(param.numel() for chunk in chunks for param in chunk.parameters())
    finally:
        destroy_distributed()
    assert built == count_parameters(config.model, 300).total
