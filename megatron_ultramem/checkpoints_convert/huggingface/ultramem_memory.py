"""The memory layers: what a block adds beside, or instead of, its FFN.

Each reads the normalised FFN input x [T, h] and finds rows in a value pool, which several layers may share. The pool is
a child of the model, not of the layers, so that it is saved and moved once; a layer is given what looks up in it.

Shapes: T tokens, M rows per token, B blocks of virtual values, C cores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_ultramem import UltraMemConfig
from .ultramem_lookup import UltraMemValuePool
from .ultramem_product_keys import UltraMemProductKeys
from .ultramem_retrieval import UltraMemTuckerRetrieval

# Rows [T, M], scores [T, M, B, C] and, for pools with pre-values, their inputs [T, D] to pooled values [T, B*V].
Lookup = Callable[..., torch.Tensor]
TUCKER_KINDS = ("ultramem_v2", "ultramem")


def value_pools(config: UltraMemConfig) -> list[UltraMemValuePool]:
    """The pools of the model, uninitialised."""
    memory = config.memory
    if not memory:
        return []
    pre_value_dim, activation = 0, "none"
    if memory["kind"] == "ultramem_v2":
        pre_value_dim, activation = memory["pre_value_dim"], memory["activation"]
    elif memory["kind"] == "peer":
        pre_value_dim, activation = memory["value_dim"], "gelu"
    return [
        UltraMemValuePool(pool["padded_rows"], memory["value_dim"], pre_value_dim, activation, config.memory_kernels)
        for pool in memory["pools"]
    ]


def memory_layer(config: UltraMemConfig, layer: int) -> "UltraMemMemory | None":
    """The memory layer that reads the FFN input of block `layer`, or None."""
    entry = config.memory_layer(layer)
    if entry is None:
        return None
    layer_class = {
        "ultramem_v2": UltraMemV2Memory,
        "ultramem": UltraMemV1Memory,
        "memory_plus": MemoryPlusMemory,
        "pkm": ProductKeyMemory,
        "peer": ProductKeyMemory,
    }[config.memory["kind"]]
    return layer_class(config, entry)


class UltraMemMemory(nn.Module):
    """What the kinds have in common: queries, their retrieval and the permutation of rows.

    `permutation` is saved with the model: torch does not promise to draw the same one from a seed for ever.
    """

    permutation: torch.Tensor | None

    def __init__(self, config: UltraMemConfig, entry: dict[str, Any]) -> None:
        super().__init__()
        memory = config.memory
        self.rows, self.row_offset = memory["pools"][entry["pool"]]["rows"], entry["row_offset"]
        keys_per_side = entry["keys_per_side"]
        self.retrieval: UltraMemTuckerRetrieval | UltraMemProductKeys
        if memory["kind"] in TUCKER_KINDS:
            self.retrieval = UltraMemTuckerRetrieval(memory, keys_per_side, config.rms_norm_eps, config.memory_kernels)
        else:
            self.retrieval = UltraMemProductKeys(memory, keys_per_side, config.rms_norm_eps)
        self.query_proj = nn.Linear(config.hidden_size, self.retrieval.query_width, bias=False)
        permutation = None
        if memory["shuffle"]:
            virtual_rows = keys_per_side**2
            dtype = torch.int32 if virtual_rows <= torch.iinfo(torch.int32).max else torch.int64
            permutation = torch.empty(virtual_rows, dtype=dtype)
        self.register_buffer("permutation", permutation)

    def retrieve(self, x_TH: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers modulo `rows` [T, M] and scores, [T, M, C] or [T, M]."""
        query_TQ = self.query_proj(x_TH)
        with torch.autocast(x_TH.device.type, enabled=False):  # half precision would choose other keys
            return self.retrieval(query_TQ, self.permutation, self.row_offset, rows)


class UltraMemV2Memory(UltraMemMemory):
    """UltraMemV2 (arXiv 2508.18756): o = W_v^T ( V^T ( (P x') * s ) ), x' = W_p x."""

    def __init__(self, config: UltraMemConfig, entry: dict[str, Any]) -> None:
        super().__init__(config, entry)
        memory, hidden_size = config.memory, config.hidden_size
        self.pre_value_proj = nn.Linear(hidden_size, memory["pre_value_dim"], bias=False)
        self.value_proj = nn.Linear(memory["value_dim"], hidden_size, bias=False)

    def forward(self, x_TH: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        rows_TM, scores_TMC = self.retrieve(x_TH, self.rows)
        return self.value_proj(lookup(rows_TM, scores_TMC.unsqueeze(2), self.pre_value_proj(x_TH)))


class UltraMemV1Memory(UltraMemMemory):
    """UltraMem (arXiv 2411.12364): B virtual blocks over one physical table, each with its part of the projection."""

    def __init__(self, config: UltraMemConfig, entry: dict[str, Any]) -> None:
        super().__init__(config, entry)
        self.blocks = config.memory["value_expansion"]
        self.value_proj = nn.Linear(self.blocks * config.memory["value_dim"], config.hidden_size, bias=False)

    def forward(self, x_TH: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        virtual_TM, scores_TMC = self.retrieve(x_TH, self.blocks * self.rows)
        block_TMB = F.one_hot(virtual_TM.long() // self.rows, self.blocks).to(scores_TMC.dtype)
        pooled_TV = lookup(virtual_TM % self.rows, block_TMB.unsqueeze(-1) * scores_TMC.unsqueeze(2))
        return self.value_proj(pooled_TV)


class MemoryPlusMemory(UltraMemMemory):
    """Memory+ (arXiv 2412.09764): o = W_2 ( (V^T softmax(s)) * silu(W_1 x) )."""

    def __init__(self, config: UltraMemConfig, entry: dict[str, Any]) -> None:
        super().__init__(config, entry)
        value_dim = config.memory["value_dim"]
        self.gate_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        self.value_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

    def forward(self, x_TH: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        rows_TM, weights_TM = self.retrieve(x_TH, self.rows)
        pooled_TV = lookup(rows_TM, weights_TM[..., None, None])
        return self.value_proj(pooled_TV * F.silu(self.gate_proj(x_TH)))


class ProductKeyMemory(UltraMemMemory):
    """PKM (arXiv 1907.05242), and PEER (2407.04153), whose pools have pre-values and multiply by gelu(<x, P[row]>)."""

    def __init__(self, config: UltraMemConfig, entry: dict[str, Any]) -> None:
        super().__init__(config, entry)
        self.has_pre_values = config.memory["kind"] == "peer"

    def forward(self, x_TH: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        rows_TM, weights_TM = self.retrieve(x_TH, self.rows)
        return lookup(rows_TM, weights_TM[..., None, None], x_TH if self.has_pre_values else None)
