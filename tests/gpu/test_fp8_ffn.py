"""SwiGLU that writes FP8 gives what SwiGLU in bf16 and a cast give."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from tests.gpu.test_fp8 import needs_fp8

pytestmark = [pytest.mark.gpu, needs_fp8]
E4M3_STEP, E5M2_STEP = 2.0**-3, 2.0**-2  # between neighbours, of the smaller of them


@pytest.mark.parametrize("format", ["HYBRID", "E4M3"])
@pytest.mark.parametrize("tokens, width", [(16, 16), (48, 144), (1040, 6912)])
def test_swiglu_and_its_gradient_are_cast_to_the_nearest(tokens: int, width: int, format: str) -> None:
    from transformer_engine.common.recipe import Float8CurrentScaling, Format

    from megatron_ultramem.model.fp8_ffn import QuantizedSwiGLU

    torch.manual_seed(0)
    gated = 3 * torch.randn(tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    gated.requires_grad_()
    recipe = Float8CurrentScaling(fp8_format=Format[format])

    exact = gated.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = silu(gate) * up
    expected.backward(grad.double())
    assert exact.grad is not None

    found = QuantizedSwiGLU.apply(gated, recipe, True)
    assert found.requires_grad and found.shape == expected.shape
    _near(found, expected.detach(), E4M3_STEP)
    (quantised,) = torch.autograd.grad(found, gated, grad)
    _near(quantised, exact.grad, E4M3_STEP if format == "E4M3" else E5M2_STEP)

    with torch.no_grad():
        without = QuantizedSwiGLU.apply(gated, recipe, False)
    assert without._transpose is None
    torch.testing.assert_close(without.dequantize(), found.dequantize(), rtol=0, atol=0)


def _near(found: torch.Tensor, expected: torch.Tensor, step: float) -> None:
    """Half a step away at most, and a little for bf16; and the transpose holds the same codes."""
    assert torch.equal(found._transpose.view(torch.uint8), found._data.view(torch.uint8).T)
    smallest = expected.abs().max() * 2.0**-14  # codes without leading bit are a fixed distance apart
    allowed = (step / 2 + 2.0**-7) * expected.abs() + smallest
    assert ((found.dequantize().double() - expected).abs() <= allowed).all()
