"""What README.md says about a converted folder, done in processes of their own."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from megatron_ultramem.inference import Generator, Sampling
from tests.huggingface.subprocesses import ROOT, run

CONVERT = "import sys; from megatron_ultramem.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder of `modules` and `model`, converted with the logit gate."""
    home = tmp_path_factory.mktemp("home")
    run(CONVERT, "convert", "to-hf", checkpoint, home / "model", cwd=ROOT, HF_MODULES_CACHE=str(home / "modules"))
    return home


def example(folder: Path) -> str:
    text = (ROOT / "README.md").read_text()
    start = text.index("    from transformers import AutoModelForCausalLM")
    return textwrap.dedent(text[start : text.index("\n\nMemory layers run on", start)]).replace(
        '"model"', repr(str(folder))
    )


def test_a_conversion_leaves_no_code_in_the_cache(converted: Path) -> None:
    assert not list((converted / "modules").rglob("*ultramem*"))


def test_the_example_runs_and_its_greedy_text_is_ours(tmp_path: Path, converted: Path, checkpoint: Path) -> None:
    """Two prompts of different length, so that one is padded on the left."""
    more = """
import json
out = model.generate(**prompts, max_new_tokens=50, do_sample=False)[:, prompts.input_ids.shape[1] :]
print(json.dumps(tokenizer.batch_decode(out, skip_special_tokens=True)))
"""
    printed = run(
        example(converted / "model") + more, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path), CUDA_VISIBLE_DEVICES=""
    )
    generator = Generator.load(checkpoint)
    try:
        ours = generator.generate(["The memory of", "A model"], Sampling(max_new_tokens=50, temperature=0))
    finally:
        generator.close()
    assert json.loads(printed.splitlines()[-1]) == ours
