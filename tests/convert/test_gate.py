"""The logit gate: what is the same passes in fp32 and in bf16, and what is not does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ultramem.checkpoints_convert import verify
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.tokenizers import build_tokenizer

Logits = list[torch.Tensor]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return verify.prompts_for(build_tokenizer(TokenizerConfig()), 64)


@pytest.fixture(scope="module")
def ours(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Logits]:
    return {precision: verify.our_logits(checkpoint, prompts, precision, []) for precision in verify.DTYPES}


def as_it_is(model: UltraMemForCausalLM) -> None:
    pass


def without_memory(model: UltraMemForCausalLM) -> None:
    for name, param in model.named_parameters():
        if name.endswith(".values"):
            param.data.zero_()


def two_layers_exchanged(model: UltraMemForCausalLM) -> None:
    first, second = (model.model.layers[number].self_attn for number in (1, 2))
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [as_it_is, without_memory, two_layers_exchanged])
def test_another_model_does_not_pass(
    tmp_path: Path,
    folder: Path,
    prompts: list[list[int]],
    ours: dict[str, Logits],
    precision: str,
    change: Callable[[UltraMemForCausalLM], None],
) -> None:
    model = UltraMemForCausalLM.from_pretrained(str(folder))
    change(model)
    model.save_pretrained(str(tmp_path))
    theirs = verify.their_logits(tmp_path, prompts, precision, UltraMemForCausalLM)
    if change is as_it_is:
        verify.compare(ours["fp32"], theirs, precision, ours[precision])
        return
    with pytest.raises(CheckpointError, match="do not compute the same"):
        verify.compare(ours["fp32"], theirs, precision, ours[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [float("nan"), 50.0])
def test_logits_that_differ_do_not_pass(precision: str, wrong: float) -> None:
    logits = [torch.randn(5, 7), torch.randn(3, 7)]
    assert verify.compare(logits, logits, precision, logits).top_1 == 1
    other = [logits[0], logits[1].clone()]
    other[1][2, 3] = wrong
    with pytest.raises(CheckpointError, match="do not compute the same"):
        verify.compare(logits, other, precision, logits)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_ends_in_the_gate_is_one_error(error: Exception) -> None:
    def short(precision: str) -> Logits:
        raise error

    with pytest.raises(CheckpointError, match="memory does not suffice.*--no-verify"):
        verify.run_gate("fp32", short, short)


def test_other_errors_of_the_gate_are_not_hidden() -> None:
    def broken(precision: str) -> Logits:
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        verify.run_gate("bf16", broken, broken)
