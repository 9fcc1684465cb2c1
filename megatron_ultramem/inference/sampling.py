"""From logits to the next token: greedy, temperature, top-k, top-p.

Every prompt draws from a generator of its own, seeded by the seed and the prompt alone, and a draw is one uniform
number, so a sampled text depends neither on the other prompts of its batch nor on the device's random numbers.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ultramem.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and when to stop. Raises ConfigError on creation for values out of range.

    Attributes:
        max_new_tokens: tokens to add at most.
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample among the k likeliest tokens alone; 0: all.
        top_p: sample among the fewest of the likeliest tokens that together have this probability; 1: all.
        seed: the same seed gives the same text for a prompt; a prompt that is given several times gets other texts.
        ignore_eod: go on after an end-of-document token.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eod: bool = False

    def __post_init__(self) -> None:
        for name, legal, fits in (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            (
                "temperature",
                "0 (greedy) or a positive number",
                math.isfinite(self.temperature) and not self.temperature < 0,
            ),
            ("top_k", "0 (all) or a positive number", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
        ):
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name)}: legal: {legal}")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise ConfigError(
                f"top_k = {self.top_k} and top_p = {self.top_p} would be ignored by temperature = 0, which takes the "
                "likeliest token; legal: a positive temperature, or neither of the two"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def random_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """One generator for each prompt (token ids), from the seed, the prompt and how often it came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(f"{seed}|{seen[key]}|{key}".encode()).digest()
        seen[key] += 1
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return streams


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Next tokens [B] int64; -1 in rows whose logits are not finite.

    Args:
        logits_BV: fp32.
        uniform_B: fp64 in [0, 1), one draw for each row; not looked at when greedy.
    """
    good_B = logits_BV.isfinite().all(dim=-1)
    if sampling.greedy:
        return logits_BV.argmax(dim=-1).where(good_B, -1)
    ordered_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered_BV, token_BV = ordered_BV[:, : sampling.top_k], token_BV[:, : sampling.top_k]
    p_BV = torch.softmax(ordered_BV.double() / sampling.temperature, dim=-1)
    # A token stays while the mass before it is below top_p, so the likeliest always does.
    p_BV = p_BV.where(p_BV.cumsum(dim=-1) - p_BV < sampling.top_p, 0.0)
    mass_BV = p_BV.cumsum(dim=-1)
    place_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * mass_BV[:, -1:], right=True)
    place_B1 = place_B1.minimum((p_BV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return token_BV.gather(-1, place_B1).squeeze(-1).where(good_B, -1)
