"""Parameter counts: the published figures, and exact sums by hand."""

import pytest

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig, MoEConfig
from megatron_ultramem.planning.parameters import count_parameters

VOCABULARY = 50304


def ultramemv2_227m() -> ModelConfig:
    return ModelConfig(memory=MemoryConfig(sharing="ring", share_size=10, window="start"))


def olmoe_227m() -> ModelConfig:
    return ModelConfig(memory=MemoryConfig(layers="none"), moe=MoEConfig(layers="all", ffn_hidden_size=384))


def test_ultramemv2_227m_has_the_published_table_parameters():
    assert count_parameters(ultramemv2_227m(), VOCABULARY).tables == 360 * 360 * 20 * (192 + 192) == 995_328_000


def test_ultramemv2_227m_has_the_published_active_and_total_parameters():
    published = count_parameters(ultramemv2_227m(), VOCABULARY).published
    assert published.active == pytest.approx(225e6, rel=0.01)
    assert round(published.total / 1e9, 2) == 1.18


def test_the_same_convention_gives_olmoe_227m_its_published_counts():
    published = count_parameters(olmoe_227m(), VOCABULARY).published
    assert published.active == pytest.approx(227e6, rel=0.01)
    assert round(published.total / 1e9, 2) == 1.18


def test_active_counts_every_key_that_a_layer_scores():
    counts = count_parameters(ultramemv2_227m(), VOCABULARY)
    extra_keys = 20 * 2 * (1138 - 360) * 2 * 192
    assert counts.active - counts.published.active == extra_keys


@pytest.mark.parametrize(
    "model",
    [
        ultramemv2_227m(),
        olmoe_227m(),
        ModelConfig(
            tie_embeddings=False, num_query_groups=4, memory=MemoryConfig(layers="0,3-5", query_per_rank=False)
        ),
    ],
    ids=["ultramemv2", "olmoe", "mixed"],
)
def test_parts_add_up_to_the_total(model):
    c = count_parameters(model, VOCABULARY)
    assert c.total == c.tables + c.memory_dense + c.attention + c.ffn + c.moe + c.embedding + c.norms


def test_a_small_mixed_model_counted_by_hand():
    model = ModelConfig(
        num_layers=3, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=10, qk_norm=False,
        tie_embeddings=False, vocab_size_multiple=16,
        memory=MemoryConfig(layers="1", num_keys=5, key_dim=3, top_m=4, value_dim=6, pre_value_dim=2, num_heads=2,
                            rows_multiple=16),
        moe=MoEConfig(layers="2", num_experts=4, top_k=2, ffn_hidden_size=7, shared_expert_hidden_size=5),
    )  # fmt: skip
    counts = count_parameters(model, 20)
    assert counts.embedding == 2 * 32 * 8
    assert counts.attention == 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8)
    assert counts.ffn == 2 * 3 * 8 * 10
    assert counts.moe == 8 * 4 + 3 * 8 * (4 * 7 + 5)
    assert counts.norms == 3 * 2 * 8 + 8
    assert counts.tables == 32 * (6 + 2)  # 25 rows padded to 32
    inactive = (32 - 2 * 4) * (6 + 2) + 2 * 3 * 8 * 7
    assert counts.active == counts.total - inactive
