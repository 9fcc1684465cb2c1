"""Is a memory layer alive? Measurements outside the forward's hot path."""

from __future__ import annotations

import math

import torch

from megatron_ultramem.memory.layer import UltraMemV2


@torch.no_grad()
def memory_health(layer: UltraMemV2, x_TH: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of one layer on tokens `x_TH` [T, h] (T at least 1), fp32 on the layer's device, not reduced over ranks.

    rows_touched: share of the rows the layer sees that some token used.
    usage_kl: KL divergence (nats) of the row usage from uniform; at least ln(rows / (T*M)) for few tokens.
    top1_score, top_m_score: mean over tokens and heads of the largest and of all selected scores, each averaged over
        the cores; the derived initialisation sets the latter to 1.
    tucker_singular_values: of the summed cores, mean over heads, [r]; the coarse pass sees the first alone.
    output_std: of the layer's output.
    values_rms, pre_values_rms: of the pool's tables.
    """
    rows_TM, scores_TMC = layer.retrieve(x_TH)
    _, counts = rows_TM.unique(return_counts=True)
    usage = counts.float() / rows_TM.numel()
    out_TH = layer.value_proj(layer.table.lookup(rows_TM, scores_TMC, layer.pre_value_proj(x_TH)))
    by_head_THMC = scores_TMC.float().unflatten(1, (layer.config.num_heads, -1))
    rows = layer.pool.rows
    return {
        "rows_touched": torch.tensor(counts.numel() / layer.pool.virtual_rows, device=usage.device),
        "usage_kl": (usage * usage.log()).sum() + math.log(layer.pool.virtual_rows),
        "top1_score": by_head_THMC.mean(-1).amax(-1).mean(),
        "top_m_score": by_head_THMC.mean(),
        "tucker_singular_values": torch.linalg.svdvals(layer.retrieval.summed_cores()).mean(0).float(),
        "output_std": out_TH.float().std(),
        "values_rms": _rms(layer.table.values[:rows]),
        "pre_values_rms": _rms(layer.table.pre_values[:rows]),
    }


def _rms(table: torch.Tensor) -> torch.Tensor:
    """Root mean square in fp32, without an fp32 copy of the table."""
    return torch.linalg.vector_norm(table, dtype=torch.float32) / math.sqrt(table.numel())
