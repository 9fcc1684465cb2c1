"""FLOPs per token against torch's own counter on modules that do the same work."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig, MoEConfig
from megatron_ultramem.memory.geometry import coarse_k, plan_pools
from megatron_ultramem.planning.flops import MemoryFlops, flops_per_token

BATCH, SEQUENCE = 2, 16


def counted(work) -> float:
    """FLOPs that torch counts while `work` runs, per token of a batch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / (BATCH * SEQUENCE)


class Block(nn.Module):
    """A dense GPT block with grouped-query attention and SwiGLU; shapes [batch, sequence, width]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, self.heads, self.groups = model.hidden_size, model.num_attention_heads, model.num_query_groups
        self.width = hidden // self.heads
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * self.width, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.fc1 = nn.Linear(hidden, 2 * model.ffn_hidden_size, bias=False)
        self.fc2 = nn.Linear(model.ffn_hidden_size, hidden, bias=False)

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.groups, self.groups], dim=1)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        x = x + self.out((q @ k.transpose(2, 3)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return x + self.fc2(F.silu(gate) * up)


def dense_model() -> ModelConfig:
    return ModelConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=56,
        vocab_size_multiple=8, memory=MemoryConfig(layers="none"),
    )  # fmt: skip


def test_a_dense_gpt_agrees_with_torchs_counter_up_to_the_causal_half():
    model = dense_model()
    blocks = nn.Sequential(*[Block(model) for _ in range(model.num_layers)], nn.Linear(32, 104, bias=False))
    flops = flops_per_token(model, 100, SEQUENCE)
    # The counter sees the whole S x S of attention; ours only the (S + 1) / 2 keys that a query may look at.
    unmasked = flops.attention_scores * SEQUENCE / ((SEQUENCE + 1) / 2)
    forward = counted(lambda: blocks(torch.randn(BATCH, SEQUENCE, 32)))
    assert forward == pytest.approx(flops.forward - flops.attention_scores + unmasked)


def test_training_is_three_forwards_as_torchs_counter_sees_them():
    model = dense_model()
    blocks = nn.Sequential(*[Block(model) for _ in range(model.num_layers)])
    x = torch.randn(BATCH, SEQUENCE, 32, requires_grad=True)
    forward = counted(lambda: blocks(x))
    assert counted(lambda: blocks(x).sum().backward()) == pytest.approx(3 * forward)
    flops = flops_per_token(model, 100, SEQUENCE)
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize("query_per_rank", [True, False])
def test_each_memory_term_agrees_with_torchs_counter(query_per_rank):
    memory = MemoryConfig(
        layers="1", num_keys=24, key_dim=10, num_heads=2, tucker_rank=3, num_cores=2, query_per_rank=query_per_rank,
        top_m=9, coarse_top_k=6, value_dim=8, pre_value_dim=12,
    )  # fmt: skip
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, memory=memory)
    n, k = plan_pools(model)[0].keys_per_side, coarse_k(memory, plan_pools(model)[0].keys_per_side)
    tokens, heads, rank, cores, m = BATCH * SEQUENCE, 2, 3, 2, 9
    queries = 2 * 10 * heads * (rank if query_per_rank else 1)
    flops = flops_per_token(model, 128, SEQUENCE).memory

    x = torch.randn(tokens, 32)
    assert flops.query_projection == counted(lambda: x @ torch.randn(32, queries))
    assert flops.pre_value_projection == counted(lambda: x @ torch.randn(32, 12))
    assert flops.value_projection == counted(lambda: torch.randn(tokens, 8) @ torch.randn(8, 32))
    sides = 2 * heads
    q = torch.randn(sides * rank, tokens, 10)
    assert flops.key_scores == counted(lambda: q @ torch.randn(sides * rank, 10, n))
    assert flops.coarse_combination == counted(
        lambda: torch.randn(sides, tokens * n, rank) @ torch.randn(sides, rank, 1)
    )

    def exact_scores():
        row, column = torch.randn(heads * tokens, k, rank), torch.randn(heads * tokens, rank, k)
        (row @ torch.randn(heads * tokens, rank, rank)) @ column
        for _ in range(cores):
            selected = torch.randn(heads * tokens, m, rank) @ torch.randn(heads * tokens, rank, rank)
            selected.view(-1, 1, rank) @ torch.randn(heads * tokens * m, rank, 1)

    assert flops.exact_scores == counted(exact_scores)

    def lookup():
        scores = torch.randn(heads * tokens, m, 12) @ torch.randn(heads * tokens, 12, 1)
        scores.transpose(1, 2) @ torch.randn(heads * tokens, m, 8)

    assert flops.lookup == counted(lookup)


PRODUCT_KEYS = {"layers": "1", "num_keys": 24, "key_dim": 10, "num_heads": 2, "top_m": 9}


def memory_flops(**settings) -> MemoryFlops:
    memory = MemoryConfig(**{**PRODUCT_KEYS, **settings})
    return flops_per_token(
        ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, memory=memory), 128, 1
    ).memory


def test_memory_plus_agrees_with_torchs_counter():
    flops, x = memory_flops(kind="memory_plus", value_dim=12), torch.randn(BATCH * SEQUENCE, 32)
    assert flops.query_projection == counted(lambda: x @ torch.randn(32, 2 * 2 * 10))
    assert flops.gate_projection == flops.value_projection == counted(lambda: x @ torch.randn(32, 12))
    assert flops.key_scores == counted(lambda: torch.randn(4, len(x), 10) @ torch.randn(4, 10, 24))
    pairs = [(i, j) for i in range(9) for j in range(9) if (i + 1) * (j + 1) <= 9]
    assert flops.exact_scores == 2 * len(pairs)  # a sum each, which the counter does not see
    assert flops.lookup == counted(lambda: torch.randn(len(x), 1, 18) @ torch.randn(len(x), 18, 12))
    assert flops.pre_value_projection == flops.coarse_combination == 0


def test_pkm_and_peer_have_no_projections_but_the_queries():
    pkm = memory_flops(kind="pkm", value_dim=32)
    peer = memory_flops(kind="peer", value_dim=32, pre_value_dim=32)
    assert pkm.value_projection == peer.value_projection == peer.pre_value_projection == peer.gate_projection == 0
    assert peer.lookup == 2 * pkm.lookup == 2 * 2 * 2 * 9 * 32


def test_ultramem_projects_every_block_and_has_one_query_a_side():
    v2, v1 = (memory_flops(kind=kind, value_dim=12) for kind in ("ultramem_v2", "ultramem"))
    assert v1.value_projection == 4 * v2.value_projection
    assert v1.query_projection == v2.query_projection / 2
    assert v1.key_scores == 2 * v2.key_scores  # sqrt(4) times the keys
    assert v1.pre_value_projection == 0


def test_memory_instead_of_the_ffn_saves_its_flops():
    kept, replaced = (
        flops_per_token(
            ModelConfig(memory=MemoryConfig(kind="memory_plus", layers="0-4", replaces_ffn=replaces)), 128, 1
        )
        for replaces in (False, True)
    )
    assert replaced.ffn == kept.ffn * 15 / 20
    assert replaced.memory == kept.memory


def test_memory_flops_grow_with_the_keys_that_sharing_adds():
    alone = ModelConfig(num_layers=4, memory=MemoryConfig(num_keys=100))
    shared = ModelConfig(num_layers=4, memory=MemoryConfig(num_keys=100, sharing="ring", share_size=4))
    one, four = (flops_per_token(model, 128, SEQUENCE).memory for model in (alone, shared))
    assert four.key_scores == 2 * one.key_scores
    assert four.lookup == one.lookup


def test_moe_counts_the_router_the_chosen_experts_and_the_shared_one():
    moe = MoEConfig(layers="0-1", num_experts=16, top_k=3, ffn_hidden_size=20, shared_expert_hidden_size=8)
    model = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=10, moe=moe,
                        memory=MemoryConfig(layers="none"))  # fmt: skip
    flops = flops_per_token(model, 128, SEQUENCE)
    assert flops.moe == 2 * 2 * 32 * (16 + 3 * (3 * 20 + 8))
    assert flops.ffn == 2 * 2 * 3 * 32 * 10


def test_model_without_memory_has_no_memory_flops():
    assert flops_per_token(dense_model(), 128, SEQUENCE).memory.total == 0
