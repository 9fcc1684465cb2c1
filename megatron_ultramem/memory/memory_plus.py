"""The Memory+ layer (arXiv 2412.09764): product keys, one table for all layers of a pool, a gate from the input.

    o = W2^T ( (sum over heads and m of softmax(s)_m V[row_m]) * silu(W1^T x) )

Shapes: T tokens, H hidden size, M values per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from megatron_ultramem.memory.product_keys import ProductKeyLayer


class MemoryPlus(ProductKeyLayer):
    """One memory layer; see `MemoryLayer` for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_proj = self._projection(self.hidden_size, self.config.value_dim)
        self.value_proj = self._projection(self.config.value_dim, self.hidden_size)

    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        return self.value_proj(self.table.lookup(rows_TM, scores_TMC) * F.silu(self.gate_proj(x_TH)))
