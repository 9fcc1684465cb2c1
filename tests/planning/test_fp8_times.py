"""FP8 products in the time model: faster where they are wide, and only those that run in FP8."""

from __future__ import annotations

from pathlib import Path

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import Evaluator
from megatron_ultramem.planning.kernel_times import Times

CUT = Path(__file__).parents[2] / "benchmarks" / "configs" / "ultramemv2_1b_7b_cut.yaml"
FP8 = "train.fp8.recipe=tensorwise"


def step(*overrides: str) -> Times:
    config = load_config(CUT, ["train.global_batch_size=32", *overrides])
    found = Evaluator(config, 50304, load_cluster("h100")).evaluate(config, 1)
    return found.time.times


def test_products_in_fp8_take_less_time_and_nothing_else_changes() -> None:
    bf16, fp8, without_memory = step(), step(FP8), step(FP8, "train.fp8.memory_projections=false")
    assert 0.5 * bf16.matmul < fp8.matmul < without_memory.matmul < bf16.matmul
    assert (fp8.attention, fp8.lookup, fp8.loss) == (bf16.attention, bf16.lookup, bf16.loss)


def test_casts_leave_nothing_of_the_gain_in_narrow_models() -> None:
    narrow = ["model.hidden_size=512", "model.ffn_hidden_size=1024", "model.memory.key_dim=128"]
    assert step(*narrow, FP8).matmul > step(*narrow).matmul
