"""What the planner says that a block keeps for its backward pass, against the tensors that autograd holds."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ultramem import platform

SEQUENCE, BATCH = 32, 3
TINY = [
    "model.num_layers=1", "model.hidden_size=64", "model.num_attention_heads=4", "model.ffn_hidden_size=96",
    "model.memory.num_keys=20", "model.memory.key_dim=8", "model.memory.top_m=8", "model.memory.value_dim=24",
    f"model.max_sequence_length={SEQUENCE}", f"data.sequence_length={SEQUENCE}",
]  # fmt: skip
PRE, WIDE = "model.memory.pre_value_dim=40", "model.memory.value_dim=64"
MOE = [
    "model.moe.layers=all",
    "model.moe.aux_loss_coeff=0",
    "model.moe.num_experts=6",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=40",
]
CASES = {
    "dense": ["model.memory.layers=none"],
    "grouped_queries": ["model.memory.layers=none", "model.num_query_groups=2"],
    "no_qk_norm": ["model.memory.layers=none", "model.qk_norm=false"],
    "ultramem_v2": [PRE, "model.memory.num_heads=2"],
    "one_query": [PRE, "model.memory.query_per_rank=false"],
    "recomputed_memory": [PRE, "model.memory.recompute=true"],
    "ultramem": ["model.memory.kind=ultramem"],
    "memory_plus": ["model.memory.kind=memory_plus"],
    "pkm": ["model.memory.kind=pkm", WIDE],
    "peer": ["model.memory.kind=peer", WIDE, "model.memory.pre_value_dim=64"],
    "moe": ["model.memory.layers=none", *MOE, "model.moe.shared_expert_hidden_size=20"],
    "moe_and_memory": [PRE, *MOE],
}


def kept_and_predicted(settings: list[str]) -> tuple[float, float]:
    """Bytes a token of the tensors that one block holds for its backward, and what the planner expects."""
    where = platform.prepare()
    import torch

    from megatron_ultramem.config import load_config
    from megatron_ultramem.memory.geometry import plan_pools
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.parallel.cost_model import choose
    from megatron_ultramem.planning.activations import Options, saved_by_block
    from megatron_ultramem.planning.workload import Workload
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    config = load_config(None, [*TINY, *settings])
    model, fp32 = config.model, config.train.precision == "fp32"
    keys_per_side = plan_pools(model)[0].keys_per_side if plan_pools(model) else 0
    initialize_distributed(config, where)
    try:
        _, (chunk,) = build_chunks(config, 128, "local", where.device)
        block, rotary = chunk.decoder.layers[0], chunk.rotary_pos_emb(SEQUENCE)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        x = torch.randn(SEQUENCE, BATCH, model.hidden_size, dtype=torch.float32 if fp32 else torch.bfloat16)
        x.requires_grad_()
        own = [*chunk.parameters(), *chunk.buffers(), rotary, mask]
        known = {tensor.untyped_storage().data_ptr() for tensor in own}
        held, tensors = {}, []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and _grows_with_tokens(tensor, keys_per_side):
                held[storage.data_ptr()] = storage.nbytes()
                tensors.append(tensor)  # or its place in memory is given to another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, attention_mask=mask, rotary_pos_emb=rotary)
    finally:
        destroy_distributed()
    options = Options(
        "local", model.memory.kernels == "fused", 4 if fp32 else 2, SEQUENCE, "none", model.memory.recompute
    )
    layer = Workload(model, 128, SEQUENCE).layers[0]
    saved = saved_by_block(model, layer, choose(config), options, SEQUENCE * BATCH)
    return sum(held.values()) / (SEQUENCE * BATCH), saved.stream + saved.inner + saved.memory


def _grows_with_tokens(tensor: Any, keys_per_side: int) -> bool:
    """Not normalised keys (which the kernels pad to a multiple of 64), rotations and scalars."""
    of_keys = {keys_per_side, -(-keys_per_side // 64) * 64} & set(tensor.shape[:-1])
    return tensor.numel() >= SEQUENCE * BATCH and not of_keys


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["fused", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_a_block_keeps_what_the_planner_says(case: str, kernels: str, precision: str) -> None:
    settings = [*CASES[case], f"model.memory.kernels={kernels}", f"train.precision={precision}"]
    if case in ("dense", "grouped_queries", "no_qk_norm", "moe") and kernels == "fused":
        pytest.skip("the same without memory layers")
    kept, predicted = kept_and_predicted(settings)
    assert predicted == pytest.approx(kept, rel=0.03)
