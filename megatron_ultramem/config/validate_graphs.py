"""Checks of train.cuda_graphs, before a process group or a model exists."""

from __future__ import annotations

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers
from megatron_ultramem.memory.kinds import tucker_penalty
from megatron_ultramem.parallel.cost_model import choose, rows_hold_all

KINDS = ("ultramem_v2",)
PLACEMENTS = ("replicated", "columns", "rows")  # whose exchanges have static sizes, or can


def validate_cuda_graphs(config: Config) -> None:
    """Raises ConfigError for the first setting that graphs of the memory layers do not go with."""
    m, p, train = config.model, config.parallel, config.train
    if train.cuda_graphs == "none":
        return
    if not parse_layers(m.memory.layers, m.num_layers, "model.memory.layers"):
        raise _refusal("model.memory.layers", m.memory.layers, "at least one layer")
    if tucker_penalty(m.memory) > 0 and m.memory.tucker_rank > 2:  # its singular values are not cuSOLVER's up to 2 x 2
        raise _refusal(
            "model.memory.tucker_penalty_coeff", tucker_penalty(m.memory), "0, or model.memory.tucker_rank = 2"
        )
    if choose(config).placement == "rows" and not rows_hold_all(config, p.memory_parallel_size):
        needed = (
            f"at least parallel.memory_parallel_size = {p.memory_parallel_size} with parallel.memory_placement = rows"
        )
        raise _refusal("parallel.exchange_capacity", p.exchange_capacity, needed)
    for name, value, legal in (
        ("model.memory.kind", m.memory.kind, KINDS),
        ("model.memory.recompute", m.memory.recompute, (False,)),
        ("train.recompute", train.recompute, ("none", "selective")),
        ("parallel.pipeline_parallel_size", p.pipeline_parallel_size, (1,)),
        ("parallel.overlap_param_gather", p.overlap_param_gather, (False,)),
        ("parallel.memory_placement", choose(config).placement, PLACEMENTS),
    ):
        if value not in legal:
            raise _refusal(name, value, " or ".join(str(one).lower() for one in legal))


def _refusal(name: str, value: object, legal: str) -> ConfigError:
    return ConfigError(
        f"train.cuda_graphs = memory with {name} = {str(value).lower()}; legal: {legal}, or cuda_graphs = none"
    )
