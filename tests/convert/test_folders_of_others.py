"""Folders that transformers saved of our model, and checkpoints that are stored in unusual ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.verify import our_logits
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.checkpoint_folder import read_config, read_record
from tests.convert.test_llama_style import MODELS, save_folder
from tests.convert.test_round_trip import assert_same_weights

Convert = Callable[..., tuple[int, str]]


def test_what_transformers_saved_comes_back(tmp_path: Path, checkpoint: Path, folder: Path, convert: Convert) -> None:
    """Its folder has config.json and the weights, and nothing that we left beside them."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs" / "ultramem_conversion.json").exists()
    shutil.copy(folder / "tokenizer.json", tmp_path / "theirs")
    code, printed = convert("from-hf", tmp_path / "theirs", tmp_path / "ours")
    assert code == 0, printed
    assert read_config(tmp_path / "ours").model == read_config(checkpoint).model
    assert read_record(tmp_path / "ours").step == 0
    before, after = CheckpointReader(checkpoint), CheckpointReader(tmp_path / "ours")
    assert before.tensors == after.tensors
    name = "decoder.final_layernorm.weight"
    assert torch.equal(after.read(name), 2 * before.read(name))


def test_fine_tuned_in_another_dtype(tmp_path: Path, folder: Path, convert: Convert) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(str(tmp_path / "theirs"))
    shutil.copy(folder / "tokenizer.json", tmp_path / "theirs")
    code, printed = convert("from-hf", tmp_path / "theirs", tmp_path / "ours")
    assert code == 0, printed
    assert read_config(tmp_path / "ours").train.precision == "bf16"
    tensors = CheckpointReader(tmp_path / "ours").tensors
    assert tensors["decoder.pools.0.values"].dtype == torch.bfloat16
    assert tensors["decoder.layers.0.mlp.memory.retrieval.u"].dtype == torch.float32


def test_a_permutation_that_the_seed_does_not_give_is_kept(
    tmp_path: Path, checkpoint: Path, folder: Path, convert: Convert
) -> None:
    """As if another torch had drawn it: the model keeps the rows that it was trained with."""
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (theirs / "SHA256SUMS").unlink()
    name = "model.layers.1.memory.permutation"
    file = theirs / json.loads((theirs / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    code, printed = convert("from-hf", theirs, tmp_path / "ours")  # the logits are compared
    assert code == 0, printed
    assert read_config(tmp_path / "ours").model.memory.keep_shuffle
    kept = CheckpointReader(tmp_path / "ours").read("decoder.layers.1.mlp.memory.permutation")
    assert torch.equal(kept, tensors[name])
    prompt = [[5, 6, 7, 8]]
    assert not torch.equal(
        *our_logits(checkpoint, prompt, "fp32", []), *our_logits(tmp_path / "ours", prompt, "fp32", [])
    )

    tensors[name][0] = tensors[name][1]
    save_file(tensors, file, metadata={"format": "pt"})
    code, printed = convert("from-hf", theirs, tmp_path / "again")
    assert code == 2
    assert f"{name} [144] is no permutation of 144 rows" in printed


def test_frequencies_that_old_versions_saved_are_accounted_for(tmp_path: Path, convert: Convert) -> None:
    source = save_folder(tmp_path / "theirs", LlamaForCausalLM(MODELS["llama"][1]))
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, printed = convert("from-hf", source, tmp_path / "ours")
    assert code == 0, printed
    assert "follows from model.rope_base" in printed


def test_a_conversion_is_the_same_as_one_of_a_conversion(tmp_path: Path, folder: Path, convert: Convert) -> None:
    assert convert("from-hf", folder, tmp_path / "ours", "--no-verify")[0] == 0
    assert convert("to-hf", tmp_path / "ours", tmp_path / "hf", "--no-verify", "--max-shard-size", "40KB")[0] == 0
    sums = [(path / "SHA256SUMS").read_text().splitlines() for path in (tmp_path / "hf", folder)]
    ours, first = ([line for line in lines if line.endswith(".safetensors")] for lines in sums)
    assert ours == first and len(ours) > 1
    assert convert("from-hf", tmp_path / "hf", tmp_path / "again", "--no-verify")[0] == 0
    assert_same_weights(tmp_path / "ours", tmp_path / "again")


def test_shards_are_read_whatever_their_strides(tmp_path: Path) -> None:
    """torch.save keeps the order in which numbers lie in memory."""
    tensors = {"turned": torch.randn(6, 4).T, "part": torch.randn(4, 8)[:, :3], "plain": torch.randn(4, 3)}
    dcp.save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    reader = CheckpointReader(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(reader.read(name, 1, 3), tensor[1:3]), name


def test_rows_that_no_shard_holds_are_missed(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(4, 3)}, checkpoint_id=str(tmp_path), no_dist=True)
    reader = CheckpointReader(tmp_path)
    reader._parts["w"] = [part for part in reader._parts["w"] if part.place != (0, 0)]
    with pytest.raises(CheckpointError, match="only 0 of 12 numbers of rows 0 to 4"):
        reader.read("w")
