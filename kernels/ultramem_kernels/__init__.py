"""Kernels of a sparse memory layer (UltraMemV2): retrieval, table lookup with its backward, norm of queries and keys.

Needs torch; uses Triton and NVRTC where they are found. Each operation has its plain-PyTorch reference beside it, which
says what it computes: `lookup.reference`, `retrieval.reference`, `rms_norm.reference`.
"""

from ultramem_kernels.lookup.fp8_rows import quantize_, row_amax
from ultramem_kernels.lookup.ops import lookup, pre_value_dot, weighted_sum
from ultramem_kernels.retrieval.ops import retrieve
from ultramem_kernels.retrieval.search import KeptKeys, search
from ultramem_kernels.rms_norm.ops import rms_norm_swapped
from ultramem_kernels.settings import configure

__all__ = [
    "KeptKeys", "configure", "lookup", "pre_value_dot", "quantize_", "retrieve", "rms_norm_swapped", "row_amax",
    "search", "weighted_sum",
]  # fmt: skip
