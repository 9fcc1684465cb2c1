"""Value pools: initial numbers, and the signal that a microbatch's gradient is complete."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.memory.init import monte_carlo_gain, sigma_v
from megatron_ultramem.memory.tables import ValuePool

SHARED = {"sharing": "ring", "share_size": 2}


def test_the_signal_comes_once_per_table_after_the_last_layer_of_a_microbatch(small_model, tokens) -> None:
    model = small_model(3, **SHARED)
    model.attach_main_grads()
    ready: list[torch.nn.Parameter] = []
    snapshots: list[torch.Tensor] = []

    def signal(table: torch.nn.Parameter) -> None:
        ready.append(table)
        snapshots.append(table.main_grad.clone())

    model.table.grad_ready = signal
    for microbatch in range(2):
        out = model(tokens(6))
        assert len(ready) == 2 * microbatch
        out.sum().backward()
        assert ready[2 * microbatch :] == [model.table.values, model.table.pre_values]
    assert torch.equal(snapshots[2], model.table.values.main_grad)  # complete when announced
    assert torch.equal(snapshots[3], model.table.pre_values.main_grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_evaluation_between_forward_and_backward_does_not_disturb_the_count(
    small_model, tokens, recompute: bool
) -> None:
    model = small_model(2, recompute=recompute, **SHARED)
    model.attach_main_grads()
    ready: list[torch.nn.Parameter] = []
    model.table.grad_ready = ready.append
    out = model(tokens(6))
    with torch.no_grad():
        model(tokens(6))
    model(tokens(6))  # a forward whose backward never comes
    out.sum().backward()
    assert len(ready) == 2


def test_an_abandoned_microbatch_can_be_forgotten(small_model, tokens) -> None:
    model = small_model(2, **SHARED)
    model.attach_main_grads()
    ready: list[torch.nn.Parameter] = []
    model.table.grad_ready = ready.append
    model.layers[0](tokens(6)).sum().backward()
    model.table.reset_grad_count()
    model.layers[0](tokens(6)).sum().backward()
    assert ready == []
    model.layers[1](tokens(6)).sum().backward()
    assert len(ready) == 2


def test_without_main_grad_there_is_no_signal(small_model, tokens) -> None:
    model = small_model(2, **SHARED)
    ready: list[torch.nn.Parameter] = []
    model.table.grad_ready = ready.append
    model(tokens(6)).sum().backward()
    assert ready == [] and model.table.values.grad is not None


def pool_of(**settings: object) -> tuple[MemoryConfig, ValuePool]:
    memory = MemoryConfig(num_keys=30, key_dim=16, top_m=4, value_dim=8, pre_value_dim=4, **settings)  # type: ignore[arg-type]
    pools = plan_pools(ModelConfig(num_layers=4, memory=memory))
    return memory, ValuePool(memory, pools[1], hidden_size=64, num_layers=4, ffn_ratio=3.0)


def test_tables_are_drawn_with_sigma_v() -> None:
    memory, table = pool_of()
    _, variance = monte_carlo_gain(30, 16, tucker_rank=2, num_cores=2, top_m=4, candidates=4)
    std = sigma_v(memory, hidden_size=64, num_layers=4, ffn_ratio=3.0, score_variance=variance)
    table.reset_parameters(1)
    assert table.values.initializer.std == table.pre_values.initializer.std == std
    assert table.values.std().item() == pytest.approx(std, rel=0.05)
    assert not torch.equal(table.values[:, :4], table.pre_values)


def test_released_initialisation_uses_the_released_deviation() -> None:
    _, table = pool_of(init="released")
    assert table.values.initializer.std == 0.02


def test_numbers_depend_on_seed_and_pool() -> None:
    (_, first), (_, second) = pool_of(), pool_of()
    first.reset_parameters(1)
    second.reset_parameters(1)
    assert torch.equal(first.values, second.values)
    second.reset_parameters(2)
    assert not torch.equal(first.values, second.values)
    second.pool = plan_pools(ModelConfig(num_layers=4, memory=MemoryConfig(num_keys=30, top_m=4)))[2]
    second.reset_parameters(1)
    assert not torch.equal(first.values, second.values)


def test_padding_rows_are_never_looked_up(small_model, tokens) -> None:
    model = small_model(3, num_keys=5, rows_multiple=64, top_m=25, init="released", **{**SHARED, "share_size": 3})
    pool = model.pool
    assert pool.padded_rows > pool.rows
    with torch.no_grad():
        model.table.values[pool.rows :] = torch.nan
        model.table.pre_values[pool.rows :] = torch.nan
    assert model(tokens(40)).isfinite().all()
