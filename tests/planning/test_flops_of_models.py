"""The planner's FLOPs against what torch's counter sees of the models that Megatron builds.

The counter sees matrix products. The planner differs from it on purpose, in what it cannot see or see through:

- the causal half: the counter sees all S x S scores of attention, the planner the (S + 1) / 2 keys of a query;
- sums of pairs of product-key scores, which are additions (the planner counts them in `exact_scores`);
- the fused kernels, which are operators of their own: here the layers run in plain PyTorch;
- empty places: UltraMem in plain PyTorch looks up M places in each of its four blocks, of which M in all are rows;
- norms, softmax, SwiGLU, rotations, top-k and gathers, which count nothing in either.

Backwards are not twice the forward to the last FLOP: the selection of keys has none, and the lookup's repeats products.
"""

from __future__ import annotations

import pytest

from megatron_ultramem import platform

SEQUENCE, BATCH, VOCABULARY = 32, 3, 300
TINY = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.ffn_hidden_size=96",
    "model.memory.num_keys=20", "model.memory.key_dim=8", "model.memory.top_m=8", "model.memory.value_dim=24",
    f"model.max_sequence_length={SEQUENCE}", f"data.sequence_length={SEQUENCE}", f"model.vocab_size={VOCABULARY}",
    "train.precision=fp32", "model.memory.kernels=reference",
]  # fmt: skip
MOE = [
    "model.moe.layers=1",
    "model.moe.aux_loss_coeff=0",
    "model.moe.num_experts=6",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=40",
]
CASES = {
    "dense": ["model.memory.layers=none", "model.num_query_groups=2"],
    "moe": ["model.memory.layers=none", *MOE, "model.moe.shared_expert_hidden_size=20"],
    "ultramem_v2": ["model.memory.sharing=ring", "model.memory.share_size=2", "model.memory.num_heads=2"],
    "one_query_three_ranks": ["model.memory.query_per_rank=false", "model.memory.tucker_rank=3"],
    "capped": ["model.memory.coarse_top_k=4"],
    "memory_and_moe": MOE,
    "ultramem": ["model.memory.kind=ultramem"],
    "memory_plus": ["model.memory.kind=memory_plus", "model.memory.num_heads=2"],
    "pkm": ["model.memory.kind=pkm", "model.memory.value_dim=64"],
    "peer": ["model.memory.kind=peer", "model.memory.value_dim=64", "model.memory.pre_value_dim=64"],
}
WITH_PAIR_SUMS = ("memory_plus", "pkm", "peer")


@pytest.mark.parametrize("case", CASES)
def test_the_counter_sees_what_the_planner_counts(case: str) -> None:
    where = platform.prepare()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_ultramem.config import load_config
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.planning.flops import flops_per_token
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    config = load_config(None, [*TINY, *CASES[case]])
    initialize_distributed(config, where)
    try:
        _, (model,) = build_chunks(config, VOCABULARY, "local", where.device)
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens, torch.arange(SEQUENCE).expand(BATCH, -1), mask, labels=tokens)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.sum().backward()
        training = forward + counter.get_total_flops()
    finally:
        destroy_distributed()
    flops = flops_per_token(config.model, VOCABULARY, SEQUENCE)
    expected = flops.forward + flops.attention_scores * (2 * SEQUENCE / (SEQUENCE + 1) - 1)
    if case in WITH_PAIR_SUMS:
        expected -= flops.memory.exact_scores
    if case == "ultramem":
        expected += 3 * flops.memory.lookup
    assert forward / (BATCH * SEQUENCE) == pytest.approx(expected, rel=1e-12)
    assert training / (BATCH * SEQUENCE) == pytest.approx(3 * expected, rel=0.03)
