"""A dense model with memory layers added: its logits bit for bit at step 0, and then it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.verify import our_logits
from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from megatron_ultramem.training.checkpoint_folder import read_config
from tests.convert.test_llama_style import MODELS, build, save_folder

Convert = Callable[..., tuple[int, str]]
EXAMPLE = Path(__file__).parents[2] / "examples/configs/upcycle_llama.yaml"
PROMPTS = [[256, *b"The memory of a model"], [5], list(range(40))]
V2 = {"num_keys": 9, "key_dim": 8, "top_m": 6, "value_dim": 12, "pre_value_dim": 10}
PLAIN = {"num_keys": 9, "key_dim": 8, "top_m": 6}
MEMORIES = {
    "ultramem_v2-ring": {**V2, "sharing": "ring", "share_size": 2, "keep_shuffle": True},
    "ultramem": {**PLAIN, "kind": "ultramem", "value_dim": 12, "layers": "0", "join_layers": "1"},
    "memory_plus": {**PLAIN, "kind": "memory_plus", "value_dim": 12, "replaces_ffn": False},
    "pkm": {**PLAIN, "kind": "pkm", "value_dim": 32, "replaces_ffn": False, "layers": "1"},
    "peer": {**PLAIN, "kind": "peer", "value_dim": 32, "pre_value_dim": 32, "replaces_ffn": False},
}


def write_recipe(path: Path, memory: dict, **sections: dict) -> Path:
    path.write_text(yaml.safe_dump({**sections, "model": {**sections.get("model", {}), "memory": memory}}))
    return path


FAST = ("ultramem_v2-ring", "pkm")  # with and without a last matrix to be zero


@pytest.mark.parametrize(
    "memory", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MEMORIES if name not in FAST)]
)
def test_logits_are_bitwise_those_of_the_dense_model(tmp_path: Path, convert: Convert, memory: str) -> None:
    source = save_folder(tmp_path / "theirs", build("llama"))
    recipe = write_recipe(tmp_path / "recipe.yaml", MEMORIES[memory])
    assert convert("from-hf", source, tmp_path / "dense", "--no-verify")[0] == 0
    code, printed = convert("upcycle", source, tmp_path / "upcycled", "--config", recipe)
    assert code == 0, printed
    assert "top-1 agreement 100.0 %" in printed
    assert read_config(tmp_path / "upcycled").model.memory.layers != "none"
    dense = our_logits(tmp_path / "dense", PROMPTS, "fp32", [])
    upcycled = our_logits(tmp_path / "upcycled", PROMPTS, "fp32", [])
    assert all(torch.equal(*pair) for pair in zip(dense, upcycled, strict=True))


def test_moe_and_bf16_models_can_be_upcycled(tmp_path: Path, convert: Convert) -> None:
    source = save_folder(tmp_path / "theirs", build("olmoe").to(torch.bfloat16))
    recipe = write_recipe(tmp_path / "recipe.yaml", V2)
    code, printed = convert("upcycle", source, tmp_path / "upcycled", "--config", recipe)
    assert code == 0, printed
    tensors = CheckpointReader(tmp_path / "upcycled").tensors
    assert tensors["decoder.pools.1.values"].dtype == torch.bfloat16
    assert tensors["decoder.layers.0.mlp.memory.retrieval.u"].dtype == torch.float32


def test_training_reaches_the_tables(tmp_path: Path, corpus: Path, convert: Convert) -> None:
    """The run that the recipe describes, from the command that the conversion prints."""
    source = save_folder(tmp_path / "theirs", build("llama"))
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        V2,
        data={"paths": [str(corpus)], "split": "1,0,0", "sequence_length": 32, "tokenizer": {"kind": "byte"}},
        optimizer={"lr": 3e-3},
        train={"steps": 12, "global_batch_size": 8, "micro_batch_size": 8, "eval_steps": 0},
        logging={"progress": False, "tensorboard": False, "interval": 1},
    )
    start, run = tmp_path / "upcycled", tmp_path / "run"
    code, printed = convert("upcycle", source, start, "--config", recipe)
    assert code == 0, printed
    (command,) = [line for line in printed.splitlines() if line.startswith("train on with: ultramem ")]
    words = command.removeprefix("train on with: ultramem ").replace("run_dir=...", f"run_dir={run}").split()
    assert main(words) == 0

    before, after = CheckpointReader(start), CheckpointReader(run / "checkpoints" / "step_00000012")
    for name in before.tensors:
        if "memory" in name or "pools" in name:
            moved = (before.read(name) - after.read(name)).abs().max() > 0
            assert moved, name
    losses = [yaml.safe_load(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


def test_weights_alone_are_not_taken_for_a_whole_checkpoint(
    tmp_path: Path, corpus: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_folder(tmp_path / "theirs", build("llama"))
    settings = [f"data.paths=[{corpus}]", "data.split='1,0,0'", "train.eval_steps=0", "data.tokenizer.kind=byte"]
    assert convert("from-hf", source, tmp_path / "ours", "--no-verify", *settings)[0] == 0
    arguments = ["--config", str(tmp_path / "ours/config.yaml"), f"checkpoint.load={tmp_path / 'ours'}"]
    assert main(["train", *arguments, f"train.run_dir={tmp_path / 'run'}"]) == 2
    assert "holds weights alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "model", "named"),
    [
        ({"layers": "none"}, {}, "has no memory layers (model.memory.layers = 'none')"),
        ({**PLAIN, "kind": "memory_plus"}, {}, "takes the place of FFNs"),
        (V2, {"hidden_size": 64}, "another model than"),
        (V2, {"num_layers": 4}, "model.num_layers = 4 (there 2)"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    tmp_path: Path, convert: Convert, memory: dict, model: dict, named: str
) -> None:
    source = save_folder(tmp_path / "theirs", LlamaForCausalLM(MODELS["llama"][1]))
    recipe = write_recipe(tmp_path / "recipe.yaml", memory, model=model)
    code, printed = convert("upcycle", source, tmp_path / "upcycled", "--config", recipe)
    assert code == 2
    assert named in printed
    assert not (tmp_path / "upcycled").exists()


def test_a_model_with_memory_is_not_upcycled(tmp_path: Path, folder: Path, convert: Convert) -> None:
    code, printed = convert("upcycle", folder, tmp_path / "o", "--config", write_recipe(tmp_path / "r.yaml", V2))
    assert code == 2
    assert "has memory layers already" in printed


def test_the_example_fits_a_model_of_its_size() -> None:
    sizes = ["model.num_layers=22", "model.hidden_size=2048", "model.num_attention_heads=32"]
    config = load_config(EXAMPLE, [*sizes, "data.paths=[x]"])
    from megatron_ultramem.planning.parameters import count_parameters

    assert 1.0e9 < count_parameters(config.model, 32000).tables < 1.2e9


@pytest.mark.slow
def test_the_example_trains(tmp_path: Path, corpus: Path, convert: Convert) -> None:
    """The shipped file with sizes cut down, for one step."""
    source = save_folder(tmp_path / "theirs", build("llama"))
    start, run = tmp_path / "upcycled", tmp_path / "run"
    small = [f"model.memory.{name}={size}" for name, size in V2.items()]
    small += [
        f"data.paths=[{corpus}]", "data.split='1,0,0'", "data.sequence_length=32", "data.tokenizer.kind=byte",
        "train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_steps=0",
        "schedule.warmup_steps=0", "logging.interval=1", "logging.progress=false", "logging.tensorboard=false",
    ]  # fmt: skip
    code, printed = convert("upcycle", source, start, "--config", EXAMPLE, *small)
    assert code == 0, printed
    settings = ["--config", str(start / "config.yaml"), f"checkpoint.load={start}", "checkpoint.load_optimizer=false"]
    assert main(["train", *settings, f"train.run_dir={run}"]) == 0
    (step,) = [yaml.safe_load(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step["loss"] < 10
    assert read_config(run / "checkpoints" / "step_00000001").optimizer.value_lr_times == 4.0  # of the example
