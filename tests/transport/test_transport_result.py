"""``fusee.TransportResult``, and what may be given to the functions that return it."""

from __future__ import annotations

import math
import pickle
from typing import Any

import fusee
import numpy as np
import pytest
import scipy.sparse
import torch
from fusee.transport import result as module
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.harness.spec import Maker

PROPERTIES = (
    "potentials",
    "plan",
    "value",
    "value_linear",
    "marginals",
    "marginal_error",
    "converged",
    "n_iter",
    "stages",
)


def _make(dtype: torch.dtype = torch.float64, seed: int = 0) -> Maker:
    return Maker(dtype, seed=seed)


def _everything(result: fusee.TransportResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in PROPERTIES}


def _points(metric: str) -> tuple[fusee.TransportResult, fusee.TransportResult]:
    """The same problems of points and of their costs."""
    make = _make(seed=2)
    x, y = make.normal(2, 9, 3), make.normal(2, 7, 3)
    M = {
        "sqeuclidean": torch.cdist(x, y).square(),
        "euclidean": torch.cdist(x, y),
        "cityblock": torch.cdist(x, y, p=1),
        "dot": -(x @ y.mT),
    }[metric]
    options = {"reg": 0.4, "unbalanced": (3.0, math.inf), "tol": 1e-12}
    of_points = fusee.sinkhorn_newton_samples(x, y, metric=metric, **options)
    return of_points, fusee.sinkhorn_newton(M, **options)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", "dot"])
def test_everything_follows_from_the_plan(metric: str) -> None:
    """Sums of the dense plan, for costs and for points."""
    of_points, of_costs = _points(metric)
    M = of_costs._tensors["x"]
    a, b = torch.full((9,), 1 / 9).double(), torch.full((7,), 1 / 7).double()
    for result in (of_points, of_costs):
        P = result.plan
        torch.testing.assert_close(P, of_costs.plan, rtol=1e-9, atol=1e-12)
        linear = (P * M).sum((1, 2))
        torch.testing.assert_close(result.value_linear, linear, rtol=1e-12, atol=0)
        for sums, dim in zip(result.marginals, (2, 1), strict=True):
            torch.testing.assert_close(sums, P.sum(dim), rtol=1e-12, atol=0)
        product = a[:, None] * b
        kl = (P * (P / product).log() - P + product).sum((1, 2))
        rows = P.sum(2)
        penalty = 3 * (rows * (rows / a).log() - rows + a).sum(1)
        torch.testing.assert_close(result.value, linear + 0.4 * kl + penalty, rtol=1e-12, atol=0)
        assert result.converged.dtype == torch.bool and bool(result.converged.all())
        assert result.n_iter.dtype == torch.int64 and result.n_iter.shape == (2,)
        assert result.stages.shape == (2, 48, 7)


