"""Generation over tensor-parallel ranks gives what one rank gives, from a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.workers import WorkerPool
from tests.inference.train_job import MODEL, train_checkpoint, write_corpus

PROMPTS = ["the cat", "a", "", "she sells sea shells. she s"]
OTHERWISE = ["parallel.pipeline_parallel_size=2", "model.memory.sharing=none", "model.memory.share_size=1",
             "model.memory.query_per_rank=false", "model.tie_embeddings=false"]  # fmt: skip
MOE = ["model.moe.layers=1", "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=32"]


def generate_job(folder: Path) -> dict[str, Any]:
    """Greedy and sampled texts of this rank, and logits."""
    from megatron_ultramem.inference import Generator, Sampling

    generator = Generator.load(folder)
    tokens = torch.tensor([list(b"she sells sea shells. a")])
    return {
        "logits": generator.model.logits(tokens).numpy(),
        "greedy": generator.generate(PROMPTS, Sampling(max_new_tokens=16, temperature=0)),
        "uncached": Generator(generator.model, cache=False).generate(
            PROMPTS, Sampling(max_new_tokens=16, temperature=0)
        ),
        "sampled": generator.generate(PROMPTS, Sampling(max_new_tokens=16, top_p=0.9, seed=3)),
        "stream": "".join(generator.stream(PROMPTS[0], Sampling(max_new_tokens=16, temperature=0))),
    }


@pytest.mark.parametrize(
    ("saved_ranks", "settings"),
    [
        (1, []),
        (1, MOE),
        (2, OTHERWISE),
    ],
    ids=["one_rank", "moe", "saved_by_two_stages"],
)
def test_two_tensor_parallel_ranks_generate_what_one_does(
    pool: WorkerPool, tmp_path: Path, saved_ranks: int, settings: list[str]
) -> None:
    write_corpus(tmp_path)
    pool.run(saved_ranks, train_checkpoint, tmp_path, [*MODEL, "train.steps=20", *settings])
    (one,) = pool.run(1, generate_job, tmp_path / "run")
    for rank in pool.run(2, generate_job, tmp_path / "run"):
        np.testing.assert_allclose(rank["logits"], one["logits"], rtol=1e-5, atol=1e-5)
        assert rank["greedy"] == rank["uncached"] == one["greedy"] == one["uncached"]
        assert rank["sampled"] == one["sampled"]
        assert rank["stream"] == one["stream"] == one["greedy"][0]
