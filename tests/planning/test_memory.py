"""Memory of a rank: how it follows the layout."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.layout import Layout
from megatron_ultramem.planning.memory import RankMemory, host_memory, micro_batches_in_flight

MODEL = [
    "model.num_layers=8", "model.memory.sharing=block", "model.memory.share_size=2", "model.vocab_size=50304",
    "train.global_batch_size=64",
]  # fmt: skip


def plan(gpus: int, *settings: str) -> Evaluation:
    cluster = load_cluster("h100")
    config = on_cluster(load_config(None, [*MODEL, *settings]), cluster)
    return Evaluator(config, config.model.vocab_size or 0, cluster).evaluate(config, gpus)


def memory(gpus: int, *settings: str) -> RankMemory:
    return plan(gpus, *settings).memory


def test_a_parameter_takes_18_bytes_on_one_gpu() -> None:
    """bf16 weight, fp32 gradient, fp32 master weight and two moments."""
    found = plan(1)
    m = found.memory
    state = m.weights + m.gradients + m.optimizer + m.table_weights + m.table_gradients + m.table_optimizer
    assert state == 18 * found.parameters.total


def test_the_distributed_optimizer_splits_its_state_alone() -> None:
    one, four = memory(1), memory(4)
    assert four.optimizer == one.optimizer / 4 and four.table_optimizer == one.table_optimizer / 4
    assert (four.weights, four.table_gradients) == (one.weights, one.table_gradients)
    assert memory(4, "parallel.distributed_optimizer=false").optimizer == one.optimizer


def test_offload_moves_the_optimizer_of_tables_to_the_host() -> None:
    device, host = plan(2), plan(2, "optimizer.value_offload=torch")
    assert host.memory == dataclasses.replace(device.memory, table_optimizer=0.0)
    tables = device.parameters.tables
    assert host_memory(host.layout, tables) == 16 * tables / 2 and host_memory(device.layout, tables) == 0
    assert host.time.times.optimizer > device.time.times.optimizer


@pytest.mark.parametrize("placement", ["rows", "columns"])
def test_tables_read_in_fp8_are_held_twice(placement: str) -> None:
    """A byte for every number, and 4 for every row of both tables, whole however its columns are shared."""
    ranks = ["parallel.memory_parallel_size=4", f"parallel.memory_placement={placement}"]
    for settings in ([], ranks):
        plain, copied = plan(4, *settings), plan(4, *settings, "model.memory.table_read=fp8")
        rows = plain.parameters.tables / 384 * (4 if placement == "columns" and settings else 1)
        found = copied.memory.table_weights - plain.memory.table_weights
        assert found == pytest.approx(plain.parameters.tables + 8 * rows)
        assert copied.memory.table_gradients == plain.memory.table_gradients
        assert copied.time.times.lookup < 0.95 * plain.time.times.lookup


def test_memory_parallel_splits_tables_and_nothing_else() -> None:
    one, four = memory(4), memory(4, "parallel.memory_parallel_size=4")
    assert four.table_weights == one.table_weights / 4
    assert four.table_optimizer == one.table_optimizer  # over as many ranks in all
    assert (four.weights, four.gradients) == (one.weights, one.gradients)


def test_recompute_keeps_less() -> None:
    none, of_memory, full = (
        memory(1, f"train.recompute={mode}", f"model.memory.recompute={again}")
        for mode, again in (("none", "false"), ("none", "true"), ("full", "false"))
    )
    assert none.activations > of_memory.activations > 5 * full.activations


def test_activations_grow_with_the_micro_batch_and_shrink_with_tensor_and_context_parallelism() -> None:
    one, two = memory(2), memory(2, "train.micro_batch_size=2")
    assert two.activations == 2 * one.activations
    assert memory(2, "parallel.tensor_parallel_size=2").activations == pytest.approx(one.activations / 2)
    assert memory(2, "parallel.context_parallel_size=2").activations == pytest.approx(one.activations / 2)


def test_the_first_stage_holds_a_micro_batch_for_every_stage() -> None:
    found = plan(4, "parallel.pipeline_parallel_size=4")
    per_stage = memory(1).activations / 4
    assert found.stage in (0, 3)
    assert found.layout.pipeline == 4
    first = micro_batches_in_flight(found.layout, 0)
    assert (first, micro_batches_in_flight(found.layout, 3)) == (4, 1)
    if found.stage == 0:
        assert found.memory.activations == pytest.approx(4 * per_stage, rel=0.01)


def layout(**sizes: int) -> Layout:
    return dataclasses.replace(plan(4, "parallel.pipeline_parallel_size=4").layout, **sizes)


@pytest.mark.parametrize(
    ("chunks", "micro_batches", "stage", "in_flight"),
    [(1, 64, 0, 4), (1, 2, 0, 2), (1, 64, 2, 2), (2, 64, 0, 5.5), (2, 64, 3, 2.5), (2, 4, 0, 4)],
)
def test_forward_passes_in_flight(chunks: int, micro_batches: int, stage: int, in_flight: float) -> None:
    """1F1B: stages from here to the end. Interleaved: 2 (p - s - 1) + (v - 1) p + 1 chunks, never more than all."""
    assert micro_batches_in_flight(layout(chunks=chunks, micro_batches=micro_batches), stage) == in_flight


def test_only_the_last_stage_has_logits() -> None:
    assert memory(1).loss > 0
    early = plan(4, "parallel.pipeline_parallel_size=4", "model.vocab_size=1280", "train.micro_batch_size=4")
    assert (early.stage, early.memory.loss) == (0, 0)
