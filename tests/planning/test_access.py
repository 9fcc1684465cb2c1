"""Memory access per token, by hand for a small model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import MemoryConfig, ModelConfig, MoEConfig
from megatron_ultramem.planning.access import decoding_access, equal_moe, training_access
from megatron_ultramem.planning.parameters import count_parameters
from megatron_ultramem.planning.workload import Workload

VOCABULARY = 128
MEMORY = MemoryConfig(num_keys=40, key_dim=8, top_m=4, value_dim=16, pre_value_dim=8)
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, memory=MEMORY)
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def work(model: ModelConfig) -> Workload:
    return Workload(model, VOCABULARY, 16)


def test_decoding_shares_dense_weights_and_pays_for_its_own_rows() -> None:
    counts = count_parameters(MODEL, VOCABULARY)
    gains = 2 * 2 * 8  # of QK-norm, and the norms: not counted
    dense = counts.total - counts.tables - counts.norms - gains
    for batch in (1, 16):
        access = decoding_access(work(MODEL), batch, 2).model
        assert access.dense == pytest.approx(2 * dense / batch)
        assert access.rows == 2 * 2 * 4 * (16 + 8)
        assert access.experts == 0


def test_training_reads_twice_and_adds_fp32_gradients() -> None:
    decoding, training = decoding_access(work(MODEL), 64, 2).model, training_access(work(MODEL), 64, 2).model
    assert training.rows == decoding.rows / 2 * (2 * 2 + 8)
    assert training.dense == pytest.approx(decoding.dense / 2 * (2 * 2 + 8))


def test_rows_read_in_fp8_take_a_byte_a_number_and_a_scale_a_table() -> None:
    fp8 = dataclasses.replace(MODEL, memory=dataclasses.replace(MEMORY, table_read="fp8"))
    decoding, training = decoding_access(work(fp8), 8, 2).model, training_access(work(fp8), 8, 2).model
    assert decoding.rows == 2 * 4 * (16 + 8 + 2 * 4)
    assert training.rows == 2 * 4 * (2 * (16 + 8 + 2 * 4) + 8 * (16 + 8))
    assert decoding.dense == decoding_access(work(MODEL), 8, 2).model.dense


def test_of_many_experts_a_batch_reads_those_that_any_token_chose() -> None:
    moe = MoEConfig(layers="all", num_experts=8, top_k=2, ffn_hidden_size=24)
    model = ModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, memory=MemoryConfig(layers="none"), moe=moe
    )
    expert = 3 * 32 * 24
    assert decoding_access(work(model), 1, 2).model.experts == pytest.approx(2 * 2 * expert)
    two = decoding_access(work(model), 2, 2).model.experts * 2
    assert two == pytest.approx(2 * expert * 8 * (1 - (6 / 8) ** 2))
    assert decoding_access(work(model), 1000, 2).model.experts * 1000 == pytest.approx(2 * 8 * expert)


def test_the_equal_moe_has_the_same_parameters_in_all_and_active() -> None:
    moe = equal_moe(work(MODEL))
    assert moe is not None
    counts = count_parameters(MODEL, VOCABULARY)
    inside = counts.ffn + counts.memory_dense
    rows = 2 * 4 * (16 + 8)
    assert 2 * moe.top_k * moe.expert_parameters == pytest.approx(inside + rows)
    unpadded = 2 * 40 * 40 * (16 + 8)
    assert 2 * moe.num_experts * moe.expert_parameters == pytest.approx(inside + unpadded)
    assert equal_moe(work(ModelConfig(memory=MemoryConfig(layers="none")))) is None


def test_the_equal_of_the_227m_recipe_is_about_olmoe() -> None:
    """OLMoE-227M/1.2B: 64 experts of 3 * 768 * 384 parameters."""
    moe = equal_moe(Workload(load_config(CONFIGS / "ultramemv2_227m_1b.yaml").model, 50304, 4096))
    assert moe is not None
    assert moe.num_experts == pytest.approx(64, rel=0.1)
    assert moe.expert_parameters == pytest.approx(3 * 768 * 384, rel=0.1)


def test_memory_reads_less_than_its_equal_moe_in_decoding() -> None:
    recipe = Workload(load_config(CONFIGS / "ultramemv2_2_5b_120b_top256.yaml").model, 50304, 4096)
    for batch in (8, 64, 512):
        found = decoding_access(recipe, batch, 2)
        assert found.moe is not None and found.model.total < found.moe.total / 3
