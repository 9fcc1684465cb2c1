"""Launchers of the hand-written CUDA kernels by token (by_token.cu): lookup and backward. Legend in reference.py.

Both tables, or one of them: without values the result are dots, without pre-values the weights are final.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultramem_kernels.nvrtc import C_TYPES, Kernel, Module, device_supported, multiprocessors, pointer, read_source
from ultramem_kernels.tiles import rows_argument

SHARED_BYTES = 48 * 1024


class Blocks(NamedTuple):
    """How by_token.cu cuts the work. `stages` steps of rows in flight a warp; `blocks` a multiprocessor at least;
    `loads` of 16 bytes that a lane makes of a row at most."""

    warps: int = 4
    stages: int = 3
    blocks: int = 4
    persistent: bool = False  # no more blocks than run at once: they walk over the tokens
    loads: int = 3


FORWARD = Blocks()
BACKWARD = Blocks()
# A lane keeps twice as many sums for a load of codes, and the backward keeps its inputs too.
CODES_FORWARD = Blocks()
CODES_BACKWARD = Blocks(loads=2)


def source(name: str) -> str:
    """Text of a kernel source with what it shares with the others in front."""
    folder = Path(__file__).parent
    shared = {"sort.cu": [], "by_token.cu": ["common.cuh", "row_format.cuh"]}.get(name, ["common.cuh"])
    return read_source(*(folder / part for part in shared), folder / name)


def make_module(name: str, device: torch.device, defines: dict[str, object]) -> Module:
    """A compiled source."""
    return Module(source(name), defines, device)


def lanes_per_row(row_bytes: int, loads: int) -> int:
    """4, 8, 16 or 32 lanes share a row: the fewest that keep it to at most `loads` loads of 16 bytes a lane."""
    for lanes in (4, 8, 16):
        if row_bytes <= loads * 16 * lanes:
            return lanes
    return 32


def supports(
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    indices_TM: torch.Tensor,
    cores: int,
    core_width: int,
    column_start: int,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether these kernels cover the shape: 16-bit tables, or codes beside inputs of a 16-bit `dtype`; columns in
    chunks of 16 bytes that lie in one core."""
    if not device_supported(indices_TM.device) or indices_TM.dtype not in (torch.int32, torch.int64):
        return False
    table = values_NV if values_NV is not None else pre_values_NP
    assert table is not None
    inputs = dtype if table.dtype == torch.uint8 else table.dtype
    if inputs not in (torch.bfloat16, torch.float16) or cores > 8 or indices_TM.numel() >= 2**31:
        return False
    chunk = 16 // table.element_size()
    if values_NV is not None and (not _readable(values_NV) or core_width % chunk or column_start % chunk):
        return False
    return pre_values_NP is None or (pre_values_NP.dtype == table.dtype and _readable(pre_values_NP))


