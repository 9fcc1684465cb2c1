"""What the Tucker kinds share (UltraMemV2 and UltraMem): the search, by PyTorch or by the kernels, and its losses.

Shapes: T tokens, H hidden size (heads in the five-axis names of `retrieval.py`), M values per token, C cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultramem.memory.auxiliary import AuxiliaryLoss, balance_loss, tucker_penalty
from megatron_ultramem.memory.base import Kept, MemoryLayer
from megatron_ultramem.memory.geometry import coarse_k
from megatron_ultramem.memory.init import retrieval_gain
from megatron_ultramem.memory.kinds import query_ranks
from megatron_ultramem.memory.kinds import tucker_penalty as tucker_penalty_coeff
from megatron_ultramem.memory.lookup import uses_kernels
from megatron_ultramem.memory.retrieval import TuckerRetrieval, refresh_all


class TuckerLayer(MemoryLayer):
    """A memory layer with Tucker retrieval; see `MemoryLayer` for the arguments."""

    retrieval: TuckerRetrieval

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, keys_per_side = self.config, self.pool.keys_per_side
        gain, _ = retrieval_gain(config, keys_per_side)
        self.retrieval = TuckerRetrieval(
            keys_per_side=keys_per_side,
            key_dim=config.key_dim,
            top_m=config.top_m,
            coarse_k=coarse_k(config, keys_per_side),
            num_heads=config.num_heads,
            tucker_rank=config.tucker_rank,
            num_cores=config.num_cores,
            query_per_rank=query_ranks(config) > 1,
            gain=gain,
            norm_eps=self.norm_eps,
            fused=uses_kernels(config.kernels, torch.device(self._device or "cpu")),
            dtype=self._dtype,
            device=self._device,
        )

    def retrieve(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices_TM, scores_TMC = self.retrieval(self.query_proj(x_TH))
        return self._rows(indices_TM), scores_TMC

    def refresh(self) -> None:
        """Recomputes u and t."""
        self.retrieval.refresh()

    def begin_step(self) -> None:
        """Keys are normalised once in a step."""
        self.retrieval.keep_keys(True)

    def end_step(self) -> None:
        self.retrieval.keep_keys(False)

    def reset_parameters(self, seed: int) -> None:
        self.retrieval.u.zero_()  # a new start has no sign to keep
        self.retrieval.t.zero_()
        super().reset_parameters(seed)

    def _forward(self, x_TH: torch.Tensor, kept: Kept, retrieved: Callable[[], None] | None = None) -> torch.Tensor:
        retrieval, query_TQ = self.retrieval, self.query_proj(x_TH)
        if retrieval.fused:
            rows_TM, scores_TMC, kept.fused_keys = retrieval.fused_search(
                query_TQ,
                permutation=self.permutation,
                row_offset=self.row_offset,
                rows=self.row_span,
                known_keys=kept.fused_keys,
            )
        else:
            rows_TM, scores_TMC = self._search(*retrieval.normalised(query_TQ), kept)
        if retrieved is not None:
            retrieved()
        out_TH = self.output(x_TH, rows_TM, scores_TMC)
        if self.training and torch.is_grad_enabled():
            out_TH = self._with_auxiliary_losses(out_TH, query_TQ, kept)
        return out_TH

    def _search(
        self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, kept: Kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T, M] and scores [T, M, C]; leaves the selection in `kept`, or takes it from there."""
        retrieval, known_HSRTM = self.retrieval, None
        if kept.keys_HSTM is None:
            kept.keys_HSTM, known_HSRTM = retrieval.select(query_HSRTD, key_HSRND)
        scores_TMC = retrieval.score_at(query_HSRTD, key_HSRND, kept.keys_HSTM, known_HSRTM)
        return self._rows(retrieval.grid_indices(kept.keys_HSTM)), scores_TMC

    def _with_auxiliary_losses(self, out_TH: torch.Tensor, query_TQ: torch.Tensor, kept: Kept) -> torch.Tensor:
        config, retrieval = self.config, self.retrieval
        if config.balance_loss_coeff > 0:
            loss, kept.counts_HSN = balance_loss(
                *retrieval.normalised(query_TQ),
                retrieval.leading(),
                retrieval.coarse_k,
                tokens_group=self.tokens_group,
                counts_HSN=kept.counts_HSN,
            )
            out_TH = AuxiliaryLoss.apply(out_TH, config.balance_loss_coeff * loss)
        if (coeff := tucker_penalty_coeff(config)) > 0:
            # The same on every rank of the group, whose gradients are summed: it must count once.
            ranks = 1 if self.tokens_group is None else dist.get_world_size(self.tokens_group)
            penalty = tucker_penalty(retrieval.cores, config.tucker_penalty_threshold)
            out_TH = AuxiliaryLoss.apply(out_TH, coeff / ranks * penalty)
        return out_TH


def refresh_layers(layers: Iterable[MemoryLayer]) -> None:
    """`refresh` of many layers with one decomposition; they must be of one model and on one device."""
    refresh_all(layer.retrieval for layer in layers if isinstance(layer, TuckerLayer))
