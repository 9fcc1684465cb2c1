"""Generation on GPUs: Megatron's key-value cache with Transformer Engine's attention, and over two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.workers import WorkerPool
from tests.inference.train_job import MODEL, SENTENCES, train_checkpoint, write_corpus

pytestmark = pytest.mark.gpu
# Widths that flash attention takes.
WIDE = ["model.hidden_size=128", "model.head_dim=64", "model.num_attention_heads=2", "model.ffn_hidden_size=256",
        "model.num_query_groups=2", "data.mask_document_boundaries=false"]  # fmt: skip
PROMPTS = ["the cat", "a", "", "she sells sea shells. she s"]
# Of the largest logit. Where TF32 cannot be switched off, Transformer Engine multiplies fp32 matrices in 10 bits.
TOLERANCE = {("local", "fp32"): 1e-4, ("transformer_engine", "fp32"): 2e-3}
BF16_TOLERANCE = 0.05


def generate_job(folder: Path, overrides: list[str]) -> dict[str, Any]:
    from megatron_ultramem.inference import Generator, Sampling

    generator = Generator.load(folder, overrides)
    tokens_BS = torch.tensor([list(SENTENCES[0].encode())])
    session = generator.model.session(1, tokens_BS.shape[1], cached=True)
    cached = [session.append(tokens_BS[:, :5])]
    cached += [session.append(tokens_BS[:, place : place + 1]) for place in range(5, tokens_BS.shape[1])]
    return {
        "device": str(next(generator.model.gpt.parameters()).device),
        "uncached": generator.model.logits(tokens_BS)[0, 4:].cpu().numpy(),
        "cached": torch.cat(cached).cpu().numpy(),
        "greedy": generator.generate(PROMPTS, Sampling(max_new_tokens=16, temperature=0)),
        "sampled": generator.generate(PROMPTS, Sampling(max_new_tokens=16, top_k=40, top_p=0.9, seed=3)),
    }


@pytest.fixture(scope="module")
def folder(gpus: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("generation")
    write_corpus(made)
    gpus.run(1, train_checkpoint, made, [*MODEL, *WIDE])
    return made / "run"


@pytest.mark.seconds(12)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_cached_and_uncached_logits_agree(gpus: WorkerPool, folder: Path, backend: str, precision: str) -> None:
    (result,) = gpus.run(1, generate_job, folder, [f"model.backend={backend}", f"train.precision={precision}"])
    assert result["device"].startswith("cuda")
    scale = np.abs(result["uncached"]).max()
    assert (
        np.abs(result["cached"] - result["uncached"]).max()
        < TOLERANCE.get((backend, precision), BF16_TOLERANCE) * scale
    )


def test_both_back_ends_write_the_same(gpus: WorkerPool, folder: Path) -> None:
    local, te = (
        gpus.run(1, generate_job, folder, [f"model.backend={backend}", "train.precision=fp32"])[0]
        for backend in ("local", "transformer_engine")
    )
    assert local["greedy"] == te["greedy"]
    assert local["sampled"] == te["sampled"]


@pytest.mark.two_gpus
@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_two_gpus_write_what_one_does(gpus: WorkerPool, folder: Path, backend: str) -> None:
    settings = [f"model.backend={backend}", "train.precision=fp32"]
    (one,) = gpus.run(1, generate_job, folder, settings)
    for rank in gpus.run(2, generate_job, folder, settings):
        assert rank["greedy"] == one["greedy"]
        assert rank["sampled"] == one["sampled"]
