"""What runs beside the FFN: streams wait where they must and nowhere else, and communicators go first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ultramem.config import load_config
from megatron_ultramem.platform import prepare
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu
CYCLES = 2_000_000_000  # of a GPU's clock: about a second


class SlowMemory(nn.Module):
    """In place of a memory layer: has its rows at once, and its exchange takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cycles = nn.Parameter(torch.full((8,), 3.0, device="cuda")), 0

    def forward(self, x: Tensor, retrieved: Any) -> Tensor:
        pooled = self.weight * x
        retrieved()
        torch.cuda._sleep(self.cycles)
        self.done = _event()
        return pooled * pooled


class TimedFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 2.0, device="cuda"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out = self.weight * x
        self.done = _event()
        return out, None


def _event() -> torch.cuda.Event | None:
    """When the current stream gets here; recordings are not timed."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def two_blocks(overlap: bool) -> tuple[nn.Module, nn.Module]:
    """One that reads memory, beside its FFN, and one that adds what the first has read."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ultramem.model.feed_forward import FeedForwardWithMemory, Joint

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    options: dict[str, Any] = {"overlap": overlap, "pg_collection": ProcessGroupCollection()}
    joint, memory = Joint(), SlowMemory()
    reads = FeedForwardWithMemory(config, lambda **_: TimedFfn(), lambda _: memory, sends=joint, **options)
    return reads, FeedForwardWithMemory(config, lambda **_: TimedFfn(), None, receives=joint, **options)


def through(blocks: tuple[nn.Module, nn.Module], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and weights."""
    out = blocks[1](blocks[0](x)[0])[0]
    weights = [*blocks[0].parameters(), *blocks[1].parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])]


def overlap_job() -> dict[str, Any]:
    from megatron_ultramem.training.graph_recording import recording

    prepare()
    x = torch.rand(4, 2, 8, device="cuda", requires_grad=True)
    expected = through(two_blocks(False), x)
    blocks = two_blocks(True)
    through(blocks, x)  # loads kernels, which may wait for those that run
    torch.cuda.synchronize()
    blocks[0].memory.cycles = CYCLES
    found = through(blocks, x)
    torch.cuda.synchronize()
    exchange, (own, later) = blocks[0].memory.done, (block.ffn.done for block in blocks)

    x, blocks = x.detach().requires_grad_(), two_blocks(True)
    blocks[0].memory.cycles = CYCLES // 20
    graph = torch.cuda.CUDAGraph()
    with recording(graph, torch.cuda.Stream(), torch.cuda.graph_pool_handle(), "two blocks"):
        recorded = through(blocks, x)
    for part in recorded:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return {
        "expected": [part.cpu() for part in expected],
        "found": [part.cpu() for part in found],
        "recorded": [part.cpu() for part in recorded],
        "before_the_exchange_ended_ms": (own.elapsed_time(exchange), later.elapsed_time(exchange)),
    }


def test_a_block_that_only_adds_memory_has_its_ffn_beside_the_exchange(gpus: WorkerPool) -> None:
    (result,) = gpus.run(1, overlap_job)
    assert min(result["before_the_exchange_ended_ms"]) > 0, result["before_the_exchange_ended_ms"]
    for what in ("found", "recorded"):
        for found, expected in zip(result[what], result["expected"], strict=True):
            torch.testing.assert_close(found, expected)


def priorities_job() -> dict[str, bool]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ultramem.parallel.groups import memory_groups
    from megatron_ultramem.training.distributed import initialize_distributed

    config = load_config(None, ["parallel.memory_parallel_size=2", "parallel.overlap_exchange=true"])
    initialize_distributed(config, prepare())
    groups = memory_groups(ProcessGroupCollection.use_mpu_process_groups(), 2, 10.0, beside_ffn=True)
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        name: group._get_backend(device).options.is_high_priority_stream for name, group in groups._asdict().items()
    }


@pytest.mark.two_gpus
def test_communicators_of_an_exchange_beside_the_ffn_have_high_priority(gpus: WorkerPool) -> None:
    for found in gpus.run(2, priorities_job):
        assert found == {"whole": True, "within": True, "across": True}