def _readable(table: torch.Tensor) -> bool:
    rows, width = table.shape
    return (
        width * table.element_size() % 16 == 0 and 0 < width <= 1024 and rows < 2**31 - 1 and table.data_ptr() % 16 == 0
    )


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that starts at a multiple of 16 bytes, as vector loads need it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _Plan(NamedTuple):
    """A kernel and the grid it wants."""

    kernel: Kernel
    warps: int
    most_blocks: int

    def grid(self, tokens: int) -> tuple[int, int]:
        return min(-(-tokens // self.warps), self.most_blocks), 1


_plans: dict[tuple[Any, ...], _Plan] = {}

_SIGNATURES = {"lookup_forward": "P" * 9 + "iiqqqiii", "lookup_backward": "P" * 15 + "iiqqqiii"}


def _plan(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dot_dtype: torch.dtype,
    P: int,
    V: int,
    C: int,
    gelu: bool,
    padding: bool,
    atomic: bool,
    codes: bool,
    paired: bool,
    blocks: Blocks,
) -> _Plan:
    key = (
        name, device, dtype, index_dtype, weight_dtype, dot_dtype, P, V, C, gelu, padding, atomic, codes, paired,
        blocks,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        element, chunk = (1, 16) if codes else (2, 8)
        lanes = lanes_per_row(element * max(P, V), blocks.loads)
        chunks = -(-P // (chunk * lanes)) - (-V // (chunk * lanes))
        stages = max(1, min(blocks.stages, SHARED_BYTES // ((chunks * 16 + codes * 8) * 32 * blocks.warps)))
        defines = {
            "FP16": int(dtype == torch.float16), "INDEX": C_TYPES[index_dtype], "WEIGHT": C_TYPES[weight_dtype],
            "DOT": C_TYPES[dot_dtype], "P": P, "V": V, "C": C, "GELU": int(gelu), "PADDING": int(padding), "G": lanes,
            "WARPS": blocks.warps, "STAGES": stages, "BLOCKS": blocks.blocks, "ATOMIC": int(atomic),
            "CODES": int(codes), "PAIRED": int(paired),
        }  # fmt: skip
        most = blocks.blocks * multiprocessors(device) if blocks.persistent else 2**31 - 1
        kernel = make_module("by_token.cu", device, defines).kernel(name, _SIGNATURES[name])
        plan = _plans[key] = _Plan(kernel, blocks.warps, most)
    return plan


def _scale_layout(pre_value_scales_N: torch.Tensor | None, value_scales_N: torch.Tensor | None) -> tuple[bool, int]:
    """(whether a row's two scales are read by one copy, distance of the scales of neighbouring rows)."""
    given = [scales for scales in (pre_value_scales_N, value_scales_N) if scales is not None]
    strides = {scales.stride(0) for scales in given} or {0}
    if len(strides) > 1:
        raise ValueError(f"scales of strides {sorted(strides)}: those of both tables need one stride")
    at = [scales.data_ptr() for scales in given]
    return len(at) == 2 and at[1] == at[0] + 4 and strides == {2} and at[0] % 8 == 0, strides.pop()


def forward(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor | None,
    pre_input_TP: torch.Tensor | None,
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    *,
    activation: str = "none",
    core_width: int = 1,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """Pooled values [T, V]; without values the dots [T, M] fp32. Weights fp32 or of the inputs' dtype, which is
    `dtype` where the tables hold codes, else theirs."""
    T, M = indices_TM.shape
    table: Any = values_NV if values_NV is not None else pre_values_NP
    P = 0 if pre_values_NP is None else pre_values_NP.shape[1]
    V = 0 if values_NV is None else values_NV.shape[1]
    C, weight_dtype = (1, torch.float32) if weights_TMC is None else (weights_TMC.shape[2], weights_TMC.dtype)
    codes, dtype = table.dtype == torch.uint8, dtype or table.dtype
    out = torch.empty((T, V) if V else (T, M), dtype=dtype if V else torch.float32, device=table.device)
    if T == 0 or M == 0:
        return out.zero_()
    paired, scale_stride = _scale_layout(pre_value_scales_N, value_scales_N)
    plan = _plan(
        "lookup_forward", table.device, dtype, indices_TM.dtype, weight_dtype, torch.float32, P, V, C,
        activation == "gelu", padding_index is not None, False, codes, paired,
        blocks or (CODES_FORWARD if codes else FORWARD),
    )  # fmt: skip
    pre_input_TP = None if pre_input_TP is None else aligned(pre_input_TP)
    at = out.data_ptr()
    plan.kernel(
        plan.grid(T), 32 * plan.warps, indices_TM.data_ptr(), pointer(weights_TMC), pointer(pre_input_TP),
        pointer(pre_values_NP), pointer(values_NV), pointer(pre_value_scales_N), pointer(value_scales_N),
        at if V else 0, 0 if V else at, T, M, row_start, rows_argument(table), padding_index or 0, core_width,
        column_start, scale_stride,
    )  # fmt: skip
    return out


def backward_by_token(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor | None,
    pre_input_TP: torch.Tensor | None,
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    grad_out_TV: torch.Tensor | None,
    grad_dots_TM: torch.Tensor | None,
    *,
    atomic: bool,
    grad_values_NV: torch.Tensor | None = None,
    grad_pre_values_NP: torch.Tensor | None = None,
    activation: str = "none",
    core_width: int = 1,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(grad_pre_input, grad_weights, d_dot [T, M], final weights [T, M, C]).

    `atomic`: the tables' gradients given (fp32, contiguous) are added to, and the last two are None. Otherwise those
    two are the factors that `cuda_gradients.add_segments_` needs: fp32, or `grad_dots_TM` and `weights_TMC` themselves
    where one of the tables is absent.
    """
    T, M = indices_TM.shape
    table: Any = values_NV if values_NV is not None else pre_values_NP
    device, codes = table.device, table.dtype == torch.uint8
    P = 0 if pre_values_NP is None else pre_values_NP.shape[1]
    V = 0 if values_NV is None else values_NV.shape[1]
    C, weight_dtype = (1, torch.float32) if weights_TMC is None else (weights_TMC.shape[2], weights_TMC.dtype)
    grad_pre_input = None if pre_input_TP is None else torch.empty_like(pre_input_TP)
    grad_weights = None if weights_TMC is None else torch.empty_like(weights_TMC)
    d_dots, final = (None, None) if atomic else (grad_dots_TM, weights_TMC)
    if P and V and not atomic:
        d_dots = torch.empty(T, M, dtype=torch.float32, device=device)
        final = torch.empty(T, M, C, dtype=torch.float32, device=device)
    if T == 0 or M == 0:
        return (None if grad_pre_input is None else grad_pre_input.zero_()), grad_weights, d_dots, final
    paired, scale_stride = _scale_layout(pre_value_scales_N, value_scales_N)
    plan = _plan(
        "lookup_backward", device, dtype or table.dtype, indices_TM.dtype, weight_dtype,
        torch.float32 if grad_dots_TM is None else grad_dots_TM.dtype, P, V, C, activation == "gelu",
        padding_index is not None, atomic, codes, paired, blocks or (CODES_BACKWARD if codes else BACKWARD),
    )  # fmt: skip
    pre_input_TP = None if pre_input_TP is None else aligned(pre_input_TP)
    grad_out_TV = None if grad_out_TV is None else aligned(grad_out_TV)
    plan.kernel(
        plan.grid(T), 32 * plan.warps, indices_TM.data_ptr(), pointer(weights_TMC), pointer(pre_input_TP),
        pointer(pre_values_NP), pointer(values_NV), pointer(pre_value_scales_N), pointer(value_scales_N),
        pointer(grad_out_TV), pointer(grad_dots_TM), pointer(grad_pre_input), pointer(grad_weights), pointer(d_dots),
        pointer(final), pointer(grad_pre_values_NP), pointer(grad_values_NV), T, M, row_start, rows_argument(table),
        padding_index or 0, core_width, column_start, scale_stride,
    )  # fmt: skip
    return grad_pre_input, grad_weights, d_dots, final
