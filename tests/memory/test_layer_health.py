"""Health metrics against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ultramem.memory.health import memory_health


def test_metrics_equal_their_definitions(small_model, tokens) -> None:
    model = small_model(2, sharing="ring", share_size=2, num_heads=2)
    layer, x = model.layers[1], tokens(20)
    health = memory_health(layer, x)
    rows, scores = layer.retrieve(x)
    counts = torch.bincount(rows.flatten(), minlength=model.pool.rows).double()
    share = counts[counts > 0] / rows.numel()
    seen = model.pool.virtual_rows
    assert health["rows_touched"].item() == pytest.approx((counts > 0).sum().item() / seen)
    assert health["usage_kl"].item() == pytest.approx((share * (share * seen).log()).sum().item(), rel=1e-5)
    assert health["top_m_score"].item() == pytest.approx(scores.mean().item(), rel=1e-5)
    largest = scores.view(20, 2, 4, 2).mean(-1).max(-1).values
    assert health["top1_score"].item() == pytest.approx(largest.mean().item(), rel=1e-5)
    assert health["output_std"].item() == pytest.approx(layer(x).std().item(), rel=1e-4)
    real = model.table.values[: model.pool.rows]
    assert health["values_rms"].item() == pytest.approx(real.square().mean().sqrt().item(), rel=1e-4)
    singular = torch.linalg.svdvals(layer.retrieval.cores.detach().sum(1)).mean(0)
    torch.testing.assert_close(health["tucker_singular_values"], singular)
    assert not any(value.requires_grad for value in health.values())


def test_usage_of_every_row_alike_has_no_divergence(small_model, tokens) -> None:
    model = small_model(num_keys=4, top_m=16, init="released")
    health = memory_health(model.layers[0], tokens(3))
    assert health["rows_touched"].item() == 1.0
    assert health["usage_kl"].item() == pytest.approx(0.0, abs=1e-6)


def test_one_row_for_all_tokens_diverges_by_the_log_of_the_rows(small_model, tokens) -> None:
    model = small_model(top_m=1)
    x = tokens(1).expand(30, -1)
    assert memory_health(model.layers[0], x)["usage_kl"].item() == pytest.approx(math.log(100))


def test_measuring_leaves_model_and_gradient_count_alone(small_model, tokens) -> None:
    model = small_model()
    model.attach_main_grads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory_health(model.layers[0], tokens(5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.count_nonzero(model.table.values.main_grad) == 0
