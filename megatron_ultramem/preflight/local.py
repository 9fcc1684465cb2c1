"""Measurements of one rank: matrix products, copies, free space, speed of writing. All ranks measure at once, as they
do in training, where the GPUs of a host share its power, its air and its links."""

from __future__ import annotations

import os
import platform as python_platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ultramem.doctor import version_of
from megatron_ultramem.preflight.report import Folder

REPEATS = 7
_CHUNK = 8 * 2**20  # bytes written at a time


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {"python": python_platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-ultramem", "megatron-core", "transformer-engine", "triton", "numpy"):
        found[name] = version_of(name) or "not installed"
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def matmul_tflops(device: torch.device, during: Callable[[], None] = lambda: None) -> float:
    """Rate of a large matrix product, bf16 on a GPU and fp32 on a CPU. `during` is called while the device works."""
    on_gpu = device.type == "cuda"
    size, products = (8192, 20) if on_gpu else (512, 4)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else None) for _ in range(2))
    out = a @ b

    def run() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    rate = 2 * size**3 * products / median_seconds(run, device) / 1e12
    run()
    during()
    synchronize(device)
    return rate


def copy_gb_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device) / 1e9


def host_copy_gb_s(device: torch.device) -> float | None:
    """Bytes a second from pinned host memory to a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    source = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return len(source) / median_seconds(lambda: target.copy_(source, non_blocking=True), device) / 1e9


def write_mb_s(folder: Path, rank: int, mebibytes: int) -> float:
    """Speed of writing a file of that size to a folder and forcing it to the disk; raises OSError. Leaves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".preflight-{rank}-{os.getpid()}"
    data = os.urandom(_CHUNK)  # what a file system compresses would be measured too fast
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, mebibytes * 2**20 // _CHUNK)):
                file.write(data)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return max(1, mebibytes * 2**20 // _CHUNK) * _CHUNK / seconds / 1e6


def free_space(setting: str, path: Path, wanted_gib: float) -> Folder:
    """Free space of the file system that a folder is, or will be, on."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        free = shutil.disk_usage(existing).free / 2**30
    except OSError:
        free = None
    return Folder(setting, str(path), free, wanted_gib)


def median_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of several calls after a first one; the device is waited for around each."""
    action()
    times: list[float] = []
    for _ in range(REPEATS):
        with _timed(device, times):
            action()
    return statistics.median(times)


@contextmanager
def _timed(device: torch.device, times: list[float]) -> Iterator[None]:
    synchronize(device)
    started = time.perf_counter()
    yield
    synchronize(device)
    times.append(time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Waits for the work given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
