"""Kernel tests: on a GPU they run compiled, without one under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined, so before any test imports them


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: the largest number), so that an output nobody wrote is seen."""
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def poisoned(*args: object, _original: object = original, **kwargs: object) -> torch.Tensor:
            tensor = _original(*args, **kwargs)  # type: ignore[operator]
            if type(tensor) is not torch.Tensor or tensor.is_meta:
                return tensor  # torch.compile's fake tensors have no memory
            filling = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            with torch.no_grad():
                return tensor.fill_(filling)

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
