"""In the repository's root Python finds the folder `kernels/`; transformers looks for a package of that name."""

from __future__ import annotations

from pathlib import Path

from tests.huggingface.subprocesses import ROOT, run

TRANSFORMERS = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
print("kernels:", transformers.utils.is_kernels_available())
config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
print("logits:", tuple(model(torch.tensor([[1, 2]])).logits.shape))
print("generated:", tuple(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, eos_token_id=None).shape))
"""


def test_transformers_works_and_takes_the_folder_for_no_package(tmp_path):
    elsewhere = run(TRANSFORMERS, cwd=tmp_path)
    assert "logits: (1, 2, 16)" in elsewhere and "generated: (1, 5)" in elsewhere
    assert run(TRANSFORMERS, cwd=ROOT) == elsewhere


def test_a_package_kernels_is_found_past_the_folder(tmp_path: Path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    out = run("import kernels; print(kernels.__file__)", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert out.strip() == str(package / "__init__.py")
