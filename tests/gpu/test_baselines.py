"""Other kinds of memory layer and the MoE's fusions on GPUs: the kernels compute what plain PyTorch does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.layout_job import STEPS, train_job
from tests.distributed.test_baselines import COLUMNS, KINDS, P2, ROWS
from tests.distributed.test_moe import MODELS as MOE
from tests.distributed.workers import WorkerPool
from tests.gpu.test_training import BF16, LOCAL, TE, WIDE, two_gpus

pytestmark = pytest.mark.gpu
LAYERS = ("ultramem", "memory_plus", "pkm", "peer")
# Each kind once, each exchange twice; all pairs of them run on the CPU.
PLACEMENTS = {
    "ultramem": [ROWS, "parallel.overlap_exchange=true"],
    "memory_plus": [COLUMNS],
    "pkm": [ROWS],
    "peer": [COLUMNS],
}
_known: dict[tuple[str, ...], list[Any]] = {}  # losses of runs on one GPU


def losses(gpus: WorkerPool, ranks: int, settings: list[str]) -> list[Any]:
    if ranks == 1 and tuple(settings) in _known:
        return _known[tuple(settings)]
    found = [result["losses"] for result in gpus.run(ranks, train_job, settings, STEPS)]
    return _known.setdefault(tuple(settings), found) if ranks == 1 else found


@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_train_as_the_reference_does(gpus: WorkerPool, small_run: list[str], kind: str) -> None:  # noqa: F811
    settings = [*small_run, *KINDS[kind], LOCAL]
    plain, fused = (
        losses(gpus, 1, [*settings, f"model.memory.kernels={kernels}"])[0] for kernels in ("reference", "fused")
    )
    np.testing.assert_allclose(fused, plain, rtol=1e-4)


@pytest.mark.parametrize("kind", ("ultramem", "memory_plus"))
def test_transformer_engine_trains_in_bf16_as_the_local_back_end(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    kind: str,
) -> None:
    settings = [*small_run, *KINDS[kind], *WIDE, BF16]
    np.testing.assert_allclose(losses(gpus, 1, [*settings, TE])[0], losses(gpus, 1, [*settings, LOCAL])[0], rtol=5e-3)


@two_gpus
@pytest.mark.parametrize("kind", LAYERS)
def test_two_gpus_equal_one(gpus: WorkerPool, small_run: list[str], kind: str) -> None:  # noqa: F811
    placement = PLACEMENTS[kind]
    settings = [*small_run, *KINDS[kind], LOCAL]
    (one,) = losses(gpus, 1, settings)
    for result in losses(gpus, 2, [*settings, P2, *placement]):
        np.testing.assert_allclose(result, one, rtol=1e-5)


@pytest.mark.parametrize(
    "fusions",
    [
        ["model.moe.permute_fusion=true", "model.moe.grouped_gemm=true"],
        ["model.moe.permute_fusion=false", "model.moe.grouped_gemm=true", "model.moe.router_fusion=true"],
        ["model.moe.permute_fusion=true", "model.moe.grouped_gemm=true", "preset=throughput"],
    ],
    ids=" ".join,
)
def test_the_moes_fusions_change_nothing_but_speed(gpus: WorkerPool, small_run: list[str], fusions: list[str]) -> None:  # noqa: F811
    settings = [*small_run, *MOE["losses"], *WIDE, TE, BF16, "model.moe.router_dtype=fp32"]
    plain = losses(gpus, 1, [*settings, "model.moe.permute_fusion=false", "model.moe.grouped_gemm=false"])[0]
    np.testing.assert_allclose(losses(gpus, 1, [*settings, *fusions])[0], plain, rtol=5e-3)
