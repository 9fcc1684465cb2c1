"""What a plan computes on: the model layer by layer, and how a pipeline deals its layers out to stages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_ultramem.config.schema import Config, ModelConfig
from megatron_ultramem.config.validate import stage_of_layer
from megatron_ultramem.memory.geometry import Pool, plan_pools
from megatron_ultramem.memory.kinds import pre_value_dim
from megatron_ultramem.planning.flops import LayerFlops, layer_flops, logits_flops
from megatron_ultramem.planning.parameters import (
    LayerParameters,
    layer_parameters,
    pad_vocabulary,
    row_width,
    table_parameters,
)


@dataclass(frozen=True)
class Layer:
    """One block. Blocks that are alike are equal, so that a plan looks at each kind once."""

    parameters: LayerParameters
    flops: LayerFlops
    side_scores: int  # of a token in the memory layer: keys of both sides, heads and Tucker ranks; 0 without one
    virtual_rows: int  # that the memory layer can address, each with an entry in its shuffle permutation

    @property
    def has_memory(self) -> bool:
        return self.parameters.memory > 0

    @property
    def has_moe(self) -> bool:
        return self.parameters.experts > 0


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds, over all of its model chunks."""

    number: int
    layers: tuple[tuple[Layer, int], ...]  # kinds of blocks and how many of each
    tables: int  # parameters of its pools, before the memory-parallel ranks share them
    largest_table: int  # of these, those of one tensor
    has_embedding: bool
    has_output: bool

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)


class Workload:
    """A model on sequences of one length."""

    def __init__(self, model: ModelConfig, vocab_size: int, sequence_length: int) -> None:
        """`vocab_size` is the tokenizer's, before padding."""
        self.model, self.vocab_size, self.sequence_length = model, vocab_size, sequence_length
        self.vocabulary = pad_vocabulary(model, vocab_size)
        self.pools: list[Pool] = plan_pools(model)
        pool_of = {layer: pool for pool in self.pools for layer in pool.layers}
        self.layers = [
            Layer(
                parameters,
                flops,
                round(flops.memory.key_scores / (2 * model.memory.key_dim)) if flops.memory else 0,
                pool_of[number].virtual_rows if number in pool_of else 0,
            )
            for number, (parameters, flops) in enumerate(
                zip(layer_parameters(model), layer_flops(model, sequence_length), strict=True)
            )
        ]
        self.logits_flops = logits_flops(model, vocab_size)
        self._stages: dict[tuple[int, int], list[Stage]] = {}

    def stages(self, config: Config) -> list[Stage]:
        """The pipeline stages of a legal layout."""
        p = config.parallel
        key = p.pipeline_parallel_size, p.virtual_pipeline_stages
        if key not in self._stages:
            self._stages[key] = self._deal(config)
        return self._stages[key]

    def _deal(self, config: Config) -> list[Stage]:
        stage_of = [stage for stage, _ in stage_of_layer(config)]
        last = config.parallel.pipeline_parallel_size - 1
        return [
            Stage(
                number,
                tuple(Counter(self.layers[layer] for layer, home in enumerate(stage_of) if home == number).items()),
                sum(
                    table_parameters(self.model.memory, pool)
                    for pool in self.pools
                    if stage_of[pool.layers[0]] == number
                ),
                max(
                    (self._largest_table(pool) for pool in self.pools if stage_of[pool.layers[0]] == number), default=0
                ),
                has_embedding=number == 0,
                has_output=number == last,
            )
            for number in range(last + 1)
        ]

    def _largest_table(self, pool: Pool) -> int:
        memory = self.model.memory
        rows = table_parameters(memory, pool) // row_width(memory)
        return rows * max(memory.value_dim, pre_value_dim(memory))
