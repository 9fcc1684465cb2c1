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

from megatron_ultramem.memory.fp8_table import Fp8Table, row_amax
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

    def of_whole_rows(self, amax_N: torch.Tensor) -> None:
        """Makes the largest magnitudes of this rank's part of rows those of the whole rows, in place. May be a
        collective call."""


class WholeTables:
    """The `Placement` without parallelism: this rank holds everything it looks up."""

    def shard(self, pool: Pool, width: int) -> TableShard:
        return TableShard.whole(pool.padded_rows, width)

    def path(self, config: MemoryConfig, pool: Pool, device: torch.device) -> LookupPath:
        return LocalLookup(lookup_backend(config.kernels, device), activation(config), padded=blocks(config) > 1)

    def of_whole_rows(self, amax_N: torch.Tensor) -> None:
        pass


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
        self._make_backend = functools.cache(functools.partial(lookup_backend, config.kernels))
        self._reads_fp8 = config.table_read == "fp8"
        self._copies: dict[str, Fp8Table] = {}  # derived: neither saved nor moved with the module
        self._copied: tuple[object, ...] | None = None  # which tables they are copies of; None: outdated
        self.register_load_state_dict_post_hook(lambda pool, _: pool.outdate())

    def reset_parameters(self, seed: int) -> None:
        """Draws both tables; the numbers depend on the seed and the number of the pool."""
        for name, table in self.named_parameters():
            self.shards[name].draw_(
                table.data,
                table.initializer,  # type: ignore[attr-defined]
                seed,
                f"pools.{self.pool.index}.{name}",
            )
        self.outdate()

    def outdate(self) -> None:
        """The tables hold new numbers: what was derived of them no longer holds."""
        self._copied = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Derives what lookups read where they do not read the tables themselves, if the tables have changed: in place,
        for CUDA graphs. May be a collective call.

        Whoever changes tables through other tensors than these parameters says so by `outdate`.
        """
        if not self._reads_fp8:
            return
        self.settle()
        tables = dict(self.named_parameters())
        state = tuple((table.data_ptr(), table._version) for table in tables.values())
        if state == self._copied:
            return
        if any(
            name not in self._copies
            or (self._copies[name].device, self._copies[name].dtype) != (table.device, table.dtype)
            for name, table in tables.items()
        ):
            names = sorted(tables)  # pre-values first, as the kernels like the scales
            self._copies = dict(zip(names, Fp8Table.like(*(tables[name] for name in names)), strict=True))
        for name, table in tables.items():
            amax_N = row_amax(table)
            self.placement.of_whole_rows(amax_N)
            self._make_backend(table.device).quantize_(self._copies[name], table.detach(), amax_N)
        self._copied = state

    def lookup(
        self, indices_TM: torch.Tensor, scores_TMC: torch.Tensor, pre_input_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pooled values [T, Dv] of physical rows `indices_TM`; see `memory.lookup`. May be a collective call.

        pre_input_TD: only where the pool has pre-values; otherwise a row's weight is its score.
        """
        pre_values = self._parameters.get("pre_values")
        none_ND = self.values.new_empty(len(self.values), 0)
        if pre_input_TD is None:
            pre_input_TD = self.values.new_empty(len(indices_TM), 0)
        self.refresh()
        return run_lookup(
            self._make_path(self.values.device),
            indices_TM,
            scores_TMC,
            pre_input_TD,
            self.values,
            none_ND if pre_values is None else pre_values,
            read=(self._copies["values"], self._copies.get("pre_values", none_ND)) if self._reads_fp8 else None,
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
