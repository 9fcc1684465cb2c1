"""The UltraMemV2 layer (arXiv 2508.18756): TDQKR retrieval, PEER-style values, one shared value projection.

    o = W_v^T ( V^T ( (P x') * s ) ),   x' = W_p x

Shapes: T tokens, H hidden size (heads in the five-axis names of `retrieval.py`), M values per token, C cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ultramem.memory.auxiliary import AuxiliaryLoss, balance_loss, tucker_penalty
from megatron_ultramem.memory.geometry import Pool, coarse_k
from megatron_ultramem.memory.init import Constant, Normal, fill_, linear_std, retrieval_gain
from megatron_ultramem.memory.lookup import uses_kernels
from megatron_ultramem.memory.retrieval import TuckerRetrieval
from megatron_ultramem.memory.shuffle import checksum, physical_rows, shuffle_permutation
from megatron_ultramem.memory.tables import ValuePool

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import MemoryConfig


@dataclass
class _Kept:
    """What a recomputation takes over from the first forward instead of searching again."""

    keys_HSTM: torch.Tensor | None = None
    fused_keys: tuple[torch.Tensor, ...] | None = None  # what the kernels left, of every head
    counts_HSN: torch.Tensor | None = None


class UltraMemV2(nn.Module):
    """One memory layer. Its value pool is owned elsewhere: no submodule, so that it is saved and moved once.

    Every parameter carries the `initializer` with which it is to be drawn; construction leaves them uninitialised.
    """

    permutation: torch.Tensor | None

    def __init__(
        self,
        config: MemoryConfig,
        *,
        hidden_size: int,
        layer: int,
        pool: Pool,
        table: ValuePool,
        norm_eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        linear: Callable[[int, int], nn.Module] | None = None,
        tokens_group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            layer: global number of the layer, from 0; it must be one of the pool's.
            table: the value pool to look up in.
            norm_eps: of the query and key norms.
            linear: makes a projection without bias from (input width, output width); default nn.Linear.
            tokens_group: ranks that hold other tokens of the same replica (sequence parallelism), for the balance
                loss.
        """
        super().__init__()
        self.config, self.layer, self.pool, self.tokens_group = config, layer, pool, tokens_group
        self._table = (table,)  # in a tuple: nn.Module would register it
        self.row_offset = pool.row_offset(layer)
        gain, _ = retrieval_gain(config, pool.keys_per_side)
        self.retrieval = TuckerRetrieval(
            keys_per_side=pool.keys_per_side,
            key_dim=config.key_dim,
            top_m=config.top_m,
            coarse_k=coarse_k(config, pool.keys_per_side),
            num_heads=config.num_heads,
            tucker_rank=config.tucker_rank,
            num_cores=config.num_cores,
            query_per_rank=config.query_per_rank,
            gain=gain,
            norm_eps=norm_eps,
            fused=uses_kernels(config.kernels, torch.device(device or "cpu")),
            dtype=dtype,
            device=device,
        )

        def plain_linear(width_in: int, width_out: int) -> nn.Module:
            options = {"bias": False, "dtype": dtype, "device": device or "cpu"}
            return nn.utils.skip_init(nn.Linear, width_in, width_out, **options)

        def projection(width_in: int, width_out: int, released_std: float) -> nn.Module:
            made = (linear or plain_linear)(width_in, width_out)
            std = released_std if config.init == "released" else linear_std(hidden_size)
            for param in made.parameters():
                param.initializer = Normal(std) if param.dim() > 1 else Constant(0.0)  # type: ignore[attr-defined]
            return made

        self.query_proj = projection(hidden_size, self.retrieval.query_width, config.key_dim**-0.5)
        self.pre_value_proj = projection(hidden_size, config.pre_value_dim, hidden_size**-0.5)
        self.value_proj = projection(config.value_dim, hidden_size, config.value_dim**-0.5)
        permutation = None
        if config.shuffle:
            permutation = shuffle_permutation(
                pool.virtual_rows, seed=config.shuffle_seed, pool=pool.index, layer=layer, device=device
            )
        self.register_buffer("permutation", permutation, persistent=config.keep_shuffle)

    @property
    def table(self) -> ValuePool:
        return self._table[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised FFN input [T, h] or [S, B, h] -> what is added to the residual stream, of the same shape."""
        x_TH, kept = x.reshape(-1, x.shape[-1]), _Kept()
        if self.config.recompute and torch.is_grad_enabled():
            out_TH = checkpoint(self._forward, x_TH, kept, use_reentrant=False, preserve_rng_state=False)
        else:
            out_TH = self._forward(x_TH, kept)
        return out_TH.view(x.shape)

    def retrieve(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Physical rows [T, M] (int64) and scores [T, M, C] of tokens."""
        indices_TM, scores_TMC = self.retrieval(self.query_proj(x_TH))
        return self._physical(indices_TM), scores_TMC

    def refresh(self) -> None:
        """Recomputes what follows from the parameters (u and t); once per optimizer step."""
        self.retrieval.refresh()

    def reset_parameters(self, seed: int) -> None:
        """Draws every parameter of this layer (not the pool's) from the seed and the layer's number."""
        for name, param in self.named_parameters():
            fill_(param, param.initializer, seed, f"layers.{self.layer}.memory.{name}")  # type: ignore[attr-defined]
        self.retrieval.u.zero_()  # a new start has no sign to keep
        self.retrieval.t.zero_()
        self.refresh()

    def shuffle_checksum(self) -> str:
        """Identifies a permutation that follows from the seed, in a checkpoint; '' where there is none to compare."""
        return "" if self.permutation is None or self.config.keep_shuffle else checksum(self.permutation)

    def _forward(self, x_TH: torch.Tensor, kept: _Kept) -> torch.Tensor:
        retrieval = self.retrieval
        query_HSRTD, key_HSRND = retrieval.normalised(self.query_proj(x_TH))
        search = self._fused_search if retrieval.fused else self._search
        rows_TM, scores_TMC = search(query_HSRTD, key_HSRND, kept)
        out_TH = self.value_proj(self.table.lookup(rows_TM, scores_TMC, self.pre_value_proj(x_TH)))
        if self.training and torch.is_grad_enabled():
            out_TH = self._with_auxiliary_losses(out_TH, query_HSRTD, key_HSRND, kept)
        return out_TH

    def _search(
        self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, kept: _Kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Physical rows [T, M] and scores [T, M, C]; leaves the selection in `kept`, or takes it from there."""
        retrieval, known_HSRTM = self.retrieval, None
        if kept.keys_HSTM is None:
            kept.keys_HSTM, known_HSRTM = retrieval.select(query_HSRTD, key_HSRND)
        scores_TMC = retrieval.score_at(query_HSRTD, key_HSRND, kept.keys_HSTM, known_HSRTM)
        return self._physical(retrieval.grid_indices(kept.keys_HSTM)), scores_TMC

    def _fused_search(
        self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, kept: _Kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_search` by the kernels."""
        from megatron_ultramem.memory.fused import fused_search

        retrieval = self.retrieval
        rows_TM, scores_TMC, kept.fused_keys = fused_search(
            query_HSRTD,
            key_HSRND,
            retrieval.leading(),
            retrieval.cores,
            coarse_k=retrieval.coarse_k,
            top_m=retrieval.top_m,
            permutation=self.permutation,
            row_offset=self.row_offset,
            rows=self.pool.rows,
            known_keys=kept.fused_keys,
        )
        return rows_TM, scores_TMC

    def _physical(self, indices_TM: torch.Tensor) -> torch.Tensor:
        return physical_rows(indices_TM, self.permutation, self.row_offset, self.pool.rows)

    def _with_auxiliary_losses(
        self, out_TH: torch.Tensor, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, kept: _Kept
    ) -> torch.Tensor:
        config, retrieval = self.config, self.retrieval
        if config.balance_loss_coeff > 0:
            loss, kept.counts_HSN = balance_loss(
                query_HSRTD,
                key_HSRND,
                retrieval.leading(),
                retrieval.coarse_k,
                tokens_group=self.tokens_group,
                counts_HSN=kept.counts_HSN,
            )
            out_TH = AuxiliaryLoss.apply(out_TH, config.balance_loss_coeff * loss)
        if config.tucker_penalty_coeff > 0:
            # The same on every rank of the group, whose gradients are summed: it must count once.
            ranks = 1 if self.tokens_group is None else dist.get_world_size(self.tokens_group)
            penalty = tucker_penalty(retrieval.cores, config.tucker_penalty_threshold)
            out_TH = AuxiliaryLoss.apply(out_TH, config.tucker_penalty_coeff / ranks * penalty)
        return out_TH
