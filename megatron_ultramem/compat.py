"""The differences between the supported Megatron-Core versions (0.16.1 to 0.19), all in this file.

Call `platform.prepare()` before importing it: it imports megatron.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state, safe_globals
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.distributed import finalize_model_grads
from megatron.core.inference import utils as inference_utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ultramem.training.optimizer_parts import optimizer_parts

MCORE_VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
# Since 0.17 the fields for submodules of a layer hold callable builders; before, ModuleSpecs.
BUILDERS = MCORE_VERSION >= (0, 17)
_HAS_MOE_TRACKER = importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None
COMMON_FILE, COMMON_STATE = "common.pt", "common_state"
# What tells an optimizer's parameter groups apart in every version.
GROUP_NAME = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
TENSOR_READER = "safe_load_from_bytes"
WRITER_LOG = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def module_slot(module: type, **params: Any) -> Any:
    """What a field of Megatron's submodules takes to build `module(config=..., **params)`."""
    return functools.partial(module, **params) if BUILDERS else ModuleSpec(module=module, params=params)


def dense_mlp_slot(submodules: MLPSubmodules, kind: type[MLP] = MLP) -> Any:
    """The `mlp` field for Megatron's dense MLP, or a kind of it."""
    if BUILDERS:
        return functools.partial(kind.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=kind, submodules=submodules)


