"""What the retrieval computes, in plain PyTorch (UltraMemV2's TDQKR, arXiv 2508.18756 section 3.1).

Legend: T tokens, S = 2 sides (rows, columns), R Tucker ranks, N keys per side, D key width, K coarse candidates,
M selected values, C cores.

    side[s, r, t, i] = <query[s, r, t], key[s, r, i]>          in the queries' dtype, sums in fp32
    coarse pass        the K keys of each side with the largest sum_r side[s, r, t, i] * leading[s, r]
    exact pass         the M pairs of candidates with the largest sum_c score_c(i, j)
    score_c(i, j)    = sum_ab side[0, a, t, i] * cores[c, a, b] * side[1, b, t, j]
    index            = (permutation[i*N + j] + offset) mod rows

The M pairs of a token come in no particular order. Selection carries no gradient; the scores do, to the queries, the
keys and the cores.
"""

from __future__ import annotations

import torch


def side_scores(query_SRTD: torch.Tensor, key_SRND: torch.Tensor) -> torch.Tensor:
    """`side` [S, R, T, N]: sums in fp32 (fp64 for fp64), rounded to the dtype of the queries."""
    if query_SRTD.is_cuda:
        return torch.matmul(query_SRTD, key_SRND.mT)  # accumulates in fp32
    dtype = torch.promote_types(query_SRTD.dtype, torch.float32)
    return torch.matmul(query_SRTD.to(dtype), key_SRND.to(dtype).mT).to(query_SRTD.dtype)


def select(
    side_SRTN: torch.Tensor, leading_SR: torch.Tensor, core_RR: torch.Tensor, coarse_k: int, top_m: int
) -> torch.Tensor:
    """Key numbers [S, T, M] int32 of the selected pairs. `core_RR` is the sum of the cores."""
    dtype = torch.promote_types(side_SRTN.dtype, torch.float32)
    side_SRTN = side_SRTN.to(dtype)
    coarse_STN = torch.einsum("srtn,sr->stn", side_SRTN, leading_SR.to(dtype))
    candidates_STK = coarse_STN.topk(coarse_k, dim=-1).indices
    kept_SRTK = gather_keys(side_SRTN, candidates_STK)
    pairs_TKK = torch.einsum("atk,ab,btl->tkl", kept_SRTK[0], core_RR.to(dtype), kept_SRTK[1])
    best_TM = pairs_TKK.flatten(1).topk(top_m, dim=-1).indices
    place_STM = torch.stack((best_TM // coarse_k, best_TM % coarse_k))
    return candidates_STK.gather(-1, place_STM).int()


def gather_keys(side_SRTN: torch.Tensor, keys_STM: torch.Tensor) -> torch.Tensor:
    """[S, R, T, M]: every rank's score at the keys [S, T, M]."""
    return side_SRTN.gather(-1, keys_STM.long().unsqueeze(1).expand(-1, side_SRTN.shape[1], -1, -1))


def pair_scores(side_SRTM: torch.Tensor, cores_CRR: torch.Tensor) -> torch.Tensor:
    """Scores [T, M, C] in fp32 of pairs whose side scores are given (fp64 for fp64)."""
    dtype = torch.promote_types(side_SRTM.dtype, torch.float32)
    row_RTM, column_RTM = side_SRTM.to(dtype)
    return torch.einsum("atm,cab,btm->tmc", row_RTM, cores_CRR.to(dtype), column_RTM)


def physical_rows(
    keys_STM: torch.Tensor, keys_per_side: int, permutation: torch.Tensor | None, offset: int, rows: int
) -> torch.Tensor:
    """Rows [T, M] int32 (int64 where `rows` needs it) of the selected pairs."""
    index_TM = keys_STM[0].long() * keys_per_side + keys_STM[1]
    if permutation is not None:
        index_TM = permutation[index_TM].long()
    return ((index_TM + offset) % rows).to(torch.int32 if rows <= 2**31 - 1 else torch.int64)


def retrieve(
    query_SRTD: torch.Tensor,
    key_SRND: torch.Tensor,
    leading_SR: torch.Tensor,
    cores_CRR: torch.Tensor,
    coarse_k: int,
    top_m: int,
    permutation: torch.Tensor | None = None,
    offset: int = 0,
    rows: int | None = None,
    known_keys_STM: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row indices [T, M], scores [T, M, C], key numbers [S, T, M] int32); scores differentiable by autograd."""
    side_SRTN = side_scores(query_SRTD, key_SRND)
    if known_keys_STM is None:
        known_keys_STM = select(side_SRTN.detach(), leading_SR, cores_CRR.detach().sum(0), coarse_k, top_m)
    scores_TMC = pair_scores(gather_keys(side_SRTN, known_keys_STM), cores_CRR)
    n = key_SRND.shape[2]
    return physical_rows(known_keys_STM, n, permutation, offset, rows or n * n), scores_TMC, known_keys_STM


def dense_gradient(
    grad_scores_TMC: torch.Tensor,
    kept_SRTM: torch.Tensor,
    cores_CRR: torch.Tensor,
    keys_STM: torch.Tensor,
    keys_per_side: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `pair_scores` and of the gathering before it: (d_side [S, R, T, N], d_cores [C, R, R])."""
    dtype = kept_SRTM.dtype
    row_RTM, column_RTM = kept_SRTM
    cores_CRR, slope_TMC = cores_CRR.to(dtype), grad_scores_TMC.to(dtype)
    d_row_RTM = torch.einsum("tmc,cab,btm->atm", slope_TMC, cores_CRR, column_RTM)
    d_column_RTM = torch.einsum("tmc,cab,atm->btm", slope_TMC, cores_CRR, row_RTM)
    d_cores = torch.einsum("tmc,atm,btm->cab", slope_TMC, row_RTM, column_RTM)
    d_kept_SRTM = torch.stack((d_row_RTM, d_column_RTM))
    dense = torch.zeros(*kept_SRTM.shape[:3], keys_per_side, dtype=dtype, device=kept_SRTM.device)
    return dense.scatter_add_(-1, keys_STM.long().unsqueeze(1).expand_as(kept_SRTM), d_kept_SRTM), d_cores
