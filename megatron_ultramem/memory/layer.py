"""The UltraMemV2 layer (arXiv 2508.18756): TDQKR retrieval, PEER-style values, one shared value projection.

    o = W_v^T ( V^T ( (P x') * s ) ),   x' = W_p x

Shapes: T tokens, H hidden size, M values per token, C cores.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ultramem.memory.tucker_layer import TuckerLayer


class UltraMemV2(TuckerLayer):
    """One memory layer; see `MemoryLayer` for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, hidden = self.config, self.hidden_size
        released = config.init == "released"
        self.query_proj = self._projection(
            hidden, self.retrieval.query_width, config.key_dim**-0.5 if released else None
        )
        self.pre_value_proj = self._projection(hidden, config.pre_value_dim, hidden**-0.5 if released else None)
        self.value_proj = self._projection(config.value_dim, hidden, config.value_dim**-0.5 if released else None)

    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        return self.value_proj(self.table.lookup(rows_TM, scores_TMC, self.pre_value_proj(x_TH)))
