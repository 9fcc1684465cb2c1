"""Fine-tuning: loss, gradients, gradient checkpointing, mixed precision, and u and t that follow the cores."""

from __future__ import annotations

import pytest
import torch

from tests.huggingface.cases import CASES


def gradients(model, tokens) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_megatrons(reference, case):
    made = reference(case)
    model = made.hf_model()
    assert model(made.tokens, labels=made.tokens).loss.item() == pytest.approx(made.loss, abs=1e-5)
    found = gradients(model, made.tokens)
    assert found.keys() == made.grads.keys()
    for name, grad in found.items():
        scale = made.grads[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grad, made.grads[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["moe-and-memory", "ring", "heads", "ultramem-skip-layer", "memory-plus", "peer"])
def test_gradient_checkpointing_gives_equal_gradients(reference, case, reentrant):
    made = reference(case)
    model = made.hf_model().train()
    plain = gradients(model, made.tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    checkpointed = gradients(model, made.tokens)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_dropout_acts_in_training_alone(reference):
    made = reference("ring")
    for dropout in ({"hidden_dropout": 0.2}, {"attention_dropout": 0.2}):
        model = made.hf_model(**dropout)
        with torch.no_grad():
            torch.testing.assert_close(model(made.tokens).logits, made.logits, rtol=0, atol=1e-5)
            assert not torch.equal(model.train()(made.tokens).logits, model(made.tokens).logits)


def test_autocast_leaves_the_choice_of_rows_in_full_precision(reference):
    made = reference("ring")
    model = made.hf_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(made.tokens, labels=made.tokens)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(made.loss, abs=0.05)
    for name, param in model.named_parameters():
        assert param.grad.isfinite().all(), name
        assert param.grad.dtype == torch.float32


def test_leading_vectors_follow_the_cores_from_step_to_step_and_stay_in_evaluation(reference):
    made = reference("heads")
    model = made.hf_model().train()
    retrieval = model.model.layers[1].memory.retrieval
    before = retrieval.u.clone()
    gradients(model, made.tokens)
    torch.testing.assert_close(retrieval.u, before)  # the cores are still those that u was computed from
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    retrieval.cores.grad = torch.randn(retrieval.cores.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    model.eval()
    with torch.no_grad():
        model(made.tokens)
    torch.testing.assert_close(retrieval.u, before)
    model.train()
    gradients(model, made.tokens)
    left, _, right = torch.linalg.svd(retrieval.cores.sum(1))
    for found, expected in ((retrieval.u, left[..., 0]), (retrieval.t, right[..., 0, :])):
        torch.testing.assert_close((found * expected).sum(-1).abs(), torch.ones(len(found)))
    assert ((retrieval.u * before).sum(-1).abs() < 0.999).any()
