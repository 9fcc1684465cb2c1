"""The PEER layer (arXiv 2407.04153): a great many experts of one neuron, chosen by product keys.

    o = sum over heads and m of softmax(s)_m gelu(<x, down[row_m]>) up[row_m]

The pool's pre-values are the experts' input weights (down), its values their output weights (up).

Shapes: T tokens, H hidden size, M experts per token.
"""

from __future__ import annotations

import torch

from megatron_ultramem.memory.product_keys import ProductKeyLayer


class PEER(ProductKeyLayer):
    """One memory layer; see `MemoryLayer` for the arguments."""

    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        return self.table.lookup(rows_TM, scores_TMC, x_TH)
