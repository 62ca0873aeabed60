"""What the functions make of a table of groups: as of dimensions, and across tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusee
import pytest
import torch
from fusee import GroupTable
from fusee.prox.table_functions import envelope_of_table, project_of_table, prox_of_table
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.prox.tables import DOUBLE, coupled


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def _calls() -> dict[str, Callable[[Any, GroupTable], Any]]:
    return {
        "envelope": lambda x, table: envelope_of_table(x, table, 2),
        "prox": lambda x, table: prox_of_table(x, table, 2, 0.1),
        "project": lambda x, table: project_of_table(x, table, 2),
    }


@pytest.mark.parametrize("name", _calls())
def test_bad_arguments(name: str) -> None:
    call = _calls()[name]
    table, tensors = coupled()
    for input, error, match in (
        (tensors[0], TypeError, "input must be a sequence of tensors, as groups is a table"),
        ([*tensors[:2], 1.0], TypeError, r"input\[2\] must be a Tensor"),
        ([*tensors[:2], tensors[2].long()], TypeError, r"input\[2\] must have dtype"),
        (tensors[:2], ValueError, "input must have the shapes .* of groups"),
        ([t.mT if t.dim() == 2 else t for t in tensors], ValueError, "input must have the shapes"),
        (
            [*tensors[:2], tensors[2].to("meta")],
            ValueError,
            r"input\[2\] must be on the same device",
        ),
    ):
        with pytest.raises(error, match=match):
            call(input, table)
    with pytest.raises(TypeError, match="groups must be a GroupTable"):
        call(tensors, table.ids)  # type: ignore[arg-type]


def test_bad_options() -> None:
    table, tensors = coupled()
    ones = torch.ones(4, dtype=DOUBLE)
    for options, match in (
        ({"weights": ones[:3]}, r"weights must have shape \(4,\)"),
        ({"weights": -ones}, "weights must be finite and not negative"),
        ({"metric": ones[:3]}, r"metric must have shape \(4,\) where groups is a table"),
        ({"metric": 0 * ones}, "metric must be positive and finite"),
    ):
        with pytest.raises(ValueError, match=match):
            prox_of_table(tensors, table, 2, 0.1, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lam must"):
        prox_of_table(tensors, table, 2, -0.1)


WEIGHTS: dict[str, Any] = {
    "none": None,
    "size": "size",
    "inverse": "inverse_size",
    "some": torch.tensor([1.0, 0.0, 2.0, 0.25, 3.0, 0.5], dtype=DOUBLE),
}


@pytest.mark.parametrize("dim", [0, 1, (0, 2)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_same_as_dimensions(dim: int | tuple[int, ...], weights: str) -> None:
    """Where groups are slices, results and gradients are those of ``dim``, zero groups included."""
    x = torch.randn(6, 6, 1, dtype=DOUBLE)
    x[2] = 0
    x[:, 3] = 0
    dims = (dim,) if isinstance(dim, int) else dim
    numbers = torch.arange(6).view(*(6 if d == dims[0] else 1 for d in range(3)))
    table = GroupTable([numbers.expand(6, 6, 1)])
    d = WEIGHTS[weights]
    h = torch.rand(6, dtype=DOUBLE) + 0.5
    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = []
    for k in (0, 1, 2.5, 5, 9):
        options = {"weights": d}
        pairs.append(
            (
                lambda x, k=k, o=options: fusee.project_top_k_groups(x, k, dim=dim, **o),
                lambda x, k=k, o=options: project_of_table([x], table, k, **o)[0],
            )
        )
        for debiased in (False, True):
            options = {"weights": d, "debiased": debiased}
            if k > 0:
                pairs.append(
                    (
                        lambda x, k=k, o=options: fusee.group_envelope(x, k, dim=dim, **o),
                        lambda x, k=k, o=options: envelope_of_table([x], table, k, **o),
                    )
                )
            for lam in (0, 0.1, 2.0):
                for metric in (None, h):
                    options = {"weights": d, "debiased": debiased, "metric": metric}
                    pairs.append(
                        (
                            lambda x, k=k, lam=lam, o=options: fusee.prox_group_envelope(
                                x, k, lam, dim=dim, **o
                            ),
                            lambda x, k=k, lam=lam, o=options: prox_of_table(
                                [x], table, k, lam, **o
                            )[0],
                        )
                    )
    for of_dim, of_table in pairs:
        leaf = x.clone().requires_grad_()
        expected, actual = of_dim(leaf), of_table(leaf)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        g = torch.randn_like(expected)
        grads = [torch.autograd.grad(y, leaf, g)[0] for y in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("weights", [None, "size"])
def test_derivatives(debiased: bool, weights: str | None) -> None:
    """In every tensor, k and lam, of first and second order, away from zero groups."""
    table, tensors = coupled()
    tensors[2][:, 3] = 0.3
    if weights == "size":
        tensors = [t * 3 for t in tensors]
    k, lam = torch.tensor(1.5, dtype=DOUBLE), torch.tensor(0.05, dtype=DOUBLE)
    leaves = [t.clone().requires_grad_() for t in (*tensors, k, lam)]

    def prox(*values: Tensor) -> tuple[Tensor, ...]:
        *given, k, lam = values
        return prox_of_table(given, table, k, lam, weights=weights, debiased=debiased)

    def envelope(*values: Tensor) -> Tensor:
        return envelope_of_table(values[:-1], table, values[-1], weights=weights, debiased=debiased)

    def project(*values: Tensor) -> tuple[Tensor, ...]:
        return project_of_table(values, table, 2, weights=weights)

    assert gradcheck(prox, leaves, check_forward_ad=True)
    assert gradgradcheck(prox, leaves)
    assert gradcheck(envelope, leaves[:-1], check_forward_ad=True)
    assert gradcheck(project, leaves[:-2], check_forward_ad=True)


def test_coupled_projection() -> None:
    """Whole groups over all tensors are kept; what is in no group passes, in its dtype."""
    table, tensors = coupled()
    tensors = [tensors[0].float(), tensors[1].bfloat16(), tensors[2]]
    norms = table.norms(tensors)
    kept = norms.topk(2).indices.tolist()
    output = project_of_table(tensors, table, 2)
    for ids, before, after in zip(table.ids, tensors, output, strict=True):
        stays = (ids < 0) | torch.isin(ids, torch.tensor(kept))
        assert after.dtype == before.dtype
        assert torch.equal(after, torch.where(stays, before, 0.0))
    assert torch.equal(project_of_table(tensors, table, 4)[0], tensors[0])


def test_nan_and_infinity() -> None:
    """NaN in a group reaches every group and nothing else; an infinite group stays infinite."""
    table, tensors = coupled()
    tensors[0][0, 0] = torch.nan
    for output in (prox_of_table(tensors, table, 2, 0.1), project_of_table(tensors, table, 2)):
        for ids, after in zip(table.ids, output, strict=True):
            assert torch.equal(after.isnan(), ids >= 0)
    tensors[0][0, 0] = torch.inf
    first = prox_of_table(tensors, table, 2, 0.5)[0]
    assert first[0, 0] == torch.inf
    torch.testing.assert_close(first[0, 1:], tensors[0][0, 1:] / 1.5)
    assert torch.equal(project_of_table(tensors, table, 1)[0][0], tensors[0][0])


def test_no_groups() -> None:
    x = [torch.randn(3)]
    table = GroupTable([torch.full((3,), -1)])
    assert torch.equal(prox_of_table(x, table, 2, 0.1)[0], x[0])
    assert torch.equal(project_of_table(x, table, 2)[0], x[0])
    assert envelope_of_table(x, table, 2) == 0


def test_vmap() -> None:
    """A batch of lists of tensors and of k, against a loop."""
    table, tensors = coupled()
    batch = [torch.stack([t, t.flip(0), 2 * t]) for t in tensors]
    k = torch.tensor([1.0, 2.0, 2.5], dtype=DOUBLE)

    def call(x: list[Tensor], k: Tensor) -> tuple[Tensor, ...]:
        return prox_of_table(x, table, k, 0.1)

    actual = torch.vmap(call)(batch, k)
    for item in range(3):
        expected = call([t[item] for t in batch], k[item])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[item], e)


@pytest.mark.tracing
def test_compile() -> None:
    """One graph, with the table as a constant; results and gradients of eager mode."""
    table, tensors = coupled()
    for name, call in _calls().items():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        grads = []
        for function in (call, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors]
            output = function(leaves, table)
            total = output if name == "envelope" else sum(y.square().sum() for y in output)
            grads.append(torch.autograd.grad(total, leaves))
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e)


def _atomic(name: str) -> bool:
    """Whether an operator of torch adds floats in an order that CUDA does not fix."""
    return any(part in name for part in ("index_add", "index_put", "scatter_add", "put_"))


def test_no_float_atomics() -> None:
    """Neither results nor derivatives of first and second order call what CUDA adds atomically."""
    table, tensors = coupled()
    tensors = [t + 0.3 for t in tensors]

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if _atomic(str(func)) and any(
                isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 1 for t in args
            ):
                called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    with Recorded():
        for name, call in _calls().items():
            leaves = [t.clone().requires_grad_() for t in tensors]
            output = call(leaves, table)
            total = output if name == "envelope" else sum(y.square().sum() for y in output)
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert called == []


def test_sums_in_transforms() -> None:
    """What a table remembers of its groups stays usable when a transform asked for it first."""
    table, tensors = coupled()
    fresh = GroupTable(table.ids)

    def total(x: list[Tensor], table: GroupTable) -> Tensor:
        return table.norms(x).square().sum()

    with torch.inference_mode():
        table.norms(tensors)
    for of_table in (table, fresh):
        grads = torch.func.grad(total)(tensors, of_table)
        for ids, g, t in zip(table.ids, grads, tensors, strict=True):
            torch.testing.assert_close(g, torch.where(ids < 0, 0.0, 2 * t))
    leaves = [t.clone().requires_grad_() for t in tensors]
    for of_table in (table, fresh):
        total(leaves, of_table).backward()
    hessian = torch.func.hessian(lambda x: total([x, *tensors[1:]], GroupTable(table.ids)))
    expected = torch.diag(torch.where(table.ids[0].reshape(-1) < 0, 0.0, 2.0).to(DOUBLE))
    torch.testing.assert_close(hessian(tensors[0]).reshape(12, 12), expected)


@pytest.mark.parametrize("sorted_", [False, True])
def test_batches_of_sums(sorted_: bool) -> None:
    """Of a batch along any dimension, and of batches of batches, whether or not the groups lie in
    order."""
    ids = torch.tensor([0, 0, 1, 1, 1, 2] if sorted_ else [2, 0, -1, 1, 0, 1])
    table = GroupTable([ids])
    x = torch.randn(6, 2, 3, dtype=DOUBLE)
    expected = torch.stack([x[ids == group].norm(dim=0) for group in range(3)])

    def norms(column: Tensor) -> Tensor:
        return table.norms([column])

    batched = torch.vmap(torch.vmap(norms, in_dims=1, out_dims=1), in_dims=1, out_dims=1)
    torch.testing.assert_close(batched(x), expected)
    jacobian = torch.func.jacfwd(norms)(x[:, 0, 0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(norms)(x[:, 0, 0]))
    torch.testing.assert_close(jacobian @ x[:, 0, 0], expected[:, 0, 0])  # as norms are homogeneous
