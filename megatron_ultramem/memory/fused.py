"""The kernels of `ultramem_kernels` behind the interfaces of this package.

The kernels choose between Triton, CUDA and their own PyTorch references by device and shape; on a CPU they compute by
those references.

Shapes: as in `lookup.py` and `retrieval.py`; K keys selected per side and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ultramem_kernels import KeptKeys, quantize_, rms_norm_swapped, search
from ultramem_kernels.lookup.ops import run_lookup_backward, run_lookup_forward, sort_for_backwards

from megatron_ultramem.memory.fp8_table import Fp8Table, Table
from megatron_ultramem.memory.lookup_reference import SortedRows

PADDING = -1  # the index that means no row


class FusedLookup:
    """The `LookupBackend` of the kernels; see there for what the methods compute."""

    def quantize_(self, copy: Fp8Table, table: torch.Tensor, amax_N: torch.Tensor) -> None:
        quantize_(table, copy.codes, copy.scales, amax_N)

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        padded: bool = False,
    ) -> torch.Tensor:
        pooled_TV = run_lookup_forward(
            indices_TM.contiguous(),
            scores_TMC.contiguous(),
            pre_input_TD.to(values.dtype).contiguous(),
            _numbers(values),
            _numbers(pre_values),
            activation=activation,
            core_width=values.shape[1] // scores_TMC.shape[2],
            column_start=0,
            row_start=0,
            padding_index=PADDING if padded else None,
            backend=None,
            **_scales(values, pre_values),
        )
        return pooled_TV.to(pre_input_TD.dtype)

    def backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_pre_input, grad_scores = run_lookup_backward(
            indices_TM.contiguous(),
            scores_TMC.contiguous(),
            pre_input_TD.to(values.dtype).contiguous(),
            _numbers(values),
            _numbers(pre_values),
            grad=grad_pooled_TV.to(values.dtype).contiguous(),
            grad_values=values_grad,
            grad_pre_values=pre_values_grad,
            activation=activation,
            core_width=values.shape[1] // scores_TMC.shape[2],
            column_start=0,
            row_start=0,
            padding_index=PADDING if padded else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            backend=None,
            **_scales(values, pre_values),
        )
        return grad_scores, grad_pre_input.to(pre_input_TD.dtype)

    def dots(
        self, indices_TM: torch.Tensor, pre_input_TD: torch.Tensor, pre_values: Table, padded: bool = False
    ) -> torch.Tensor:
        pre_input_TD = pre_input_TD.to(pre_values.dtype).contiguous()
        padding = PADDING if padded else None
        return run_lookup_forward(
            indices_TM.contiguous(),
            None,
            pre_input_TD,
            None,
            _numbers(pre_values),
            activation="none",
            core_width=1,
            column_start=0,
            row_start=0,
            padding_index=padding,
            backend=None,
            **_scales(None, pre_values),
        )

    def sort_rows(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> SortedRows | None:
        return sort_for_backwards(
            indices_TM.contiguous(),
            weights_TMC,
            _numbers(values),
            core_width,
            column_start,
            padding_index=PADDING if padded else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dtype=_scales(values, None)["dtype"],
        )

    def dots_backward(
        self,
        grad_dots_TM: torch.Tensor,
        indices_TM: torch.Tensor,
        pre_input_TD: torch.Tensor,
        pre_values: Table,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        grad_pre_input, _ = run_lookup_backward(
            indices_TM.contiguous(),
            None,
            pre_input_TD.to(pre_values.dtype).contiguous(),
            None,
            _numbers(pre_values),
            grad=grad_dots_TM.contiguous(),
            grad_values=None,
            grad_pre_values=pre_values_grad,
            activation="none",
            core_width=1,
            column_start=0,
            row_start=0,
            padding_index=PADDING if padded else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            backend=None,
            **_scales(None, pre_values),
            **_sorted(sorted_rows),
        )
        return grad_pre_input.to(pre_input_TD.dtype)

    def weighted_sum(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> torch.Tensor:
        return run_lookup_forward(
            indices_TM.contiguous(),
            weights_TMC.contiguous(),
            None,
            _numbers(values),
            None,
            activation="none",
            core_width=core_width,
            column_start=column_start,
            row_start=0,
            padding_index=PADDING if padded else None,
            backend=None,
            **_scales(values, None),
        )

    def weighted_sum_backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        _, grad_weights = run_lookup_backward(
            indices_TM.contiguous(),
            weights_TMC.contiguous(),
            None,
            _numbers(values),
            None,
            grad=grad_pooled_TV.to(values.dtype).contiguous(),
            grad_values=values_grad,
            grad_pre_values=None,
            activation="none",
            core_width=core_width,
            column_start=column_start,
            row_start=0,
            padding_index=PADDING if padded else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            backend=None,
            **_scales(values, None),
            **_sorted(sorted_rows),
        )
        return grad_weights


def _numbers(table: Table) -> torch.Tensor:
    """What the kernels take for a table: itself, or its codes."""
    return table.codes if isinstance(table, Fp8Table) else table


def _scales(values: Table | None, pre_values: Table | None) -> dict[str, Any]:
    """What they take beside the codes."""
    first = values if values is not None else pre_values
    return {
        "value_scales": values.scales if isinstance(values, Fp8Table) else None,
        "pre_value_scales": pre_values.scales if isinstance(pre_values, Fp8Table) else None,
        "dtype": first.dtype if isinstance(first, Fp8Table) else None,
    }


def _sorted(rows: SortedRows | None) -> dict[str, Any]:
    return {} if rows is None else {"sorted_rows": rows[0], "sorted_order": rows[1]}


def fused_norms(
    query_TQ: torch.Tensor,
    keys_HSNRD: torch.Tensor,
    query_gain: torch.Tensor,
    key_gain: torch.Tensor,
    ranks: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS-normalised queries [H, S, ranks, T, D] and keys [H, S, R, N, D]; `ranks`: queries per head and side."""
    H, S, N, R, D = keys_HSNRD.shape
    query_XTD = rms_norm_swapped(query_TQ.view(1, query_TQ.shape[0], H * S * ranks, D), query_gain, eps)
    key_XRND = rms_norm_swapped(keys_HSNRD.view(H * S, N, R, D), key_gain, eps)
    return query_XTD.view(H, S, ranks, query_TQ.shape[0], D), key_XRND.view(H, S, R, N, D)


