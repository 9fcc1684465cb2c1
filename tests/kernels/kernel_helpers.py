"""What several kernel tests share."""

from __future__ import annotations

import pytest
import torch

# Triton's kernels run everywhere (without a GPU in the interpreter), the hand-written ones on a GPU only.
FAST_BACKENDS = [
    "triton",
    pytest.param("triton", marks=pytest.mark.gpu, id="triton_compiled"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """||got - wanted|| / ||wanted||; NaN if either holds NaN."""
    difference = (got.double() - wanted.double()).norm()
    return (difference / wanted.double().norm().clamp_min(1e-30)).item()
