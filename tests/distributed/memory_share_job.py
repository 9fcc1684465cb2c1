"""The job that watches every tensor a rank allocates while it builds a model and trains a step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.config import load_config
from megatron_ultramem.memory import init
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed.layout_job import Shards, shards


class LargestStorage(TorchDispatchMode):
    """The bytes of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def largest_allocation(overrides: list[str], block_elements: int) -> tuple[int, int]:
    """(largest storage, bytes of this rank's part of the tables) over building, initialising and one training step."""
    with mock.patch.object(init, "BLOCK_ELEMENTS", block_elements), LargestStorage() as seen:
        run = set_up(load_config(None, overrides))
        train_step(run)
    tables = [param for pool in value_pools(run.model) for param in pool.parameters()]
    return seen.largest, sum(table.nbytes for table in tables)


def initial_shards(overrides: list[str], block_elements: int) -> Shards:
    """The parameters before any step."""
    with mock.patch.object(init, "BLOCK_ELEMENTS", block_elements):
        return shards(set_up(load_config(None, overrides)))


def bitwise_run(overrides: list[str], steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and this rank's parameters after some steps."""
    run = set_up(load_config(None, overrides))
    losses = [train_step(run)["loss"] for _ in range(steps)]
    return losses, {name: param.detach().numpy().copy() for name, param in run.model[0].named_parameters()}
