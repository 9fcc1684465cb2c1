"""Buffers that stay fp32, and unrounded, whatever their module is cast to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Fp32Buffers(nn.Module):
    """A module whose buffers move with it but keep their numbers when it is cast (Megatron casts whole models)."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp32Buffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            if old is not None:
                device = self._buffers[name].device  # type: ignore[union-attr]
                self._buffers[name] = torch.zeros_like(old, device=device) if old.is_meta else old.to(device)
        return self
