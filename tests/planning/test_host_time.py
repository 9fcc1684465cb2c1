"""What the host launches in a step, where no CUDA graph does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.planning import calibration as c
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import ONE_GROUPED_GEMM, Evaluation
from megatron_ultramem.planning.scaling import evaluate

RECIPES = Path(__file__).parents[2] / "examples" / "configs"
LAYERS, EXPERTS, MICRO_BATCHES = 16, 64, 4
ONE_LAUNCH = {ONE_GROUPED_GEMM: "1"}


def plan(*settings: str, recipe: str = "olmoe_1b_7b", gpus: int = 1, **environment: str) -> Evaluation:
    """Four micro-batches a step on every rank, of sequences so short that the host binds both directions."""
    short = ["data.paths=[unused]", "data.sequence_length=256", "train.micro_batch_size=1", *settings]
    sizes = [f"train.global_batch_size={MICRO_BATCHES * gpus}", f"parallel.expert_parallel_size={gpus}"]
    config = load_config(RECIPES / f"{recipe}.yaml", [*short, *(sizes if recipe.startswith("olmoe") else sizes[:1])])
    return evaluate(config, gpus, load_cluster("h200"), environment.items())


def launches(longer: Evaluation, shorter: Evaluation) -> float:
    """In a step, by which one is longer."""
    return (longer.time.seconds - shorter.time.seconds) * 1e6 / load_cluster("h200").launch_us


def test_one_launch_for_all_experts_spares_those_of_each_but_for_gradients_of_weights() -> None:
    spared = launches(plan(), plan(**ONE_LAUNCH))
    of_each = MICRO_BATCHES * LAYERS * EXPERTS * c.EXPERT_LAUNCHES
    assert spared == pytest.approx(of_each * (1 - c.OF_WEIGHT_GRADIENTS))


def test_one_launch_for_all_experts_is_not_for_fp8() -> None:
    fp8 = "train.fp8.recipe=tensorwise"
    assert launches(plan(fp8), plan(fp8, **ONE_LAUNCH)) == 0


def test_experts_on_two_ranks_are_half_as_many_with_an_exchange_of_tokens() -> None:
    """Links take their own time, but the host binds."""
    one, two, launch = plan().time, plan(gpus=2).time, load_cluster("h200").launch_us / 1e6
    spared = (one.micro_batch.total - two.micro_batch.total) / launch
    assert spared == pytest.approx(LAYERS * (EXPERTS / 2 * c.EXPERT_LAUNCHES - c.DISPATCH_LAUNCHES))
    ends = (one.times.optimizer - two.times.optimizer) / launch
    assert ends > LAYERS * EXPERTS / 2 * c.EXPERT_STEP_LAUNCHES  # and fewer parameters to step


def test_all_tokens_to_all_ranks_need_no_numbers_of_tokens() -> None:
    spared = launches(plan(gpus=2), plan("model.moe.dispatcher=allgather", gpus=2))
    assert spared == pytest.approx(MICRO_BATCHES * LAYERS * c.DISPATCH_LAUNCHES)


def test_models_without_experts_do_not_ask() -> None:
    recipe = "ultramemv2_1b_7b"
    assert launches(plan(recipe=recipe), plan(recipe=recipe, **ONE_LAUNCH)) == 0
