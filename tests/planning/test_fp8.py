"""FP8 matrix products in a plan: what they take and spare."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning import calibration
from megatron_ultramem.planning.clusters import Cluster, load_cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.fp8 import projection_weights, weights_of_rank
from megatron_ultramem.planning.workload import Workload

MODEL = [
    "model.num_layers=8", "model.hidden_size=2048", "model.num_attention_heads=16", "model.ffn_hidden_size=6912",
    "model.vocab_size=50304", "model.memory.key_dim=512", "model.memory.value_dim=768",
    "model.memory.pre_value_dim=384", "train.micro_batch_size=2", "train.global_batch_size=64",
]  # fmt: skip
MOE = ["model.memory.layers=none", "model.moe.layers=all"]
TENSORWISE, GATHER = "train.fp8.recipe=tensorwise", "train.fp8.param_gather=true"
ENDS = "train.fp8.first_last_layers_bf16=true"
H200 = load_cluster("h200")


def config(*settings: str) -> Config:
    return on_cluster(load_config(None, [*MODEL, *settings]), H200)


def plan(*settings: str, gpus: int = 1, cluster: Cluster = H200) -> Evaluation:
    chosen = config(*settings)
    return Evaluator(chosen, chosen.model.vocab_size or 0, cluster).evaluate(chosen, gpus)


def linears(chosen: Config) -> int:
    """Weights of a block's linears but for keys and cores: of the modules, spelled out."""
    m = chosen.model
    attention = 4 * m.hidden_size**2
    if m.moe.layers == "all":
        return attention + 3 * m.hidden_size * m.moe.ffn_hidden_size * m.moe.num_experts
    memory = m.hidden_size * (4 * m.memory.key_dim + m.memory.pre_value_dim + m.memory.value_dim)
    return attention + 3 * m.hidden_size * m.ffn_hidden_size + memory


@pytest.mark.parametrize("settings", [[], MOE], ids=["memory", "moe"])
def test_a_weight_takes_two_bytes_more_unless_it_exists_in_fp8_alone(settings: list[str]) -> None:
    plain, fast, alone = plan(*settings), plan(*settings, TENSORWISE), plan(*settings, TENSORWISE, GATHER)
    assert fast.memory.weights - plain.memory.weights == 2 * 8 * linears(config(*settings))
    assert alone.memory.weights == plain.memory.weights
    same = ("gradients", "optimizer", "table_weights", "table_optimizer", "loss")
    assert all(getattr(fast.memory, part) == getattr(plain.memory, part) for part in same)


def test_copies_of_weights_are_split_as_the_weights_are() -> None:
    settings = ["model.moe.layers=all"]
    layer = Workload(config(*settings).model, 50304, 4096).layers[0]
    fp8 = plan(*settings, TENSORWISE).layout.fp8
    assert fp8 is not None
    p = layer.parameters
    whole, split = weights_of_rank(layer, fp8, 1, 1), weights_of_rank(layer, fp8, 2, 4)
    assert whole == p.attention + p.experts + projection_weights(layer)
    assert split == p.attention / 2 + p.experts / 4 + projection_weights(layer)


@pytest.mark.parametrize("settings", [[], ["model.memory.layers=none"], MOE], ids=["memory", "dense", "moe"])
def test_blocks_keep_fewer_bytes(settings: list[str]) -> None:
    plain, fast = plan(*settings).memory.activations, plan(*settings, TENSORWISE).memory.activations
    assert 0.7 * plain < fast < 0.95 * plain


def test_what_a_dense_block_keeps_for_its_backward() -> None:
    """Of a token: inputs of the four linears in one byte instead of two, and attention's output once more."""
    settings = ["model.memory.layers=none", "model.vocab_size=128"]  # a small loss: the peak is in a block
    plain, fast = plan(*settings), plan(*settings, TENSORWISE)
    tokens, layers = 2 * 4096, 8
    spared = (plain.memory.activations - fast.memory.activations) / tokens / layers
    assert spared == 2048 + 2048 + 6912 - 2048


