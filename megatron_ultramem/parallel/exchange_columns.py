"""The exchange by columns: every rank holds Dv/P and Dp/P columns of all rows of a pool.

Forward: everyone gets everyone's row numbers and its slice of their pre-inputs, and computes partial dot products; they
go to the token's owner, which adds them in fp32, multiplies with its scores, and returns to every rank the weights of
the cores that this rank's columns belong to; the pooled slices come back. Backward: the same steps in reverse. Partial
dots travel rank to rank rather than through a reduce-scatter: the same bytes, and sums in fp32 of bf16 payloads.

Tables without pre-values (D = 0) need no dots: their weights are the scores.

All shapes are static if all ranks have the same number of tokens. (Reference: section "columns" of the memory-parallel
traffic, the cheaper algorithm; bytes in `traffic.columns_bytes`.)

Legend: P ranks, T tokens a rank (after padding to the largest), A = P*T tokens of all ranks, M rows a token, C cores,
K cores of this rank's columns, Dv and D widths.
"""

from __future__ import annotations

import torch

from megatron_ultramem.memory.fp8_table import Table
from megatron_ultramem.memory.lookup import LookupBackend, Saved
from megatron_ultramem.memory.lookup_reference import activate, activation_slope
from megatron_ultramem.memory.numerics import accumulation_dtype
from megatron_ultramem.parallel.channel import Channel, pad
from megatron_ultramem.parallel.traffic import core_range


