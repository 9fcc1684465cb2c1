"""Puts a plan together: what a config costs, whether its layout fits a cluster, and which layouts would."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate_memory import expert_group_size
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.access import DECODING_BATCHES, Comparison, decoding_access, training_access
from megatron_ultramem.planning.cluster_sizes import LARGEST_CLUSTER, largest_cluster, smallest_cluster
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.communication import Links, Transfer, step_traffic
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster, with_recompute
from megatron_ultramem.planning.flops import FlopsPerToken, flops_per_token
from megatron_ultramem.planning.memory import RankMemory, host_memory
from megatron_ultramem.planning.parameters import ParameterCounts, count_parameters
from megatron_ultramem.planning.search import (
    Found,
    as_overrides,
    binding_constraint,
    needs,
    search,
)


@dataclass(frozen=True)
class Plan:
    """Everything that `ultramem plan` prints.

    Attributes:
        problem: why the config's own layout is not legal or does not fit; '' if it is and does.
        shown: the layout that the details are of: the config's own, or the best that was found.
        modes: that layout under every legal kind of recomputation, by name.
        found: layouts that fit (None without a search).
    """

    config: Config
    cluster: Cluster
    gpus: int
    parameters: ParameterCounts
    flops: FlopsPerToken
    access: list[Comparison]
    problem: str
    shown: Evaluation
    modes: dict[str, Evaluation]
    traffic: dict[str, Transfer]
    found: Found | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: bytes, seconds, FLOPs."""
        flops = dataclasses.asdict(self.flops) | {"forward": self.flops.forward, "training": self.flops.training}
        return {
            "cluster": dataclasses.asdict(self.cluster) | {"gpus": self.gpus},
            "parameters": dataclasses.asdict(self.parameters),
            "flops_per_token": flops,
            "memory_access_per_token": [dataclasses.asdict(comparison) for comparison in self.access],
            "problem": self.problem,
            "layout": layout_dict(self.shown, self.config),
            "recompute": {mode: memory_dict(shown.memory) for mode, shown in self.modes.items()},
            "communication_per_step": {name: dataclasses.asdict(moved) for name, moved in self.traffic.items()},
            "layouts": [layout_dict(found, self.config) for found in self.found.fitting] if self.found else None,
        }


def memory_dict(memory: RankMemory) -> dict[str, float]:
    """Every part in bytes, `peak` (what torch allocates) and `required` (with the allowance)."""
    return dataclasses.asdict(memory) | {"peak": memory.peak, "required": memory.required}


def layout_dict(shown: Evaluation, given: Config) -> dict[str, Any]:
    """One layout of the config that was given, with its memory and time."""
    layout = dataclasses.asdict(shown.layout)
    return {
        "settings": shown.settings(given),
        "layout": layout | {"placement": shown.layout.placement.placement},
        "fits": shown.fits,
        "fullest_stage": shown.stage,
        "parameters_of_rank": dataclasses.asdict(shown.parameters),
        "memory_of_rank": memory_dict(shown.memory),
        "host_memory_of_rank": host_memory(shown.layout, shown.parameters.tables),
        "step_seconds": shown.time.seconds,
        "tokens_per_s": shown.time.tokens_per_s,
        "mfu": shown.time.mfu,
        "bound_by": shown.time.bound_by,
        "seconds_by_part": dataclasses.asdict(shown.time.times),
    }


def fewest_gpus(config: Config) -> int:
    """Ranks that the config's own layout needs at least."""
    p = config.parallel
    replica = math.lcm(p.tensor_parallel_size * p.context_parallel_size, expert_group_size(config))
    return p.pipeline_parallel_size * replica


def make_plan(
    config: Config, vocab_size: int, cluster: Cluster, gpus: int | None = None, *, look_for_layouts: bool = True
) -> Plan:
    """
    Args:
        config: may hold a layout that is not legal; everything else must be.
        vocab_size: of the tokenizer, before padding.
        gpus: None: as few as the config's own layout needs.

    Raises:
        ConfigError: for settings that are wrong under any layout, and where no layout fits: naming the constraint that
            binds and the smallest cluster that would do.
    """
    config = on_cluster(config, cluster)
    evaluator = Evaluator(config, vocab_size, cluster)
    gpus = fewest_gpus(config) if gpus is None else gpus
    problem = evaluator.problem(config, gpus)
    own = None if problem else evaluator.evaluate(config, gpus)
    if own is not None and not own.fits:
        problem = f"a rank of stage {own.stage} {needs(own.memory, cluster)}"
    found = search(evaluator, config, gpus) if look_for_layouts else None
    if found is not None and not found.fitting:
        if own is None or not own.fits:
            said = _cannot_be_laid_out(evaluator, config, found)
            raise ConfigError(f"the config's own layout: {problem}; {said}")
        found.fitting.append(own)  # which may split what the search does not, by three or five
    shown = own if own is not None else found.fitting[0] if found is not None else None
    if shown is None:
        raise ConfigError(f"the layout of the config is not legal on {gpus} GPUs: {problem}")
    modes = {name: evaluator.evaluate(with_recompute(shown.config, name), gpus) for name in evaluator.modes}
    element = shown.layout.element
    tokens = shown.layout.micro_batch * config.data.sequence_length
    return Plan(
        config=config,
        cluster=cluster,
        gpus=gpus,
        parameters=count_parameters(config.model, vocab_size),
        flops=flops_per_token(config.model, vocab_size, config.data.sequence_length),
        access=[
            training_access(evaluator.work, tokens, element),
            *(decoding_access(evaluator.work, batch, element) for batch in DECODING_BATCHES),
        ],
        problem=problem,
        shown=shown,
        modes=modes,
        traffic=_busiest(evaluator, shown),
        found=found,
    )


def _cannot_be_laid_out(evaluator: Evaluator, config: Config, found: Found) -> str:
    constraint = binding_constraint(evaluator, found)
    smallest = smallest_cluster(evaluator, config)
    name = evaluator.cluster.name
    said = f"no layout fits {found.gpus} x {name}: {constraint}"
    if smallest is None:
        return f"{said}; no cluster of up to {LARGEST_CLUSTER} of them would do either"
    named = [("smallest cluster that would do", smallest)]
    if smallest.layout.gpus < found.gpus:
        named.append(("largest with fewer GPUs", largest_cluster(evaluator, config, found.gpus) or smallest))
    for what, shown in named:
        said += f"; the {what}: {shown.layout.gpus} x {name}, with {as_overrides(shown.settings(config))}"
    return said


def _busiest(evaluator: Evaluator, shown: Evaluation) -> dict[str, Transfer]:
    """By group, the traffic of the stage that has most of it."""
    links = Links(evaluator.cluster, shown.layout)
    found: dict[str, Transfer] = {}
    for stage in evaluator.work.stages(shown.config):
        for name, moved in step_traffic(shown.config, evaluator.work, shown.layout, links, stage).items():
            found[name] = max(found.get(name, Transfer()), moved, key=lambda transfer: transfer.received)
    return {name: moved for name, moved in found.items() if moved.received}
