"""Folders: saved and loaded again, by whoever has torch and transformers and nothing of this repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

from megatron_ultramem.checkpoints_convert.huggingface import (
    AUTO_MAP,
    FORMAT_VERSION,
    MODEL_FILES,
    configuration_ultramem,
    copy_model_files,
    modeling_ultramem,
)
from tests.huggingface.subprocesses import ROOT, run


def write_folder(model, folder: Path, **options) -> Path:
    """A checkpoint folder as the converter makes it."""
    model.config.auto_map = AUTO_MAP
    model.save_pretrained(folder, **options)
    copy_model_files(folder)
    return folder


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize(
    "case",
    [
        "dense-untied-no-qk-norm-head-width",
        "moe-shared-expert",
        "ring",
        "heads",
        "ultramem-skip-layer",
        "memory-plus",
        "pkm",
        "peer",
    ],
)
def test_a_saved_model_loads_bitwise_equal(reference, tmp_path, case):
    made = reference(case)
    model = made.hf_model()
    loaded = load(write_folder(model, tmp_path / "model"))
    assert type(loaded).__module__.startswith("transformers_modules")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    assert torch.equal(logits_of(loaded, made.tokens), logits_of(model, made.tokens))
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": loaded.config.name_or_path}


def test_shards_load_and_every_table_is_stored_once(reference, tmp_path):
    made = reference("ring")
    folder = write_folder(made.hf_model(), tmp_path / "model", max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    stored = [name for file in files for name in load_file(file)]
    assert len(stored) == len(set(stored))
    assert "lm_head.weight" not in stored  # tied
    assert [name for name in stored if name.endswith(".values")] == ["model.pools.0.values"]
    torch.testing.assert_close(logits_of(load(folder), made.tokens), made.logits, rtol=0, atol=1e-5)


def test_a_model_loaded_with_remote_code_saves_a_folder_that_loads_again(reference, tmp_path):
    made = reference("heads")
    load(write_folder(made.hf_model(), tmp_path / "first")).save_pretrained(tmp_path / "second")
    assert {file.name for file in (tmp_path / "second").glob("*.py")} == set(MODEL_FILES)
    torch.testing.assert_close(logits_of(load(tmp_path / "second"), made.tokens), made.logits, rtol=0, atol=1e-5)


def test_the_auto_classes_find_the_code(reference, tmp_path):
    made = reference("own-tables")
    folder = write_folder(made.hf_model(), tmp_path / "model")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "ultramem"
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        hidden = decoder(made.tokens).last_hidden_state
    logits = hidden @ decoder.embed_tokens.weight.T
    torch.testing.assert_close(logits, made.logits, rtol=0, atol=1e-5)


def test_embeddings_stay_tied_after_loading(reference, tmp_path):
    loaded = load(write_folder(reference("ring").hf_model(), tmp_path / "model"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map_loads_the_model(reference, tmp_path, device_map):
    made = reference("ring")
    loaded = load(write_folder(made.hf_model(), tmp_path / "model"), device_map=device_map)
    torch.testing.assert_close(logits_of(loaded, made.tokens), made.logits, rtol=0, atol=1e-5)


def test_the_implementation_of_memory_is_an_argument_of_loading(reference, tmp_path):
    made = reference("ring")
    loaded = load(write_folder(made.hf_model(), tmp_path / "model"), memory_kernels="fused")
    assert {pool.kernels for pool in loaded.model.pools} == {"fused"}
    torch.testing.assert_close(logits_of(loaded, made.tokens), made.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_disk", ["model.pools", "model.layers.1"])
def test_parts_of_the_model_may_stay_on_the_disk(reference, tmp_path, on_disk):
    made = reference("ring")
    folder = write_folder(made.hf_model(), tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.pools"]
    places = dict.fromkeys([*names, *(f"model.layers.{layer}" for layer in range(4))], "cpu")
    places[on_disk] = "disk"
    loaded = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert all(param.is_meta for param in loaded.get_submodule(on_disk).parameters())
    torch.testing.assert_close(logits_of(loaded, made.tokens), made.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"format_version": FORMAT_VERSION + 1}, {"memory_kernels": "fast"}, {"kind": "x"}])
def test_a_config_that_this_code_cannot_read_is_refused(reference, tmp_path, change):
    folder = write_folder(reference("ring").hf_model(), tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    ((name, value),) = change.items()
    (config["memory"] if name == "kind" else config)[name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_every_file_is_imported_by_the_first_one():
    """Older releases of transformers copy the files that the modelling file imports, but not what those import."""
    imported = get_relative_imports(Path(modeling_ultramem.__file__))
    assert {*MODEL_FILES} == {"modeling_ultramem.py", *(f"{name}.py" for name in imported)}


def test_both_places_of_the_format_version_agree():
    assert configuration_ultramem.FORMAT_VERSION == FORMAT_VERSION


USE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *more):
        hidden = name.partition(".")[0] in ("megatron_ultramem", "ultramem_kernels", "megatron")
        return None if hidden else self.finder.find_spec(name, *more)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import importlib.util
assert importlib.util.find_spec("megatron_ultramem") is None

import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[3])
print(model.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False).shape[1])
"""
"""Uses a checkpoint folder in a process that cannot import this repository, however it is installed."""


@pytest.mark.parametrize("start", ["elsewhere", "repository"])
def test_a_folder_runs_where_this_repository_cannot_be_imported(reference, tmp_path, start):
    made = reference("ring")
    folder = write_folder(made.hf_model(), tmp_path / "model")
    torch.save(made.tokens, tmp_path / "tokens.pt")
    cwd = ROOT if start == "repository" else tmp_path
    out = run(USE, folder, tmp_path / "tokens.pt", tmp_path / "logits.pt", cwd=cwd, HF_HOME=str(tmp_path / "home"))
    assert out.split()[-1] == "9"
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), made.logits, rtol=0, atol=1e-5)