def fused_search(
    query_TQ: torch.Tensor,
    keys_HSNRD: torch.Tensor,
    query_gain: torch.Tensor,
    key_gain: torch.Tensor,
    leading_HSR: torch.Tensor,
    cores_HCRR: torch.Tensor,
    *,
    eps: float,
    coarse_k: int,
    top_m: int,
    permutation: torch.Tensor | None,
    row_offset: int,
    rows: int,
    kept_keys: Sequence[KeptKeys] | None,
    known_keys: tuple[torch.Tensor, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Of queries and keys before their norms: physical rows [T, H*M], scores [T, H*M, C] (with gradients) and the
    selected keys of every head.

    `kept_keys`: of every head, where normalised keys are kept between micro-batches. Giving the selected keys back as
    `known_keys` skips the selection (recomputation).
    """
    heads, D = keys_HSNRD.shape[0], keys_HSNRD.shape[4]
    query_THQD = query_TQ.view(query_TQ.shape[0], heads, -1, D)
    found = [
        search(
            query_THQD[:, head],
            keys_HSNRD[head],
            query_gain,
            key_gain,
            leading_HSR[head],
            cores_HCRR[head],
            eps=eps,
            coarse_k=coarse_k,
            top_m=top_m,
            permutation=permutation,
            offset=row_offset,
            rows=rows,
            kept_keys=None if kept_keys is None else kept_keys[head],
            known_keys_STM=None if known_keys is None else known_keys[head],
        )
        for head in range(heads)
    ]
    heads_rows, heads_scores, heads_keys = zip(*found, strict=True)
    if heads == 1:
        return heads_rows[0], heads_scores[0], heads_keys
    return torch.cat(heads_rows, dim=1), torch.cat(heads_scores, dim=1), heads_keys
