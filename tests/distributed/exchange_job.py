"""The job of the exchange tests: lookups over real ranks, with every rank's own tokens, and what they moved.

The tables, indices and other inputs of all ranks follow from one seed, so that the test can compute the truth alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.memory.geometry import Pool, plan_pools
from megatron_ultramem.memory.kinds import blocks, num_cores, pre_value_dim
from megatron_ultramem.memory.lookup import run_lookup
from megatron_ultramem.parallel.placement import ShardedPlacement
from megatron_ultramem.parallel.traffic import Capacity


@dataclass(frozen=True)
class Case:
    """One exchange: a placement, the tokens of every rank, and which rows they hit."""

    placement: str
    tokens: tuple[int, ...]
    hits: str = "random"  # or 'one_row', 'first_half', 'gaps' and 'holes': some places are of no row
    capacity: float | None = None
    dtype: torch.dtype = torch.float64
    memory: dict[str, Any] = field(default_factory=dict)
    layers: int = 1
    room: int | None = None  # for tokens of a rank, with a capacity; default: for the largest number of them

    @property
    def config(self) -> MemoryConfig:
        small = {"num_keys": 8, "key_dim": 4, "top_m": 5, "value_dim": 16, "pre_value_dim": 8, "rows_multiple": 16}
        return MemoryConfig(**{**small, **self.memory})

    @property
    def pool(self) -> Pool:
        (pool,) = plan_pools(ModelConfig(num_layers=self.layers, memory=self.config))
        return pool

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(1)
        rows = self.pool.padded_rows
        values = torch.randn(rows, self.config.value_dim, generator=g, dtype=torch.float64)
        pre_values = torch.randn(rows, pre_value_dim(self.config), generator=g, dtype=torch.float64)
        return values.to(self.dtype), pre_values.to(self.dtype)

    def inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices, scores, pre-inputs and the gradient of the pooled values of one rank's tokens."""
        g = torch.Generator().manual_seed(100 + rank)
        T, c = self.tokens[rank], self.config
        rows = {"one_row": 1, "first_half": self.pool.padded_rows // 2}.get(self.hits, self.pool.rows)
        indices = torch.randint(0, rows, (T, c.top_m), generator=g) + (7 if self.hits == "one_row" else 0)
        if self.hits == "gaps":  # the last places of a token, and for some tokens all
            rows_of_token = torch.randint(0, c.top_m + 1, (T, 1), generator=g)
            indices = indices.masked_fill(torch.arange(c.top_m) >= rows_of_token, -1)
        if self.hits == "holes":  # places anywhere among a token's
            indices = indices.masked_fill(torch.rand(T, c.top_m, generator=g) < 0.4, -1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        scores, pre_input = random(T, c.top_m, num_cores(c)), random(T, pre_value_dim(c))
        scores_dtype = torch.promote_types(self.dtype, torch.float32)
        return indices, scores.to(scores_dtype), pre_input.to(self.dtype), random(T, c.value_dim).to(self.dtype)


def exchange_job(case: Case) -> dict[str, Any]:
    """Pooled values and gradients on this rank, its shards, and the bytes that came in."""
    dist.init_process_group("gloo")
    return exchange(case, torch.device("cpu"))


def refused_exchange(case: Case) -> str:
    """What this rank says of a case that cannot be exchanged."""
    dist.init_process_group("gloo")
    try:
        exchange(case, torch.device("cpu"))
    except TrainingError as error:
        return str(error)
    return "exchanged"


def exchange_jobs_on_gpus(cases: list[Case]) -> list[dict[str, Any]]:
    """The same through NCCL for many cases, one after the other, because its start takes seconds."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return [exchange(case, device) for case in cases]


def exchange(case: Case, device: torch.device) -> dict[str, Any]:
    """One case on this rank; everything that it returns is on the CPU."""
    capacity = None
    if case.capacity is not None:
        capacity = Capacity(case.capacity, case.room or max(case.tokens), blocks(case.config))
    placement = place(case.placement, capacity)
    path = placement.path(case.config, case.pool, device)
    tables, shards = [], []
    for table in case.tables():
        shard = placement.shard(case.pool, table.shape[1])
        columns = slice(shard.column_start, shard.column_start + shard.columns)
        local = torch.cat([table[start : start + shard.block_rows, columns] for _, (start, _) in shard.pieces()])
        tables.append(torch.nn.Parameter(local.to(device)))
        main_grad_dtype = torch.promote_types(case.dtype, torch.float32)
        tables[-1].main_grad = torch.zeros(local.shape, dtype=main_grad_dtype, device=device)
        shards.append(shard)
    indices, scores, pre_input, grad = (x.to(device) for x in case.inputs(dist.get_rank()))
    scores.requires_grad_()
    pre_input.requires_grad_()
    pooled = run_lookup(path, indices, scores, pre_input, *tables)
    forward = dict(placement.traffic.received)
    pooled.backward(grad)
    assert scores.grad is not None and pre_input.grad is not None
    return {
        "pooled": pooled.detach().cpu(),
        "scores": scores.grad.cpu(),
        "pre_input": pre_input.grad.cpu(),
        "tables": [table.main_grad.cpu() for table in tables],
        "shards": shards,
        "bytes": (forward["forward"], placement.traffic.received["backward"]),
        "messages": tuple(placement.traffic.messages.values()),
        "untouched": forward["backward"] == 0 and placement.traffic.received["forward"] == forward["forward"],
        "table_grads": [table.grad for table in tables],
    }


def place(name: str, capacity: Capacity | None = None) -> ShardedPlacement:
    """A placement over all ranks; columns find out by themselves how many tokens there are."""
    world = dist.group.WORLD
    if name == "rows":
        return ShardedPlacement(world, None, capacity=capacity)
    if name == "columns":
        return ShardedPlacement(None, world)
    rank, size = dist.get_rank(), dist.get_world_size()
    within = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    across = [dist.new_group(list(range(place, size, 2))) for place in range(2)]
    return ShardedPlacement(across[rank % 2], within[rank // 2], capacity=capacity)
