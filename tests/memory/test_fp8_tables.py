"""Tables read as E4M3: layers compute with exactly the numbers of the copy, which follows the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ultramem_kernels.lookup import fp8_rows

from megatron_ultramem.memory.fp8_table import Fp8Table, quantize_, row_amax

RING = {"sharing": "ring", "share_size": 1}
FP8 = {"table_read": "fp8"}
KINDS: dict[str, dict[str, Any]] = {
    "ultramem_v2": {"sharing": "ring", "share_size": 2, "activation": "gelu"},
    "ultramem_v2_recompute": {**RING, "recompute": True, "num_cores": 3, "value_dim": 9},
    "one_row": {**RING, "top_m": 1},
    "ultramem": {"kind": "ultramem"},
    "memory_plus": {"kind": "memory_plus", "num_heads": 2},
    "peer": {"kind": "peer", "value_dim": 24, "pre_value_dim": 24, "num_heads": 2},
}


def copy_of(table: torch.Tensor) -> Fp8Table:
    (copy,) = Fp8Table.like(table)
    quantize_(copy, table, row_amax(table))
    return copy


def test_the_copy_is_that_of_the_kernels() -> None:
    table = torch.randn(200, 72) * 10.0 ** torch.randint(-9, 9, (200, 1))
    table[3] = 0.0
    for numbers in (table, table.bfloat16()):
        copy, codes, scales = copy_of(numbers), torch.empty(200, 72, dtype=torch.uint8), torch.empty(200)
        fp8_rows.quantize_(numbers, codes, scales)
        assert torch.equal(copy.codes, codes) and torch.equal(copy.scales, scales)
        everything = copy.rows(torch.arange(200))
        assert everything.isfinite().all() and (everything[3] == 0).all()


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_with_the_numbers_of_the_copy(small_model, tokens, kind: str, kernels: str) -> None:
    """Output and every gradient are those of a model whose tables are these numbers; tables get the gradients as if
    they had been read."""
    settings = {"kernels": kernels, **KINDS[kind]}
    layers = 1 if kind in ("ultramem", "peer") else 2  # whose pools are one layer's
    model, exact = small_model(layers, **settings, **FP8), small_model(layers, **settings)
    for table in exact.table.parameters():
        rounded = copy_of(table.detach()).rows(torch.arange(len(table)))
        assert not torch.equal(rounded, table)
        table.data.copy_(rounded)
    x = tokens(7).requires_grad_()
    results = []
    for one in (model, exact):
        one.attach_main_grads()
        out = one(x)
        (grad_x,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        out.square().sum().backward()
        grads = {name: param.grad for name, param in one.named_parameters() if param.grad is not None}
        results.append((out, grad_x, grads, [table.main_grad for table in one.table.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_without_main_grad_tables_get_dense_gradients(small_model, tokens) -> None:
    model = small_model(**FP8)
    model(tokens(5)).sum().backward()
    assert all(table.grad is not None and table.grad.any() for table in model.table.parameters())


def test_the_copy_follows_every_change_of_the_tables(small_model, tokens) -> None:
    model, x = small_model(**FP8), tokens(5)
    outputs = [model(x)]
    with torch.no_grad():
        model.table.values.mul_(2.0)  # as torch's optimizers
    outputs.append(model(x))
    model.table.values.data.mul_(2.0)  # through another tensor, as Megatron's
    model.table.outdate()
    outputs.append(model(x))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.table.reset_parameters(seed=9)
    outputs.append(model(x))
    model.load_state_dict(saved)
    outputs.append(model(x))
    first, second, third, other, again = (output - x for output in outputs)
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(third, 4 * first)
    assert not torch.allclose(other, third)
    assert torch.equal(again, third)


def test_the_copy_stays_in_its_place_and_is_not_saved(small_model, tokens) -> None:
    model, plain = small_model(**FP8), small_model()
    model(tokens(3))
    places = [copy.codes.data_ptr() for copy in model.table._copies.values()]
    model.table.outdate()
    model(tokens(3))
    assert places == [copy.codes.data_ptr() for copy in model.table._copies.values()]
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_that_with_tables_in_full(small_model, tokens, dtype: torch.dtype) -> None:
    losses = {}
    for read in ("params", "fp8"):
        model, x = small_model(2, dtype, table_read=read, **RING), tokens(64, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[read] = []
        for _ in range(60):
            loss = (model(x).float() - x.float().roll(1, 0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[read].append(loss.item())
    assert losses["fp8"][-1] < 0.8 * losses["fp8"][0]
    torch.testing.assert_close(torch.tensor(losses["fp8"]), torch.tensor(losses["params"]), rtol=0.06, atol=0.0)
