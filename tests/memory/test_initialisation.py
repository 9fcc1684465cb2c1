"""Layout-independent fills, and the numbers of the paper's derived initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ultramem.config.schema import MemoryConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory import init
from megatron_ultramem.memory.init import Constant, Normal, Uniform, fill_, linear_std, monte_carlo_gain, sigma_v
from megatron_ultramem.memory.retrieval import TuckerRetrieval


def full(initializer: init.Initializer, shape: tuple[int, ...], seed: int = 1, name: str = "x") -> torch.Tensor:
    return fill_(torch.empty(shape), initializer, seed, name)


@pytest.mark.parametrize("initializer", [Normal(0.5), Uniform(-1.0, 2.0), Constant(0.25)], ids=str)
@pytest.mark.parametrize(
    ("offset", "shape"),
    [
        ((0, 0), (50, 7)),
        ((13, 0), (29, 7)),
        ((0, 3), (50, 4)),
        ((17, 2), (20, 3)),
        ((49, 6), (1, 1)),
        ((10, 0), (0, 7)),
    ],
    ids=str,
)
def test_a_shard_gets_the_numbers_of_the_full_tensor(
    initializer: init.Initializer, offset: tuple[int, int], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 64)  # blocks of 9 rows, so that shards cut through them
    expected = full(initializer, (50, 7))[offset[0] :, offset[1] :][: shape[0], : shape[1]]
    shard = fill_(torch.empty(shape), initializer, 1, "x", global_shape=(50, 7), offset=offset)
    assert torch.equal(shard, expected)


def test_blocks_differ_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 64)
    drawn = full(Normal(1.0), (50, 7))
    assert drawn.unique().numel() == drawn.numel()


def test_numbers_depend_on_seed_and_name_and_nothing_else() -> None:
    torch.manual_seed(5)
    first = full(Normal(1.0), (4, 3))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert torch.equal(first, full(Normal(1.0), (4, 3)))
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert not torch.equal(first, full(Normal(1.0), (4, 3), seed=2))
    assert not torch.equal(first, full(Normal(1.0), (4, 3), name="y"))


def test_other_dtypes_and_ranks_get_the_rounded_fp32_numbers() -> None:
    bf16 = fill_(torch.empty(6, 5, dtype=torch.bfloat16), Normal(1.0), 1, "x")
    assert torch.equal(bf16, full(Normal(1.0), (6, 5)).bfloat16())
    assert full(Normal(1.0), ()).shape == ()
    assert full(Uniform(2.0, 3.0), (4,)).min() >= 2


def test_distributions_have_the_moments_asked_for() -> None:
    assert full(Normal(0.3), (200, 100)).std().item() == pytest.approx(0.3, rel=0.03)
    uniform = full(Uniform(-1.0, 3.0), (200, 100))
    assert uniform.mean().item() == pytest.approx(1.0, abs=0.03)
    assert -1 <= uniform.min() < -0.9 and 2.9 < uniform.max() <= 3


def test_a_piece_outside_the_full_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="keys: a piece of shape"):
        fill_(torch.empty(5, 2), Normal(1.0), 1, "keys", global_shape=(8, 2), offset=(4, 0))


def test_linear_std_is_that_of_appendix_a() -> None:
    assert linear_std(768) == pytest.approx(math.sqrt(2 / (5 * 768)))


@pytest.mark.parametrize(
    ("memory", "hidden", "layers", "ffn_ratio", "expected"),
    [
        (MemoryConfig(top_m=32, value_dim=192, pre_value_dim=192), 768, 20, 3.25, 0.0678),
        (MemoryConfig(top_m=128, value_dim=768, pre_value_dim=384), 2048, 16, 2.75, 0.0370),
    ],
    ids=["227M/1.2B", "1B/7B"],
)
def test_sigma_v_of_the_reference(
    memory: MemoryConfig, hidden: int, layers: int, ffn_ratio: float, expected: float
) -> None:
    got = sigma_v(memory, hidden_size=hidden, num_layers=layers, ffn_ratio=ffn_ratio, score_variance=0.0)
    assert got == pytest.approx(expected, abs=5e-5)
    # the derivation: variance of the memory branch = variance that the FFN branch is to have
    memory_variance = 0.16 * got**4 * memory.pre_value_dim * memory.top_m * memory.value_dim / hidden
    assert memory_variance == pytest.approx(0.064 * ffn_ratio / (2 * layers))


@pytest.mark.parametrize(
    ("n", "key_dim", "m", "exponent"), [(360, 192, 32, -0.34), (1138, 192, 32, -0.353), (528, 512, 128, -0.325)]
)
def test_gains_of_the_reference(n: int, key_dim: int, m: int, exponent: float) -> None:
    gain, variance = monte_carlo_gain(n, key_dim, tucker_rank=2, num_cores=2, top_m=m, candidates=m)
    assert math.log(gain) / math.log(key_dim) == pytest.approx(exponent, abs=0.005)
    assert 0.05 < variance < 0.2
    monte_carlo_gain.cache_clear()
    assert monte_carlo_gain(n, key_dim, tucker_rank=2, num_cores=2, top_m=m, candidates=m) == (gain, variance)


@pytest.mark.parametrize("query_per_rank", [True, False])
def test_the_gain_makes_the_mean_score_of_real_layers_one(query_per_rank: bool) -> None:
    n, key_dim, m, k = 40, 16, 12, 8
    gain, variance = monte_carlo_gain(
        n, key_dim, tucker_rank=2, num_cores=2, top_m=m, candidates=k, query_per_rank=query_per_rank, tokens=1024
    )
    scores = []
    for seed in range(60):
        retrieval = TuckerRetrieval(
            keys_per_side=n, key_dim=key_dim, top_m=m, coarse_k=k, gain=gain, query_per_rank=query_per_rank
        )
        for name, param in retrieval.named_parameters():
            fill_(param, param.initializer, seed, name)
        retrieval.refresh()
        query = full(Normal(1.0), (40, retrieval.query_width), seed, "query")
        scores.append(retrieval(query)[1].detach())
    assert torch.stack(scores).mean().item() == pytest.approx(1.0, abs=0.08)
    assert torch.stack(scores).var().item() == pytest.approx(variance, rel=0.35)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_selecting_everything_leaves_no_gain_and_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="top_m=16 .*legal: a smaller top_m, or init=released"):
        monte_carlo_gain(4, 64, tucker_rank=2, num_cores=2, top_m=16, candidates=4, seed=seed)
