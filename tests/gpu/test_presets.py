"""What the presets change computes the same, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.layout_job import assemble, train_job
from tests.distributed.test_layouts import MODELS, STEPS
from tests.distributed.workers import WorkerPool
from tests.gpu.test_fp8 import MEMORY_WIDTHS, needs_fp8
from tests.gpu.test_training import BF16, EVERY_ROW, TE, WIDE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(128, 4, 50304), (33, 1, 1000), (7, 3, 70000)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["flat", "steep"])
def test_transformer_engines_cross_entropy_is_that_of_torch_in_fp32(shape: tuple[int, int, int], spread: float) -> None:
    """Losses, and gradients for another gradient of every token's loss, as loss masks give."""
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    generator = torch.Generator("cuda").manual_seed(0)
    logits_SBV = (spread * torch.randn(shape, device="cuda", generator=generator)).bfloat16().requires_grad_()
    labels_SB = torch.randint(0, shape[2], shape[:2], device="cuda", generator=generator)
    slope_SB = torch.rand(shape[:2], device="cuda", generator=generator) * (labels_SB % 3 > 0)
    found_SB = te_parallel_cross_entropy(logits_SBV, labels_SB, None)
    (grad_SBV,) = torch.autograd.grad(found_SB, [logits_SBV], slope_SB)
    exact_SBV = logits_SBV.detach().float().requires_grad_()
    wanted_SB = F.cross_entropy(exact_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view(shape[:2])
    (wanted_grad_SBV,) = torch.autograd.grad(wanted_SB, [exact_SBV], slope_SB)
    torch.testing.assert_close(found_SB, wanted_SB, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_SBV.float(), wanted_grad_SBV, rtol=1e-2, atol=1e-6)


def test_a_model_trains_as_without_the_preset(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    """Losses, gradients' norms and updated parameters, in bf16; every row for every token, so that no choice turns."""
    settings = [*small_run, *MODELS["block"], *WIDE, *EVERY_ROW, TE, BF16]
    (plain,) = gpus.run(1, train_job, settings, STEPS, True)
    (fast,) = gpus.run(1, train_job, [*settings, "preset=throughput"], STEPS, True)
    np.testing.assert_allclose(fast["losses"], plain["losses"], rtol=3e-3)
    np.testing.assert_allclose(fast["grad_norms"], plain["grad_norms"], rtol=5e-2)
    found, wanted = assemble([fast["params"]]), assemble([plain["params"]])
    for key, numbers in wanted.items():
        assert np.linalg.norm(found[key] - numbers) <= 0.05 * np.linalg.norm(numbers) + 1e-6, key


@needs_fp8
def test_a_model_trains_under_the_preset_for_fp8_like_in_bf16(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    settings = [*small_run, *MODELS["block"], *WIDE, *EVERY_ROW, *MEMORY_WIDTHS, TE, BF16]
    (plain,) = gpus.run(1, train_job, settings, STEPS, True)
    (fp8,) = gpus.run(1, train_job, [*settings, "preset=throughput_fp8"], STEPS, True)
    assert fp8["losses"] != plain["losses"]
    np.testing.assert_allclose(fp8["losses"], plain["losses"], rtol=1e-2)
    np.testing.assert_allclose(fp8["grad_norms"], plain["grad_norms"], rtol=0.2)
    np.testing.assert_allclose(fp8["valid_loss"], plain["valid_loss"], rtol=1e-2)
