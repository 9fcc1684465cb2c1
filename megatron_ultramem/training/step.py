"""One forward-backward over the micro-batches of a step, and one evaluation batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ultramem.compat import context_parallel_part
from megatron_ultramem.config.schema import Config
from megatron_ultramem.memory.auxiliary import AuxiliaryLossScale
from megatron_ultramem.training.model_graph import ModelGraph

Batch = dict[str, Any]
# Numerator and denominator of the mean loss of one micro-batch on this rank.
LossReport = dict[str, Tensor]


@dataclass(frozen=True)
class LossTotals:
    """fp64 [2 + number of flags]: sum of the losses of unmasked tokens in nats, their number, and sums of the flags."""

    all_ranks: Tensor  # over the whole global batch, the same on every rank
    this_rank: Tensor  # over the micro-batches of this rank; zeros before the last pipeline stage


def forward_backward(
    config: Config,
    megatron_config: TransformerConfig,
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Callable[[int], Iterator[Batch]],
    num_microbatches: int,
    device: torch.device,
    *,
    forward_only: bool = False,
    flags: Sequence[float] = (),
    graph: ModelGraph | None = None,
) -> LossTotals:
    """Runs Megatron's schedule (no pipeline, 1F1B or interleaved) over the micro-batches of one global batch.

    Args:
        micro_batches: an iterator over this rank's micro-batches for the model chunk of that number.
        flags: of this rank, as many on every rank; their sums travel with the loss.
        graph: runs the micro-batches that it takes in place of the (only) chunk.
    """
    if not forward_only:
        _set_auxiliary_scale(config, megatron_config, num_microbatches, device)
    iterators = [micro_batches(number) for number in range(len(chunks))]
    reports: list[LossReport] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, config, device, graph),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    return _sum_over_ranks(reports, flags, device)


def _forward_step(
    config: Config, device: torch.device, graph: ModelGraph | None, iterator: Iterator[Batch], model: Any
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, LossReport]]]:
    batch = next(iterator)
    packed = _packed_documents(batch, device)
    batch = {name: _to_device(value, device) for name, value in batch.items()}
    if config.parallel.context_parallel_size > 1:
        batch = context_parallel_part(batch)
    inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
    if graph is not None and graph.takes(inputs):
        return graph.run(inputs), partial(_loss, batch["loss_mask"])
    losses_BS = model(
        **inputs,
        attention_mask=batch.get("attention_mask"),
        **({"packed_seq_params": packed} if packed else {}),
    )
    return losses_BS, partial(_loss, batch["loss_mask"])


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """From page-locked memory, which torch keeps and reuses: otherwise the host waits for the device to copy."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


def _loss(mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, LossReport]:
    """Sum of the unmasked losses, number of unmasked tokens, and both for the report (Megatron scales in place)."""
    mask = mask_BS.reshape(-1).float()
    total = (losses_BS.reshape(-1).float() * mask).sum()
    count = mask.sum()
    return total, count.int(), {"loss_sum": total.detach().clone(), "tokens": count}


def _packed_documents(batch: Batch, device: torch.device) -> PackedSeqParams | None:
    """Document boundaries for Transformer Engine, which takes the micro-batch as one row of packed sequences.

    The local back end takes the mask of the batch instead.
    """
    if "cu_seqlens" not in batch:
        return None
    boundaries, longest = _to_device(batch.pop("cu_seqlens"), device), int(batch.pop("max_seqlen"))
    if "attention_mask" in batch:
        return None
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        batch[name] = batch[name].reshape(1, -1)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _set_auxiliary_scale(
    config: Config, megatron_config: TransformerConfig, num_microbatches: int, device: torch.device
) -> None:
    """Gives memory's auxiliary losses the scale of the main loss; Megatron does so for its MoE losses alone."""
    scale = torch.ones(1, device=device)
    if megatron_config.grad_scale_func is not None:
        scale = megatron_config.grad_scale_func(scale)
    if megatron_config.calculate_per_token_loss:
        # Gradients are sums over tokens then, divided by the number of tokens of the global batch at the end; ranks
        # that split a sequence add one loss each.
        tokens = config.train.micro_batch_size * config.data.sequence_length
        scale = scale * tokens / config.parallel.context_parallel_size
    else:
        scale = scale / num_microbatches
    AuxiliaryLossScale.set(scale)


def _sum_over_ranks(reports: list[LossReport], flags: Sequence[float], device: torch.device) -> LossTotals:
    local = torch.zeros(2 + len(flags), dtype=torch.float64, device=device)
    for number, flag in enumerate(flags):
        if flag:  # no copy from the host, which would wait for the device
            local[2 + number].fill_(flag)
    for report in reports:  # empty but on the last pipeline stage
        local[:2] += torch.stack([report["loss_sum"], report["tokens"]]).double()
    total = local.clone()
    torch.distributed.all_reduce(total)
    # Tensor-parallel ranks hold the same numbers.
    return LossTotals(total / parallel_state.get_tensor_model_parallel_world_size(), local)