class ColumnsExchange:
    """`LookupPath` over tables sharded by columns.

    Args:
        channel: to the ranks that share the columns.
        value_dim: Dv of the whole table; P must divide it, and Dp.
        num_cores: C.
        equal_tokens: all ranks always have the same number of tokens. Otherwise the largest number is found out in
            every call, which waits for the device.
        padded: indices may be negative: no row.
    """

    def __init__(
        self,
        channel: Channel,
        backend: LookupBackend,
        activation: str,
        *,
        value_dim: int,
        num_cores: int,
        equal_tokens: bool,
        padded: bool = False,
    ) -> None:
        self.channel, self.backend, self.activation = channel, backend, activation
        self.equal_tokens, self.padded = equal_tokens, padded or not equal_tokens
        self.core_width = value_dim // num_cores
        self.cores = [core_range(rank, channel.ranks, value_dim, num_cores) for rank in range(channel.ranks)]
        low, high = self.cores[channel.rank]
        self.num_own_cores = high - low
        # Of this rank's columns within the slices of its cores.
        self.column_start = channel.rank * (value_dim // channel.ranks) - low * self.core_width

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, Saved]:
        P, tokens, dtype = self.channel.ranks, len(indices_TM), values.dtype
        largest = tokens
        if not self.equal_tokens:
            largest = self.channel.largest(torch.tensor(tokens, device=values.device), "forward")
        index_TM = pad(indices_TM.to(torch.int32), largest, -1)
        index_AM, pre_AD = self.channel.even_all_to_all(
            "forward", [index_TM.expand(P, -1, -1).flatten(0, 1), _slices(pad(pre_input_TD.to(dtype), largest), P)]
        )
        scores_TMC = pad(scores_TMC, largest)
        if pre_values.shape[1] == 0:
            dots_TM, weights_TMC = scores_TMC.new_empty(0), scores_TMC
        else:
            partial_AM = self.backend.dots(index_AM, pre_AD, pre_values, self.padded).to(dtype)
            (dots_AM,) = self.channel.even_all_to_all("forward", [partial_AM])
            dots_TM = dots_AM.view(P, *index_TM.shape).sum(0, dtype=accumulation_dtype(dtype))
            weights_TMC = activate(dots_TM, self.activation).unsqueeze(-1) * scores_TMC
        weights_AMK = self._send_cores("forward", weights_TMC.to(dtype))
        pooled_AV = self.backend.weighted_sum(
            index_AM, weights_AMK, values, self.column_start, self.core_width, self.padded
        )
        (pooled_AV,) = self.channel.even_all_to_all("forward", [pooled_AV])
        pooled_TV = _joined(pooled_AV, P)[:tokens].to(pre_input_TD.dtype)
        return pooled_TV, Saved((index_AM, pre_AD, weights_AMK, dots_TM, scores_TMC), (tokens, pre_input_TD.dtype))

    def backward(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        values: Table,
        pre_values: Table,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index_AM, pre_AD, weights_AMK, dots_TM, scores_TMC = saved.tensors
        tokens, pre_input_dtype = saved.plan
        P, dtype, largest = self.channel.ranks, values.dtype, len(scores_TMC)
        (grad_AV,) = self.channel.even_all_to_all("backward", [_slices(pad(grad_pooled_TV.to(dtype), largest), P)])
        at, both = (self.column_start, self.core_width), values_grad is not None and pre_values_grad is not None
        sorted_rows = self.backend.sort_rows(index_AM, weights_AMK, values, *at, self.padded) if both else None
        grad_weights_AMK = self.backend.weighted_sum_backward(
            grad_AV, index_AM, weights_AMK, values, *at, values_grad, self.padded, sorted_rows
        )
        grad_weights_TMC = self._return_cores("backward", grad_weights_AMK.to(dtype), scores_TMC)
        if pre_values.shape[1] == 0:
            no_grad_TD = torch.empty(tokens, 0, dtype=pre_input_dtype, device=values.device)
            return grad_weights_TMC[:tokens].to(scores_TMC.dtype), no_grad_TD
        grad_scores_TMC = activate(dots_TM, self.activation).unsqueeze(-1) * grad_weights_TMC
        grad_dots_TM = (scores_TMC * grad_weights_TMC).sum(-1) * activation_slope(dots_TM, self.activation)
        (grad_dots_AM,) = self.channel.even_all_to_all(
            "backward", [grad_dots_TM.to(dtype).expand(P, -1, -1).flatten(0, 1)]
        )
        grad_pre_AD = self.backend.dots_backward(
            grad_dots_AM, index_AM, pre_AD, pre_values, pre_values_grad, self.padded, sorted_rows
        )
        (grad_pre_AD,) = self.channel.even_all_to_all("backward", [grad_pre_AD])
        return grad_scores_TMC[:tokens].to(scores_TMC.dtype), _joined(grad_pre_AD, P)[:tokens].to(pre_input_dtype)

    def _send_cores(self, direction: str, weights_TMC: torch.Tensor) -> torch.Tensor:
        """To every rank the weights of its cores: [A, M, K]."""
        T, M, _ = weights_TMC.shape
        parts = [weights_TMC[:, :, low:high].reshape(-1) for low, high in self.cores]
        receive = [T * M * self.num_own_cores] * self.channel.ranks
        (came,) = self.channel.all_to_all(direction, [torch.cat(parts)], [[len(part) for part in parts]], [receive])
        return came.view(self.channel.ranks * T, M, self.num_own_cores)

    def _return_cores(self, direction: str, part_AMK: torch.Tensor, like_TMC: torch.Tensor) -> torch.Tensor:
        """The sums over the ranks [T, M, C] of what each computed for the cores of its columns."""
        T, M, _ = like_TMC.shape
        send = [T * M * self.num_own_cores] * self.channel.ranks
        receive = [T * M * (high - low) for low, high in self.cores]
        (came,) = self.channel.all_to_all(direction, [part_AMK.reshape(-1)], [send], [receive])
        total_TMC = torch.zeros(like_TMC.shape, dtype=accumulation_dtype(part_AMK.dtype), device=part_AMK.device)
        for (low, high), part in zip(self.cores, came.split(receive), strict=True):
            total_TMC[:, :, low:high] += part.view(T, M, high - low)
        return total_TMC


def _slices(x_TX: torch.Tensor, ranks: int) -> torch.Tensor:
    """[T, X] -> [P*T, X/P]: the columns of rank 0 of all tokens, then those of rank 1, ..."""
    return x_TX.view(len(x_TX), ranks, x_TX.shape[1] // ranks).transpose(0, 1).flatten(0, 1)


def _joined(x_AX: torch.Tensor, ranks: int) -> torch.Tensor:
    """Inverse of `_slices`."""
    return x_AX.view(ranks, len(x_AX) // ranks, x_AX.shape[1]).transpose(0, 1).flatten(1)
