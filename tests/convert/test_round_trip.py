"""to-hf and back: the same weights bitwise, the same settings, and both sides compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.tensors import TensorInfo, row_blocks
from megatron_ultramem.training.checkpoint_folder import read_config, read_record
from tests.convert.checkpoints import BF16, FP32, MOE, save_checkpoint
from tests.huggingface.cases import CASES

Convert = Callable[..., tuple[int, str]]
MODELS = {
    "dense-untied": [
        FP32, "model.memory.layers=none", "model.tie_embeddings=false", "model.qk_norm_width=all_heads",
    ],
    "moe-and-memory-heads": [FP32, *MOE, "model.memory.layers='0,1'", "model.memory.num_heads=2"],
    "no-ring-bf16": [
        BF16, "model.memory.sharing=no_ring", "model.memory.share_size=3", "model.memory.query_per_rank=false",
    ],
    "kept-shuffle": [FP32, "model.memory.keep_shuffle=true", "model.memory.layers='1,2'"],
}  # fmt: skip
FAST_CASE = "ultramem-skip-layer"


def _settings(case: list[str]) -> list[str]:
    """Of a case in bf16. Kinds that have no pre-values want that setting left alone."""
    return [BF16, *(["model.memory.pre_value_dim=192"] if "model.memory.kind" in " ".join(case) else []), *case]


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = CheckpointReader(first), CheckpointReader(second)
    assert ours.tensors == theirs.tensors  # names, shapes, dtypes
    for name in ours.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.parametrize(
    "model", [*MODELS, FAST_CASE, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != FAST_CASE)]
)
def test_there_and_back_is_the_same_checkpoint(tmp_path: Path, corpus: Path, convert: Convert, model: str) -> None:
    original = save_checkpoint(tmp_path / "run", corpus, MODELS.get(model) or _settings(CASES[model]))
    code, there = convert("to-hf", original, tmp_path / "hf")
    assert code == 0, there
    code, back = convert("from-hf", tmp_path / "hf", tmp_path / "back")
    assert code == 0, back
    for printed in (there, back):
        assert "top-1 agreement 100.0 %" in printed
        assert "none is left over, none is missing" in printed
    assert_same_weights(original, tmp_path / "back")
    assert read_config(tmp_path / "back") == read_config(original)
    ours, theirs = read_record(original), read_record(tmp_path / "back")
    for field in ("step", "consumed_samples", "consumed_tokens", "tokenizer", "vocab_size", "shuffles"):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_the_logit_gate_fails_where_a_weight_is_another(tmp_path: Path, checkpoint: Path, monkeypatch) -> None:
    """A link that forgets to turn the halves of SwiGLU apart would pass the account: only logits show it."""
    from megatron_ultramem.checkpoints_convert import names
    from megatron_ultramem.cli import main

    def crossed(ours: str, theirs: str, width: int, h: int):
        for link in straight(ours, theirs, width, h):
            swapped = tuple(reversed(getattr(link, "theirs", ()))) if "fc1" in link.ours else link.theirs
            yield type(link)(**{**vars(link), "theirs": swapped})

    straight = names._swiglu
    monkeypatch.setattr(names, "_swiglu", crossed)
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf")]) == 2
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.iterdir())


def test_the_gate_reports_and_can_be_skipped(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    _, skipped = convert("to-hf", checkpoint, tmp_path / "a", "--no-verify")
    assert "logits were not compared (--no-verify)" in skipped
    code, half = convert("to-hf", checkpoint, tmp_path / "b", "--verify-precision", "bf16")
    assert code == 0, half
    assert re.search(
        r"in bf16 against ours in fp32: .*relative difference \S+ \(tolerance \S+, ours \S+\), top-1 agreement \S+ %",
        half,
    ), half


def test_the_table_accounts_for_every_tensor(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    _, printed = convert("to-hf", checkpoint, tmp_path / "hf", "--no-verify")
    rows = {line.split()[2]: line.split() for line in printed.splitlines() if re.match(r"\d+ x  ", line)}
    assert rows["decoder.pools.*.values"][3:] == ["384x12", "1", "x", "model.pools.*.values", "384x12"]
    assert rows["decoder.layers.*.mlp.memory.retrieval.keys"][:2] == ["4", "x"]
    counted = sum(int(row[0]) for row in rows.values())  # a source that becomes several is listed several times
    assert f"{counted} tensors of the source" in printed


def test_blocks_cover_every_row_once() -> None:
    info = TensorInfo((10, 3), torch.float32)
    assert list(row_blocks(info, limit=36)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_blocks(info, limit=1)) == [(row, row + 1) for row in range(10)]
