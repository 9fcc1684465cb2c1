"""Choosing tokens: the kept set is the documented one, and frequencies are the probabilities."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.inference.sampling import Sampling, choose, random_streams

P = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1], dtype=torch.float64)
DRAWS = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # every part of [0, 1) alike


def frequencies(sampling: Sampling, p: torch.Tensor = P) -> torch.Tensor:
    logits = p.log().float().expand(len(DRAWS), -1)
    return torch.bincount(choose(logits, sampling, DRAWS), minlength=len(p)) / len(DRAWS)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / (P**2).sum()),
        (Sampling(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (Sampling(top_k=1), torch.tensor([0, 1.0, 0, 0, 0])),
        (Sampling(top_k=99), P),
        (Sampling(top_p=0.75), torch.tensor([0, 0.4, 0.15, 0.3, 0]) / 0.85),
        (Sampling(top_p=1e-9), torch.tensor([0, 1.0, 0, 0, 0])),
        (Sampling(top_k=3, top_p=0.8), torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        (Sampling(temperature=0), torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=lambda value: str(value) if isinstance(value, Sampling) else "",
)
def test_frequencies_are_those_of_the_kept_tokens(sampling: Sampling, expected: torch.Tensor) -> None:
    torch.testing.assert_close(frequencies(sampling).double(), expected.double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_extreme_draws_stay_within_the_kept_tokens(u: float) -> None:
    logits = torch.tensor([[0.0, -1e30, 1.0, -float(2**100)]])
    chosen = choose(logits, Sampling(top_p=0.999), torch.tensor([u], dtype=torch.float64))
    assert chosen.item() in (0, 2)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)])
def test_rows_that_are_not_finite_are_marked(sampling: Sampling) -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    assert choose(logits, sampling, torch.full((3,), 0.5, dtype=torch.float64)).tolist() == [1, -1, -1]


def test_streams_depend_on_seed_prompt_and_repetition_alone() -> None:
    def first(prompts: list[list[int]], seed: int) -> list[float]:
        return [torch.rand((), generator=stream).item() for stream in random_streams(prompts, seed)]

    a, b, again = first([[1, 2], [3], [1, 2]], 5)
    assert len({a, b, again}) == 3
    assert first([[3], [9], [1, 2]], 5)[::2] == [b, a]
    assert first([[1, 2]], 6) != [a]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.5)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{setting} = .*legal: "):
        Sampling(**{setting: value})


def test_greedy_refuses_filters_that_it_would_ignore() -> None:
    with pytest.raises(ConfigError, match="top_k = 3.*ignored by temperature = 0"):
        Sampling(temperature=0, top_k=3)
