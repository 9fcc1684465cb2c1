"""How a sequence is cut for context parallelism, which itself needs Transformer Engine."""

from __future__ import annotations

import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.distributed import initialize_distributed
from tests.distributed.workers import WorkerPool


def parts(settings: list[str]) -> dict[str, list[list[int]]]:
    """Positions of a batch of two sequences of 16 that this rank gets."""
    initialize_distributed(load_config(None, settings), prepare("auto"))
    from megatron_ultramem.compat import context_parallel_part

    tokens_BS = torch.arange(16).expand(2, 16) + torch.tensor([[0], [100]])
    part = context_parallel_part({"tokens": tokens_BS, "loss_mask": tokens_BS.float()})
    return {name: tensor.int().tolist() for name, tensor in part.items()}


def test_each_rank_gets_a_piece_from_the_front_and_its_counterpart_from_the_back(
    pool: WorkerPool, small_run: list[str]
) -> None:
    results = pool.run(2, parts, [*small_run, "parallel.context_parallel_size=2"])
    for result, pieces in zip(results, ((0, 3), (1, 2)), strict=True):
        first = [4 * piece + place for piece in pieces for place in range(4)]
        assert result["tokens"] == result["loss_mask"] == [first, [100 + place for place in first]]
