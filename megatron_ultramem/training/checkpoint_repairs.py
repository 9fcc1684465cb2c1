"""Repairs of Megatron's checkpoint code, which every supported version needs (compat.py: those that differ).

For torch's AdamW it does not create the state that it is about to load, and restores one step counter for all
parameters; under any optimizer it loses count of the padding between buckets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ultramem.compat import parts_of_state
from megatron_ultramem.training.optimizer_parts import optimizer_parts


def install_adam_checkpoint_fix() -> None:
    """Lets DistributedOptimizer save and load the state of torch.optim.AdamW, with which it steps where neither Apex
    nor Transformer Engine brings an Adam of its own. Its checkpoint code expects theirs. Does nothing with those."""
    import megatron.core.optimizer as mcore_optimizer

    optimizer: Any = mcore_optimizer.DistributedOptimizer
    if not mcore_optimizer.USING_PYTORCH_OPTIMIZER or hasattr(optimizer.sharded_state_dict, "knows_torch_adam"):
        return
    original_state_dict: Callable[..., Any] = optimizer.sharded_state_dict
    original_plain: Callable[..., dict[str, Any]] = optimizer.state_dict
    original_set_states: Callable[..., None] = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(original_state_dict)
    def sharded_state_dict(self: Any, model_state: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        # AdamW creates its state in the first step; a fresh optimizer must have it before a checkpoint can fill it.
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original_state_dict(self, model_state, is_loading, **kwargs)

    @functools.wraps(original_plain)
    def state_dict(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return original_plain(self)
        # No parameter of this kind is on this rank, as value tables on a stage without memory: no AdamW has a step.
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": 0.0}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": groups}}

    @functools.wraps(original_set_states)
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        # AdamW keeps "step" beside the moments; checkpoints hold it once per group, so it is not among `tensors`.
        group_index, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {"step": state["step"], **tensors}
        with torch.no_grad():
            original_set_states(self, model_param, tensors)

    sharded_state_dict.knows_torch_adam = True  # type: ignore[attr-defined]
    optimizer.sharded_state_dict, optimizer.state_dict = sharded_state_dict, state_dict
    optimizer._set_main_param_and_optimizer_states = set_states


@contextmanager
def padding_kept(optimizer: Any) -> Iterator[None]:
    """Within it, DistributedOptimizer describes its state for `fully_reshardable` checkpoints with the right numbers.

    Megatron (0.16 to 0.19) lays the buckets of a buffer end to end without the padding between them, and then cuts
    parameters out of the result at their places in the padded buffer: after the first bucket whose size is not a
    multiple of its alignment, every parameter would be saved with the state of its neighbours, and the last one cut
    short.
    """
    saved: list[tuple[Any, int]] = []
    for chained in optimizer_parts(optimizer):
        for buffer in getattr(chained, "buffers", []):
            saved += [(part, part.numel_unpadded) for part in (buffer, *buffer.buckets)]
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in saved:
            part.numel_unpadded = numel


def share_step(state: dict[Any, Any]) -> None:
    """Gives all parts of a chained optimizer's state the same AdamW step. A checkpoint keeps rank 0's alone, and a kind
    of parameter that rank 0 has none of never stepped there. In groups it is an int: torch's AdamW counts in floats,
    which Transformer Engine's does not take."""
    inner = parts_of_state(state)
    groups = [group for part in inner for group in part["param_groups"] if "step" in group]
    counters = [part["state"] for part in inner if "state" in part]
    steps = [group["step"] for group in groups] + [state.get("common_step", 0) for state in counters]
    latest = max(steps, default=0)
    for group in groups:
        group["step"] = int(latest)
    for counter in counters:
        counter["common_step"] = latest


def separate_step_counters(optimizer: Any) -> None:
    """Gives every parameter its own AdamW "step" after a checkpoint was loaded. Megatron restores one tensor for all of
    them, and torch's AdamW, counting in place, would then count a step once for every parameter."""
    for chained in optimizer_parts(optimizer):
        for state in chained.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