def test_projections_and_layers_that_stay_in_bf16() -> None:
    def seconds(*settings: str) -> float:
        """Of a GPU that no host keeps waiting: with FP8 there is more to launch."""
        quick = dataclasses.replace(H200, launch_us=0.0)
        return plan(*settings, cluster=quick).time.micro_batch.total

    assert seconds() > seconds(TENSORWISE, "train.fp8.memory_projections=false")
    some = plan(TENSORWISE, ENDS)
    assert some.layout.fp8 is not None and some.layout.fp8.share == 6 / 8
    assert seconds(TENSORWISE) < seconds(TENSORWISE, ENDS) < seconds()


def test_products_are_faster_by_their_peak_and_casts_take_time() -> None:
    plain, fast = plan().time.micro_batch, plan(TENSORWISE).time.micro_batch
    gain = calibration.MATMUL_FP8 * H200.fp8_times / calibration.MATMUL
    assert plain.matmul / gain < fast.matmul < 0.85 * plain.matmul  # keys and logits stay in bf16
    assert fast.elementwise > 1.2 * plain.elementwise and fast.lookup == plain.lookup
    slower = plan(TENSORWISE, cluster=dataclasses.replace(H200, fp8_times=1.0)).time.micro_batch
    assert slower.matmul > fast.matmul and slower.elementwise == fast.elementwise
    assert plan("train.fp8.recipe=delayed").time.micro_batch.elementwise < fast.elementwise


def test_scales_of_what_swiglu_writes_take_no_read_of_their_own() -> None:
    def reads(*settings: str) -> float:
        """What scales of the tensors themselves add to casts with scales of earlier steps, of activations alone."""
        own, earlier = (plan(f"train.fp8.recipe={recipe}", GATHER, *settings) for recipe in ("tensorwise", "delayed"))
        return own.time.micro_batch.elementwise - earlier.time.micro_batch.elementwise

    narrow, wide = "model.ffn_hidden_size=256", "model.ffn_hidden_size=1024"
    assert reads(narrow) == pytest.approx(reads(wide))
    dense = "model.memory.layers=none"
    assert reads(dense, wide) > 1.1 * reads(dense, narrow)


def test_weights_are_cast_once_a_step_or_never() -> None:
    """8 layers of them, each read twice and written twice; the rest of the casts is of every micro-batch."""
    few, many = (plan(TENSORWISE, f"train.global_batch_size={size}") for size in (16, 32))
    alone = plan(TENSORWISE, GATHER, "train.global_batch_size=16")
    cast = 8 * linears(config()) * 6 / (calibration.ELEMENTWISE * H200.hbm_gb_per_s * 1e9)
    total, half = many.time.times.elementwise, few.time.times.elementwise
    assert 2 * half - total == pytest.approx(cast, rel=0.01)
    assert half - alone.time.times.elementwise == pytest.approx(cast, rel=0.01)


def test_gpus_without_fp8_are_refused() -> None:
    with pytest.raises(ConfigError, match="train.fp8.recipe = tensorwise: GPUs of cluster a100 have no FP8"):
        plan(TENSORWISE, cluster=load_cluster("a100"))


def test_ranks_that_share_columns_agree_on_the_largest_numbers_of_tables_in_fp8() -> None:
    ranks = ["parallel.memory_parallel_size=4", "model.memory.table_read=fp8"]
    columns, rows = (plan(*ranks, f"parallel.memory_placement={name}", gpus=4) for name in ("columns", "rows"))
    plain = plan(ranks[0], "parallel.memory_placement=columns", gpus=4)
    held = columns.parameters.tables * 4 // (768 + 384)  # rows of a table
    seconds = 2 * 3 / 4 * 4 * 2 * held / (H200.intra_node_gb_per_s * 1e9) + 2 * H200.latency_us / 1e6
    assert columns.time.times.gradient_comm - plain.time.times.gradient_comm == pytest.approx(seconds)
    assert rows.time.times.gradient_comm == pytest.approx(plain.time.times.gradient_comm)
