"""Small memory layers for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.memory.build import LAYERS
from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.memory.tables import ValuePool

HIDDEN = 24
SMALL = {"num_keys": 10, "key_dim": 8, "top_m": 4, "value_dim": 6, "pre_value_dim": 5, "rows_multiple": 16}


class SmallModel(nn.Module):
    """One pool and the memory layers that use it, one after the other."""

    def __init__(self, num_layers: int, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        super().__init__()
        memory = MemoryConfig(**{**SMALL, **settings})
        model = ModelConfig(num_layers=num_layers, hidden_size=HIDDEN, memory=memory)
        (self.pool,) = plan_pools(model)
        self.table = ValuePool(
            memory, self.pool, hidden_size=HIDDEN, num_layers=num_layers, ffn_ratio=3.25, dtype=dtype
        )
        self.layers = nn.ModuleList(
            LAYERS[memory.kind](memory, hidden_size=HIDDEN, layer=layer, pool=self.pool, table=self.table, dtype=dtype)
            for layer in range(num_layers)
        )
        self.table.reset_parameters(seed=3)
        for layer in self.layers:
            layer.reset_parameters(seed=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def attach_main_grads(self) -> None:
        for table in self.table.parameters():
            table.main_grad = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32))


@pytest.fixture
def small_model() -> Callable[..., SmallModel]:
    """Builds `SmallModel`; keyword arguments are settings of `model.memory`."""

    def build(num_layers: int = 1, dtype: torch.dtype = torch.float32, **settings: Any) -> SmallModel:
        return SmallModel(num_layers, dtype, settings)

    return build


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """Builds normalised inputs [*shape, h]."""

    def build(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)

    return build
