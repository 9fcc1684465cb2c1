"""Memory layers, and whole models, as CUDA graphs train as they do without, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_baselines import KINDS
from tests.distributed.test_memory_parallel import COLUMNS, MODELS, OVERLAP, P2, ROWS, STATIC, TP2
from tests.distributed.workers import WorkerPool
from tests.gpu.graph_job import graph_job, refused_recording
from tests.gpu.test_fp8 import FP8_TABLES, MEMORY_WIDTHS, RECIPES, needs_fp8
from tests.gpu.test_memory_parallel import BESIDE_FFN
from tests.gpu.test_training import BF16, TE, WIDE, two_gpus

pytestmark = pytest.mark.gpu
MEMORY, FULL, LAYERS = (f"train.cuda_graphs={graphs}" for graphs in ("memory", "full", "layers"))
GRAD_OVERLAP, _, SMALL_BUCKETS = OVERLAP
STEPS = 4
LOSSES = ["model.memory.balance_loss_coeff=0.01", "model.memory.tucker_penalty_coeff=0.1", "data.mask_eod_loss=true"]
KERNELS = ["train.cross_entropy=transformer_engine", "train.norms=ultramem", "train.fused_weight_gradients=true"]
FP8 = [*RECIPES["tensorwise"], "train.fused_weight_gradients=true", *MEMORY_WIDTHS]
STATIC_ROWS = [P2, ROWS, f"{STATIC}=2"]
MOE = ["model.moe.layers=all", "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=32"]
SETTINGS = {
    "memory": (1, MEMORY, LOSSES),
    "memory_fp8": (1, MEMORY, [*FP8, "train.fp8.memory_projections=false", FP8_TABLES]),
    "memory_columns_overlap": (2, MEMORY, [P2, COLUMNS, BESIDE_FFN, GRAD_OVERLAP, SMALL_BUCKETS]),
    "memory_rows_overlap": (2, MEMORY, [*STATIC_ROWS, BESIDE_FFN, GRAD_OVERLAP, SMALL_BUCKETS]),
    "layers_dense": (1, LAYERS, ["model.memory.layers=none"]),
    "layers_moe": (1, LAYERS, ["model.memory.layers=none", *MOE]),
    "full": (1, FULL, ["model.hidden_dropout=0.1", *LOSSES]),
    "full_without_memory": (1, FULL, ["model.memory.layers=none"]),
    "full_kernels": (1, FULL, KERNELS),
    "full_fp8": (1, FULL, FP8),
    "full_ultramem": (1, FULL, KINDS["ultramem"]),
    "full_memory_plus": (1, FULL, KINDS["memory_plus"]),
    "full_pkm": (1, FULL, [*KINDS["pkm"], "model.memory.value_dim=128"]),
    "full_peer": (1, FULL, [*KINDS["peer"], "model.memory.value_dim=128", "model.memory.pre_value_dim=128"]),
    "full_data_parallel": (2, FULL, []),
    "full_columns_overlap": (2, FULL, [P2, COLUMNS, BESIDE_FFN]),
    "full_rows_overlap": (2, FULL, [*STATIC_ROWS, BESIDE_FFN]),
    "full_tensor_parallel": (2, FULL, [TP2, *LOSSES]),
    "full_tensor_parallel_fp8_columns": (2, FULL, [TP2, P2, COLUMNS, *FP8]),
}


def needs(case: str) -> list[pytest.MarkDecorator]:
    """What a case asks of the machine."""
    ranks, _, more = SETTINGS[case]
    return [two_gpus] * (ranks == 2) + [needs_fp8] * any("fp8" in setting for setting in more)


@pytest.mark.parametrize("case", [pytest.param(case, marks=needs(case)) for case in SETTINGS])
def test_training_with_graphs_equals_training_without(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    case: str,
) -> None:
    ranks, graphs, more = SETTINGS[case]
    model = [] if any("memory.kind" in setting for setting in more) else MODELS["ring"]
    settings = [*small_run, *model, *WIDE, TE, BF16, "train.deterministic=true", *more]
    expected = gpus.run(ranks, graph_job, settings, STEPS)
    for found, wanted in zip(gpus.run(ranks, graph_job, [*settings, graphs], STEPS), expected, strict=True):
        assert found["recorded"] and not wanted["recorded"]
        for what in ("losses", "grad_norms", "valid_loss", "moved"):
            assert found[what] == wanted[what], what
        for (key, _, _, numbers), (_, _, _, known) in zip(found["params"], wanted["params"], strict=True):
            assert np.array_equal(numbers, known), key


@pytest.mark.seconds(30)
def test_what_cannot_be_recorded_is_named(
    small_run: list[str],  # noqa: F811
) -> None:
    workers = WorkerPool(1, timeout=100)  # of its own: a recording that failed spoils a process
    try:
        message = workers.run(1, refused_recording, [*small_run, *MODELS["ring"], *WIDE, TE, BF16, FULL])[0]
    finally:
        workers.close()
    assert "the model's forward cannot be recorded" in message and "graph_job.py" in message and ".item()" in message
