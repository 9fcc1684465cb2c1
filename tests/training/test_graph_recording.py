"""What recordings of CUDA graphs share and needs no GPU: leaves, gradients, counts of what exchanges move."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ultramem import platform
from megatron_ultramem.parallel.traffic import Traffic


@pytest.fixture
def recording() -> ModuleType:
    platform.prepare()
    from megatron_ultramem.training import graph_recording

    return graph_recording


def parameter(**attributes: Any) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(3))
    param.main_grad = torch.ones(3)  # type: ignore[attr-defined]
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def test_leaves_are_the_parameters_memory_with_gradients_of_their_own(recording: ModuleType) -> None:
    param = parameter(sequence_parallel=True, grad_added_to_main_grad=True)
    leaf = recording.leaves_of({"weight": param})["weight"]
    assert leaf.data_ptr() == param.data_ptr() and leaf.is_leaf and leaf.requires_grad
    assert leaf.sequence_parallel and not leaf.grad_added_to_main_grad and leaf.main_grad is param.main_grad
    (grad,) = torch.autograd.grad((leaf * leaf).sum(), [leaf])
    recording.add_gradients({"weight": leaf}, [grad])
    torch.testing.assert_close(param.main_grad, 1 + 2 * param.detach())
    assert param.grad is None


def test_a_gradient_that_was_added_already_is_not_added_twice(recording: ModuleType) -> None:
    param = parameter()
    leaves = recording.leaves_of({"weight": param})
    leaves["weight"].grad_added_to_main_grad = True
    recording.add_gradients(leaves, [torch.full((3,), 7.0)])
    torch.testing.assert_close(param.main_grad, torch.ones(3))


def test_a_parameter_without_gradient_is_named(recording: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="no gradient reaches norm.weight"):
        recording.add_gradients(recording.leaves_of({"norm.weight": parameter()}), [None])


def test_what_was_only_recorded_counts_once_for_every_replay(recording: ModuleType) -> None:
    traffic = Traffic(timed=lambda: nullcontext())
    timed = traffic.timed
    traffic.add("forward", 5)
    pools: list[Any] = [SimpleNamespace(placement=SimpleNamespace(traffic=traffic)) for _ in range(2)]
    pools.append(SimpleNamespace(placement=object()))  # tables that no exchange reaches
    with recording.Counted(pools) as counted:
        assert traffic.timed is nullcontext
        traffic.add("forward", 100)
        traffic.add("backward", 10)
    assert traffic.timed is timed and traffic.received == {"forward": 5, "backward": 0}
    counted.repeat()
    counted.repeat()
    assert traffic.received == {"forward": 205, "backward": 20} and traffic.messages == {"forward": 3, "backward": 2}


def test_the_loss_hands_back_gradients_with_the_strides_that_are_recorded(recording: ModuleType) -> None:
    """The losses of one sequence are a transposed column: code compiled for their strides would not be used again."""
    from megatron_ultramem.training.step import _loss

    losses_BS = torch.rand(5, 1).transpose(0, 1).contiguous().requires_grad_()
    handed_back: list[tuple[int, ...]] = []
    losses_BS.register_hook(lambda grad: handed_back.append(grad.stride()))
    _loss(torch.ones(1, 5), losses_BS)[0].backward()
    assert handed_back == [torch.zeros(1, 5).stride()]
    assert losses_BS.stride() != handed_back[0]
