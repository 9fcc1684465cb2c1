"""A converted model is used as any other of transformers: the same greedy text, and lm-evaluation-harness runs it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ultramem.checkpoints_convert.verify import our_logits
from megatron_ultramem.cli import main
from megatron_ultramem.evaluation.tasks import write_tasks
from megatron_ultramem.inference import Generator, Sampling
from tests.inference.train_job import MODEL, train_checkpoint, write_corpus

PROMPTS = ["the cat", "a dög ran to", "", "she sells sea shells. she", "x"]
TEXTS = ["the cat sat on the mat. fin.", "a dög ran to the høuse. a dög"]
QUESTIONS = [
    {"question": "the cat sat on the", "choices": ["mat.", "høuse."], "answer": 0},
    {"question": "a dög ran to the", "choices": ["mat.", "høuse."], "answer": 1},
    {"question": "she sells sea", "choices": ["mat.", "cat.", "shells."], "answer": 2},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, which has learnt its sentences, and `hf`, which is made of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    train_checkpoint(folder, MODEL)
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "hf")]) == 0
    return folder


@pytest.fixture
def generator(trained: Path) -> Iterator[Generator]:
    made = Generator.load(trained / "run")
    yield made
    made.close()


@pytest.mark.slow
def test_greedy_text_is_the_same(trained: Path, generator: Generator) -> None:
    ours = generator.generate(PROMPTS, Sampling(max_new_tokens=40, temperature=0))
    assert "mat" in ours[0]  # it has learnt something, so that texts are not noise

    tokenizer = AutoTokenizer.from_pretrained(str(trained / "hf"), trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(str(trained / "hf"), trust_remote_code=True, dtype="auto")
    theirs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=min(40, 64 - ids.shape[1]), pad_token_id=256)
        theirs.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert ours == theirs

    # The same in one batch, padded on the left.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    prompts = [prompt for prompt in PROMPTS if prompt]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, do_sample=False, max_new_tokens=20, pad_token_id=256)
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert texts == generator.generate(prompts, Sampling(max_new_tokens=20, temperature=0))


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def offline(tmp_path: Path) -> dict[str, str]:
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **home, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_the_harness_runs_the_folder_offline(trained: Path, tmp_path: Path) -> None:
    """`lm_eval --model hf` itself, and tools/evaluate.py; bits per byte are those of our own logits."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    questions = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    (tmp_path / "tasks").mkdir()
    names = write_tasks(tmp_path / "tasks", texts=[texts], choices=[questions])

    command = [
        *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={trained / 'hf'},trust_remote_code=True"),
        *("--tasks", ",".join(names), "--include_path", str(tmp_path / "tasks"), "--device", "cpu"),
        *("--output_path", str(tmp_path / "harness.json")),
    ]
    done = subprocess.run([sys.executable, *command], env=offline(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("harness*.json")
    by_harness = json.loads(results.read_text())["results"]
    assert by_harness["local_questions"]["acc,none"] == 1.0
    assert by_harness["local_texts"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(trained / "run"), rel=1e-4)

    tool = [str(Path(__file__).parents[2] / "tools/evaluate.py"), str(trained / "run"), "--texts", str(texts)]
    tool += ["--choices", str(questions), "--output", str(tmp_path / "ours.json")]
    done = subprocess.run([sys.executable, *tool], env=offline(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_tool = json.loads((tmp_path / "ours.json").read_text())
    for task in names:
        for metric, value in by_tool[task].items():
            assert value == pytest.approx(by_harness[task][f"{metric},none"], rel=1e-6), (task, metric)


def bits_per_byte(checkpoint: Path) -> float:
    """Of TEXTS, each behind an end of document."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = list(text.encode())
        (logits,) = our_logits(checkpoint, [[256, *ids]], "fp32", [])
        total -= float(logits[:-1].log_softmax(-1)[torch.arange(len(ids)), ids].sum())
        count += len(ids)
    return total / count / math.log(2)
