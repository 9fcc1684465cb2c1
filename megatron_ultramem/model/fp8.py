"""What FP8 asks of a model beyond Megatron's settings: the memory layers' projections, their recomputation, weights
under CUDA graphs, and drawing those that exist in FP8 alone. Transformer Engine is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def fp8_linear(config: TransformerConfig) -> Callable[[int, int], nn.Module]:
    """Makes projections without bias from (input width, output width), whole on every tensor-parallel rank.

    They compute in FP8 within the context that Megatron opens around the layers that do, in bf16 outside of it. Their
    parameter has the name and the shape of nn.Linear's, so that checkpoints fit both.
    """
    from megatron.core.extensions.transformer_engine import TELinear

    class Projection(TELinear):
        """TELinear whose output is the product alone."""

        def forward(self, x: Tensor) -> Tensor:
            product: Tensor = super().forward(x)[0]
            return product

    def make(width_in: int, width_out: int) -> nn.Module:
        return Projection(
            width_in,
            width_out,
            parallel_mode="duplicated",
            config=config,
            init_method=_nothing,  # model/initialize.py draws them
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )

    return make


def fp8_checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Recomputes `function` in the backward pass with the scales of the forward pass."""
    from transformer_engine.pytorch import checkpoint

    recomputed: Tensor = checkpoint(function, *args, use_reentrant=False)
    return recomputed


class StepWeights:
    """The FP8 copies of a model's weights, which Transformer Engine makes in a step's first micro-batch, for a forward
    that is recorded as a CUDA graph: in place, where the step before it left them, unless a flag on the device says no.

    Made before the recording. What evaluation puts in their place afterwards is not what the graph knows, so they are
    kept here.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.set_skip_fp8_weight_update_tensor(False)
        self._skip: Tensor = FP8GlobalStateManager.get_skip_fp8_weight_update_tensor()
        copies = (copy for module in model.modules() for copy in getattr(module, "_fp8_workspaces", {}).values())
        self._kept = [part for copy in copies for part in vars(copy).values() if isinstance(part, Tensor)]

    def make(self, wanted: bool) -> None:
        """Whether the next replay makes them or takes those of the one before."""
        self._skip.fill_(not wanted)


@contextmanager
def plain_parameters(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, parameters that exist in FP8 alone are plain tensors, to be drawn in place; at its end they take over
    what was drawn, and the optimizer's fp32 copies will start from that and not from its rounding to FP8."""
    replaced: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    for module in (module for chunk in chunks for module in chunk.modules()):
        for name, param in module.named_parameters(recurse=False):
            if is_float8tensor(param):
                plain = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=param.device))
                for attribute in ("initializer", "tensor_model_parallel", "partition_dim", "partition_stride"):
                    if hasattr(param, attribute):
                        setattr(plain, attribute, getattr(param, attribute))
                module._parameters[name] = plain
                replaced.append((module, name, param, plain))
    try:
        yield
    finally:
        for module, name, param, plain in replaced:
            module._parameters[name] = param
            with torch.no_grad():
                param.copy_(plain)
            if hasattr(param, "get_high_precision_init_val"):
                param._high_precision_init_val = plain.detach().cpu()  # type: ignore[attr-defined]


def _nothing(_: Tensor) -> None:
    """Leaves a parameter as it was allocated."""
