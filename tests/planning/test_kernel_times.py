"""Times of one GPU's kernels."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.kernel_times import KernelTimes
from megatron_ultramem.planning.layout import layout_of
from megatron_ultramem.planning.workload import Workload

MOE = ["model.memory.layers=none", "model.moe.layers=all", "model.vocab_size=50304"]


def matmul_of_a_block(tensor: int, shared_expert: int) -> float:
    """Seconds, forward; few tokens, so that it is weights that count."""
    config = load_config(None, [
        *MOE, f"parallel.tensor_parallel_size={tensor}", f"model.moe.shared_expert_hidden_size={shared_expert}",
        "data.sequence_length=64", "model.max_sequence_length=64",
    ])  # fmt: skip
    work = Workload(config.model, 50304, config.data.sequence_length)
    layout = layout_of(config, tensor)
    return KernelTimes(work, load_cluster("h100")).block(layout, work.layers[0])[0].matmul


def test_tensor_parallel_ranks_share_the_shared_expert() -> None:
    one, two = (matmul_of_a_block(tensor, 8192) - matmul_of_a_block(tensor, 0) for tensor in (1, 2))
    assert two == pytest.approx(one / 2)
