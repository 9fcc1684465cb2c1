"""RMSNorms of train.norms compute the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ultramem import platform
from megatron_ultramem.config import load_config


@pytest.mark.parametrize("shape", [(5, 2, 24), (3, 2, 4, 16)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_the_kernels_norm_is_that_of_torch_with_its_gradients(shape: tuple[int, ...], strided: bool) -> None:
    platform.prepare()
    from megatron_ultramem.model.norm import KernelRMSNorm, RMSNorm

    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    norms = [made(config, shape[-1], eps=1e-3) for made in (RMSNorm, KernelRMSNorm)]
    gain = torch.randn(shape[-1])
    wide = torch.randn(*shape[:-1], 3 * shape[-1])
    results = []
    for norm in norms:
        assert norm.weight.sequence_parallel
        norm.weight.data.copy_(gain)
        source = wide.clone().requires_grad_()
        x = source[..., : shape[-1]] if strided else source[..., : shape[-1]].contiguous()
        y = norm(x)
        (y * y).sum().backward()
        results.append((y.detach(), source.grad, norm.weight.grad))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("setting", "kernel"), [("backend", "RMSNorm"), ("torch", "RMSNorm"), ("ultramem", "KernelRMSNorm")]
)
def test_every_norm_of_a_model_is_of_the_chosen_kernels(setting: str, kernel: str) -> None:
    where = platform.prepare()
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.model.norm import RMSNorm
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    config = load_config(
        None,
        [
            "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.ffn_hidden_size=48",
            "model.memory.layers=0", "model.memory.num_keys=12", "model.memory.key_dim=8", "model.memory.top_m=6",
            "model.memory.value_dim=16", "model.memory.pre_value_dim=16", "train.precision=fp32",
            f"train.norms={setting}",
        ],
    )  # fmt: skip
    initialize_distributed(config, where)
    try:
        _, (model,) = build_chunks(config, 300, "local", where.device)
        norms = [type(module).__name__ for module in model.modules() if isinstance(module, RMSNorm)]
    finally:
        destroy_distributed()
    assert norms == [kernel] * 9  # in each block before attention and the FFN, of queries and keys; and the last
