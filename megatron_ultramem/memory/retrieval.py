"""Tucker-decomposed query-key retrieval (TDQKR, arXiv 2508.18756 section 3.1, 2411.12364).

Each side (0 rows, 1 columns) scores its n keys once per Tucker rank. Selection, without gradient:
  coarse pass: top-k keys of each side by u . S_row[i] and t . S_col[j], u and t being the leading singular vectors
               of the summed cores;
  exact pass:  top-m of the k x k pairs by S_row[i] (sum of cores) S_col[j].
Then the score of core c, S_row[i] C_c S_col[j], is computed at the selected pairs alone, with gradients.

Shapes: T tokens, H heads, S=2 sides, R Tucker ranks, N keys per side, D key width, K coarse candidates, M values per
head (per token in `indices_TM` and `scores_TMC`, where M = heads * top_m), C cores, X = H*S*R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from megatron_ultramem.memory.fp32_buffers import Fp32Buffers
from megatron_ultramem.memory.init import Constant, Normal, Uniform
from megatron_ultramem.memory.numerics import accumulation_dtype, bmm_accumulated, tokens_per_chunk

if TYPE_CHECKING:
    from ultramem_kernels import KeptKeys


def side_scores(query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor) -> torch.Tensor:
    """S [H, S, R, T, N] in the accumulation dtype: every key's score, per side and Tucker rank. No gradient."""
    H, S, R, T, D = query_HSRTD.shape
    N = key_HSRND.shape[3]
    scores_XTN = bmm_accumulated(query_HSRTD.reshape(-1, T, D), key_HSRND.reshape(-1, N, D).mT)
    return scores_XTN.view(H, S, R, T, N)


def coarse_pass(side_HSRTN: torch.Tensor, leading_HSR: torch.Tensor, k: int) -> torch.Tensor:
    """Key numbers [H, S, T, K] with the largest scores projected on the leading singular vectors (u, t)."""
    coarse_HSTN = torch.einsum("hsrtn,hsr->hstn", side_HSRTN, leading_HSR.to(side_HSRTN.dtype))
    return coarse_HSTN.topk(k, dim=-1, sorted=False).indices


