"""How value tables are taken out of Megatron's optimizers: where those keep master weights, gradients and moments.

Megatron has one optimizer for expert parameters, to which tables belong: a DistributedOptimizer, which updates a part
of every parameter and gathers the rest; a Float16OptimizerWithFloat16Params, with whole fp32 copies; or an
FP32Optimizer, whose parameters are their own master weights. In each of them a table's place is taken by a `lent`
tensor, which has its shape and carries its gradient through norm and clipping, but no memory. Checkpoints keep their
form: what Megatron reads and writes as state of the lent tensor lies in host memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from megatron_ultramem.training.host_adam import AdamSettings, HostAdam
from megatron_ultramem.training.host_memory import host_zeros


@dataclass(eq=False)
class HostTable:
    """A value table, or the N elements of it that this rank updates, with its optimizer in host memory."""

    param: nn.Parameter  # on the device
    span: slice  # of the flattened parameter
    group: dict[str, Any]  # Megatron's, with the learning rate of the step
    lent: Tensor
    master: Tensor  # fp32 [N], host
    exp_avg: Tensor  # fp32 [N], host
    exp_avg_sq: Tensor  # fp32 [N], host
    grad: Tensor  # fp32 [N], host, pinned where there is a GPU
    adam: HostAdam
    step: int = 0  # updates so far
    pending: Future[None] | None = None  # of the update under way
    fetched: list[torch.cuda.Event] = field(default_factory=list)  # of each chunk: its gradient is on the host (GPU)
    arrived: torch.cuda.Event | None = None  # the new values have arrived at the device
    state: dict[str, Any] = field(default_factory=dict)  # as Megatron sees it

    @property
    def values(self) -> Tensor:
        """The elements of the parameter, [N] on the device."""
        return self.param.data.view(-1)[self.span]

    @property
    def device_grad(self) -> Tensor:
        """The gradient, fp32 [N] on the device."""
        grad: Tensor = self.param.main_grad  # type: ignore[attr-defined]
        return grad.view(-1)[self.span]

    def settings(self) -> AdamSettings:
        group = self.group
        return AdamSettings(group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"])

    def count_step(self) -> None:
        """Begins an update."""
        self.step += 1
        if USING_PYTORCH_OPTIMIZER:
            self.state["step"] = torch.tensor(float(self.step))
        else:
            self.group["step"] = self.step

    def read_back(self) -> None:
        """Takes over what a checkpoint has put into Megatron's places."""
        self.step = int(self.state["step"] if USING_PYTORCH_OPTIMIZER else self.group.get("step", 0))
        if self.param.dtype == torch.float32:
            self.master.copy_(self.values)


