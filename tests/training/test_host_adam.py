"""AdamW in host memory makes the update of torch's AdamW, to fp32 round-off, whatever the chunks."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.training import host_adam
from megatron_ultramem.training.host_adam import AdamSettings, HostAdam, choose_backend

BACKENDS = ["torch", pytest.param("deepspeed", marks=pytest.mark.slow)]  # whose kernel is compiled first


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("numel", "chunk"), [(1, 16), (16, 16), (1000, 7), (1003, 256)])
def test_updates_equal_those_of_torch(backend: str, numel: int, chunk: int) -> None:
    if backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    generator = torch.Generator().manual_seed(numel)
    master = torch.randn(numel, generator=generator)
    reference = torch.nn.Parameter(master.clone())
    moments = torch.zeros(numel), torch.zeros(numel)
    adam = HostAdam(master, *moments, backend, chunk=chunk)
    expected = torch.optim.AdamW([reference], lr=0.0)
    for step in range(1, 7):
        settings = AdamSettings(lr=1e-2 / step, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1 * (step % 2))
        grad = torch.randn(numel, generator=generator) * 10.0 ** (step - 3)
        done: list[slice] = []
        late = torch.full_like(grad, torch.nan)  # until it is waited for

        def arrive(number: int, late: torch.Tensor = late, grad: torch.Tensor = grad) -> None:
            late[adam.chunks[number]] = grad[adam.chunks[number]]

        adam.update(late, step, settings, wait_for=arrive, updated=done.append)
        expected.param_groups[0].update(vars(settings))
        reference.grad = grad
        expected.step()
        assert [(part.start, part.stop) for part in done] == [
            (start, min(start + chunk, numel)) for start in range(0, numel, chunk)
        ]
        torch.testing.assert_close(master, reference.detach(), rtol=2e-6, atol=1e-7)
    state = expected.state[reference]
    for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        largest = state[name].abs().max()
        torch.testing.assert_close(moment / largest, state[name] / largest, rtol=0, atol=1e-6)


def test_it_goes_on_from_moments_and_a_step_that_were_loaded() -> None:
    whole, moments = torch.ones(5), (torch.zeros(5), torch.zeros(5))
    settings = AdamSettings(1e-2, (0.9, 0.95), 1e-8, 0.1)
    grads = [torch.tensor([1.0, -2.0, 3.0, 0.0, 1e-3]) * step for step in (1, 2, 3)]
    straight = HostAdam(whole, *moments, "torch")
    for step, grad in enumerate(grads, 1):
        straight.update(grad, step, settings)
    again, others = torch.ones(5), (torch.zeros(5), torch.zeros(5))
    for step, grad in enumerate(grads, 1):  # another object for every step
        HostAdam(again, *others, "torch", chunk=2).update(grad, step, settings)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_without_deepspeed_torch_takes_its_place_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_adam.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.ops.adam", None)
    assert choose_backend("auto") == choose_backend("torch") == "torch"
    with pytest.raises(ConfigError, match=r"optimizer.value_offload = deepspeed: .* legal here: torch or auto"):
        choose_backend("deepspeed")