def exact_pass(
    side_HSRTN: torch.Tensor, coarse_HSTK: torch.Tensor, core_HRR: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best m of the K*K pairs by S_row[i] core S_col[j], best first.

    Returns the keys of both sides [H, S, T, M] (int64) and their side scores [H, S, R, T, M].
    """
    kept_HSRTK = gather_keys(side_HSRTN, coarse_HSTK)
    row_HRTK, column_HRTK = kept_HSRTK.unbind(1)
    weighted_HRTK = torch.einsum("hatk,hab->hbtk", row_HRTK, core_HRR.to(side_HSRTN.dtype))
    pairs_HTKK = torch.einsum("hrtk,hrtl->htkl", weighted_HRTK, column_HRTK)
    best_HTM = pairs_HTKK.flatten(2).topk(m, dim=-1, sorted=True).indices
    k = coarse_HSTK.shape[-1]
    place_HSTM = torch.stack((best_HTM // k, best_HTM % k), dim=1)
    return coarse_HSTK.gather(-1, place_HSTM), gather_keys(kept_HSRTK, place_HSTM)


@torch.no_grad()
def select(
    query_HSRTD: torch.Tensor,
    key_HSRND: torch.Tensor,
    core_HRR: torch.Tensor,
    leading_HSR: torch.Tensor,
    k: int,
    m: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse and exact pass over chunks of tokens: keys [H, S, T, M] (int64) and their side scores [H, S, R, T, M]."""
    H, S, R, T, _ = query_HSRTD.shape
    keys_HSTM = torch.empty(H, S, T, m, dtype=torch.int64, device=query_HSRTD.device)
    dtype = accumulation_dtype(query_HSRTD.dtype)
    at_keys_HSRTM = torch.empty(H, S, R, T, m, dtype=dtype, device=query_HSRTD.device)
    for low, high in token_chunks(query_HSRTD, key_HSRND, extra=H * k * k):
        chunk_HSRTN = side_scores(query_HSRTD[:, :, :, low:high], key_HSRND)
        coarse_HSTK = coarse_pass(chunk_HSRTN, leading_HSR, k)
        keys_HSTM[:, :, low:high], at_keys_HSRTM[:, :, :, low:high] = exact_pass(chunk_HSRTN, coarse_HSTK, core_HRR, m)
    return keys_HSTM, at_keys_HSRTM


class _SideScoresAt(torch.autograd.Function):
    """Side scores at given keys. Saves queries, keys and key numbers, and never a full [T, N] of all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HSRTD: torch.Tensor,
        key_HSRND: torch.Tensor,
        keys_HSTM: torch.Tensor,
        known_HSRTM: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query_HSRTD, key_HSRND, keys_HSTM)
        if known_HSRTM is not None:
            return known_HSRTM.clone()
        H, S, R, T, _ = query_HSRTD.shape
        dtype = accumulation_dtype(query_HSRTD.dtype)
        out_HSRTM = torch.empty(H, S, R, T, keys_HSTM.shape[-1], dtype=dtype, device=query_HSRTD.device)
        for low, high in token_chunks(query_HSRTD, key_HSRND):
            chunk_HSRTN = side_scores(query_HSRTD[:, :, :, low:high], key_HSRND)
            out_HSRTM[:, :, :, low:high] = gather_keys(chunk_HSRTN, keys_HSTM[:, :, low:high])
        return out_HSRTM

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_HSRTM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        query_HSRTD, key_HSRND, keys_HSTM = ctx.saved_tensors
        H, S, R, T, D = query_HSRTD.shape
        N = key_HSRND.shape[3]
        key_XND = key_HSRND.reshape(-1, N, D)
        grad_query_XTD = torch.empty(H * S * R, T, D, dtype=query_HSRTD.dtype, device=query_HSRTD.device)
        grad_key_XND = torch.zeros(H * S * R, N, D, dtype=grad_HSRTM.dtype, device=query_HSRTD.device)
        for low, high in token_chunks(query_HSRTD, key_HSRND):
            grad_chunk = grad_HSRTM[:, :, :, low:high]
            at = keys_HSTM[:, :, low:high].unsqueeze(2).expand_as(grad_chunk)
            dense = torch.zeros(H * S * R * (high - low), N, dtype=grad_HSRTM.dtype, device=grad_HSRTM.device)
            # Flat: with several dimensions the deterministic version copies from the host, which no graph can record.
            starts = torch.arange(0, dense.numel(), N, device=dense.device).unsqueeze(-1)
            dense.view(-1).scatter_add_(0, (at.reshape(len(dense), -1) + starts).view(-1), grad_chunk.reshape(-1))
            dense_XTN = dense.view(-1, high - low, N).to(query_HSRTD.dtype)
            grad_query_XTD[:, low:high] = bmm_accumulated(dense_XTN, key_XND)
            query_XTD = query_HSRTD[:, :, :, low:high].reshape(-1, high - low, D)
            grad_key_XND += bmm_accumulated(dense_XTN.mT, query_XTD)
        return grad_query_XTD.view_as(query_HSRTD), grad_key_XND.to(key_HSRND.dtype).view_as(key_HSRND), None, None


def side_scores_at(
    query_HSRTD: torch.Tensor,
    key_HSRND: torch.Tensor,
    keys_HSTM: torch.Tensor,
    known_HSRTM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Differentiable side scores [H, S, R, T, M] at the keys `keys_HSTM`; `known_HSRTM` are their values if at hand."""
    return _SideScoresAt.apply(query_HSRTD, key_HSRND, keys_HSTM, known_HSRTM)


def core_scores(side_HSRTM: torch.Tensor, cores_HCRR: torch.Tensor) -> torch.Tensor:
    """Scores [T, H*M, C] of the pairs whose side scores are given: S_row C_c S_col. Differentiable."""
    row_HRTM, column_HRTM = side_HSRTM.unbind(1)
    # Two steps: left to itself, einsum would form an [R, R] product of rows and columns for every selected pair.
    weighted_CHBTM = torch.einsum("hatm,hcab->chbtm", row_HRTM, cores_HCRR.to(side_HSRTM.dtype))
    return torch.einsum("chbtm,hbtm->thmc", weighted_CHBTM, column_HRTM).flatten(1, 2)


def leading_singular_vectors(core_RR: torch.Tensor, previous_SR: torch.Tensor) -> torch.Tensor:
    """(u, t) of each matrix of the batch [..., R, R] as [..., 2, R] fp32, of the sign that is closer to `previous_SR`.

    (u, t) and (-u, -t) are equally good singular vectors; a sign that flips between steps would turn the coarse pass
    upside down. A `previous_SR` of zeros asks for the sign with a non-negative sum.
    """
    left, _, right = torch.linalg.svd(core_RR.double())
    vectors_SR = torch.stack((left[..., 0], right[..., 0, :]), dim=-2)
    towards = previous_SR.double()
    towards = torch.where((towards == 0).all((-2, -1), keepdim=True), torch.ones_like(towards), towards)
    agreement = (vectors_SR * towards).sum((-2, -1), keepdim=True)
    return torch.where(agreement < 0, -vectors_SR, vectors_SR).float()


class TuckerRetrieval(Fp32Buffers):
    """Keys, Tucker cores and norms of one layer.

    Parameters: `keys` [H, 2, N, R, Dk], `cores` [H, C, R, R], `query_gain` and `key_gain` [Dk].
    Buffers `u`, `t` [H, R]: always fp32, saved with the model (their sign is memory of the past), renewed by `refresh`.
    """

    u: torch.Tensor
    t: torch.Tensor
    _kept_keys: list[KeptKeys] | None

    def __init__(
        self,
        *,
        keys_per_side: int,
        key_dim: int,
        top_m: int,
        coarse_k: int,
        num_heads: int = 1,
        tucker_rank: int = 2,
        num_cores: int = 2,
        query_per_rank: bool = True,
        gain: float = 1.0,
        norm_eps: float = 1e-5,
        fused: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`fused`: norms by the kernels of `ultramem_kernels`."""
        super().__init__()
        self.fused = fused
        self.keys_per_side, self.key_dim, self.num_heads = keys_per_side, key_dim, num_heads
        self.top_m, self.coarse_k, self.norm_eps = top_m, coarse_k, norm_eps
        self.tucker_rank, self.query_ranks = tucker_rank, tucker_rank if query_per_rank else 1

        def parameter(initializer: Normal | Uniform | Constant, *shape: int) -> nn.Parameter:
            made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            made.initializer = initializer  # type: ignore[attr-defined]
            return made

        self.keys = parameter(Normal(key_dim**-0.5), num_heads, 2, keys_per_side, tucker_rank, key_dim)
        self.cores = parameter(Uniform(0.0, 1.0), num_heads, num_cores, tucker_rank, tucker_rank)
        self.query_gain = parameter(Constant(gain), key_dim)
        self.key_gain = parameter(Constant(gain), key_dim)
        self.register_buffer("u", torch.zeros(num_heads, tucker_rank, dtype=torch.float32, device=device))
        self.register_buffer("t", torch.zeros(num_heads, tucker_rank, dtype=torch.float32, device=device))
        self._join_leading()
        self._kept_keys = None

    @property
    def query_width(self) -> int:
        """Width that `query_proj` must produce: heads * 2 * (r or 1) * Dk."""
        return self.num_heads * 2 * self.query_ranks * self.key_dim

    def forward(self, query_TQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`query_TQ` [T, query_width] -> (indices_TM int64, scores_TMC).

        Indices are grid indices i*n + j before the shuffle; scores, in the accumulation dtype, carry gradients to the
        queries, keys, gains and cores.
        """
        query_HSRTD, key_HSRND = self.normalised(query_TQ)
        keys_HSTM, known_HSRTM = self.select(query_HSRTD, key_HSRND)
        return self.grid_indices(keys_HSTM), self.score_at(query_HSRTD, key_HSRND, keys_HSTM, known_HSRTM)

    def normalised(self, query_TQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RMS-normalised queries [H, S, R, T, D] and keys [H, S, R, N, D], in the dtype of the keys."""
        if self.fused:
            from megatron_ultramem.memory.fused import fused_norms

            query_HSRTD, key_HSRND = fused_norms(
                query_TQ, self.keys, self.query_gain, self.key_gain, self.query_ranks, self.norm_eps
            )
            return query_HSRTD.expand(-1, -1, self.tucker_rank, -1, -1), key_HSRND
        query_THSRD = query_TQ.reshape(query_TQ.shape[0], self.num_heads, 2, self.query_ranks, self.key_dim)
        query_HSRTD = self._norm(query_THSRD, self.query_gain).permute(1, 2, 3, 0, 4)
        key_HSRND = self._norm(self.keys, self.key_gain).transpose(2, 3)
        return query_HSRTD.expand(-1, -1, self.tucker_rank, -1, -1), key_HSRND

    def fused_search(
        self,
        query_TQ: torch.Tensor,
        *,
        permutation: torch.Tensor | None,
        row_offset: int,
        rows: int,
        known_keys: tuple[torch.Tensor, ...] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """By the kernels: physical rows [T, M], scores [T, M, C], selected keys of every head; see `fused.py`."""
        from megatron_ultramem.memory.fused import fused_search

        return fused_search(
            query_TQ,
            self.keys,
            self.query_gain,
            self.key_gain,
            self.leading(),
            self.cores,
            eps=self.norm_eps,
            coarse_k=self.coarse_k,
            top_m=self.top_m,
            permutation=permutation,
            row_offset=row_offset,
            rows=rows,
            kept_keys=self._kept_keys,
            known_keys=known_keys,
        )

    def keep_keys(self, keep: bool) -> None:
        """From now on (keep) the kernels normalise the keys in the next forward only, and the following ones take that
        over: keys and gain must not change until `keep_keys` is called again."""
        self._kept_keys = None
        if self.fused and keep:
            from ultramem_kernels import KeptKeys

            self._kept_keys = [KeptKeys() for _ in range(self.num_heads)]

    def select(self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both passes, without gradient: selected keys [H, S, T, M] and their side scores [H, S, R, T, M]."""
        return select(query_HSRTD, key_HSRND, self.summed_cores(), self.leading(), self.coarse_k, self.top_m)

    def score_at(
        self,
        query_HSRTD: torch.Tensor,
        key_HSRND: torch.Tensor,
        keys_HSTM: torch.Tensor,
        known_HSRTM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Differentiable scores [T, H*M, C] of selected keys; `known_HSRTM`, if at hand, saves computing them again."""
        return core_scores(side_scores_at(query_HSRTD, key_HSRND, keys_HSTM, known_HSRTM), self.cores)

    def grid_indices(self, keys_HSTM: torch.Tensor) -> torch.Tensor:
        """Grid indices i*n + j [T, H*M] of selected keys."""
        rows_HTM, columns_HTM = keys_HSTM.unbind(1)
        return (rows_HTM * self.keys_per_side + columns_HTM).transpose(0, 1).flatten(1)

    def leading(self) -> torch.Tensor:
        """(u, t) as [H, 2, R] fp32: always the same tensor, so that captured CUDA graphs see what `refresh` writes."""
        return self._leading

    def summed_cores(self) -> torch.Tensor:
        """Sum of the cores [H, R, R] in the accumulation dtype, detached."""
        return self.cores.detach().to(accumulation_dtype(self.cores.dtype)).sum(1)

    def refresh(self) -> None:
        """Recomputes u and t from the cores; call once per optimizer step (and after loading foreign weights)."""
        refresh_all([self])

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype)
        normed = F.rms_norm(x.to(dtype), (self.key_dim,), gain.to(dtype), self.norm_eps)
        return normed.to(self.keys.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TuckerRetrieval:
        super()._apply(fn, recurse)
        self._join_leading()
        return self

    def _join_leading(self) -> None:
        """u and t become views of one tensor."""
        self._leading = torch.stack((self.u, self.t), dim=1)
        self._buffers["u"], self._buffers["t"] = self._leading[:, 0], self._leading[:, 1]


@torch.no_grad()
def refresh_all(retrievals: Iterable[TuckerRetrieval]) -> None:
    """`refresh` for many layers with one decomposition; they must agree in heads, rank and device."""
    layers = list(retrievals)
    if not layers:
        return
    cores_LHRR = torch.stack([layer.summed_cores() for layer in layers])
    vectors_LHSR = leading_singular_vectors(cores_LHRR, torch.stack([layer.leading() for layer in layers]))
    for layer, vectors_HSR in zip(layers, vectors_LHSR, strict=True):
        layer.u.copy_(vectors_HSR[:, 0])
        layer.t.copy_(vectors_HSR[:, 1])


def gather_keys(side_HSRTN: torch.Tensor, keys_HSTM: torch.Tensor) -> torch.Tensor:
    """[H, S, R, T, M]: every rank's scores at the keys [H, S, T, M]."""
    R = side_HSRTN.shape[2]
    return side_HSRTN.gather(-1, keys_HSTM.unsqueeze(2).expand(-1, -1, R, -1, -1))


def token_chunks(query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, extra: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of tokens whose [S, R, N] scores (and `extra` elements more for each) fit the budget of temporaries."""
    H, S, R, T, _ = query_HSRTD.shape
    step = tokens_per_chunk(H * S * R * key_HSRND.shape[3] + extra, query_HSRTD.is_cuda)
    for low in range(0, T, step):
        yield low, min(T, low + step)
