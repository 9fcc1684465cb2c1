"""The lookup against the written-out formula, and where gradients of tables go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.memory import lookup_reference
from megatron_ultramem.memory.lookup import lookup

ROWS, T, M, C, DV, DP = 30, 7, 5, 2, 6, 4


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """indices, scores, pre_input, values, pre_values; rows repeat within and across tokens."""
    g = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    indices = torch.randint(0, ROWS // 2, (T, M), generator=g)
    indices[0, 1] = indices[0, 0]
    return [indices, random(T, M, C), random(T, DP), random(ROWS, DV), random(ROWS, DP)]


def formula(
    indices: torch.Tensor,
    scores: torch.Tensor,
    pre_input: torch.Tensor,
    values: torch.Tensor,
    pre_values: torch.Tensor,
    activation: str = "none",
) -> torch.Tensor:
    """Equation 15, row by row."""
    out = []
    width = values.shape[1] // scores.shape[2]
    for t in range(indices.shape[0]):
        slices = []
        for c in range(scores.shape[2]):
            total = torch.zeros(width, dtype=values.dtype)
            for m in range(indices.shape[1]):
                dot = pre_input[t] @ pre_values[indices[t, m]]
                active = F.gelu(dot) if activation == "gelu" else dot
                total = total + active * scores[t, m, c] * values[indices[t, m], c * width : (c + 1) * width]
            slices.append(total)
        out.append(torch.cat(slices))
    return torch.stack(out)


@pytest.fixture(params=[1000, 3], ids=["one-chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lookup_reference, "tokens_per_chunk", lambda elements, is_cuda: request.param)
    yield


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_values_and_gradients_equal_the_formula(activation: str) -> None:
    indices, *rest = inputs()
    given = [x.requires_grad_() for x in rest]
    direction = torch.randn(T, DV, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = formula(indices, *given, activation)
    got = lookup(indices, *given, activation)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, given, direction), torch.autograd.grad(expected, given, direction)
    )


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradcheck(activation: str) -> None:
    indices, *rest = inputs()
    given = [x.requires_grad_() for x in rest]
    assert torch.autograd.gradcheck(lambda *x: lookup(indices, *x, activation), given)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("with_main_grad", [{"values"}, {"pre_values"}, {"values", "pre_values"}], ids=sorted)
def test_main_grad_gets_the_dense_gradient_added_in_place(with_main_grad: set[str]) -> None:
    indices, scores, pre_input, values, pre_values = inputs()
    expected = formula(indices, scores, pre_input, values.requires_grad_(), pre_values.requires_grad_())
    dense = torch.autograd.grad(expected.square().sum(), [values, pre_values])

    tables = {"values": torch.nn.Parameter(values), "pre_values": torch.nn.Parameter(pre_values)}
    for name in with_main_grad:
        tables[name].main_grad = torch.ones_like(tables[name])
    buffers = {name: tables[name].main_grad for name in with_main_grad}
    lookup(indices, scores.requires_grad_(), pre_input, *tables.values()).square().sum().backward()
    for (name, table), gradient in zip(tables.items(), dense, strict=True):
        if name in with_main_grad:
            assert table.main_grad is buffers[name] and table.grad is None
            torch.testing.assert_close(table.main_grad, gradient + 1)
        else:
            torch.testing.assert_close(table.grad, gradient)


def test_tables_learn_even_when_nothing_else_does() -> None:
    indices, scores, pre_input, values, pre_values = inputs()
    table = torch.nn.Parameter(values)
    table.main_grad = torch.zeros_like(table)
    lookup(indices, scores, pre_input, table, pre_values).sum().backward()
    assert table.main_grad.abs().sum() > 0


def test_a_frozen_table_gets_no_gradient() -> None:
    indices, scores, pre_input, values, pre_values = inputs()
    table = torch.nn.Parameter(values, requires_grad=False)
    table.main_grad = torch.zeros_like(table)
    lookup(indices, scores.requires_grad_(), pre_input, table, pre_values).sum().backward()
    assert torch.count_nonzero(table.main_grad) == 0 and table.grad is None


def test_the_parameters_own_gradient_hooks_do_not_run_with_main_grad() -> None:
    indices, scores, pre_input, values, pre_values = inputs()
    table = torch.nn.Parameter(values)
    called: list[int] = []
    accumulate = table.expand_as(table).grad_fn.next_functions[0][0]
    accumulate.register_hook(lambda *_: called.append(1))
    lookup(indices, scores.requires_grad_(), pre_input, table, pre_values).sum().backward()
    assert called == [1]  # the ordinary path does run them
    table.main_grad = torch.zeros_like(table)
    lookup(indices, scores, pre_input, table, pre_values).sum().backward()
    assert called == [1]


class LargeAllocations(TorchDispatchMode):
    """Counts fresh tensors of at least `threshold` elements, leaving out results that share known storage."""

    def __init__(self, threshold: int, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.threshold, self.count = threshold, 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: list[torch.Tensor] = []  # kept, so that no storage address comes back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.threshold:
                pointer = tensor.untyped_storage().data_ptr()
                self.count += pointer not in self.seen
                self.seen.add(pointer)
                self.alive.append(tensor)
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_share_a_pool_never_materialise_its_gradient(small_model, tokens, recompute: bool) -> None:
    model = small_model(
        3, num_keys=40, sharing="ring", share_size=2, value_dim=32, pre_value_dim=32, recompute=recompute
    )
    tables = [model.table.values, model.table.pre_values]
    smallest = min(table.numel() for table in tables)
    model.attach_main_grads()
    known = tables + [table.main_grad for table in tables]
    with LargeAllocations(smallest, known) as watch:
        model(tokens(4)).sum().backward()
    assert watch.count == 0
    assert all(table.grad is None and table.main_grad.abs().sum() > 0 for table in tables)

    for table in tables:
        del table.main_grad
    with LargeAllocations(smallest, tables) as watch:
        model(tokens(4)).sum().backward()
    assert watch.count >= 2 * 3  # the ordinary path allocates two tables per layer: the watch sees such things


def test_fp32_accumulation_of_bf16_tables() -> None:
    indices, scores, pre_input, values, pre_values = inputs(torch.bfloat16)
    scores = scores.float()
    exact = formula(indices, *(x.double() for x in (scores, pre_input, values, pre_values)))
    got = lookup(indices, scores, pre_input, values, pre_values)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding, of the result

    table = torch.nn.Parameter(values)
    table.main_grad = torch.zeros(ROWS, DV)
    lookup(indices, scores.requires_grad_(), pre_input, table, pre_values).sum().backward()
    wide = values.double().requires_grad_()
    formula(indices, scores.detach().double(), pre_input.double(), wide, pre_values.double()).sum().backward()
    torch.testing.assert_close(table.main_grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_backward_is_bitwise_repeatable() -> None:
    indices, scores, pre_input, values, pre_values = inputs(torch.float32)
    results = []
    for _ in range(2):
        table = torch.nn.Parameter(values.clone())
        table.main_grad = torch.zeros_like(table)
        lookup(indices, scores.requires_grad_(), pre_input, table, pre_values).square().sum().backward()
        results.append(table.main_grad)
    assert torch.equal(*results)


def test_no_tokens_are_no_special_case() -> None:
    indices, scores, pre_input, values, pre_values = inputs()
    out = lookup(indices[:0], scores[:0].requires_grad_(), pre_input[:0], values.requires_grad_(), pre_values)
    out.sum().backward()
    assert out.shape == (0, DV) and torch.count_nonzero(values.grad) == 0