def build_ffn(slot: Any, config: Any, pg_collection: ProcessGroupCollection, is_mtp_layer: bool) -> torch.nn.Module:
    """Builds what an `mlp` field describes (Megatron's MLP or MoE layer) outside a TransformerLayer."""
    if not isinstance(slot, ModuleSpec):
        built: torch.nn.Module = slot(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        return built
    groups = {"tp_group": pg_collection.tp} if issubclass(slot.module, MLP) else {"pg_collection": pg_collection}
    module: torch.nn.Module = build_module(slot, config=config, **groups)
    return module


def context_parallel_part(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of tensors [B, S, ...] under context parallelism (`attention_mask`: [B, 1, S, S], cut along its
    third axis): of twice as many pieces of the sequence as ranks, one from the front and its counterpart from the back.
    """
    options: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        options["is_hybrid_cp"] = False
    part: dict[str, Any] = get_batch_on_this_cp_rank(batch, **options)
    return part


def graphed_parts(parts: list[str]) -> dict[str, list[str]]:
    """The setting of TransformerConfig that names the parts of a layer which CUDA graphs record."""
    renamed = "cuda_graph_modules" in TransformerConfig.__dataclass_fields__  # in 0.19
    return {"cuda_graph_modules" if renamed else "cuda_graph_scope": parts}


def caching() -> AbstractContextManager[None]:
    """Around a forward pass with a key-value cache, which then computes the logits of the last position alone: 0.16
    knows by the cache, 0.19 has to be told."""
    mode: Any = getattr(inference_utils, "InferenceMode", None)
    return nullcontext() if mode is None else mode.active()


def moe_losses(names: list[str], num_microbatches: int, config: Any) -> dict[str, torch.Tensor]:
    """Means over MoE layers and micro-batches of auxiliary losses that routers recorded since they were forgotten, by
    Megatron's names for them. A collective call. config: Megatron's TransformerConfig."""
    found: dict[str, torch.Tensor] = {}
    options: dict[str, Any] = {
        "loss_scale": 1.0 / num_microbatches,
        "iteration": 0,
        "total_loss_dict": found,
        "force_initialize": True,  # stages without MoE layers take part
        "track_names": names,
        "num_layers": config.num_layers,
        "moe_layer_freq": config.moe_layer_freq,
    }
    if _HAS_MOE_TRACKER:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().report(**options)
    else:
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        track_moe_metrics(**options)
    return found


def forget_moe_losses(*, in_place: bool = False) -> None:
    """Starts the record of routers' auxiliary losses anew; in place where CUDA graphs write to it. That keeps its
    length, which is the number of layers of this process's first model."""
    if _HAS_MOE_TRACKER:
        from megatron.core.transformer.moe import moe_logging

        clear, renew = moe_logging.get_moe_metrics_tracker().clear, moe_logging.destroy_moe_metrics_tracker
    else:
        from megatron.core.transformer.moe import moe_utils

        clear, renew = moe_utils.clear_aux_losses_tracker, moe_utils.get_moe_layer_wise_logging_tracker().clear
    clear() if in_place else renew()


def finalize_gradients(chunks: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Reduces the gradients of wrapped model chunks as Megatron does, and divides them by the number of tokens of all
    ranks. 0.16 looks at that number first, for which the host would wait. Collective.

    Args:
        num_tokens: int [], of this rank; counts on the last pipeline stage. None: nothing is divided.
    """
    finalize_model_grads(chunks, None, **options)
    if num_tokens is None:
        return
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(num_tokens, last_stage, parallel_state.get_pipeline_model_parallel_group())
    torch.distributed.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def start_save(state: dict[str, Any], folder: Path, content: dict[str, Any]) -> AsyncRequest:
    """Begins a checkpoint of what `state` describes; what is returned writes it. Collective.

    Args:
        content: metadata that goes along.
    """
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # the other one is nvidia-resiliency-ext, another package
    request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, content_metadata=content, **options)
    assert isinstance(request, AsyncRequest)
    if request.async_fn is not None:  # this rank has something to write
        request = request._replace(async_fn=functools.partial(_write_telling_why, request.async_fn))
    return request


def write_common_file(folder: Path) -> None:
    """Gives a checkpoint that was just written the file of what is not sharded, if it has none, so that every version
    loads it: 0.19 puts that among the tensors, under the key `COMMON_STATE`, but reads the file where there is one."""
    if not (folder / COMMON_FILE).exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / COMMON_FILE)


@contextmanager
def later_pickles_read() -> Iterator[None]:
    """Within it, tensors that 0.19 pickled (Transformer Engine's FP8 scales) are unpickled by earlier versions too: it
    names a function of its own for reading them."""
    if hasattr(safe_globals, TENSOR_READER):
        yield
        return
    setattr(safe_globals, TENSOR_READER, lambda content: torch.load(io.BytesIO(content), weights_only=True))
    try:
        yield
    finally:
        delattr(safe_globals, TENSOR_READER)


def _write_telling_why(write: Callable[..., None], rank: int, buckets: list[Any], results: Any) -> None:
    """Runs a checkpoint's writer so that a failure in its queue of results says why: 0.19 gives the class of the error
    there, and the rest to its log alone."""
    causes: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        _, found, cause = record.getMessage().partition("encountered an error: ")
        if found:
            causes.append(cause)
        return True

    logger = logging.getLogger(WRITER_LOG)
    logger.filters.insert(0, note)  # before those that drop the message
    try:
        write(rank, buckets, _Results(results, causes))
    finally:
        logger.filters.remove(note)


class _Results:
    """A writer's queue of results, with the first of the causes that were found in place of a failure without it."""

    def __init__(self, queue: Any, causes: list[str]) -> None:
        self._queue, self._causes = queue, causes

    def put(self, result: Any) -> None:
        if isinstance(result, Exception) and self._causes and self._causes[0] not in str(result):
            result = RuntimeError(self._causes[0])
        self._queue.put(result)


def parts_of_state(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Of a chained optimizer's state, or the one of an optimizer that is not chained."""
    parts = [state[key] for key in sorted(key for key in state if isinstance(key, int))] if 0 in state else [state]
    return [part.get("optimizer", part) for part in parts]


def keep_settings(state: dict[Any, Any], optimizer: Any) -> None:
    """Gives the parameter groups of a loaded optimizer state this run's learning rates, decay and betas in place of the
    checkpoint's. Before it is loaded, because 0.19 tells groups apart by rates and decay too."""

    def name(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in GROUP_NAME)

    for part, loaded in zip(optimizer_parts(optimizer), parts_of_state(state), strict=True):
        ours = {name(group): group for group in part.optimizer.param_groups}
        for group in loaded["param_groups"]:
            settings = ours.get(name(group), {})
            group.update({key: value for key, value in settings.items() if key not in ("params", "step")})


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """Of one of Megatron's optimizers (not a chained one): the gradients that count for the norm on this rank."""
    name = (
        "get_grads_for_grad_norm" if hasattr(optimizer, "get_grads_for_grad_norm") else "get_main_grads_for_grad_norm"
    )
    found: list[torch.Tensor] = getattr(optimizer, name)()
    return found