@pytest.mark.parametrize("block", [1 << 22, 25])
def test_sparse_plan(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CSR tensor of what counts, made by blocks; with the gradient of the dense plan there."""
    monkeypatch.setattr(module, "_ENTRIES_OF_BLOCK", block)
    M = _make().uniform(12, 10).requires_grad_()
    for tol in (1e-9, 1e-3):
        result = fusee.sinkhorn_newton(M, reg=0.01, tol=tol)
        dense, sparse = result.plan, result.sparse_plan
        assert sparse.layout == torch.sparse_csr and sparse.shape == dense.shape
        gap = (sparse.to_dense() - dense).detach().abs()
        assert float(gap.sum(1).max()) <= tol / 12 and float(gap.sum(0).max()) <= tol / 10
        kept = sparse.detach().to_dense() > 0
        assert 12 <= int(kept.sum()) == sparse.values().numel() < 120
        weight = _make(seed=1).normal(12, 10)
        both = ((sparse.to_dense() * weight).sum(), (dense * weight)[kept].sum())
        actual, expected = (torch.autograd.grad(out, M, retain_graph=True)[0] for out in both)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_sparse_plan_of_points_and_of_a_batch() -> None:
    of_points, of_costs = _points("cityblock")
    for i in range(2):
        sparse = of_points[i].sparse_plan.to_dense()
        torch.testing.assert_close(sparse, of_costs[i].plan, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match=r"sparse_plan is of one problem: use result\[i\]"):
        _ = of_points.sparse_plan


def test_indexing() -> None:
    result, _ = _points("euclidean")
    for i in range(2):
        for name, value in _everything(result[i]).items():
            whole = getattr(result, name)
            pairs = zip(value, whole, strict=True) if isinstance(value, tuple) else [(value, whole)]
            for part, both in pairs:
                torch.testing.assert_close(part, both[i], rtol=1e-12, atol=0)
    assert len(result) == len(list(result)) == 2
    assert result[1:].n_iter.shape == (1,)
    with pytest.raises(TypeError, match="one problem, not of a batch"):
        _ = result[0][0]
    with pytest.raises(TypeError, match="one problem, not of a batch"):
        len(result[0])
    with pytest.raises(TypeError, match="by its problems alone"):
        _ = result[..., 0]


def test_pytree() -> None:
    """Its tensors can be mapped over, stacked and moved, and it survives a process."""
    M = _make().uniform(4, 3)
    results = [fusee.sinkhorn_newton(factor * M, reg=0.1) for factor in (1.0, 2.0)]
    stacked = pytree.tree_map(lambda *tensors: torch.stack(tensors), *results)
    assert isinstance(stacked, fusee.TransportResult)
    for i, result in enumerate(results):
        assert torch.equal(stacked[i].plan, result.plan)
    torch.testing.assert_close(stacked.plan, torch.stack([r.plan for r in results]))
    again = pickle.loads(pickle.dumps(results[0]))
    assert torch.equal(again.plan, results[0].plan)


def test_transforms_return_it() -> None:
    """``vmap`` gives the result of a batch, and so does compiled code."""
    M = _make().uniform(3, 4, 5)
    expected = fusee.sinkhorn_newton(M, reg=0.2)
    mapped = torch.func.vmap(lambda M: fusee.sinkhorn_newton(M, reg=0.2))(M)
    assert isinstance(mapped, fusee.TransportResult)
    assert torch.equal(mapped.plan, expected.plan)


@pytest.mark.tracing
def test_compiled_code_returns_it() -> None:
    M = _make().uniform(3, 4, 5)
    expected = fusee.sinkhorn_newton(M, reg=0.2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solve(M: Tensor) -> fusee.TransportResult:
        return fusee.sinkhorn_newton(2 * M, reg=0.4)

    result = solve(M)
    assert isinstance(result, fusee.TransportResult)
    torch.testing.assert_close(result.plan, expected.plan)
    torch.testing.assert_close(result.value_linear, 2 * expected.value_linear)


def test_numpy() -> None:
    """NumPy arrays in, NumPy arrays out, of the same dtype and numbers."""
    M = _make().uniform(6, 5)
    a = np.full(6, 1 / 6)
    for dtype in (torch.float64, torch.float32):
        array = M.to(dtype).numpy()
        array.flags.writeable = False
        result = fusee.sinkhorn_newton(array[::-1], a, reg=np.float32(0.125))
        expected = fusee.sinkhorn_newton(M.to(dtype).flip(0), torch.from_numpy(a), reg=0.125)
        for name, value in _everything(result).items():
            wanted = getattr(expected, name)
            pairs = (
                zip(value, wanted, strict=True) if isinstance(value, tuple) else [(value, wanted)]
            )
            for v, w in pairs:
                assert isinstance(v, (np.ndarray, np.generic))
                np.testing.assert_array_equal(v, w.numpy())
        assert result.plan.dtype == array.dtype
        sparse = result.sparse_plan
        assert scipy.sparse.issparse(sparse) and sparse.format == "csr"
        np.testing.assert_allclose(sparse.toarray(), result.plan, atol=1e-9)
    points = fusee.sinkhorn_newton_samples(M.numpy(), M.numpy()[:4], reg=1.0)
    assert isinstance(points.value, np.float64)


class _Foreign:
    """An array of another library."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_dlpack() -> None:
    """Anything that speaks DLPack in, tensors out."""
    M, reg = _make().uniform(2, 6, 5), torch.tensor([0.1, 0.2])
    expected = fusee.sinkhorn_newton(M, reg=reg)
    masses = _Foreign(torch.full((6,), 1 / 6).double())
    result = fusee.sinkhorn_newton(_Foreign(M), masses, reg=_Foreign(reg))
    assert isinstance(result.plan, Tensor)
    torch.testing.assert_close(result.plan, expected.plan)


def test_masses_that_differ() -> None:
    """Unequal sums name both and their gap; what rounding makes of equal ones is taken for equal."""
    M = _make().uniform(4, 3)
    a, b = torch.full((4,), 0.25), torch.tensor([0.3, 0.3, 0.4])
    with pytest.raises(
        ValueError, match=r"equal sums, got 1 and 1\.1.*, a relative gap of 0\.0909"
    ):
        fusee.sinkhorn_newton(M, a, 1.1 * b, reg=0.1)
    with pytest.raises(ValueError, match="equal sums, got 0 and 1"):
        fusee.sinkhorn_newton(M, 0 * a, b, reg=0.1)
    fusee.sinkhorn_newton(M, a, 1.1 * b, reg=0.1, unbalanced=(1.0, math.inf))
    near = fusee.sinkhorn_newton(M, a, (1 + 5e-6) * b, reg=0.1, tol=1e-12)
    half = fusee.sinkhorn_newton(M, a, b.bfloat16(), reg=0.1, tol=1e-12)
    for result in (near, half):
        torch.testing.assert_close(result.marginals[0], a.double(), rtol=0, atol=1e-12)
    batch = torch.stack([a, a])
    with pytest.raises(ValueError, match=r"got 1 and 1\.5"):
        fusee.sinkhorn_newton(M.expand(2, 4, 3), batch, torch.stack([b, 1.5 * b]), reg=0.1)


def test_unequal_masses_where_nothing_is_read() -> None:
    M, b = _make().uniform(4, 3), torch.full((3,), 1 / 3)
    values = torch.func.vmap(lambda b: fusee.sinkhorn_newton(M, b=b, reg=0.1).value)(
        torch.stack([b, 2 * b])
    )
    assert values.isnan().tolist() == [False, True]


def test_no_mass_at_all() -> None:
    M, zeros = _make().uniform(4, 3), torch.zeros(4)
    result = fusee.sinkhorn_newton(M, zeros, zeros[:3], reg=0.1)
    assert bool(result.converged) and float(result.value) == 0
    assert bool((result.plan == 0).all())


def test_dtypes_of_points() -> None:
    """The wider of both; half types are computed and returned in float32."""
    x, y = _make().normal(4, 2), _make(seed=1).normal(3, 2)
    for of_x, of_y, of_result in (
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        result = fusee.sinkhorn_newton_samples(x.to(of_x), y.to(of_y), reg=1.0)
        assert result.plan.dtype == result.value.dtype == of_result
        assert {potential.dtype for potential in result.potentials} == {of_result}


def test_large_costs() -> None:
    M = torch.tensor([[1e308, -1e308], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="M must have costs of a finite range"):
        fusee.sinkhorn_newton(M, reg=1.0)


def test_repr() -> None:
    text = repr(fusee.sinkhorn_newton(torch.zeros(2, 2), reg=1.0))
    assert text.startswith("TransportResult(value=0.0, ") and "converged=True" in text
