"""The memory layer on a CUDA GPU: its precision paths, its atomic and its deterministic backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from megatron_ultramem.memory.lookup import lookup
from megatron_ultramem.memory.numerics import bmm_accumulated

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_bf16_products_come_out_in_fp32_without_rounding() -> None:
    a, b = (torch.randn(3, 64, 64, device="cuda").bfloat16() for _ in range(2))
    got = bmm_accumulated(a, b.mT)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double().mT, rtol=1e-5, atol=1e-4)


def test_gpu_equals_cpu(small_model, tokens) -> None:
    cpu = small_model(2, torch.float64, sharing="ring", share_size=2, num_heads=2)
    gpu = copy.deepcopy(cpu).cuda()
    results = []
    for model, x in ((cpu, tokens(40, dtype=torch.float64)), (gpu, tokens(40, dtype=torch.float64).cuda())):
        model.attach_main_grads()
        out = model(x)
        out.square().sum().backward()
        results.append(
            [out.detach().cpu(), model.table.values.main_grad.cpu(), model.layers[0].retrieval.keys.grad.cpu()]
        )
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_backward_is_bitwise_repeatable_on_colliding_rows() -> None:
    torch.manual_seed(0)
    indices = torch.randint(0, 50, (4096, 32), device="cuda")
    scores = torch.randn(4096, 32, 2, device="cuda", requires_grad=True)
    pre_input = torch.randn(4096, 64, device="cuda")
    results = []
    for _ in range(3):
        torch.manual_seed(1)
        tables = [torch.nn.Parameter(torch.randn(50, 64, device="cuda")) for _ in range(2)]
        for table in tables:
            table.main_grad = torch.zeros_like(table)
        lookup(indices, scores, pre_input, *tables).square().sum().backward()
        results.append([table.main_grad for table in tables])
    assert all(
        torch.equal(first, later) for other in results[1:] for first, later in zip(results[0], other, strict=True)
    )


@pytest.mark.usefixtures("deterministic")
def test_deterministic_training_step_of_the_layer_is_bitwise_repeatable(small_model, tokens) -> None:
    model = small_model(2, sharing="ring", share_size=2, balance_loss_coeff=0.1).cuda().bfloat16()
    results = []
    for _ in range(2):
        model.zero_grad()
        model.attach_main_grads()
        model(tokens(500).cuda().bfloat16()).float().square().sum().backward()
        results.append([model.table.values.main_grad.clone(), *(layer.retrieval.keys.grad for layer in model.layers)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
