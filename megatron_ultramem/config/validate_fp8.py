"""Checks of train.fp8, before a process group or a model exists."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ultramem.config.schema import Config, Fp8Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers
from megatron_ultramem.memory.kinds import blocks, pre_value_dim, query_width, replaces_ffn

MULTIPLE = 16  # of every side of an FP8 matrix product: what cuBLAS takes
_DELAYED = ("margin", "amax_history_len", "amax_compute_algo")
_BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def fp8_projections(config: Config) -> bool:
    """Whether the projections of memory layers are Transformer Engine's and run in FP8."""
    return config.train.fp8.recipe != "none" and config.train.fp8.memory_projections


def fp8_format(fp8: Fp8Config) -> str:
    """'hybrid' or 'e4m3'."""
    return fp8.format or ("e4m3" if fp8.recipe == "blockwise" else "hybrid")


def validate_fp8(config: Config) -> None:
    """Raises ConfigError for the first setting or size that FP8 matrix products do not go with."""
    fp8 = config.train.fp8
    if fp8.recipe == "none":
        if fp8.param_gather:
            raise ConfigError("train.fp8.param_gather = true would be ignored by recipe = none; legal: false")
        return
    _refuse_ignored(fp8)
    if config.train.precision != "bf16":
        raise _refusal(fp8, "train.precision", config.train.precision, "bf16")
    if config.model.backend == "local":
        raise _refusal(fp8, "model.backend", "local", "transformer_engine or auto")
    if fp8.param_gather and not config.parallel.distributed_optimizer:
        raise ConfigError("train.fp8.param_gather = true needs parallel.distributed_optimizer = true; legal: false")
    if fp8.param_gather and config.checkpoint.load != "none" and not config.checkpoint.load_optimizer:
        raise ConfigError(
            "train.fp8.param_gather = true with checkpoint.load_optimizer = false: the optimizer would begin with "
            "weights rounded to FP8; legal: param_gather = false, or load_optimizer = true"
        )
    _check_bf16_layers(config)
    if fp8.memory_projections and _memory_layers(config):
        for name, value in (
            ("train.cuda_graphs = memory", config.train.cuda_graphs == "memory"),
            ("parallel.overlap_exchange", config.parallel.overlap_exchange),
        ):
            if (
                value
            ):  # recorded outside of the FP8 context; a workspace that Transformer Engine has once for all streams
                raise ConfigError(
                    f"{name} with FP8 projections of the memory layers (train.fp8.recipe = {fp8.recipe}): they can "
                    f"neither be recorded nor run beside other layers; legal: train.fp8.memory_projections = false"
                )
    for name, size, setting in _sizes(config):
        if size % MULTIPLE:
            raise ConfigError(
                f"train.fp8.recipe = {fp8.recipe}: {name} = {size} ({setting}) is not a multiple of {MULTIPLE}, as FP8 "
                f"matrix products need it; legal: settings that make it one, or recipe = none"
            )


def _refuse_ignored(fp8: Fp8Config) -> None:
    default = Fp8Config()
    if fp8.recipe != "delayed":
        names = [name for name in _DELAYED if getattr(fp8, name) != getattr(default, name)]
    elif fp8.first_last_layers_bf16:
        raise ConfigError(
            "train.fp8.first_last_layers_bf16 = true with recipe = delayed: its scales are updated for all layers at "
            "once; legal: false, or recipe = tensorwise or blockwise"
        )
    else:
        names = []
    if not fp8.first_last_layers_bf16:
        names += [name for name in _BF16_LAYERS if getattr(fp8, name) != getattr(default, name)]
    if names:
        raise ConfigError(
            f"train.fp8.{names[0]} = {getattr(fp8, names[0])} would be ignored by recipe = {fp8.recipe}, "
            f"first_last_layers_bf16 = {str(fp8.first_last_layers_bf16).lower()}; legal: {getattr(default, names[0])}"
        )


def _check_bf16_layers(config: Config) -> None:
    fp8, layers = config.train.fp8, config.model.num_layers
    if not fp8.first_last_layers_bf16:
        return
    stage = layers // config.parallel.pipeline_parallel_size
    for name in _BF16_LAYERS:
        if getattr(fp8, name) > stage:
            raise ConfigError(
                f"train.fp8.{name} = {getattr(fp8, name)}: legal: at most the {stage} layers of a pipeline stage"
            )
    if fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 >= layers:
        raise ConfigError(
            f"train.fp8.num_layers_at_start_in_bf16 = {fp8.num_layers_at_start_in_bf16} and num_layers_at_end_in_bf16 "
            f"= {fp8.num_layers_at_end_in_bf16} leave none of the {layers} layers in FP8; legal: fewer than {layers} "
            "together, or recipe = none"
        )


def _memory_layers(config: Config) -> list[int]:
    return parse_layers(config.model.memory.layers, config.model.num_layers, "model.memory.layers")


def _sizes(config: Config) -> Iterator[tuple[str, int, str]]:
    """Sides of the FP8 matrix products of a rank: what it is, its size, the settings it comes from."""
    m, p, tp = config.model, config.parallel, config.parallel.tensor_parallel_size
    moe = set(parse_layers(m.moe.layers, m.num_layers, "model.moe.layers"))
    memory = set(_memory_layers(config))
    yield "width of the model", m.hidden_size, "model.hidden_size"
    head, groups = m.head_dim or m.hidden_size // m.num_attention_heads, m.num_query_groups or m.num_attention_heads
    split = "" if tp == 1 else " / parallel.tensor_parallel_size"
    yield "attention output of a rank", m.num_attention_heads * head // tp, f"num_attention_heads x head_dim{split}"
    yield (
        "queries, keys and values of a rank",
        (m.num_attention_heads + 2 * groups) * head // tp,
        f"(num_attention_heads + 2 x num_query_groups) x head_dim{split}",
    )
    if any(layer not in moe and not (layer in memory and replaces_ffn(m.memory)) for layer in range(m.num_layers)):
        yield "FFN of a rank", m.ffn_hidden_size // tp, f"model.ffn_hidden_size{split}"
    if moe:
        yield "width of an expert", m.moe.ffn_hidden_size, "model.moe.ffn_hidden_size"
        shared = m.moe.shared_expert_hidden_size
        yield "shared expert of a rank", shared // tp, f"model.moe.shared_expert_hidden_size{split}"
    tokens = config.train.micro_batch_size * config.data.sequence_length // p.context_parallel_size
    batch = "train.micro_batch_size x data.sequence_length" + (
        " / context_parallel_size" if p.context_parallel_size > 1 else ""
    )
    yield "tokens of a rank's micro-batch", tokens, batch
    if memory and config.train.fp8.memory_projections:
        yield "tokens of a rank's memory layers", tokens // tp, batch + split
        yield "queries of a memory layer", query_width(m.memory), "num_heads, tucker_rank and key_dim of model.memory"
        if pre_value_dim(m.memory):
            yield "width of a pre-value", pre_value_dim(m.memory), "model.memory.pre_value_dim"
        yield "width of the pooled values", blocks(m.memory) * m.memory.value_dim, "model.memory.value_dim"


def _refusal(fp8: Fp8Config, name: str, value: str, legal: str) -> ConfigError:
    return ConfigError(f"train.fp8.recipe = {fp8.recipe} with {name} = {value}; legal: {legal}, or recipe = none")
