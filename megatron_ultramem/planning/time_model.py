"""Predicted time of a training step: a roofline with a term for the host.

For every part of a block, on one GPU:

- matrix products take FLOPs / reached FLOP/s + bytes / copy bandwidth (the sum, which small products come close to);
  in FP8 (train.fp8) at their own peak and on operands of one byte, and their casts take bytes / bandwidth (`fp8.py`);
- attention takes FLOPs / reached FLOP/s; norms, rotations, SwiGLU, residual sums and the loss take bytes / bandwidth;
- retrieval reads all side scores and evaluates k*k pairs; the lookup reads M rows a token, and its backward reads them
  again and reads, adds and writes fp32 gradients of every row that the micro-batch touched (rows used evenly).

A micro-batch takes the larger of the GPU's time, with the exchanges that nothing hides, and of the host's: launches
times the time of one. A step takes (micro-batches - 1) times the slowest stage, plus all stages once (the pipeline's
ramp, over the chunks), plus what of the gradients' reduction is not hidden, plus Adam. The figures are in
`calibration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning import calibration as c
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.communication import (
    Links,
    Transfer,
    block_traffic,
    gradient_traffic,
    pipeline_traffic,
    stage_tensor_traffic,
)
from megatron_ultramem.planning.fp8 import linears_of_block
from megatron_ultramem.planning.kernel_times import KernelTimes, Times
from megatron_ultramem.planning.layout import Layout, rank_parameters
from megatron_ultramem.planning.workload import Layer, Stage, Workload


@dataclass(frozen=True)
class StepTime:
    """A predicted step. `micro_batch` is one forward and backward of the slowest stage."""

    times: Times
    micro_batch: Times
    seconds: float
    tokens_per_s: float
    mfu: float
    bound_by: str


class TimeModel:
    """Times of one model on one cluster."""

    def __init__(self, work: Workload, cluster: Cluster, *, one_grouped_gemm: bool = False) -> None:
        """`one_grouped_gemm`: one launch computes all experts of a rank in bf16, not one each, but for gradients of
        weights."""
        self.work, self.cluster, self.kernels = work, cluster, KernelTimes(work, cluster)
        self.one_grouped_gemm = one_grouped_gemm
        flops = sum(
            f.attention_projections + f.attention_scores + f.ffn + f.moe + (f.memory.total if f.memory else 0.0)
            for f in (layer.flops for layer in work.layers)
        )
        self.model_flops = 3 * (flops + work.logits_flops)  # training, per token

    def step(self, config: Config, layout: Layout) -> StepTime:
        """Of a legal layout."""
        links = Links(self.cluster, layout)
        stages = self.work.stages(config)
        passes = [self._stage(config, layout, links, stage) for stage in stages]
        totals = [(forward + backward) for forward, backward in passes]
        slowest = max(range(len(stages)), key=lambda number: totals[number].total)
        ramp = (sum(times.total for times in totals) - totals[slowest].total) / layout.chunks
        times = totals[slowest] * layout.micro_batches + Times(bubble=ramp)
        ends = [self._end_of_step(config, layout, links, stage, *passes[number]) for number, stage in enumerate(stages)]
        times += max(ends, key=lambda end: end.total)
        tokens = config.train.global_batch_size * self.work.sequence_length
        reached = tokens * self.model_flops / times.total / layout.gpus
        return StepTime(
            times,
            totals[slowest],
            times.total,
            tokens / times.total,
            reached / (self.cluster.peak_tflops * 1e12),
            _largest(times),
        )

    def _stage(self, config: Config, layout: Layout, links: Links, stage: Stage) -> tuple[Times, Times]:
        """(forward, backward) of one micro-batch, recomputation in the backward."""
        forward, backward, launches, again = Times(), Times(), 0.0, 0.0
        full, recompute_memory = config.train.recompute == "full", config.model.memory.recompute
        for layer, count in stage.layers:
            ahead, back = self.kernels.block(layout, layer)
            to, fro = self._block_comm(config, layout, links, layer, ahead, back)
            number = self._launches(config, layout, layer)
            if full:
                back, fro = back + ahead, fro + to
                again += count * number * c.FORWARD_SHARE
            elif layer.has_memory and recompute_memory:
                back += Times(lookup=ahead.lookup, retrieval=ahead.retrieval)
                fro += Times(memory_comm=to.memory_comm)
                again += count * c.MEMORY_LAUNCHES * c.FORWARD_SHARE
            elif config.train.recompute == "selective":
                back += Times(attention=ahead.attention)
            forward, backward = forward + (ahead + to) * count, backward + (back + fro) * count
            launches += count * number
        if stage.has_output:
            fused_loss = config.train.cross_entropy == "transformer_engine"
            ahead, back = self.kernels.output(layout, fused_loss=fused_loss)
            forward, backward = forward + ahead, backward + back
        to_ends, from_ends = stage_tensor_traffic(self.work, layout, links, stage)
        neighbours = 0.0 if config.parallel.overlap_p2p else pipeline_traffic(self.work, layout, links, stage).seconds
        forward += Times(tensor_comm=to_ends.seconds, pipeline_comm=neighbours / 2)
        backward += Times(tensor_comm=from_ends.seconds, pipeline_comm=neighbours / 2)
        kept, fused = rank_parameters(self.work, layout, stage), config.train.fused_weight_gradients
        backward += Times(elementwise=self.kernels.gradients(kept.dense + kept.experts, fused=fused))
        host = self.cluster.launch_us / 1e6
        return (
            _waiting_for_host(forward, host * launches * c.FORWARD_SHARE),
            _waiting_for_host(backward, host * (launches * (1 - c.FORWARD_SHARE) + again)),
        )

    def _block_comm(
        self, config: Config, layout: Layout, links: Links, layer: Layer, forward: Times, backward: Times
    ) -> tuple[Times, Times]:
        """What of a block's exchanges nothing hides: the ring of attention runs beside attention; the memory exchange
        beside the FFN if `parallel.overlap_exchange` says so."""
        traffic = block_traffic(self.work, layout, links, layer)

        def exposed(direction: int, computing: Times) -> Times:
            memory = traffic.memory[direction].seconds
            if config.parallel.overlap_exchange:
                memory = max(0.0, memory - computing.matmul / 2)
            return Times(
                tensor_comm=traffic.tensor[direction].seconds,
                context_comm=max(0.0, traffic.context[direction].seconds - computing.attention),
                expert_comm=traffic.expert[direction].seconds,
                memory_comm=memory,
            )

        return exposed(0, forward), exposed(1, backward)

    def _launches(self, config: Config, layout: Layout, layer: Layer) -> float:
        """Forward and backward of one micro-batch."""
        p = layer.parameters
        if config.train.cuda_graphs == "full":  # two for the whole model
            return 0.0
        experts = c.EXPERT_LAUNCHES * self._experts(layout)
        if self.one_grouped_gemm and layout.fp8 is None:
            experts *= c.OF_WEIGHT_GRADIENTS
        if layout.expert_group > 1 and self.work.model.moe.dispatcher != "allgather":
            experts += c.DISPATCH_LAUNCHES
        if config.train.cuda_graphs == "layers":
            return c.GRAPH_LAUNCHES + (c.MOE_LAUNCHES + experts if layer.has_moe else 0)
        number: float = c.BLOCK_LAUNCHES + (c.FFN_LAUNCHES if p.ffn else 0)
        if layout.fp8 is not None:
            number += c.FP8_LAUNCHES * layout.fp8.share * linears_of_block(layer, layout.fp8)
        if layer.has_memory and config.train.cuda_graphs == "memory":
            number += c.GRAPH_LAUNCHES
        elif layer.has_memory:
            number += c.MEMORY_LAUNCHES + c.EXCHANGE_LAUNCHES * layout.placement.messages
        if layer.has_moe:
            number += c.MOE_LAUNCHES + experts
        return number

    def _experts(self, layout: Layout) -> float:
        """Of a block with an MoE, on a rank."""
        return self.work.model.moe.num_experts / layout.expert_group

    def _end_of_step(
        self, config: Config, layout: Layout, links: Links, stage: Stage, forward: Times, backward: Times
    ) -> Times:
        """Gradients, Adam, parameters: what is not hidden behind the last backward and the next forward."""
        p, kept = config.parallel, rank_parameters(self.work, layout, stage)
        groups = gradient_traffic(self.work, layout, links, stage)
        gradients = sum((groups[name][0] for name in groups), Transfer()).seconds
        parameters = sum((groups[name][1] for name in groups), Transfer()).seconds
        if p.overlap_grad_reduce:
            hidden = groups["data"][0].seconds + groups["expert_data"][0].seconds
            gradients -= min(hidden, backward.total)
        if p.overlap_param_gather:
            parameters = max(0.0, parameters - forward.total)
        shards, table_shards = (layout.data * layout.context, layout.expert_data) if p.distributed_optimizer else (1, 1)
        on_host = kept.tables / table_shards if layout.tables_on_host else 0.0
        own = kept.dense / shards + (kept.experts + kept.tables) / table_shards - on_host
        # The next forward pass waits for the host in the first layer that looks up in a table, mostly one of the first.
        adam = self.kernels.adam(own, kept.total) + on_host / c.HOST_ADAM_RATE
        experts = c.EXPERT_STEP_LAUNCHES * self._experts(layout) * sum(n for layer, n in stage.layers if layer.has_moe)
        host = (stage.num_layers * c.STEP_LAUNCHES + experts) * self.cluster.launch_us / 1e6
        adam += self.kernels.copies(layout, kept.tables)
        return Times(gradient_comm=gradients + parameters, optimizer=adam + host)


def _waiting_for_host(times: Times, launching: float) -> Times:
    return times + Times(host=max(0.0, launching - times.total))


def _largest(times: Times) -> str:
    if times.host > 0.25 * times.total:
        return "host"
    return max(fields(times), key=lambda field: getattr(times, field.name)).name
