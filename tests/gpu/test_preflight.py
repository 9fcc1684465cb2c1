"""Preflight on GPUs: rates of the order that the hardware has, counters through NVML, NCCL groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.devices import peak_bf16_flops
from megatron_ultramem.preflight.command import Options, run_preflight
from megatron_ultramem.preflight.gpu_health import gpu_problems
from megatron_ultramem.preflight.report import RankReport
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    workers = WorkerPool(2)
    yield workers
    workers.close()


def check(settings: list[str]) -> tuple[list[RankReport], list[str]]:
    reports, problems = run_preflight(load_config(None, settings), Options())
    return reports, [str(problem) for problem in problems]


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.two_gpus)])
def test_healthy_gpus_are_found_healthy(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
    ranks: int,
) -> None:
    reports, problems = gpus.run(ranks, check, [*small_run, f"train.run_dir={tmp_path}"])[0]
    assert problems == []
    peak = peak_bf16_flops(torch.cuda.get_device_name(0))
    for report in reports:
        assert report.device == f"cuda:{report.rank}" and report.versions["nccl"]
        assert report.matmul_tflops and report.copy_gb_s and report.host_copy_gb_s
        if peak is not None:
            assert 0.3 * peak < report.matmul_tflops * 1e12 < 1.1 * peak
        assert report.copy_gb_s > 100 and report.host_copy_gb_s > 2
        assert [group.kind for group in report.groups] == (["world"] if ranks == 2 else [])
        for group in report.groups:
            assert group.all_reduce_gb_s > 5 and group.all_to_all_gb_s > 5


def test_the_counters_of_a_gpu_can_be_read() -> None:
    pytest.importorskip("pynvml")
    problems, obstacle = gpu_problems(torch.device("cuda", 0))
    assert obstacle is None
    assert all(isinstance(problem, str) for problem in problems)
