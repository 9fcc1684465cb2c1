"""Is a memory layer alive? Measurements outside the forward's hot path."""

from __future__ import annotations

import math

import torch

from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.retrieval import TuckerRetrieval


@torch.no_grad()
def memory_health(layer: MemoryLayer, x_TH: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of one layer on tokens `x_TH` [T, h] (T at least 1), fp32 on the layer's device, not reduced over ranks.

    rows_touched: share of the pool's rows that the layer sees that some token used.
    usage_kl: KL divergence (nats) of the row usage from uniform; at least ln(rows / (T*M)) for few tokens.
    top1_score, top_m_score: mean over tokens and heads of the largest and of all selected scores, each averaged over
        the cores; the derived initialisation sets the latter to 1. After a softmax the latter is always 1/m.
    tucker_singular_values: Tucker kinds only: of the summed cores, mean over heads, [r]; the coarse pass sees the first
        alone.
    output_std: of the layer's output.
    values_rms, pre_values_rms: of the pool's tables, of those it has.
    """
    rows_TM, scores_TMC = layer.retrieve(x_TH)
    _, counts = layer.physical(rows_TM).unique(return_counts=True)
    layer.table.settle()
    usage = counts.float() / rows_TM.numel()
    seen = min(layer.pool.virtual_rows, layer.pool.rows)
    by_head_THMC = scores_TMC.float().unflatten(1, (layer.config.num_heads, -1))
    metrics = {
        "rows_touched": torch.tensor(counts.numel() / seen, device=usage.device),
        "usage_kl": (usage * usage.log()).sum() + math.log(seen),
        "top1_score": by_head_THMC.mean(-1).amax(-1).mean(),
        "top_m_score": by_head_THMC.mean(),
        "output_std": layer.output(x_TH, rows_TM, scores_TMC).float().std(),
    }
    if isinstance(layer.retrieval, TuckerRetrieval):
        metrics["tucker_singular_values"] = torch.linalg.svdvals(layer.retrieval.summed_cores()).mean(0).float()
    for name, table in layer.table.named_parameters():
        metrics[f"{name}_rms"] = _rms(table[: layer.pool.rows])
    return metrics


def _rms(table: torch.Tensor) -> torch.Tensor:
    """Root mean square in fp32, without an fp32 copy of the table."""
    return torch.linalg.vector_norm(table, dtype=torch.float32) / math.sqrt(table.numel())
