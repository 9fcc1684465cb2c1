"""GPU tests compare fp32 runs, so matrices are multiplied in fp32: Transformer Engine would take TF32, of 10 bits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.workers import WorkerPool

# Read by cuBLAS when a process starts to use it; the ranks of a test inherit them.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Every job makes communicators of its own, which takes the longer the more channels they have; messages are small.
os.environ.setdefault("NCCL_MAX_NCHANNELS", "2")
os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", "2")


@pytest.fixture(scope="session")
def gpus() -> Iterator[WorkerPool]:
    """A process for each of two GPUs, where a test asks for two."""
    workers = WorkerPool(2)
    yield workers
    workers.close()
