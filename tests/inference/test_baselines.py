"""Models with other kinds of memory generate: from their checkpoints, with a cache as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ultramem.inference import Generator
from tests.inference.train_job import MODEL, train_checkpoint, write_corpus

MEMORY = [line for line in MODEL if not line.startswith(("model.memory.sharing", "model.memory.share_size", "train."))]
MEMORY += ["train.steps=6", "train.global_batch_size=8", "train.micro_batch_size=4", "train.precision=fp32",
           "train.eval_steps=1"]  # fmt: skip
NO_PRE_VALUES, WIDE = "model.memory.pre_value_dim=192", "model.memory.value_dim=32"
KINDS = {
    "ultramem": ["model.memory.layers=0", "model.memory.join_layers=1", NO_PRE_VALUES],
    "memory_plus": [NO_PRE_VALUES],
    "pkm": [WIDE, NO_PRE_VALUES],
    "peer": [WIDE, "model.memory.pre_value_dim=32", "model.memory.layers=1"],
}


@pytest.mark.parametrize(
    "kind", ["ultramem", "pkm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("memory_plus", "peer"))]
)
def test_a_checkpoint_generates_with_a_cache_as_without(tmp_path: Path, kind: str) -> None:
    write_corpus(tmp_path)
    trained = train_checkpoint(tmp_path, [*MEMORY, f"model.memory.kind={kind}", *KINDS[kind]])
    assert trained > 0
    generator = Generator.load(tmp_path / "run")
    try:
        model = generator.model
        tokens_BS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
        full_BSV = model.logits(tokens_BS)
        session = model.session(2, 12, cached=True)
        session.append(tokens_BS[:, :5])
        for position in range(5, 12):
            logits_BV = session.append(tokens_BS[:, position : position + 1])
            torch.testing.assert_close(logits_BV, full_BSV[:, position], rtol=1e-4, atol=1e-5)
        # Every token is computed by itself: no statistics of the batch.
        torch.testing.assert_close(model.logits(tokens_BS[:1]), full_BSV[:1], rtol=1e-4, atol=1e-5)
    finally:
        generator.close()
