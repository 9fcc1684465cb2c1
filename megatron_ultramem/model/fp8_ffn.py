"""An FFN whose SwiGLU hands FP8 to the matrix products around it, with scales of the tensors themselves.

A scale needs the largest number of a tensor before the first is cast. Left to the linears, that is one more read of
everything between the two products: of 2 bytes for each of the FFN's channels and a token on the way forward, and of 4
on the way back. Transformer Engine's kernels of SwiGLU find the largest number as they write.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class Fp8FFN(MLP):
    """Megatron's dense FFN (SwiGLU, no biases), whose parameters it has, for the recipe `tensorwise`.

    Outside of the FP8 context that Megatron opens around a layer it computes as Megatron's. Quantised tensors are
    [tokens, channels] here: with a third axis Transformer Engine would transpose them anew for the backward pass.
    """

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (the rank's share of s under sequence parallelism) to ([s, b, h], None)."""
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        if not FP8GlobalStateManager.is_fp8_enabled():
            result: tuple[Tensor, Tensor | None] = super().forward(hidden_states, per_token_scale, **kwargs)
            return result
        gated_TF, _ = self.linear_fc1(hidden_states.flatten(0, 1))
        hidden_TF = QuantizedSwiGLU.apply(gated_TF, FP8GlobalStateManager.get_fp8_recipe(), torch.is_grad_enabled())
        out_TH, bias = self.linear_fc2(hidden_TF)
        if hidden_TF.requires_grad:
            hidden_TF.update_usage(rowwise_usage=False)  # the backward pass reads its transpose alone
        return out_TH.view(hidden_states.shape), bias


class QuantizedSwiGLU(torch.autograd.Function):
    """silu(gate) * up of [T, 2F] as an FP8 tensor [T, F]; its gradient as an FP8 tensor [T, 2F]."""

    @staticmethod
    def forward(ctx: Any, gated_TF: Tensor, recipe: Any, trains: bool) -> Tensor:
        import transformer_engine_torch as tex

        ctx.recipe = recipe
        ctx.save_for_backward(gated_TF)
        hidden_TF: Tensor = tex.swiglu(gated_TF, _quantizer(recipe, forward=True, transposed=trains))
        return hidden_TF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None, None]:
        import transformer_engine_torch as tex

        (gated_TF,) = ctx.saved_tensors
        return tex.dswiglu(grad_TF.contiguous(), gated_TF, _quantizer(ctx.recipe, forward=False)), None, None


def _quantizer(recipe: Any, *, forward: bool, transposed: bool = True) -> Any:
    """As the linears make theirs. `transposed`: both layouts, of which a product reads one."""
    from transformer_engine.pytorch.quantization import get_fp8_te_dtype
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    settings = recipe.fp8_quant_fwd_inp if forward else recipe.fp8_quant_bwd_grad
    return Float8CurrentScalingQuantizer(
        get_fp8_te_dtype(recipe, fprop_tensor=forward),
        torch.device("cuda"),
        rowwise=True,
        columnwise=transposed,
        force_pow_2_scales=settings.power_2_scale,
        amax_epsilon=settings.amax_epsilon,
    )
