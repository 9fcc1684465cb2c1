"""What a rank receives from others in one optimizer step, group by group, and how long the links take for it.

Volumes follow the algorithms that run: ring all-gathers and reduce-scatters, of which a rank receives all but its own
part; all-to-alls; neighbours' sends. The memory exchange is counted by the formulas of `parallel/traffic.py`, which the
run-time counters must equal.

Ranks are numbered as Megatron does: tensor, context, data (experts and tables: consecutive ranks), pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.config.schema import Config
from megatron_ultramem.memory.kinds import pre_value_dim
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.layout import Layout, rank_parameters
from megatron_ultramem.planning.parameters import attention_dims, row_width
from megatron_ultramem.planning.workload import Layer, Stage, Workload


@dataclass(frozen=True)
class Transfer:
    """Bytes received, messages, and seconds on the links if nothing else uses them."""

    received: float = 0.0
    messages: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(self.received + other.received, self.messages + other.messages, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Transfer:
        return Transfer(self.received * times, self.messages * times, self.seconds * times)


@dataclass(frozen=True)
class BlockTraffic:
    """One block, one micro-batch: (forward, backward) of every group. Recomputed forwards are not in it."""

    tensor: tuple[Transfer, Transfer]
    context: tuple[Transfer, Transfer]
    expert: tuple[Transfer, Transfer]
    memory: tuple[Transfer, Transfer]


class Links:
    """The cluster's links as groups of a layout see them."""

    def __init__(self, cluster: Cluster, layout: Layout) -> None:
        self.cluster, self.layout = cluster, layout

    def ring(self, received: float, ranks: int, stride: int, messages: float = 1.0) -> Transfer:
        """A ring collective of `ranks` ranks that are `stride` apart."""
        if ranks == 1 or received == 0:
            return Transfer()
        in_node = max(1, min(ranks, self.cluster.gpus_per_node // stride))
        bandwidth = self.cluster.intra_node_gb_per_s
        if in_node < ranks:  # every member in a node brings its own link out of it
            bandwidth = min(bandwidth, in_node * self.cluster.inter_node_gb_per_s)
        return Transfer(received, messages, self._seconds(received, bandwidth, messages))

    def all_to_all(self, received: float, ranks: int, messages: float) -> Transfer:
        """Among consecutive ranks; what comes from the node and what comes from other nodes travel at the same time."""
        if ranks == 1 or received == 0:
            return Transfer()
        near = (min(ranks, self.cluster.gpus_per_node) - 1) / (ranks - 1)
        intra = self._seconds(near * received, self.cluster.intra_node_gb_per_s, messages)
        inter = self._seconds((1 - near) * received, self.cluster.inter_node_gb_per_s, messages)
        return Transfer(received, messages, max(intra, inter))

    def neighbour(self, received: float, distance: int, messages: float) -> Transfer:
        """From a rank `distance` away."""
        near = distance < self.cluster.gpus_per_node
        bandwidth = self.cluster.intra_node_gb_per_s if near else self.cluster.inter_node_gb_per_s
        return Transfer(received, messages, self._seconds(received, bandwidth, messages))

    def _seconds(self, received: float, gb_per_s: float, messages: float) -> float:
        return received / (gb_per_s * 1e9) + messages * self.cluster.latency_us / 1e6


def block_traffic(work: Workload, layout: Layout, links: Links, layer: Layer) -> BlockTraffic:
    """Of one block for one micro-batch."""
    return BlockTraffic(
        _tensor(work, layout, links, layer),
        _context(work, layout, links),
        _expert(work, layout, links, layer),
        _memory(layout, layer),
    )


def stage_tensor_traffic(work: Workload, layout: Layout, links: Links, stage: Stage) -> tuple[Transfer, Transfer]:
    """Tensor-parallel traffic of embedding, output layer and loss for one micro-batch: (forward, backward)."""
    forward, backward = Transfer(), Transfer()
    if layout.tensor == 1:
        return forward, backward
    whole = _whole_stream(work, layout, links)
    if stage.has_embedding:
        forward += whole * (1 if layout.sequence_parallel else 2)
        backward += whole * (1 if layout.sequence_parallel else 0)
    if stage.has_output:
        scalars = 3 * 4 * _tokens(work, layout)  # largest logit, label's logit, sum of exponentials
        forward += links.ring(2 * _others(layout.tensor) * scalars, layout.tensor, 1, 2)
        forward += whole * (1 if layout.sequence_parallel else 0)
        backward += whole * 2
    return forward, backward


def pipeline_traffic(work: Workload, layout: Layout, links: Links, stage: Stage) -> Transfer:
    """What a rank of the stage receives from its neighbours for one micro-batch, forward and backward."""
    crossings = 2 * layout.chunks - stage.has_embedding - stage.has_output
    if layout.pipeline == 1:
        return Transfer()
    share = layout.tensor if layout.sequence_parallel else 1
    received = _tokens(work, layout) / share * work.model.hidden_size * layout.element
    return links.neighbour(received * crossings, layout.gpus // layout.pipeline, crossings)


def gradient_traffic(
    work: Workload, layout: Layout, links: Links, stage: Stage
) -> dict[str, tuple[Transfer, Transfer]]:
    """Once a step: (gradients, parameters) over the data-parallel ranks, over those that hold the same shard of
    experts and tables, of parameters that tensor-parallel ranks or the two ends of the pipeline share, and of what
    ranks that share columns agree on."""
    kept = rank_parameters(work, layout, stage)
    sharded = kept.experts + kept.tables
    # Megatron has one optimizer for dense parameters and one for the others, and after the step of each gathers all.
    gathers = 2 if sharded and not layout.overlap_param_gather else 1
    found = {
        "data": _reduced(layout, links, kept.dense, layout.data * layout.context, layout.tensor, gathers),
        "expert_data": _reduced(layout, links, sharded, layout.expert_data, layout.expert_group, gathers),
    }
    shared = 0
    if layout.sequence_parallel:
        own = sum(
            count * (p.norms + p.attention_gains + p.memory + p.router)
            for layer, count in stage.layers
            for p in (layer.parameters,)
        )
        shared = own + (work.model.hidden_size if stage.has_output else 0)
    volume = 2 * _others(layout.tensor) * 4 * shared
    found["tensor"] = links.ring(volume, layout.tensor, 1), Transfer()
    memory, columns = work.model.memory, layout.placement.columns
    if memory.table_read == "fp8" and columns > 1:  # largest numbers of whole rows, for what lookups read
        rows = kept.tables * columns // row_width(memory) * (2 if pre_value_dim(memory) else 1)
        found["row_scales"] = Transfer(), links.ring(2 * _others(columns) * 4 * rows, columns, 1, 2)
    if layout.pipeline > 1 and work.model.tie_embeddings and (stage.has_embedding or stage.has_output):
        matrix = 4 * work.vocabulary * work.model.hidden_size / layout.tensor
        # An all-reduce of two: each receives half, reduced, and then the other's.
        found["embedding"] = (
            links.neighbour(matrix, layout.gpus // layout.pipeline * (layout.pipeline - 1), 1),
            Transfer(),
        )
    return found


def step_traffic(config: Config, work: Workload, layout: Layout, links: Links, stage: Stage) -> dict[str, Transfer]:
    """All that a rank of the stage receives in one optimizer step, by group, recomputed forwards included."""
    again = 2 if config.train.recompute == "full" else 1
    lookups = 2 if config.train.recompute == "full" or config.model.memory.recompute else 1
    per_micro_batch: dict[str, Transfer] = {
        "tensor": sum(stage_tensor_traffic(work, layout, links, stage), Transfer()),
        "pipeline": pipeline_traffic(work, layout, links, stage),
        "context": Transfer(),
        "expert": Transfer(),
        "memory": Transfer(),
    }
    for layer, count in stage.layers:
        traffic = block_traffic(work, layout, links, layer)
        for name in ("tensor", "context", "expert", "memory"):
            forward, backward = getattr(traffic, name)
            times = lookups if name == "memory" else again
            per_micro_batch[name] += (forward * times + backward) * count
    found = {name: transfer * layout.micro_batches for name, transfer in per_micro_batch.items()}
    for name, (gradients, parameters) in gradient_traffic(work, layout, links, stage).items():
        found[name] = found.get(name, Transfer()) + gradients + parameters
    return found


def _tokens(work: Workload, layout: Layout) -> float:
    """Of a micro-batch, on all tensor-parallel ranks together."""
    return layout.micro_batch * work.sequence_length / layout.context


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def _whole_stream(work: Workload, layout: Layout, links: Links) -> Transfer:
    """One all-gather or reduce-scatter of a micro-batch's residual stream over the tensor-parallel ranks."""
    size = _tokens(work, layout) * work.model.hidden_size * layout.element
    return links.ring(size * _others(layout.tensor), layout.tensor, 1)


def _tensor(work: Workload, layout: Layout, links: Links, layer: Layer) -> tuple[Transfer, Transfer]:
    if layout.tensor == 1:
        return Transfer(), Transfer()
    parts = 1 + (layer.parameters.ffn > 0 or layer.parameters.shared_expert > 0)
    whole = _whole_stream(work, layout, links)
    if not layout.sequence_parallel:  # an all-reduce each way is two of them
        return whole * (2 * parts), whole * (2 * parts)
    # Gather and scatter; backwards both again, and the gathered input once more for the weights' gradient.
    return whole * (2 * parts), whole * (3 * parts)


def _context(work: Workload, layout: Layout, links: Links) -> tuple[Transfer, Transfer]:
    """Keys and values go round the ring; backwards their gradients too."""
    if layout.context == 1:
        return Transfer(), Transfer()
    _, _, key = attention_dims(work.model)
    chunk = _tokens(work, layout) * 2 * key / layout.tensor * layout.element
    rounds = layout.context - 1
    forward = links.ring(rounds * chunk, layout.context, layout.tensor, rounds)
    return forward, links.ring(2 * rounds * chunk, layout.context, layout.tensor, rounds)


def _expert(work: Workload, layout: Layout, links: Links, layer: Layer) -> tuple[Transfer, Transfer]:
    """Tokens to their experts and back, if experts are chosen evenly."""
    if not layer.has_moe or layout.expert_group == 1:
        return Transfer(), Transfer()
    moe, size = work.model.moe, layout.element
    own = _tokens(work, layout) / layout.tensor
    if moe.dispatcher == "allgather":  # all tokens to all ranks, and partial sums back
        volume = 2 * own * (layout.expert_group - 1) * work.model.hidden_size * size
        both = links.ring(volume, layout.expert_group, 1, 2)
        return both, both
    sent = own * moe.top_k * _others(layout.expert_group)
    volume = sent * (2 * work.model.hidden_size * size + 4)  # there with its weight, and back
    both = links.all_to_all(volume, layout.expert_group, 4)
    return both, both


def _memory(layout: Layout, layer: Layer) -> tuple[Transfer, Transfer]:
    """The cost model's figures of the placement, its time shared out by bytes."""
    e = layout.placement
    if not layer.has_memory or e.ranks == 1:
        return Transfer(), Transfer()
    share = e.forward_bytes / (e.forward_bytes + e.backward_bytes)
    seconds = e.microseconds / 1e6
    forward = Transfer(float(e.forward_bytes), e.messages / 2, seconds * share)
    return forward, Transfer(float(e.backward_bytes), e.messages / 2, seconds * (1 - share))


def _reduced(
    layout: Layout, links: Links, parameters: int, ranks: int, stride: int, gathers: int
) -> tuple[Transfer, Transfer]:
    """(gradients, parameters): reduce-scatter in fp32 and all-gathers, or one all-reduce."""
    gradients = 4 * parameters * _others(ranks)
    if not layout.distributed_optimizer:
        return links.ring(2 * gradients, ranks, stride, 2), Transfer()
    return (
        links.ring(gradients, ranks, stride),
        links.ring(gathers * layout.element * parameters * _others(ranks), ranks, stride, gathers),
    )
