"""The pattern N:M, at most N of every M neighbours: many small problems in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import fusee
import pytest
import torch
from torch import Tensor

from tests.harness.spec import ALL_DTYPES

# The CUDA kernels give a thread each to problems that are small and as many as this.
MANY = 300


def _by_rows(function: Callable[[Tensor], Tensor], weight: Tensor, m: int) -> Tensor:
    return torch.func.vmap(function)(weight.reshape(-1, m)).reshape(weight.shape)


def _best(rows: Tensor, n: int) -> Tensor:
    """Of all choices of n entries, the first that keeps most of the squares."""
    choices = list(itertools.combinations(range(rows.shape[1]), n))
    kept = torch.stack([rows[:, list(c)].square().sum(1) for c in choices], 1)
    best = kept.argmax(1)
    masks = torch.zeros(len(choices), rows.shape[1], dtype=torch.bool)
    for i, choice in enumerate(choices):
        masks[i, list(choice)] = True
    return torch.where(masks[best], rows, 0.0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("rows", [5, MANY])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_keeps_n_of_m(n: int, m: int, rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, m, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = _by_rows(lambda w: fusee.project_top_k_groups(w, n), weight, m)
    assert torch.equal((kept != 0).sum(1), torch.full((rows,), n))
    if dtype in (torch.float32, torch.float64):  # without ties
        assert torch.equal(kept, _best(weight, n))
    same = _by_rows(lambda w: fusee.prox_group_envelope(w, n, 1.0, debiased=True), weight, m)
    assert torch.equal(same, kept)


def test_ties_keep_the_first() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).repeat(MANY, 1)
    kept = _by_rows(lambda w: fusee.project_top_k_groups(w, 2), weight, 4)
    assert torch.equal(kept[:2], torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0] * 4]))
    assert torch.equal(kept, kept[:2].repeat(MANY, 1))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("debiased", [False, True])
def test_the_same_as_alone(size: int, debiased: bool) -> None:
    """Values, gradients and the envelope of many small problems, as of each by itself."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(MANY, 4, size, dtype=torch.float64, generator=generator)
    weight[0] = 0
    back = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    d = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)

    def prox(w: Tensor) -> Tensor:
        return fusee.prox_group_envelope(w, 1.5, 0.25, weights=d, debiased=debiased)

    def value(w: Tensor) -> Tensor:
        return fusee.group_envelope(w, 1.5, weights=d, debiased=debiased)

    leaf = weight.clone().requires_grad_()
    together = torch.func.vmap(prox)(leaf)
    values = torch.func.vmap(value)(leaf)
    grads = torch.autograd.grad((together * back).sum() + values.sum(), leaf)[0]
    for i in (*range(0, MANY, 37), MANY - 1):
        one = weight[i].clone().requires_grad_()
        alone, of_one = prox(one), value(one)
        expected = torch.autograd.grad((alone * back[i]).sum() + of_one, one)[0]
        for a, e in ((together[i], alone), (values[i], of_one), (grads[i], expected)):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_no_problems() -> None:
    """An empty batch has an empty result and an empty gradient."""
    nothing = torch.zeros(0, 4, requires_grad=True)
    for function in (
        lambda w: fusee.project_top_k_groups(w, 2),
        lambda w: fusee.prox_group_envelope(w, 2, 0.5),
        lambda w: fusee.prox_group_envelope(w, 2, 0.5, debiased=True),
        lambda w: fusee.group_envelope(w, 2),
    ):
        output = torch.func.vmap(function)(nothing)
        assert output.shape[0] == 0
        (grad,) = torch.autograd.grad(output.sum(), nothing)
        assert grad.shape == nothing.shape
