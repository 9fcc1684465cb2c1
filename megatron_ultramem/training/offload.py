"""Value tables whose optimizer lives in host memory: on the device a table costs its parameters and gradient alone.

After clipping, the gradients of the tables go to the host, where a thread updates fp32 master weights and moments
(`host_adam.py`) and sends the new values back. The next step's forward goes on meanwhile, and waits where it first
looks up in a table: the numbers are the same as without the overlap. Where replicas of a table each update a part of it
(distributed optimizer, expert-data parallelism) there is no overlap: the parts are gathered at the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_ultramem.config.schema import Config
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.training.host_adam import AdamSettings, choose_backend, use_threads
from megatron_ultramem.training.offload_parts import HostTable, take_tables
from megatron_ultramem.training.optimizer_parts import optimizer_parts


def offload_tables(
    config: Config, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """The optimizer that stands for Megatron's, with the optimizer of the tables in host memory; the same if
    optimizer.value_offload is none."""
    o = config.optimizer
    if o.value_offload == "none":
        return optimizer
    parts = optimizer_parts(optimizer)
    replicas = parallel_state.get_expert_data_parallel_world_size()
    offloaded = OffloadingOptimizer(
        parts,
        choose_backend(o.value_offload),
        threads=o.offload_threads,
        overlaps=not (config.parallel.distributed_optimizer and replicas > 1),
    )
    tables = {id(table.param): table for table in offloaded.tables}
    for pool in value_pools(chunks):
        mine = [tables[id(param)] for param in pool.parameters() if id(param) in tables]
        pool.settle_update = partial(offloaded.settle, mine)
    return offloaded


class OffloadingOptimizer(ChainedOptimizer):
    """Megatron's optimizers, of which the tables were taken into host memory.

    Args:
        backend: of `host_adam.choose_backend`.
        threads: of the update; None: this rank's share of the cores.
        overlaps: the update may go on after the step; `settle` then waits for it.
    """

    def __init__(
        self, parts: list[MegatronOptimizer], backend: str, *, threads: int | None = None, overlaps: bool = True
    ) -> None:
        super().__init__(parts)
        taken = [take_tables(part, backend) for part in parts]
        self.tables: list[HostTable] = [table for tables, _ in taken for table in tables]
        self.backend, self._overlaps = backend, overlaps
        self._saved_lists = [saved for _, saved in taken]
        self._device = self.tables[0].param.device if self.tables else torch.device("cpu")
        self._worker = ThreadPoolExecutor(1, "table-update", partial(_prepare_thread, self._device, threads))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of the master weights that were taken
            self._out, self._in = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
            for table in self.tables:
                table.fetched, table.arrived = [torch.cuda.Event() for _ in table.adam.chunks], torch.cuda.Event()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        found: bool = super().prepare_grads()
        for table in self.tables:
            table.lent.grad = table.device_grad.view(table.lent.shape)
        return found

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Updates everything; with the overlap, the tables' new values are on their way when it returns."""
        if self._overlaps:
            done: bool = super().step_with_ready_grads()
            self._start_updates()
        else:
            self._start_updates()
            self.settle(self.tables)
            done = super().step_with_ready_grads()
        return done

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.lent.grad = None

    def settle(self, tables: Sequence[HostTable]) -> None:
        """Makes the new values of tables what the device reads from now on. Raises what their update raised."""
        for table in tables:
            if table.pending is not None:
                table.pending.result()
                table.pending = None
                if table.arrived is not None:
                    # Memory layers may have a stream of their own.
                    torch.cuda.current_stream(self._device).wait_event(table.arrived)
                    torch.cuda.default_stream(self._device).wait_event(table.arrived)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.settle(self.tables)
        with self._lists_of_checkpoints():
            return super().sharded_state_dict(*args, **kwargs)

    def state_dict(self) -> Any:
        self.settle(self.tables)
        with self._lists_of_checkpoints():
            return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.settle(self.tables)
        with self._lists_of_checkpoints():
            super().load_state_dict(state_dict)
        for table in self.tables:
            table.read_back()

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        self.settle(self.tables)
        super().reload_model_params(state_dict)
        for table in self.tables:
            table.master.copy_(table.values)

    def _start_updates(self) -> None:
        """Sends all gradients to the host, and queues the updates in the order of the tables."""
        self.settle(self.tables)  # those that no layer has looked up in
        if self._device.type == "cuda":
            main = torch.cuda.current_stream(self._device)
            self._out.wait_stream(main)
            with torch.cuda.stream(self._out):
                for table in self.tables:
                    for chunk, fetched in zip(table.adam.chunks, table.fetched, strict=True):
                        table.grad[chunk].copy_(table.device_grad[chunk], non_blocking=True)
                        fetched.record(self._out)
            self._in.wait_stream(main)  # what reads the old values was queued before
            main.wait_stream(self._out)  # the next step clears the gradients
        else:
            for table in self.tables:
                table.grad.copy_(table.device_grad)
        for table in self.tables:
            table.count_step()
            table.pending = self._worker.submit(self._update, table, table.step, table.settings())

    def _update(self, table: HostTable, step: int, settings: AdamSettings) -> None:
        values = table.values

        def wait_for(number: int) -> None:
            if table.fetched:
                table.fetched[number].synchronize()

        def send(chunk: slice) -> None:
            if table.arrived is None:
                values[chunk].copy_(table.master[chunk])
                return
            # The place of the chunk's gradient is free now, and pinned.
            staged = table.grad[chunk].view(values.dtype)[: chunk.stop - chunk.start]
            staged.copy_(table.master[chunk])
            with torch.cuda.stream(self._in):
                values[chunk].copy_(staged, non_blocking=True)

        with torch.no_grad():
            table.adam.update(table.grad, step, settings, wait_for=wait_for, updated=send)
        if table.arrived is not None:
            table.arrived.record(self._in)

    @contextmanager
    def _lists_of_checkpoints(self) -> Iterator[None]:
        """Within it, Float16OptimizerWithFloat16Params knows of the tables' master weights."""
        before = []
        for part, saved in zip(self.chained_optimizers, self._saved_lists, strict=True):
            if saved is not None:
                before.append((part, part.float16_groups, part.fp32_from_float16_groups))
                part.float16_groups, part.fp32_from_float16_groups = saved.params, saved.masters
        try:
            yield
        finally:
            for part, params, masters in before:
                part.float16_groups, part.fp32_from_float16_groups = params, masters


def _prepare_thread(device: torch.device, threads: int | None) -> None:
    use_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
