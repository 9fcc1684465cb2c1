"""Correctness of the lookup at the sizes that are measured, where the reference over everything would not fit."""

from __future__ import annotations

import torch

from ultramem_kernels.bench.record import WrongResult, check
from ultramem_kernels.bench.shapes import Tables
from ultramem_kernels.lookup import reference
from ultramem_kernels.lookup.ops import lookup

CHUNK = 1024  # tokens whose rows are gathered at once


def check_lookup(
    case: str, indices: torch.Tensor, scores: torch.Tensor, x: torch.Tensor, tables: Tables, grad: torch.Tensor
) -> None:
    """Raises WrongResult unless output and gradients of the first and last tokens are those of fp64, all of the values'
    gradient sums to what it must, and both backwards agree, the deterministic one bitwise with itself."""
    out, grad_scores, grad_x = _run(indices, scores, x, tables, grad, deterministic=True)
    some = torch.tensor([*range(32), *range(len(indices) - 32, len(indices))], device=indices.device)
    rows = indices[some].long()
    compact = torch.arange(rows.numel(), device=rows.device).view(
        rows.shape
    )  # row numbers in small tables of their own
    of_tables = [table.detach()[rows.flatten()] for table in tables.both()]
    exact = [tensor.double().requires_grad_() for tensor in (scores[some], x[some], *of_tables)]
    wanted = reference.lookup(compact, exact[0], exact[1], exact[2], exact[3])
    wanted_scores, wanted_x, *wanted_tables = torch.autograd.grad(wanted, exact, grad[some].double())
    check(f"{case}: lookup", out[some], wanted, 5e-3)
    check(f"{case}: gradient of scores", grad_scores[some], wanted_scores, 1e-4)
    check(f"{case}: gradient of pre-inputs", grad_x[some], wanted_x, 5e-3)
    once = torch.bincount(indices.flatten())[rows.flatten()] == 1  # rows that no other entry adds to
    for name, table_grad, alone in zip(("values", "pre-values"), tables.grads, wanted_tables, strict=True):
        got = table_grad[rows.flatten()[once]]
        check(f"{case}: gradient of {name} in rows used once", got, alone[once], 1e-4)
    wanted = _sum_of_values_gradient(indices, scores, x, tables, grad)
    check(f"{case}: values' gradient", tables.grads[0].sum(0, dtype=torch.float64), wanted, 1e-4)
    first = [table_grad.clone() for table_grad in tables.grads]
    _run(indices, scores, x, tables, grad, deterministic=True)
    if not all(torch.equal(again, before) for again, before in zip(tables.grads, first, strict=True)):
        raise WrongResult(f"{case}: the deterministic backward is not bitwise reproducible")
    _run(indices, scores, x, tables, grad, deterministic=False)
    check(f"{case}: the two backwards", tables.grads[1], first[1], 1e-5)


def _run(
    indices: torch.Tensor,
    scores: torch.Tensor,
    x: torch.Tensor,
    tables: Tables,
    grad: torch.Tensor,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and the gradients of scores and pre-inputs; those of the tables are in `tables.grads` alone."""
    for table_grad in tables.grads:
        table_grad.zero_()
    leaves = scores.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    out = lookup(indices, *leaves, *tables.both(), deterministic=deterministic)
    out.backward(grad)  # not autograd.grad, which leaves out the tables
    grad_scores, grad_x = (leaf.grad for leaf in leaves)
    assert grad_scores is not None and grad_x is not None
    return out.detach(), grad_scores, grad_x


def _sum_of_values_gradient(
    indices: torch.Tensor, scores: torch.Tensor, x: torch.Tensor, tables: Tables, grad: torch.Tensor
) -> torch.Tensor:
    """[Dv] fp64: over all rows, which is the sum over all entries of weight times the output's gradient."""
    values, pre_values = tables.both()
    dots = torch.cat([
        torch.einsum("tmp,tp->tm", pre_values.detach()[rows.long()].float(), part.float())
        for rows, part in zip(indices.split(CHUNK), x.split(CHUNK), strict=True)
    ])  # fmt: skip
    weights = (dots.unsqueeze(-1) * scores).double().sum(1)
    core = torch.arange(values.shape[1], device=values.device) // (values.shape[1] // scores.shape[2])
    return (weights[:, core] * grad).sum(0)
