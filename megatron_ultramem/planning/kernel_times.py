"""Times of one GPU's work in a micro-batch, kernel by kernel; see `time_model.py` for the roofline they follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_ultramem.config.schema import Fp8Config
from megatron_ultramem.memory.kinds import num_cores, query_width
from megatron_ultramem.planning import calibration as c
from megatron_ultramem.planning.clusters import Cluster
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

    def __init__(self, work: Workload, cluster: Cluster, fp8: Fp8Config | None = None) -> None:
        """fp8: `train.fp8`; layers that it leaves in bf16 are taken for FP8 like the others."""
        self.work = work
        self.fp8 = fp8 is not None and fp8.recipe != "none"
        self.fp8_memory = self.fp8 and fp8 is not None and fp8.memory_projections
        self.flops_rate = cluster.peak_tflops * 1e12
        self.bandwidth = cluster.hbm_gb_per_s * 1e9

    def block(self, layout: Layout, layer: Layer) -> tuple[Times, Times]:
        """Of one block."""
        matmul, scores, elementwise = self._attention(layout, layer)
        for part in (self._ffn, self._moe, self._memory_projections):
            products, moved = part(layout, layer)
            matmul, elementwise = matmul + products, elementwise + moved
        retrieval, lookup = self._retrieval(layout, layer), self._lookup(layout, layer)
        return (
            Times(
                matmul=matmul,
                attention=scores / (c.ATTENTION_FORWARD * self.flops_rate),
                elementwise=elementwise,
                retrieval=retrieval[0],
                lookup=lookup[0],
            ),
            Times(
                matmul=2 * matmul,
                attention=2 * scores / (c.ATTENTION_BACKWARD * self.flops_rate),
                elementwise=2 * elementwise,
                retrieval=retrieval[1],
                lookup=lookup[1],
            ),
        )

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

    def _attention(self, layout: Layout, layer: Layer) -> tuple[float, float, float]:
        """Projections (s), scores (FLOPs), and norms, rotations and residual sums of the block (s)."""
        hidden, tokens, tp = self.work.model.hidden_size, _tokens(self.work, layout), layout.tensor
        _, query, key = attention_dims(self.work.model)
        matmul = self._matmul(
            tokens * layer.flops.attention_projections / tp,
            layout.element * (layer.parameters.attention / tp + tokens * (2 * hidden + 2 * (query + key) / tp)),
            fp8=self.fp8,
        )
        scores = tokens * layer.flops.attention_scores / tp
        return matmul, scores, self._elementwise(layout, tokens / tp * (13 * hidden + 4 * (query + key)))

    def _ffn(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        p, model, tp = layer.parameters, self.work.model, layout.tensor
        if not p.ffn:
            return 0.0, 0.0
        tokens, inner = _tokens(self.work, layout), 3 * model.ffn_hidden_size / tp
        matmul = self._matmul(
            tokens * layer.flops.ffn / tp,
            layout.element * (p.ffn / tp + tokens * (2 * model.hidden_size + inner)),
            fp8=self.fp8,
        )
        return matmul, self._elementwise(layout, tokens * inner)

    def _moe(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Experts if they are chosen evenly; tokens are permuted there and back."""
        if not layer.has_moe:
            return 0.0, 0.0
        p, model = layer.parameters, self.work.model
        own = _tokens(self.work, layout) / layout.tensor
        chosen, inner = own * model.moe.top_k, 3 * model.moe.ffn_hidden_size
        weights = p.experts / layout.expert_group + p.router + p.shared_expert
        matmul = self._matmul(
            own * layer.flops.moe,
            layout.element * (weights + chosen * (2 * model.hidden_size + inner)),
            fp8=self.fp8,
        )
        return matmul, self._elementwise(layout, chosen * (4 * model.hidden_size + inner))

    def _memory_projections(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Projections and side scores; norms of queries, and the sum with the FFN."""
        memory, m = self.work.model.memory, layer.flops.memory
        if m is None:
            return 0.0, 0.0
        own, hidden, queries = (
            _tokens(self.work, layout) / layout.tensor,
            self.work.model.hidden_size,
            query_width(memory),
        )
        linear = m.total - m.exact_scores - m.coarse_combination - m.lookup - m.key_scores
        projections = self._matmul(
            own * linear,
            layout.element * (layer.parameters.memory + own * (2 * hidden + queries + row_width(memory))),
            fp8=self.fp8_memory,
        )
        scores = self._matmul(own * m.key_scores, layout.element * own * (queries + layer.side_scores))
        return projections + scores, self._elementwise(layout, own * (3 * hidden + 2 * queries))

    def _retrieval(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Coarse and exact pass; backwards the dense gradient of the side scores."""
        if layer.flops.memory is None:
            return 0.0, 0.0
        own = _tokens(self.work, layout) / layout.tensor
        scores = own * layer.side_scores * layout.element / self.bandwidth
        exact = own * layer.flops.memory.exact_scores / (c.EXACT_PASS * self.flops_rate)
        return scores / c.COARSE_PASS + exact, scores / c.COPY

    def _lookup(self, layout: Layout, layer: Layer) -> tuple[float, float]:
        """Sharded tables serve as many rows as one rank's tokens want, by rows or by narrower columns."""
        if not layer.has_memory:
            return 0.0, 0.0
        memory, size, ranks = self.work.model.memory, layout.element, layout.placement.ranks
        own, width, rows = _tokens(self.work, layout) / layout.tensor, row_width(memory), layer.virtual_rows
        entries = own * rows_per_token(memory)
        rows_read = entries * row_bytes(memory, size)
        read = rows_read + entries * (4 + 4 * num_cores(memory)) + own * width * size
        touched = rows * -math.expm1(-entries * ranks / rows) / ranks
        written = rows_read + touched * width * 8 + own * width * size * 2
        return read / (c.LOOKUP_FORWARD * self.bandwidth), written / (c.LOOKUP_BACKWARD * self.bandwidth)

    def _matmul(self, flops: float, num_bytes: float, *, fp8: bool = False) -> float:
        """A product that moves so many bytes in bf16."""
        rate, moved = (2 * c.FP8_MATMUL, c.FP8_BYTES) if fp8 else (c.MATMUL, 1)
        return flops / (rate * self.flops_rate) + moved * num_bytes / (c.COPY * self.bandwidth)

    def _elementwise(self, layout: Layout, elements: float) -> float:
        return elements * layout.element / (c.ELEMENTWISE * self.bandwidth)


def _tokens(work: Workload, layout: Layout) -> float:
    """Of a micro-batch, on all tensor-parallel ranks together."""
    return layout.micro_batch * work.sequence_length / layout.context
