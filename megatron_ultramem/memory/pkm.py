"""The product-key memory layer (PKM, arXiv 1907.05242): values as wide as the model, added up over the heads.

    o = sum over heads and m of softmax(s)_m V[row_m]

Shapes: T tokens, H hidden size, M values per token.
"""

from __future__ import annotations

import torch

from megatron_ultramem.memory.product_keys import ProductKeyLayer


class PKM(ProductKeyLayer):
    """One memory layer; see `MemoryLayer` for the arguments."""

    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        return self.table.lookup(rows_TM, scores_TMC)
