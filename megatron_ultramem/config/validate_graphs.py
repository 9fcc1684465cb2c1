"""Checks of train.cuda_graphs, before a process group or a model exists."""

from __future__ import annotations

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers
from megatron_ultramem.memory.kinds import tucker_penalty
from megatron_ultramem.parallel.cost_model import choose, rows_hold_all

KINDS_BY_LAYER = ("ultramem_v2",)  # whose graphs of memory layers alone were run
Rule = tuple[str, object, tuple[object, ...]]  # setting, its value, legal ones
# What parallel.exchange_capacity must reach where sizes would follow the tokens: the ranks that share the rows.
RANKS_OF_ROWS = {"rows": "parallel.memory_parallel_size", "two_level": "parallel.memory_parallel_size / memory_columns"}


def validate_cuda_graphs(config: Config) -> None:
    """Raises ConfigError for the first setting that graphs do not go with: what is recorded must have static sizes, and
    the host must not look at a result in it."""
    m, p, train = config.model, config.parallel, config.train
    if train.cuda_graphs == "none":
        return
    has_memory = bool(parse_layers(m.memory.layers, m.num_layers, "model.memory.layers"))
    rules: list[Rule] = [
        ("parallel.pipeline_parallel_size", p.pipeline_parallel_size, (1,)),
        ("parallel.overlap_param_gather", p.overlap_param_gather, (False,)),
    ]
    if train.cuda_graphs == "layers":
        _check(config, [*rules, *_rules_of_layers(config)], "none")
        return
    if train.cuda_graphs == "memory":
        if not has_memory:
            raise _refusal(config, "model.memory.layers", m.memory.layers, "at least one layer", "none")
        rules += [
            ("train.recompute", train.recompute, ("none", "selective")),
            ("model.memory.kind", m.memory.kind, KINDS_BY_LAYER),
        ]
    if has_memory:
        rules.append(("model.memory.recompute", m.memory.recompute, (False,)))
    _check(config, rules, "none")
    # Its singular values are cuSOLVER's, which waits for the device, beyond 2 x 2.
    if has_memory and tucker_penalty(m.memory) > 0 and m.memory.tucker_rank > 2:
        name, legal = "model.memory.tucker_penalty_coeff", "0, or model.memory.tucker_rank = 2"
        raise _refusal(config, name, tucker_penalty(m.memory), legal, "none")
    if has_memory:
        _check_exchange(config)
    if train.cuda_graphs == "full":
        _check(config, _rules_of_whole_models(config), "memory or none" if has_memory else "none")


def _check_exchange(config: Config) -> None:
    """Sizes must not follow the tokens: by rows, there must be room for all of them."""
    choice = choose(config)
    sharing = choice.ranks // choice.columns
    if choice.placement in RANKS_OF_ROWS and not rows_hold_all(config, sharing):
        needed = (
            f"at least {RANKS_OF_ROWS[choice.placement]} = {sharing} with parallel.memory_placement = "
            f"{choice.placement}"
        )
        raise _refusal(config, "parallel.exchange_capacity", config.parallel.exchange_capacity, needed, "none")


def _rules_of_layers(config: Config) -> list[Rule]:
    m, train = config.model, config.train
    return [
        ("model.memory.layers", m.memory.layers, ("none",)),  # memory layers have graphs of their own
        ("model.backend", m.backend, ("auto", "transformer_engine")),
        ("model.attention_dropout", m.attention_dropout, (0.0,)),
        ("model.hidden_dropout", m.hidden_dropout, (0.0,)),
        ("data.mask_document_boundaries", config.data.mask_document_boundaries, (False,)),
        ("train.recompute", train.recompute, ("none",)),
        ("train.precision", train.precision, ("bf16",)),  # of the inputs that Megatron records with
        ("train.fused_weight_gradients", train.fused_weight_gradients, (False,)),  # DDP would not see them in a replay
        ("train.fp8.recipe", train.fp8.recipe, ("none",)),
    ]


def _rules_of_whole_models(config: Config) -> list[Rule]:
    m, p = config.model, config.parallel
    rules: list[Rule] = [
        ("model.backend", m.backend, ("auto", "transformer_engine")),
        ("model.moe.layers", m.moe.layers, ("none",)),  # the dispatcher's sizes follow the tokens
        ("model.attention_dropout", m.attention_dropout, (0.0,)),  # it switches generators
        ("data.mask_document_boundaries", config.data.mask_document_boundaries, (False,)),  # sizes follow documents
        ("train.recompute", config.train.recompute, ("none",)),
        ("train.fp8.recipe", config.train.fp8.recipe, ("none", "tensorwise", "blockwise")),  # delayed: scales carry on
        ("train.fp8.param_gather", config.train.fp8.param_gather, (False,)),
        ("parallel.context_parallel_size", p.context_parallel_size, (1,)),
        ("parallel.overlap_grad_reduce", p.overlap_grad_reduce, (False,)),  # gradients come with the graph's end
    ]
    if p.tensor_parallel_size > 1:
        rules.append(("model.hidden_dropout", m.hidden_dropout, (0.0,)))  # it switches generators
    return rules


def _check(config: Config, rules: list[Rule], others: str) -> None:
    for name, value, legal in rules:
        if value not in legal:
            raise _refusal(config, name, value, " or ".join(str(one).lower() for one in legal), others)


def _refusal(config: Config, name: str, value: object, legal: str, others: str) -> ConfigError:
    return ConfigError(
        f"train.cuda_graphs = {config.train.cuda_graphs} with {name} = {str(value).lower()}; legal: {legal}, or "
        f"cuda_graphs = {others}"
    )
