"""RMSNorms that Megatron does not have."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.nn import functional as F


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor of a Megatron norm, for the `local` back end.

    Megatron's own wrapper refuses sequence parallelism, which asks of a norm only that its weight be marked, so that
    the gradients of the ranks' shares of the sequence are summed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class KernelRMSNorm(RMSNorm):
    """The same by the kernels of `ultramem_kernels`: one launch forward, two backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] of any strides, to the same shape."""
        from ultramem_kernels.rms_norm.ops import rms_norm_swapped

        width = x.shape[-1]
        normed = rms_norm_swapped(x.reshape(1, -1, 1, width), self.weight, self.eps or torch.finfo(x.dtype).eps)
        return normed.view(x.shape)


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads at once (OLMoE), where Megatron normalises each head by itself.

    Every tensor-parallel rank holds the whole gain [heads * head width] and uses the part of its heads; Megatron sums
    the gradients of `q_layernorm` and `k_layernorm` over those ranks.
    """

    def __init__(self, config: Any, hidden_size: int, heads: int, eps: float = 1e-5, **_: Any) -> None:
        """
        Args:
            hidden_size: width of one head; `heads`: of the whole layer, over all ranks.
        """
        super().__init__()
        self.eps, self.width = eps, heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.width, dtype=config.params_dtype))

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """[s, b, heads of this rank, head width], to the same."""
        x = x_SBND.flatten(2)
        if x.shape[-1] == self.width:
            return F.rms_norm(x, (self.width,), self.weight, self.eps).view(x_SBND.shape)
        rank = parallel_state.get_tensor_model_parallel_rank()
        gain = self.weight[rank * x.shape[-1] : (rank + 1) * x.shape[-1]]
        squares = x.float().square().sum(-1, keepdim=True)
        # Summed over the ranks forward (the first call) and backward (the second).
        squares = tensor_parallel.reduce_from_tensor_model_parallel_region(squares)
        squares = tensor_parallel.copy_to_tensor_model_parallel_region(squares)
        normed = x.float() * torch.rsqrt(squares / self.width + self.eps) * gain.float()
        return normed.to(x.dtype).view(x_SBND.shape)
