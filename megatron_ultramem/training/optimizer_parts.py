"""Megatron's optimizer as the parts that it chains."""

from __future__ import annotations

from typing import Any


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The chained optimizers (one for dense and one for expert parameters, as a rule), or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
