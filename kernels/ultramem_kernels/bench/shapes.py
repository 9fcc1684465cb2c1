"""Sizes, tables and indices that the kernels are measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPE = torch.bfloat16
SETS = 4  # index sets that a timing rotates through
RowChoice = Callable[[int, int, int], torch.Tensor]  # (tokens, m, distinct) -> indices [tokens, m] int32


@dataclass(frozen=True)
class Shape:
    """A memory layer and its batch; letters as in the kernels' references, h the model's width."""

    tokens: int
    keys: int
    key_dim: int
    coarse_k: int
    m: int
    value_dim: int
    pre_value_dim: int
    rows: int
    hidden: int
    ranks: int = 2
    cores: int = 2

    @property
    def width(self) -> int:
        """Of a row, value and pre-value together."""
        return self.value_dim + self.pre_value_dim

    @property
    def forward_bytes(self) -> int:
        """What a lookup moves: rows, indices, scores, pre-inputs and outputs."""
        return self.tokens * (self.m * (self.width * 2 + 4 + 4 * self.cores) + self.width * 2)


SHAPES = {
    # UltraMemV2-227M: 1138 keys a side over a pool of 20 tables of 360^2 rows
    "227m": Shape(16384, 1138, 192, 32, 32, 192, 192, 2592000, 768),
    # 2.5B/120B-top256 (widths not public: hidden 2 * Dk and Dp:Dv = 1:3 by the paper's sizing rules)
    "120b": Shape(8192, 1928, 1024, 128, 256, 768, 256, 1928**2, 2048),
}


@dataclass(frozen=True)
class Tables:
    """Value and pre-value table; `grads` are their fp32 `main_grad`s, to which backwards add."""

    values: torch.Tensor
    pre_values: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor]

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, pre-values."""
        return self.values, self.pre_values


def make_tables(shape: Shape, device: str = "cuda") -> Tables:
    """Random tables of the shape's rows and widths."""
    values, values_grad = _make_table(shape.rows, shape.value_dim, device)
    pre_values, pre_values_grad = _make_table(shape.rows, shape.pre_value_dim, device)
    return Tables(values, pre_values, (values_grad, pre_values_grad))


def _make_table(rows: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.nn.Parameter(torch.empty(rows, width, device=device, dtype=DTYPE).normal_(std=0.07))
    grad = torch.zeros(rows, width, device=device)
    table.main_grad = grad  # type: ignore[attr-defined]
    return table, grad


def uniform_rows(tokens: int, m: int, distinct: int) -> torch.Tensor:
    """Every row as likely as every other."""
    return torch.randint(0, distinct, (tokens, m), device="cuda", dtype=torch.int32)


def zipf_rows(tokens: int, m: int, distinct: int, exponent: float = 1.1) -> torch.Tensor:
    """Zipf ranks by inversion of the continuous law, spread over the rows by a permutation."""
    u = torch.rand(tokens, m, device="cuda", dtype=torch.float64)
    power = 1 - exponent
    rank = ((1 - u * (1 - float(distinct) ** power)) ** (1 / power)).long().clamp(1, distinct) - 1
    return torch.randperm(distinct, device="cuda")[rank].int()
