"""Loading a checkpoint for generation: precision, layout, and what is refused; the command around it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ultramem.cli import main
from megatron_ultramem.errors import CheckpointError, ConfigError, UserError
from megatron_ultramem.inference import Generator, Sampling
from megatron_ultramem.inference.command import read_prompts
from megatron_ultramem.inference.settings import inference_config
from megatron_ultramem.model.build import memory_layers
from tests.inference.train_job import SENTENCES

GREEDY = Sampling(max_new_tokens=8, temperature=0)


def test_bf16_computes_what_fp32_does_to_its_precision(checkpoint: tuple[Path, float]) -> None:
    tokens = torch.tensor([list(SENTENCES[0].encode())])
    logits, texts = {}, {}
    for precision in ("fp32", "bf16"):
        generator = Generator.load(checkpoint[0], [f"train.precision={precision}"])
        logits[precision] = generator.model.logits(tokens)
        texts[precision] = generator.generate(["the cat", "she"], GREEDY)
        dtype = next(generator.model.gpt.parameters()).dtype
        generator.close()
    assert dtype == torch.bfloat16
    error = (logits["bf16"] - logits["fp32"]).abs().mean() / logits["fp32"].abs().mean()
    assert 0 < error < 0.05
    assert len(texts["bf16"]) == 2 and all(texts["bf16"])


def test_leading_vectors_stay_those_that_the_run_evaluated_with(checkpoint: tuple[Path, float]) -> None:
    generator = Generator.load(checkpoint[0])
    try:
        for layer in memory_layers([generator.model.gpt]):
            saved = layer.retrieval.leading().clone()
            layer.refresh()
            difference = (layer.retrieval.leading() - saved).abs().max()
            assert 0 < difference < 0.01, "one step of the optimizer apart"
    finally:
        generator.close()


def test_logits_that_are_not_finite_name_the_checkpoint(checkpoint: tuple[Path, float]) -> None:
    generator = Generator.load(checkpoint[0])
    try:
        generator.model.gpt.decoder.final_layernorm.weight.data.fill_(math.nan)
        with pytest.raises(CheckpointError, match="step_00000080.*not finite"):
            generator.generate(["a"], GREEDY)
    finally:
        generator.close()


def test_a_damaged_checkpoint_is_refused_and_leaves_no_process_groups(
    checkpoint: tuple[Path, float], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint[0] / "checkpoints", tmp_path / "copy")
    for shard in (tmp_path / "copy").rglob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Generator.load(tmp_path / "copy")
    assert not torch.distributed.is_initialized() and not parallel_state.is_initialized()


def test_a_checkpoint_of_another_tokenizer_is_refused(checkpoint: tuple[Path, float], tmp_path: Path) -> None:
    shutil.copytree(checkpoint[0] / "checkpoints" / "step_00000080", tmp_path / "copy")
    record = json.loads((tmp_path / "copy" / "run.json").read_text())
    (tmp_path / "copy" / "run.json").write_text(json.dumps(record | {"tokenizer": "byte-257-other"}))
    with pytest.raises(CheckpointError, match="byte-257-other"):
        Generator.load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("ranks", "override", "message"),
    [
        (1, "parallel.pipeline_parallel_size=2", "pipeline_parallel_size is fixed at 1 in generation"),
        (1, "parallel.tensor_parallel_size=2", "tensor_parallel_size = 2 on 1 ranks.*legal: 1, or --ranks 2"),
        (3, "train.precision=fp32", "tensor_parallel_size = 3 does not divide model.num_attention_heads = 4"),
        (1, "optimizer.lr=1", "optimizer.lr cannot be set in generation; legal: "),
        (1, "model.num_layers=3", "model.num_layers cannot be set in generation; legal: "),
        (1, "train.precision=fp7", "train.precision = 'fp7'"),
        (1, "nonsense", "nonsense"),
    ],
)
def test_overrides_and_layouts_that_cannot_be_are_refused_by_name(
    checkpoint: tuple[Path, float], ranks: int, override: str, message: str
) -> None:
    folder = checkpoint[0] / "checkpoints" / "step_00000080"
    with pytest.raises(ConfigError, match=message):
        inference_config(folder, [override], ranks, "auto")


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\nthrée")
    (tmp_path / "p.jsonl").write_text('{"prompt": "two\\nlines"}\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "p.txt") == ["one", "", "thrée"]
    assert read_prompts(tmp_path / "p.jsonl") == ["two\nlines", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt cannot be read: No such file"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("binary.txt", b"\xff\xfe\xff", "binary.txt cannot be read"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "a"}', 'line 2: .*legal: {"prompt": "text"}'),
        ("bad.jsonl", b"[1", "line 1"),
    ],
)
def test_bad_prompt_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_the_command_prints_prompt_and_text(checkpoint: tuple[Path, float], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--checkpoint", str(checkpoint[0]), "--temperature", "0", "--max-new-tokens", "8"]
    assert main([*arguments, "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out == "the cat sat on \n"


def test_the_command_says_when_fewer_tokens_fit(
    checkpoint: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "x" * 60
    arguments = ["generate", "--checkpoint", str(checkpoint[0]), "--ignore-eod", "--prompt", prompt]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert "note" not in capsys.readouterr().err
    assert main([*arguments, "--max-new-tokens", "5"]) == 0
    assert "note: 4 tokens fit within model.max_sequence_length = 64" in capsys.readouterr().err
    assert main([*arguments[:-1], "x" * 64]) == 2
    captured = capsys.readouterr()
    assert "prompt 1 has 64 tokens" in captured.err and captured.out == ""


def test_the_command_writes_batches_as_json_lines(checkpoint: tuple[Path, float], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the cat sat\nshe\nthe c")
    arguments = ["generate", "--checkpoint", str(checkpoint[0]), "--temperature", "0", "--max-new-tokens", "8"]
    assert main([*arguments, "--prompts-file", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_index = {line["index"]: line for line in lines}
    assert [by_index[index]["prompt"] for index in range(3)] == ["the cat sat", "she", "the c"]
    assert by_index[1]["text"] == " sells s" and by_index[1]["finish_reason"] == "length"
    assert by_index[1]["tokens"] == list(b" sells s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "a", "--output", "/does/not/exist.jsonl"], "--output /does/not/exist.jsonl cannot be written"),
        (["--prompt", "a", "--batch-size", "0"], "batch_size = 0"),
    ],
)
def test_bad_options_end_the_command_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", "--checkpoint", str(tmp_path / "no"), *arguments]) == 2
    assert message in capsys.readouterr().err
