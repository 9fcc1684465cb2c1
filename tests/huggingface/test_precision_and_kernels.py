"""bf16, buffers that stay fp32 or integer, and memory layers on the package ultramem_kernels."""

from __future__ import annotations

import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from megatron_ultramem.checkpoints_convert.huggingface import ultramem_common
from tests.huggingface.cases import CASES
from tests.huggingface.megatron_models import build_reference

MEMORY = [
    "own-tables",
    "ring",
    "heads",
    "one-query",
    "three-cores-capped",
    "gelu",
    "no-shuffle",
    "ultramem-skip-layer",
    "memory-plus",
    "pkm",
    "peer",
]


@pytest.mark.parametrize("case", ["ring", "pkm"])
@pytest.mark.parametrize("how", ["from_pretrained", "from_config", "to"])
def test_in_bf16_integers_and_statistics_keep_their_precision(reference, tmp_path, how, case):
    made = reference(case)
    model = made.hf_model()
    if how == "from_pretrained":
        model.save_pretrained(tmp_path)
        cast = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    elif how == "from_config":
        cast = type(model)._from_config(model.config, dtype=torch.bfloat16)
    else:
        cast = made.hf_model().to(torch.bfloat16)
    wide = model.state_dict()
    for name, tensor in cast.state_dict().items():
        if name.endswith((".u", ".t", "running_mean", "running_var")):
            assert tensor.dtype == torch.float32, name
        elif name.endswith("permutation"):
            assert tensor.dtype == torch.int32, name
        else:
            assert tensor.dtype == torch.bfloat16, name
        if how != "from_config":
            assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


@pytest.mark.parametrize("case", ["moe-and-memory", "ring"])
def test_bf16_logits_are_as_near_to_fp32_as_megatrons_are(case):
    rounded = build_reference([*CASES[case], "train.precision=bf16"])
    with torch.no_grad():
        exact = rounded.hf_model()(rounded.tokens).logits
        logits = rounded.hf_model().to(torch.bfloat16)(rounded.tokens).logits
    assert logits.dtype == torch.bfloat16
    error, megatrons = ((found.float() - exact).abs().mean().item() for found in (logits, rounded.logits))
    assert 0 < error < 1.25 * megatrons < 0.1
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("case", MEMORY)
def test_the_kernels_compute_the_same(reference, case):
    made = reference(case)
    model = made.hf_model(memory_kernels="fused")
    output = model(made.tokens, labels=made.tokens)
    torch.testing.assert_close(output.logits, made.logits, rtol=0, atol=1e-5)
    output.loss.backward()
    for name, param in model.named_parameters():
        scale = made.grads[name].abs().max().item()
        torch.testing.assert_close(param.grad, made.grads[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_the_log_says_once_that_the_kernels_are_used(reference):
    made = reference("ring")
    ultramem_common._installed_kernels.cache_clear()
    with CaptureLogger(logging.get_logger(ultramem_common.__name__)) as log:
        for _ in range(2):
            made.hf_model(memory_kernels="fused")(made.tokens)
    assert log.out.count("memory layers run on the kernels of ultramem_kernels") == 1


def test_without_a_gpu_auto_is_plain_pytorch(reference):
    made = reference("ring")
    ultramem_common._installed_kernels.cache_clear()
    with CaptureLogger(logging.get_logger(ultramem_common.__name__)) as log:
        made.hf_model()(made.tokens)
    assert log.out == ""


def test_kernels_that_are_asked_for_and_missing_are_an_error(reference, monkeypatch):
    made = reference("ring")
    ultramem_common._installed_kernels.cache_clear()
    monkeypatch.setattr(ultramem_common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="memory_kernels = 'fused' needs the package ultramem_kernels"):
        made.hf_model(memory_kernels="fused")(made.tokens)
    ultramem_common._installed_kernels.cache_clear()
