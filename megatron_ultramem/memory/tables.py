"""Value pools: the tables that a group of memory layers shares, and their gradient accounting.

A pool's tables get gradients from every layer of the pool. Each lookup's backward adds its rows to `main_grad`; only
after the last of the layers is the gradient of a microbatch complete, which `grad_ready` then announces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from megatron_ultramem.memory.geometry import Pool
from megatron_ultramem.memory.init import Normal, table_stds
from megatron_ultramem.memory.kinds import activation, blocks
from megatron_ultramem.memory.lookup import LocalLookup, LookupPath, lookup_backend, run_lookup
from megatron_ultramem.memory.shards import TableShard

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import MemoryConfig


class Placement(Protocol):
    """Which shard of every pool this rank holds, and how looked-up values reach the tokens that want them."""

    def shard(self, pool: Pool, width: int) -> TableShard:
        """This rank's part of a table of the pool of that width."""

    def path(self, config: MemoryConfig, pool: Pool, device: torch.device) -> LookupPath:
        """The lookup in those shards."""


class WholeTables:
    """The `Placement` without parallelism: this rank holds everything it looks up."""

    def shard(self, pool: Pool, width: int) -> TableShard:
        return TableShard.whole(pool.padded_rows, width)

    def path(self, config: MemoryConfig, pool: Pool, device: torch.device) -> LookupPath:
        return LocalLookup(lookup_backend(config.kernels, device), activation(config), padded=blocks(config) > 1)


class ValuePool(nn.Module):
    """Parameters `values` [padded_rows, Dv] and, where the kind has them, `pre_values` [padded_rows, Dp] of one pool.

    A rank holds the shard of each that its placement says. Uninitialised; each carries its `initializer` (see
    `init.table_stds`).

    Attributes:
        shards: by name of the table, the part that this rank holds.
        num_users: layers that look up in this pool; each has one backward per microbatch.
        settle_update: waits until the tables hold what the last optimizer step made of them; None: they always do.
        grad_ready: called with each table that has a `main_grad`, once per microbatch, when all users' backwards are
            done.
    """

    values: nn.Parameter
    pre_values: nn.Parameter  # where the kind has them

    def __init__(
        self,
        config: MemoryConfig,
        pool: Pool,
        *,
        hidden_size: int,
        num_layers: int,
        ffn_ratio: float,
        placement: Placement | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            num_layers: all of the model's; with `ffn_ratio`, the FFN's inner width / h, it enters sigma_V.
            placement: None: this rank holds the whole tables.
        """
        super().__init__()
        self.pool = pool
        self.num_users = len(pool.layers)
        self.grad_ready: Callable[[nn.Parameter], None] | None = None
        self.settle_update: Callable[[], None] | None = None
        self._backwards = 0
        stds = table_stds(
            config,
            hidden_size=hidden_size,
            num_layers=num_layers,
            ffn_ratio=ffn_ratio,
            keys_per_side=pool.keys_per_side,
        )
        self.placement: Placement = placement or WholeTables()
        widths = {"values": config.value_dim, "pre_values": config.pre_value_dim}
        self.shards = {name: self.placement.shard(pool, widths[name]) for name in stds}
        for name, shard in self.shards.items():
            table = nn.Parameter(torch.empty(shard.shape, dtype=dtype, device=device))
            table.initializer = Normal(stds[name])  # type: ignore[attr-defined]
            self.register_parameter(name, table)
        self._make_path = functools.cache(functools.partial(self.placement.path, config, pool))

    def reset_parameters(self, seed: int) -> None:
        """Draws both tables; the numbers depend on the seed and the number of the pool."""
        for name, table in self.named_parameters():
            self.shards[name].draw_(
                table.data,
                table.initializer,  # type: ignore[attr-defined]
                seed,
                f"pools.{self.pool.index}.{name}",
            )

    def lookup(
        self, indices_TM: torch.Tensor, scores_TMC: torch.Tensor, pre_input_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pooled values [T, Dv] of physical rows `indices_TM`; see `memory.lookup`. May be a collective call.

        pre_input_TD: only where the pool has pre-values; otherwise a row's weight is its score.
        """
        pre_values = self._parameters.get("pre_values")
        if pre_input_TD is None:
            pre_input_TD = self.values.new_empty(len(indices_TM), 0)
        return run_lookup(
            self._make_path(self.values.device),
            indices_TM,
            scores_TMC,
            pre_input_TD,
            self.values,
            self.values.new_empty(len(self.values), 0) if pre_values is None else pre_values,
            after_backward=self.count_backward,
        )

    def settle(self) -> None:
        """Waits for an update of the tables that may be under way; before they are read."""
        if self.settle_update is not None:
            self.settle_update()

    def reset_grad_count(self) -> None:
        """Forgets backwards of a microbatch that was not finished (after an error)."""
        self._backwards = 0

    def count_backward(self) -> None:
        """One user's backward of this microbatch is done. Only recorded as a CUDA graph, it is not."""
        if self.values.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._backwards += 1
        if self._backwards < self.num_users:
            return
        self._backwards = 0
        if self.grad_ready is not None:
            for table in self.parameters():
                if table.requires_grad and getattr(table, "main_grad", None) is not None:
                    self.grad_ready(table)
