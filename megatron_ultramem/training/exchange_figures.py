"""What benchmarks write down of the exchange of memory values, from the counter and the GPU's trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_ultramem.parallel.traffic import Traffic
from megatron_ultramem.results import Row
from megatron_ultramem.training.measure import Span, covered_ms


def is_exchange(kernel: str) -> bool:
    """Whether a kernel is NCCL's all-to-all, which it builds of sends and receives."""
    return "nccl" in kernel.lower() and "SendRecv" in kernel


def exchange_rows(case: str, spans: Sequence[Span], traffic: Traffic) -> list[Row]:
    """Bytes, messages, time, rate and hidden share of the exchange in a traced micro-batch. A collective call: the time
    of an all-to-all is that on the rank that came to it last, as the others wait in theirs."""
    exchange = [span for span in spans if is_exchange(span.name)]
    others = [span for span in spans if not is_exchange(span.name)]
    everywhere: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, [span.end - span.begin for span in exchange])
    moved, seconds = sum(traffic.received.values()), sum(map(min, zip(*everywhere, strict=True))) / 1e6
    rows = [
        Row(case, "exchange_mb", moved / 1e6, "MB per micro-batch and rank"),
        Row(case, "exchange_messages", sum(traffic.messages.values()), "per micro-batch and rank"),
    ]
    if seconds > 0:
        hidden = 1 - (covered_ms(spans) - covered_ms(others)) / covered_ms(exchange)
        rows += [
            Row(case, "exchange_ms", seconds * 1e3, "ms per micro-batch"),
            Row(case, "exchange_gb_s", moved / seconds / 1e9, "GB/s received"),
            Row(case, "exchange_hidden_percent", 100 * hidden, "%"),
        ]
    return rows
