"""Recording steps on a GPU: kernels in the trace, the history of the memory, ranges and captures for nsys."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_profiles import train_and_touch
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[WorkerPool]:
    workers = WorkerPool(1)
    yield workers
    workers.close()


@pytest.mark.seconds(45)
def test_traces_hold_kernels_and_snapshots_hold_allocations(
    gpu: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.steps=8", "logging.nvtx=true"]
    settings += ["logging.profile_steps=2-3", "logging.profile_memory=true", "logging.profile_length=1"]
    gpu.run(1, train_and_touch, settings, {5: "memory"})
    name = "step_00000002-00000003.rank_00000"
    events = json.loads(gzip.decompress((tmp_path / "profiles" / f"{name}.trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    for snapshot in (name, "step_00000006-00000006.rank_00000"):
        content = pickle.loads((tmp_path / "profiles" / f"{snapshot}.memory.pickle").read_bytes())
        assert any(content["device_traces"])


def test_a_capture_range_for_nsys_does_no_harm_without_it(
    gpu: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.steps=4", "logging.nvtx=true"]
    gpu.run(1, train_and_touch, [*settings, "logging.profile_with=nsys", "logging.profile_steps=2-3"], {})
    assert "recorded step_00000002-00000003" in (tmp_path / "logs" / "rank_00000.log").read_text()
