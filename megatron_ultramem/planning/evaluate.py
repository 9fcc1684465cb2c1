"""Judges one layout: whether it is legal, whether it fits, how fast it would be."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ultramem.config.schema import Config, ParallelConfig
from megatron_ultramem.config.validate import validate, validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.activations import Options
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.layout import Layout, RankParameters, layout_of, rank_parameters
from megatron_ultramem.planning.memory import GIB, RankMemory, stage_memory
from megatron_ultramem.planning.time_model import StepTime, TimeModel
from megatron_ultramem.planning.workload import Workload

# (name, train.recompute, model.memory.recompute), lightest first.
RECOMPUTE_MODES = (("none", "none", False), ("selective", "selective", False), ("memory", "none", True),
                   ("full", "full", False))  # fmt: skip
# Variable that Transformer Engine reads on Hopper: CUTLASS's grouped GEMM, where the products of all experts have the
# same inner dimension, as those for gradients of weights have not.
ONE_GROUPED_GEMM = "NVTE_USE_CUTLASS_GROUPED_GEMM"
# Settings of `parallel` that follow from the layout, and are named where a config has them otherwise.
FOLLOWING = ("sequence_parallel", "overlap_p2p", "memory_columns", "exchange_capacity", "overlap_exchange")


@dataclass(frozen=True)
class Evaluation:
    """A legal layout and what it takes. `memory` and `parameters` are of the fullest stage, number `stage`."""

    config: Config
    layout: Layout
    stage: int
    parameters: RankParameters
    memory: RankMemory
    fits: bool
    time: StepTime

    @property
    def recompute(self) -> str:
        return recompute_mode(self.config)

    def settings(self, given: Config) -> dict[str, object]:
        """The settings that make this layout of `given`, by their names."""
        p, t = self.config.parallel, self.config.train
        found: dict[str, object] = {
            "parallel.tensor_parallel_size": p.tensor_parallel_size,
            "parallel.pipeline_parallel_size": p.pipeline_parallel_size,
            "parallel.virtual_pipeline_stages": p.virtual_pipeline_stages,
            "parallel.context_parallel_size": p.context_parallel_size,
            "parallel.expert_parallel_size": p.expert_parallel_size,
            "parallel.memory_parallel_size": p.memory_parallel_size,
            "parallel.memory_placement": self.layout.placement.placement,
            "train.micro_batch_size": t.micro_batch_size,
            "train.recompute": t.recompute,
            "model.memory.recompute": self.config.model.memory.recompute,
            "train.cuda_graphs": t.cuda_graphs,
        }
        for name in FOLLOWING:
            if getattr(p, name) != getattr(given.parallel, name):
                found[f"parallel.{name}"] = getattr(p, name)
        if self.layout.placement.placement == "two_level":
            found["parallel.memory_columns"] = self.layout.placement.columns
        return found


def recompute_mode(config: Config) -> str:
    """Name of what is recomputed; `memory` means the memory layers alone."""
    if config.train.recompute == "none" and config.model.memory.recompute:
        return "memory"
    return config.train.recompute


class Evaluator:
    """Judges layouts of one model on one cluster.

    Attributes:
        modes: names of the recompute modes that the model can be trained in, lightest first.
    """

    def __init__(
        self, config: Config, vocab_size: int, cluster: Cluster, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Raises ConfigError for what is wrong with the config in its own layout and without any alike.

        `environment`: variables that a run would have."""
        self.cluster = cluster
        legal = _legal_somehow(config)
        if config.train.fp8.recipe != "none" and not cluster.fp8_times:
            raise ConfigError(
                f"train.fp8.recipe = {config.train.fp8.recipe}: GPUs of cluster {cluster.name} have no FP8 products "
                "(cluster.fp8_times = 0); legal: none"
            )
        self.work = Workload(config.model, vocab_size, config.data.sequence_length)
        # Planned for GPUs with Transformer Engine and the kernels, unless the config says otherwise.
        self.backend = "local" if config.model.backend == "local" else "transformer_engine"
        one_grouped_gemm = self.backend != "local" and environment.get(ONE_GROUPED_GEMM) == "1"
        self.times = TimeModel(self.work, cluster, one_grouped_gemm=one_grouped_gemm)
        self.fused = config.model.memory.kernels != "reference"
        names = [name for name, *_ in RECOMPUTE_MODES if self.work.pools or name != "memory"]
        self.modes = [name for name in names if not _problem(with_recompute(legal, name))]

    def problem(self, config: Config, gpus: int) -> str:
        """Why the layout is not legal on `gpus` ranks; '' if it is."""
        return _problem(config, gpus)

    def memory(self, config: Config, layout: Layout) -> tuple[int, RankMemory]:
        """(stage, memory) of the stage that needs most."""
        options = Options(
            self.backend,
            self.fused,
            layout.element,
            self.work.sequence_length,
            config.train.recompute,
            config.model.memory.recompute,
            config.train.cross_entropy == "transformer_engine",
        )
        stages = [
            (stage.number, stage_memory(self.work, layout, stage, options, self.cluster.fragmentation))
            for stage in self.work.stages(config)
        ]
        return max(stages, key=lambda found: found[1].required)

    def fits(self, memory: RankMemory) -> bool:
        return memory.required <= self.cluster.usable_gib * GIB

    def evaluate(self, config: Config, gpus: int) -> Evaluation:
        """Of a legal layout (see `problem`)."""
        layout = layout_of(config, gpus)
        number, memory = self.memory(config, layout)
        stage = self.work.stages(config)[number]
        return Evaluation(
            config,
            layout,
            number,
            rank_parameters(self.work, layout, stage),
            memory,
            self.fits(memory),
            self.times.step(config, layout),
        )


def _problem(config: Config, gpus: int | None = None) -> str:
    try:
        validate(config)
        if gpus is not None:
            validate_world(config, gpus)
    except ConfigError as error:
        return str(error)
    return ""


def _legal_somehow(config: Config) -> Config:
    """`config` in its own layout, or without any where that one is not legal; raises ConfigError where neither is.

    Its own comes first: some settings (model.moe.dispatcher = flex) need more than one rank.
    """
    if not (problem := _problem(config)):
        return config
    plain = dataclasses.replace(config, parallel=ParallelConfig())
    if _problem(plain):
        raise ConfigError(problem)
    return plain


def on_cluster(config: Config, cluster: Cluster) -> Config:
    """A copy whose links are those of the cluster, as far as the cost model asks."""
    changed = copy.deepcopy(config)
    p = changed.parallel
    p.ranks_per_node, p.exchange_latency_us = cluster.gpus_per_node, cluster.latency_us
    p.intra_node_gb_per_s, p.inter_node_gb_per_s = cluster.intra_node_gb_per_s, cluster.inter_node_gb_per_s
    return changed


def with_recompute(config: Config, mode: str) -> Config:
    """A copy in that recompute mode, without CUDA graphs where they do not go with it."""
    _, recompute, memory = next(found for found in RECOMPUTE_MODES if found[0] == mode)
    graphs = config.train.cuda_graphs
    if mode not in (("none", "selective") if graphs == "memory" else ("none",)):
        graphs = "none"
    model = dataclasses.replace(config.model, memory=dataclasses.replace(config.model.memory, recompute=memory))
    return dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, recompute=recompute, cuda_graphs=graphs)
    )