class PartlyOnHost:
    """The inner optimizer of one of Megatron's, of which the tables' groups are updated elsewhere.

    Args:
        inner: torch's or Transformer Engine's Adam.
        tables: by their lent tensors.
    """

    def __init__(self, inner: torch.optim.Optimizer, tables: dict[Tensor, HostTable]) -> None:
        self._inner = inner
        self.param_groups: list[dict[str, Any]] = inner.param_groups
        self.state: defaultdict[Tensor, dict[str, Any]] = inner.state
        inner.param_groups = [
            group for group in self.param_groups if not any(param in tables for param in group["params"])
        ]
        self.state.update({lent: table.state for lent, table in tables.items()})

    def step(self) -> None:
        if any(group["params"] for group in self._inner.param_groups):
            self._inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """In torch's form; the tensors are the optimizer's own."""
        number: dict[Tensor, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                number[param] = len(number)
        return {
            "state": {number[param]: dict(state) for param, state in self.state.items() if param in number},
            "param_groups": [
                {**group, "params": [number[param] for param in group["params"]]} for group in self.param_groups
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies into tensors that are there, wherever they lie."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    mine = self.state[param].get(name)
                    if name == "step" or not isinstance(mine, Tensor):
                        self.state[param][name] = _own(name, value, param)
                    elif mine is not value:
                        mine.copy_(value)
            group.update({name: value for name, value in saved.items() if name != "params"})


@dataclass(frozen=True)
class SavedLists:
    """The lists of a Float16OptimizerWithFloat16Params as its checkpoints need them, with the tables."""

    params: list[list[nn.Parameter]]
    masters: list[list[Tensor]]


def take_tables(part: MegatronOptimizer, backend: str) -> tuple[list[HostTable], SavedLists | None]:
    """Moves master weights and moments of the tables of one of Megatron's optimizers into host memory.

    Returns them, and for a Float16OptimizerWithFloat16Params the lists that its checkpoints need.
    """
    if not getattr(part, "param_groups", None):
        return [], None
    tables = [_take(part, backend, *place) for place in list(_places(part))]
    if not tables:
        return [], None
    saved = _leave_out_of_copies(part, tables)
    _create_state(part, {id(table.lent) for table in tables})
    part.optimizer = PartlyOnHost(part.optimizer, {table.lent: table for table in tables})
    return tables, saved


def _places(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, slice, int, int]]:
    """Tables with the span that this rank updates, the number of their group, and their place in it."""
    if isinstance(part, DistributedOptimizer):
        for param, (group, place) in part.model_param_group_index_map.items():
            if _is_table(param):
                span = part._get_model_param_range_map(param)["param"]
                yield param, slice(span.start, span.end), group, place
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for number, (params, masters) in enumerate(
            zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        ):
            for param, master in zip(params, masters, strict=True):
                if _is_table(param):
                    in_group = [id(other) for other in part.optimizer.param_groups[number]["params"]]
                    yield param, slice(0, param.numel()), number, in_group.index(id(master))
    else:
        for number, group in enumerate(part.optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                if _is_table(param):
                    yield param, slice(0, param.numel()), number, place


def _take(
    part: MegatronOptimizer, backend: str, param: nn.Parameter, span: slice, number: int, place: int
) -> HostTable:
    group = part.optimizer.param_groups[number]
    on_device: Tensor = group["params"][place]
    lent, shape = on_device, on_device.shape
    has_master = param.dtype != torch.float32
    master, exp_avg, exp_avg_sq = (host_zeros(on_device.numel()) for _ in range(3))
    master.copy_(on_device.detach().view(-1))
    if has_master:
        lent = torch.zeros(1, dtype=torch.float32, device=param.device).expand(shape)
        tensor_parallel.copy_tensor_model_parallel_attributes(lent, param)
        group["params"][place] = lent
        param.main_param = None  # type: ignore[attr-defined]  # Megatron's reference to the copy on the device
    table = HostTable(
        param, span, group, lent, master, exp_avg, exp_avg_sq, host_zeros(master.numel(), pin_for=param.device),
        HostAdam(master, exp_avg, exp_avg_sq, backend),
    )  # fmt: skip
    table.state.update({"exp_avg": exp_avg.view(shape), "exp_avg_sq": exp_avg_sq.view(shape)})
    if has_master and isinstance(part, DistributedOptimizer):
        table.state["param"] = master  # in its checkpoints it stands for the lent tensor
    if USING_PYTORCH_OPTIMIZER:
        table.state["step"] = torch.tensor(0.0)
    return table


def _leave_out_of_copies(part: MegatronOptimizer, tables: list[HostTable]) -> SavedLists | None:
    """Takes the tables off the lists by which Megatron copies between parameters and master weights on the device."""
    by_param = {id(table.param): table for table in tables}
    saved = None
    if isinstance(part, DistributedOptimizer):
        params_of_groups = part.model_float16_groups
        others = [part.shard_float16_groups, part.shard_fp32_from_float16_groups]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        params_of_groups, others = part.float16_groups, [part.fp32_from_float16_groups]
        masters = [
            [by_param[id(param)].master.view(param.shape) if id(param) in by_param else master
             for param, master in zip(params, copies, strict=True)]
            for params, copies in zip(params_of_groups, part.fp32_from_float16_groups, strict=True)
        ]  # fmt: skip
        saved = SavedLists([list(params) for params in params_of_groups], masters)
    else:
        return None
    for number, params in enumerate(params_of_groups):
        kept = [place for place, param in enumerate(params) if id(param) not in by_param]
        for lists in (params_of_groups, *others):
            lists[number] = [lists[number][place] for place in kept]
    return saved


def _create_state(part: MegatronOptimizer, lent: set[int]) -> None:
    """Gives the other parameters (MoE experts) the state that Adam would create in its first step: Megatron's
    checkpoint code takes an optimizer with any state for one that has all of it."""
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            state = part.optimizer.state[param]
            if id(param) not in lent and not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                if USING_PYTORCH_OPTIMIZER:
                    state["step"] = torch.tensor(0.0)


def _own(name: str, value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name == "step" else value.to(param.device, copy=True)


def _is_table(param: Tensor) -> bool:
    return bool(getattr(param, "is_value_table", False))
