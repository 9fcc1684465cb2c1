"""Initialisation: layout-independent random fills, and the paper's derived scales (arXiv 2508.18756, appendix A).

The numbers of a parameter depend on (seed, name, global shape) alone. `fill_` draws them block by block, so that any
rank fills any shard with the right piece of the same full tensor and no rank ever holds the full one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import coarse_k
from megatron_ultramem.memory.kinds import blocks

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import MemoryConfig

RELEASED_VALUE_STD = 0.02
BLOCK_ELEMENTS = 1 << 23  # fp32 numbers drawn at once: 32 MiB


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def draw_(self, block: torch.Tensor, generator: torch.Generator) -> None:
        block.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """U(low, high)."""

    low: float
    high: float

    def draw_(self, block: torch.Tensor, generator: torch.Generator) -> None:
        block.uniform_(self.low, self.high, generator=generator)


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def draw_(self, block: torch.Tensor, generator: torch.Generator) -> None:
        block.fill_(self.value)


Initializer = Normal | Uniform | Constant


@torch.no_grad()
def fill_(
    tensor: torch.Tensor,
    initializer: Initializer,
    seed: int,
    name: str,
    *,
    global_shape: tuple[int, ...] | None = None,
    offset: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Fills `tensor` in place with the piece at `offset` of the full tensor (seed, name) of `global_shape`.

    Left out, they mean that `tensor` is the full tensor. Numbers are drawn in fp32 on the tensor's device (CPU and
    CUDA draw different ones) and cast to its dtype. Raises ValueError if the piece does not lie in the full tensor.
    """
    shape = tuple(global_shape) if global_shape is not None else tuple(tensor.shape)
    start = tuple(offset) if offset is not None else (0,) * len(shape)
    if not len(shape) == len(start) == tensor.dim() or any(
        low < 0 or low + size > full for low, size, full in zip(start, tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name}: a piece of shape {tuple(tensor.shape)} at {start} is not within {shape}")
    if tensor.numel() == 0:
        return tensor
    if tensor.dim() == 0:
        return fill_(tensor.view(1), initializer, seed, name).view(())
    if isinstance(initializer, Constant):
        return tensor.fill_(initializer.value)

    block_rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    first, last = start[0], start[0] + tensor.shape[0]
    columns = tuple(slice(low, low + size) for low, size in zip(start[1:], tensor.shape[1:], strict=True))
    generator = torch.Generator(device=tensor.device)
    for block in range(first // block_rows, -(-last // block_rows)):
        low, high = block * block_rows, min((block + 1) * block_rows, shape[0])
        generator.manual_seed(_block_seed(seed, name, block))
        drawn = torch.empty((high - low, *shape[1:]), dtype=torch.float32, device=tensor.device)
        initializer.draw_(drawn, generator)
        begin, end = max(low, first), min(high, last)
        tensor[begin - first : end - first].copy_(drawn[(slice(begin - low, end - low), *columns)])
    return tensor


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def linear_std(hidden_size: int) -> float:
    """sqrt(2/(5h)), the standard deviation of every linear weight (appendix A)."""
    return math.sqrt(2 / (5 * hidden_size))


def sigma_v(
    config: MemoryConfig, *, hidden_size: int, num_layers: int, ffn_ratio: float, score_variance: float
) -> float:
    """Standard deviation of values and pre-values (appendix A):

    sigma_V^2 = sqrt(0.2 * k_inner * h / (m * heads * (1 + s_s^2) * Dp * Dv * L))

    with k_inner = `ffn_ratio` (FFN inner width / h) and s_s^2 = `score_variance`. It makes the memory branch of one
    layer as large as the derivation wants the FFN branch to be.
    """
    terms = config.top_m * config.num_heads * (1 + score_variance) * config.pre_value_dim * config.value_dim
    return (0.2 * ffn_ratio * hidden_size / (terms * num_layers)) ** 0.25


def retrieval_gain(config: MemoryConfig, keys_per_side: int) -> tuple[float, float]:
    """(gain, s_s^2) of a Tucker layer's query and key norms.

    UltraMemV2: Monte-Carlo for init=paper; Dk^-0.4 and 0 for init=released. UltraMem: Dk^-0.33 of its released code.
    """
    if config.kind == "ultramem":
        return config.key_dim**-0.33, 0.0
    if config.init == "released":
        return config.key_dim**-0.4, 0.0
    return monte_carlo_gain(
        keys_per_side,
        config.key_dim,
        tucker_rank=config.tucker_rank,
        num_cores=config.num_cores,
        top_m=config.top_m,
        candidates=coarse_k(config, keys_per_side),
        query_per_rank=config.query_per_rank,
    )


def table_stds(
    config: MemoryConfig, *, hidden_size: int, num_layers: int, ffn_ratio: float, keys_per_side: int
) -> dict[str, float]:
    """Standard deviations of the tables that a pool of this kind has, by their names.

    ultramem_v2: sigma_V of both, or the released code's. ultramem: values N(0, E/(2 m H L)) (arXiv 2411.12364), with H
    heads and all L layers of the model. memory_plus and pkm: Dv^-0.5. peer: experts are linears (appendix A).
    """
    if config.kind == "ultramem_v2":
        std = RELEASED_VALUE_STD
        if config.init == "paper":
            _, variance = retrieval_gain(config, keys_per_side)
            std = sigma_v(
                config, hidden_size=hidden_size, num_layers=num_layers, ffn_ratio=ffn_ratio, score_variance=variance
            )
        return {"values": std, "pre_values": std}
    if config.kind == "ultramem":
        return {"values": math.sqrt(blocks(config) / (2 * config.top_m * config.num_heads * num_layers))}
    if config.kind == "peer":
        return {"values": linear_std(hidden_size), "pre_values": linear_std(hidden_size)}
    return {"values": config.value_dim**-0.5}


@lru_cache(maxsize=64)
def monte_carlo_gain(
    keys_per_side: int,
    key_dim: int,
    *,
    tucker_rank: int,
    num_cores: int,
    top_m: int,
    candidates: int,
    query_per_rank: bool = True,
    tokens: int = 256,
    seed: int = 0,
) -> tuple[float, float]:
    """(gain, s_s^2): the RMSNorm gain of queries and of keys that makes the mean top-m score 1 at initialisation, and
    the variance of the scores then.

    "Score" is that of ONE core (what weights a slice of a value), selection is by the sum over cores, and cores are
    U(0, 1): with 2 cores of rank 2 this gives the exponents log(gain)/log(Dk) = -0.341 (n=360, Dk=192, m=32), -0.354
    (n=1138) and -0.323 (n=528, Dk=512, m=128), where the reference has -0.34, -0.353 and -0.325; scoring by the sum
    of the cores gives -0.374, -0.387 and -0.351. Every simulated token has cores of its own: the spread between cores
    is larger than that between tokens. A score is proportional to gain^4, so one simulation at gain 1 is enough.
    Raises ConfigError if the mean score is not clearly positive, which no gain can put right.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = tucker_rank if query_per_rank else 1
    query_TSRD = _unit_rms(torch.randn(tokens, 2, ranks, key_dim, generator=generator))
    key_SNRD = _unit_rms(torch.randn(2, keys_per_side, tucker_rank, key_dim, generator=generator))
    side_STNR = torch.einsum("tsrd,snrd->stnr", query_TSRD.expand(-1, -1, tucker_rank, -1), key_SNRD)
    cores_TCRR = torch.rand(tokens, num_cores, tucker_rank, tucker_rank, generator=generator)
    summed_TRR = cores_TCRR.sum(1)

    left_TRR, _, right_TRR = torch.linalg.svd(summed_TRR)
    leading_ST1R = torch.stack((left_TRR[:, :, 0], right_TRR[:, 0, :])).unsqueeze(2)
    coarse_STN = (side_STNR * leading_ST1R).sum(-1)
    kept_STK = coarse_STN.topk(candidates, sorted=False).indices
    rows_TKR, columns_TKR = side_STNR.gather(2, kept_STK.unsqueeze(-1).expand(-1, -1, -1, tucker_rank))
    best_TM = (rows_TKR @ summed_TRR @ columns_TKR.mT).flatten(1).topk(top_m, sorted=False).indices
    row_TMR = rows_TKR.gather(1, (best_TM // candidates).unsqueeze(-1).expand(-1, -1, tucker_rank))
    column_TMR = columns_TKR.gather(1, (best_TM % candidates).unsqueeze(-1).expand(-1, -1, tucker_rank))
    scores_TMC = torch.einsum("tma,tcab,tmb->tmc", row_TMR, cores_TCRR, column_TMR).double()

    mean = scores_TMC.mean().item()
    if mean < 0.1 * scores_TMC.square().mean().sqrt().item():  # within the noise of the simulation, or negative
        raise ConfigError(
            f"model.memory.top_m={top_m} takes nearly all of the {keys_per_side**2} rows of a layer, so that no gain "
            "makes the mean score 1 (model.memory.init=paper); legal: a smaller top_m, or init=released"
        )
    # Rounded, so that hosts whose matrix products differ in the last bits agree on the parameters.
    return round(mean**-0.25, 5), round((scores_TMC / mean).var().item(), 4)


def _unit_rms(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])
