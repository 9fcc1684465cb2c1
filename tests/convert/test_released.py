"""Checkpoints of the released research code: our logits are those of its forward, with its stored shuffle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_ultramem.checkpoints_convert.tokenizer_files import write_for_transformers
from megatron_ultramem.checkpoints_convert.verify import our_logits
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.checkpoint_folder import read_config
from megatron_ultramem.training.tokenizers import ByteTokenizer
from tests.convert.released_model import Sizes, State, forward, random_state

Convert = Callable[..., tuple[int, str]]
PROMPTS = [[256, 5, 99, 5, 120, 7], [3], list(range(30, 60))]
MODELS = {
    "single-query": Sizes(),
    "query-per-rank": Sizes(query_per_rank=True),
    "two-heads-gelu-untied": Sizes(memory_heads=2, gelu=True, tied=False),
    "whole-ring-three-cores-no-qk-norm": Sizes(share_ratio=1.0, cores=3, qk_norm=False, kv_heads=4),
    "uneven-keys": Sizes(share_ratio=0.75, rank=3, m=7),  # sqrt(3) * 6 is no whole number
}


def save(folder: Path, state: State, config: dict[str, Any]) -> Path:
    folder.mkdir()
    torch.save(state, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_for_transformers(TokenizerConfig(), ByteTokenizer(), folder, 64)
    return folder


FAST = ("single-query", "two-heads-gelu-untied")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in FAST)]
)
def test_logits_are_those_of_the_released_forward(tmp_path: Path, convert: Convert, name: str) -> None:
    sizes = MODELS[name]
    state = random_state(sizes)
    code, printed = convert("from-released", save(tmp_path / "theirs", state, sizes.config()), tmp_path / "ours")
    assert code == 0, printed
    assert "none is left over, none is missing" in printed
    for ours, tokens in zip(our_logits(tmp_path / "ours", PROMPTS, "fp32", []), PROMPTS, strict=True):
        torch.testing.assert_close(ours, forward(state, sizes, tokens), atol=1e-4, rtol=0)
    # What is peculiar about it survives the way to Hugging Face, where the gate compares once more.
    code, printed = convert("to-hf", tmp_path / "ours", tmp_path / "hf")
    assert code == 0, printed
    assert read_config(tmp_path / "ours").model.memory.keep_shuffle


def test_the_stored_shuffle_is_used(tmp_path: Path, convert: Convert) -> None:
    sizes = Sizes()
    state = random_state(sizes)
    name = "transformer.mem_blocks.2.shuffle_index"
    state[name] = state[name].roll(1)
    source = save(tmp_path / "theirs", state, sizes.config())
    assert convert("from-released", source, tmp_path / "ours")[0] == 0
    (ours,) = our_logits(tmp_path / "ours", PROMPTS[:1], "fp32", [])
    torch.testing.assert_close(ours, forward(state, sizes, PROMPTS[0]), atol=1e-4, rtol=0)
    assert (ours - forward(random_state(sizes), sizes, PROMPTS[0])).abs().max() > 1e-2


def test_a_model_without_a_shuffle(tmp_path: Path, convert: Convert) -> None:
    sizes = Sizes()
    state = random_state(sizes)
    identity = {name: torch.arange(sizes.n**2) for name in state if "shuffle" in name}
    source = save(tmp_path / "theirs", {k: v for k, v in state.items() if k not in identity}, sizes.config())
    code, printed = convert("from-released", source, tmp_path / "ours")
    assert code == 0, printed
    (ours,) = our_logits(tmp_path / "ours", PROMPTS[:1], "fp32", [])
    torch.testing.assert_close(ours, forward({**state, **identity}, sizes, PROMPTS[0]), atol=1e-4, rtol=0)


def test_what_config_yaml_does_not_say_is_asked_for(tmp_path: Path, convert: Convert) -> None:
    sizes, state = Sizes(), random_state(Sizes())
    config = sizes.config()
    del config["model"]["mem_knn"]
    source = save(tmp_path / "theirs", state, config)
    code, printed = convert("from-released", source, tmp_path / "ours")
    assert code == 2
    assert "has no mem_knn" in printed and "model.memory.top_m=NUMBER" in printed
    code, printed = convert("from-released", source, tmp_path / "ours", "model.memory.top_m=5")
    assert code == 0, printed
    (ours,) = our_logits(tmp_path / "ours", PROMPTS[:1], "fp32", [])
    torch.testing.assert_close(ours, forward(state, sizes, PROMPTS[0]), atol=1e-4, rtol=0)


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {name: x for name, x in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (without("blocks.1.ff_norm"), {}, "missing: transformer.blocks.1.ff_norm.weight"),
        (lambda s: {**s, "transformer.blocks.0.att_proj.bias": torch.zeros(2)}, {}, "left over: transformer.blocks.0"),
        (lambda s: {**s, "transformer.mem_blocks.0.values_proj.weight": torch.zeros(3, 3)}, {}, "[3, 3] instead of"),
        (without("mem_blocks.3"), {}, "3 of 4 blocks have memory"),
        (without("full_memory_layer"), {}, "no checkpoint of the released code"),
        (lambda s: {**s, "transformer.mem_blocks.1.shuffle_index": torch.zeros(64, dtype=torch.int64)}, {},
         "no permutation"),
        (dict, {"mem_knum": 7}, "mem_knum = 7, the tensors say 6"),
        (dict, {"mem_share_ratio": 0.25}, "mem_share_ratio = 0.25, the tensors say 0.5"),
        (dict, {"n_layers": 5}, "n_layers = 5, the tensors say 4"),
        (dict, {"layer_norm_type": "default"}, "layer_norm_type = 'default' (legal: 'rms')"),
        (dict, {"mem_tucker_dropout": 0.1}, "mem_tucker_dropout = 0.1 (known: mem_knum"),
        (dict, {"rope_theta": 500.5}, "rope_theta = 500.5 (legal: a whole number)"),
        (dict, {"n_heads": None}, "n_heads = None; legal: an integer"),
        (lambda s: {"optimizer": {}}, {}, "does not hold tensors by name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tmp_path: Path, convert: Convert, change: Callable[[State], State], settings: dict[str, Any], named: str
) -> None:
    config = Sizes().config()
    config["model"] |= settings
    source = save(tmp_path / "theirs", change(random_state(Sizes())), config)
    code, printed = convert("from-released", source, tmp_path / "ours")
    assert code == 2
    assert named in printed
    assert not (tmp_path / "ours").exists()


def test_damaged_files_are_refused(tmp_path: Path, convert: Convert) -> None:
    source = save(tmp_path / "theirs", random_state(Sizes()), Sizes().config())
    (source / "config.yaml").write_text("model: [")
    assert "config.yaml cannot be read" in convert("from-released", source, tmp_path / "ours")[1]
    (source / "model.pt").write_bytes((source / "model.pt").read_bytes()[:5000])
    assert "model.pt cannot be read" in convert("from-released", source, tmp_path / "ours")[1]
    (source / "model.pt").unlink()
    assert "model.pt cannot be read" in convert("from-released", source, tmp_path / "ours")[1]
