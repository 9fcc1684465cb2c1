"""Times of one GPU's work in a micro-batch, kernel by kernel; see `time_model.py` for the roofline they follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_ultramem.memory.kinds import num_cores, query_width
from megatron_ultramem.planning import calibration as c
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.fp8 import projection_weights
from megatron_ultramem.planning.layout import Layout
from megatron_ultramem.planning.parameters import attention_dims, row_bytes, row_width, rows_per_token
from megatron_ultramem.planning.workload import Layer, Workload


@dataclass(frozen=True)
class Times:
    """Seconds, by what they are spent on; communication is what nothing hides."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    retrieval: float = 0.0
    lookup: float = 0.0
    loss: float = 0.0
    tensor_comm: float = 0.0
    context_comm: float = 0.0
    expert_comm: float = 0.0
    memory_comm: float = 0.0
    pipeline_comm: float = 0.0
    host: float = 0.0  # by which launches take longer than everything above
    bubble: float = 0.0
    gradient_comm: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Times:
        return Times(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self)))

    @property
    def gpu(self) -> float:
        """Of kernels that compute."""
        return self.matmul + self.attention + self.elementwise + self.retrieval + self.lookup + self.loss


class KernelTimes:
    """(forward, backward) of the parts of a model on a rank of a layout, for one micro-batch."""

    def __init__(self, work: Workload, cluster: Cluster) -> None:
        self.work = work
        self.flops_rate = cluster.peak_tflops * 1e12
        self.fp8_rate = self.flops_rate * cluster.fp8_times
        self.bandwidth = cluster.hbm_gb_per_s * 1e9

    def block(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        """Of one block."""
        scores = _tokens(self.work, layout) / layout.tensor * layer.flops.attention_scores
        retrieval, lookup = self._retrieval(layout, layer), self._lookup(layout, layer)
        forward = Times(
            attention=scores / (c.ATTENTION_FORWARD * self.flops_rate), retrieval=retrieval[0], lookup=lookup[0]
        )
        backward = Times(
            attention=2 * scores / (c.ATTENTION_BACKWARD * self.flops_rate), retrieval=retrieval[1], lookup=lookup[1]
        )
        for part in (self._attention, self._ffn, self._moe, self._memory_projections):
            ahead, back = part(layout, layer)
            forward, backward = forward + ahead, backward + back
        return forward, backward

    def output(self, layout: Layout, *, fused_loss: bool = False) -> tuple[Times, Times]:
        """Of output layer and loss."""
        work, hidden = self.work, self.work.model.hidden_size
        tokens, shard = _tokens(work, layout), work.vocabulary / layout.tensor
        logits = tokens * shard
        matmul = self._matmul(
            tokens * work.logits_flops / layout.tensor, layout.element * (hidden * shard + logits + tokens * hidden)
        )
        moved = c.FUSED_LOSS_BYTES_MOVED if fused_loss else c.LOSS_BYTES_MOVED
        loss = logits * moved / (c.ELEMENTWISE * self.bandwidth)
        return Times(matmul=matmul, loss=loss / 2), Times(matmul=2 * matmul, loss=loss / 2)

    def gradients(self, parameters: float, *, fused: bool = False) -> float:
        """Of adding the gradients of so many weights to main_grad."""
        moved = c.FUSED_GRADIENT_BYTES if fused else c.GRADIENT_BYTES
        return parameters * moved / (c.COPY * self.bandwidth)

    def adam(self, own: float, held: float) -> float:
        """Of the optimizer: `own` parameters are stepped here, `held` gradients are cleared."""
        return (own * c.ADAM_BYTES + held * 4) / (c.ELEMENTWISE * self.bandwidth)

    def copies(self, layout: Layout, tables: int) -> float:
        """Of what lookups read in place of so many parameters, once a step."""
        if self.work.model.memory.table_read != "fp8":
            return 0.0
        return tables * (layout.element + 1) / (c.COPY * self.bandwidth)

    def _attention(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        """Projections; norms, rotations and residual sums of the block."""
        hidden, tokens, tp = self.work.model.hidden_size, _tokens(self.work, layout), layout.tensor
        _, query, key = attention_dims(self.work.model)
        return self._linears(
            layout,
            flops=tokens * layer.flops.attention_projections / tp,
            weights=layer.parameters.attention / tp,
            inputs=tokens * (hidden + query / tp),
            outputs=tokens * (hidden + (query + 2 * key) / tp),
            moved=tokens / tp * (13 * hidden + 4 * (query + key)),
        )

    def _ffn(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        p, model, tp = layer.parameters, self.work.model, layout.tensor
        if not p.ffn:
            return Times(), Times()
        tokens, inner = _tokens(self.work, layout), model.ffn_hidden_size / tp
        return self._linears(
            layout,
            flops=tokens * layer.flops.ffn / tp,
            weights=p.ffn / tp,
            inputs=tokens * (model.hidden_size + inner),
            outputs=tokens * (model.hidden_size + 2 * inner),
            moved=tokens * 3 * inner,
            scaled=tokens * inner if layer.flops.memory is not None else 0.0,  # model/fp8_ffn.py
        )

    def _moe(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        """Experts if they are chosen evenly; tokens are permuted there and back."""
        if not layer.has_moe:
            return Times(), Times()
        p, model = layer.parameters, self.work.model
        own = _tokens(self.work, layout) / layout.tensor
        chosen, inner = own * model.moe.top_k, model.moe.ffn_hidden_size
        return self._linears(
            layout,
            flops=own * layer.flops.moe,
            weights=p.experts / layout.expert_group + p.router + p.shared_expert / layout.tensor,
            inputs=chosen * (model.hidden_size + inner),
            outputs=chosen * (model.hidden_size + 2 * inner),
            moved=chosen * (4 * model.hidden_size + 3 * inner),
        )

    def _memory_projections(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        """Projections and side scores; norms of queries, and the sum with the FFN."""
        memory, m = self.work.model.memory, layer.flops.memory
        if m is None:
            return Times(), Times()
        own, hidden, queries = (
            _tokens(self.work, layout) / layout.tensor,
            self.work.model.hidden_size,
            query_width(memory),
        )
        weights, values = projection_weights(layer), m.value_projection / 2 / hidden
        others = weights / hidden - values
        projections = self._linears(
            layout,
            flops=2 * own * weights,
            weights=weights,
            inputs=own * (hidden + values),
            outputs=own * (others + (hidden if values else 0)),
            moved=own * (3 * hidden + 2 * queries),
            in_fp8=layout.fp8 is not None and layout.fp8.projections,
        )
        keys = self._linears(
            layout,
            flops=own * m.key_scores,
            weights=layer.parameters.memory - weights,
            inputs=own * queries,
            outputs=own * layer.side_scores,
            in_fp8=False,
        )
        return projections[0] + keys[0], projections[1] + keys[1]

    def _retrieval(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Coarse and exact pass; backwards the dense gradient of the side scores."""
        if layer.flops.memory is None:
            return 0.0, 0.0
        own = _tokens(self.work, layout) / layout.tensor
        scores = own * layer.side_scores * layout.element / self.bandwidth
        exact = own * layer.flops.memory.exact_scores / (c.EXACT_PASS * self.flops_rate)
        return scores / c.COARSE_PASS + exact, scores / c.COPY

    def _lookup(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Sharded tables serve as many rows as one rank's tokens want, by rows, which are sent to their owners, or by
        narrower columns."""
        if not layer.has_memory:
            return 0.0, 0.0
        memory, size, ranks = self.work.model.memory, layout.element, layout.placement.ranks
        own, width, rows = _tokens(self.work, layout) / layout.tensor, row_width(memory), layer.virtual_rows
        entries = own * rows_per_token(memory)
        rows_read = entries * row_bytes(memory, size)
        read = rows_read + entries * (4 + 4 * num_cores(memory)) + own * width * size
        touched = rows * -math.expm1(-entries * ranks / rows) / ranks
        written = rows_read + touched * width * 8 + own * width * size * 2
        routing = layout.placement.routing_us / 2e6
        return (
            read / (c.LOOKUP_FORWARD * self.bandwidth) + routing,
            written / (c.LOOKUP_BACKWARD * self.bandwidth) + routing,
        )

    def _linears(
        self,
        layout: Layout,
        *,
        flops: float,
        weights: float,
        inputs: float,
        outputs: float,
        moved: float = 0.0,
        in_fp8: bool = True,
        scaled: float = 0.0,
    ) -> tuple[Times, Times]:
        """Linears with so many weights, and numbers that go in and come out; `moved`: numbers that memory-bound kernels
        beside them read and write. `in_fp8`: if the layout has FP8 at all. `scaled`: products of gate and channel; the
        kernel that writes them, and that of their two gradients, scales them for FP8 without another read."""
        matmul = self._matmul(flops, layout.element * (weights + inputs + outputs))
        elementwise = self._elementwise(layout, moved)
        forward = Times(matmul=matmul, elementwise=elementwise)
        if not in_fp8 or layout.fp8 is None:
            return forward, forward * 2
        fp8, size = layout.fp8, layout.element
        product = flops / (c.MATMUL_FP8 * self.fp8_rate)
        ahead = product + (weights + inputs + size * outputs) / (c.COPY * self.bandwidth)
        back = 2 * product + (weights + 2 * outputs + inputs * (1 + size)) / (c.COPY * self.bandwidth)
        cast = c.FP8_CAST_BYTES[fp8.recipe] / (c.ELEMENTWISE * self.bandwidth)
        of_weights = 0.0 if fp8.only_codes else weights / layout.micro_batches
        spared = self._elementwise(layout, scaled) if fp8.recipe == "tensorwise" else 0.0
        quick = (
            Times(matmul=ahead, elementwise=elementwise + (inputs + of_weights) * cast - spared),
            Times(matmul=back, elementwise=2 * elementwise + outputs * cast - 2 * spared),
        )
        return (
            quick[0] * fp8.share + forward * (1 - fp8.share),
            quick[1] * fp8.share + forward * (2 * (1 - fp8.share)),
        )

    def _matmul(self, flops: float, num_bytes: float) -> float:
        return flops / (c.MATMUL * self.flops_rate) + num_bytes / (c.COPY * self.bandwidth)

    def _elementwise(self, layout: Layout, elements: float) -> float:
        return elements * layout.element / (c.ELEMENTWISE * self.bandwidth)


def _tokens(work: Workload, layout: Layout) -> float:
    """Of a micro-batch, on all tensor-parallel ranks together."""
    return layout.micro_batch * work.sequence_length / layout.context
