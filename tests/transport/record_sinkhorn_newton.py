"""The records of ``fusee.sinkhorn_newton``, one for each kind of result, and of its form for points.

Masses are normalised within the functions of the records: finite differences, layouts and ``vmap``
change them one by one. Families of problems are in ``test_sinkhorn_newton.py``, the result itself in
``test_transport_result.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker, OpSpec, Sample
from tests.transport.oracle import (
    costs_of,
    normalised,
    plan_of,
    plan_oracle,
    potentials_oracle,
    sinkhorn,
    value_of,
    value_oracle,
    weights_of,
)

TOL = 2e-14


def _normal(masses: Any) -> Any:
    """In float64, of sum one; what is no tensor of real numbers is left to the function."""
    if not isinstance(masses, Tensor) or not masses.is_floating_point():
        return masses
    masses = masses.double()
    return masses / masses.sum(-1, keepdim=True)


def _costs(take: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(fusee.sinkhorn_newton)
    def function(M: Any, a: Any = None, b: Any = None, **options: Any) -> Tensor:
        return take(fusee.sinkhorn_newton(M, _normal(a), _normal(b), **options))

    return function


@functools.wraps(fusee.sinkhorn_newton_samples)
def _samples_value(X_a: Any, X_b: Any, a: Any = None, b: Any = None, **options: Any) -> Tensor:
    return fusee.sinkhorn_newton_samples(X_a, X_b, _normal(a), _normal(b), **options).value


def _samples_oracle(X_a: Tensor, X_b: Tensor, *args: Any, metric: str, **options: Any) -> Tensor:
    return value_oracle(costs_of(X_a, X_b, metric), *args, **options)


def _potentials_oracle(M: Tensor, *args: Any, **options: Any) -> Tensor:
    return torch.cat(potentials_oracle(M, *args, **options), -1)


# --- what a user would write: a few of Sinkhorn's iterations ------------------------------------


def _loop(M: Tensor, a: Any = None, b: Any = None, **options: Any) -> tuple[Tensor, ...]:
    M = M if M.dtype == torch.float64 else M.float()
    a, b = normalised(a, M.shape[-2], M), normalised(b, M.shape[-1], M)
    a, b = a.expand(M.shape[:-1]), b.expand(*M.shape[:-2], M.shape[-1])
    weights = weights_of(options.get("unbalanced"))
    return M, a, b, *sinkhorn(M, a, b, options["reg"], weights, 4)


def _loop_value(*args: Any, **options: Any) -> Tensor:
    M, a, b, f, g = _loop(*args, **options)
    return value_of(M, a, b, options["reg"], options.get("unbalanced"), f, g)


def _loop_samples(X_a: Tensor, X_b: Tensor, *, metric: str, **options: Any) -> Tensor:
    dtype = torch.float64 if X_a.dtype == torch.float64 else torch.float32
    return _loop_value(costs_of(X_a.to(dtype), X_b.to(dtype), metric), **options)


def _loop_potentials(*args: Any, **options: Any) -> Tensor:
    return torch.cat(_loop(*args, **options)[3:], -1)


def _loop_plan(*args: Any, **options: Any) -> Tensor:
    M, a, b, f, g = _loop(*args, **options)
    return plan_of(M, a, b, options["reg"], f, g)


# --- samples ------------------------------------------------------------------------------------------


def _given(make: Maker, *shape: int, reg: Any = 0.15, **others: Any) -> Arguments:
    """Costs, and masses for each problem."""
    *batch, n, m = shape
    masses = {
        "a": make.uniform(*batch, n, low=0.5, high=1.5),
        "b": make.uniform(*batch, m, low=0.5, high=1.5),
    }
    return {"M": make.uniform(*shape), **masses, "reg": reg, "tol": TOL, **others}


def _common(make: Maker) -> Iterator[Sample]:
    yield Sample("costs", _given(make, 4, 3), tiny=True)
    yield Sample("unbalanced", _given(make, 3, 4, unbalanced=0.7), tiny=True)
    weights = (0.5, math.inf)
    yield Sample("semi-relaxed", _given(make, 3, 2, unbalanced=weights), tiny=True)
    batch = _given(make, 2, 3, 2, reg=make.tensor([0.2, 0.4], torch.float64))
    yield Sample("batch", batch, tiny=True)
    uniform = _given(make, 3, 3)
    del uniform["a"], uniform["b"]
    yield Sample("uniform masses", uniform, tiny=True)
    forbidden = _given(make, 3, 3)
    forbidden["M"][1, 1] = forbidden["M"][2, 2] = math.inf
    yield Sample("forbidden pairs", forbidden, tiny=True, smooth=False)
    yield Sample("no problems", _given(make, 0, 3, 2), tiny=True, smooth=False)
    yield Sample("no points", _given(make, 0, 0), tiny=True, smooth=False)
    yield Sample("larger", _given(make, 40, 31, reg=0.1))
    yield Sample("larger batch", _given(make, 3, 17, 23, reg=0.15, unbalanced=1.0))


def _samples(make: Maker) -> Iterator[Sample]:
    yield from _common(make)
    # Their potentials have no derivatives.
    massless = _given(make, 3, 4)
    massless["a"][1] = massless["b"][3] = 0
    yield Sample("points without mass", massless)


def _point_samples(make: Maker) -> Iterator[Sample]:
    for metric, unbalanced in (
        ("sqeuclidean", None),
        ("euclidean", None),
        ("cityblock", 0.8),
        ("dot", None),
    ):
        arguments = _points(make, 3, 4, 2, metric=metric, unbalanced=unbalanced)
        yield Sample(metric, arguments, tiny=True)
    yield Sample("batch", _points(make, 2, 3, 2, 2), tiny=True)
    uniform = _points(make, 3, 3, 1)
    del uniform["a"], uniform["b"]
    yield Sample("uniform masses", uniform, tiny=True)
    yield Sample("no problems", _points(make, 0, 3, 2, 2), tiny=True, smooth=False)
    yield Sample("larger", _points(make, 40, 31, 5, reg=2.0))


def _points(make: Maker, *shape: int, metric: str = "sqeuclidean", **others: Any) -> Arguments:
    *batch, n, m, d = shape
    rest = _given(make, *batch, n, m, **{"reg": 1.0, **others})
    del rest["M"]
    points = {"X_a": make.normal(*batch, n, d), "X_b": make.normal(*batch, m, d)}
    return {**points, **rest, "metric": metric}


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("costs", _given(make, 300, 170, reg=0.02))
    yield Sample("batch", _given(make, 5, 60, 40, reg=0.02))


def _large_points(make: Maker) -> Iterator[Sample]:
    yield Sample("points", _points(make, 300, 170, 3, reg=0.1))


# --- errors -------------------------------------------------------------------------------------------


def _shared_errors(given: Arguments, x: str, make: Maker) -> Iterator[ErrorInput]:
    for name, bad in (("a list", [[1.0]]), ("None", None), ("a number", 1.0)):
        yield ErrorInput(name, {**given, x: bad}, TypeError, f"{x} must be a Tensor, a NumPy array")
    integers = {**given, x: make.integers(5, 4, 3)}
    yield ErrorInput("integers", integers, TypeError, f"{x} must have dtype float32")
    for shape in ((4,), (1, 1, 4, 3)):
        wrong = {**given, x: make.uniform(*shape)}
        yield ErrorInput(f"{x} {shape}", wrong, ValueError, f"{x} must have shape ")
    for name, count in (("a", 4), ("b", 3)):
        for shape in ((), (count + 1,), (1, count)):
            wrong = {**given, name: make.uniform(*shape)}
            message = rf"{name} must have shape \({count},\), got"
            yield ErrorInput(f"{name} {shape}", wrong, ValueError, message)
        wrong = {**given, name: make.integers(5, count)}
        yield ErrorInput(f"{name} integers", wrong, TypeError, f"{name} must have dtype")
        for value in (-1.0, math.inf, math.nan):
            wrong = {**given, name: make.tensor([1.0, value, 1.0, 1.0][:count])}
            message = "must be finite and not negative"
            yield ErrorInput(f"{name} of {value}", wrong, ValueError, message, values=True)
    for name in ("reg", "tol", "unbalanced"):
        for bad in (0, -0.5, math.nan):
            message = f"{name} must be positive, got {bad}"
            yield ErrorInput(f"{name} {bad}", {**given, name: bad}, ValueError, message)
        for bad in ("1", True):
            wrong = {**given, name: bad}
            yield ErrorInput(f"{name} {bad!r}", wrong, TypeError, f"{name} must be a number")
    yield ErrorInput("reg inf", {**given, "reg": math.inf}, ValueError, "reg must be .*finite")
    wrong = {**given, "reg": make.uniform(2)}
    yield ErrorInput("two reg", wrong, ValueError, "reg must be a number or have shape")
    wrong = {**given, "reg": make.tensor(0.5).requires_grad_()}
    yield ErrorInput("reg with grad", wrong, ValueError, "reg must not require a gradient")
    for value in (0.0, math.nan):
        wrong = {**given, "reg": make.tensor(value)}
        message = "reg must be at least"
        yield ErrorInput(f"reg of {value}", wrong, ValueError, message, values=True)
    wrong = {**given, "unbalanced": (1.0, 2.0, 3.0)}
    yield ErrorInput("three weights", wrong, ValueError, "unbalanced must be a number or a pair")
    for bad, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        yield ErrorInput(f"max_iter {bad}", {**given, "max_iter": bad}, error, "max_iter must be")
    wrong = {**given, "potentials_init": make.uniform(3)}
    yield ErrorInput("one potential", wrong, TypeError, "potentials_init must be a pair")
    wrong = {**given, "potentials_init": (make.uniform(4), make.uniform(4))}
    yield ErrorInput("potentials", wrong, ValueError, r"potentials_init\[1\] must have shape")


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = {"M": make.uniform(4, 3), "a": make.uniform(4), "b": make.uniform(3), "reg": 0.5}
    yield from _shared_errors(given, "M", make)
    for value in (math.nan, -math.inf):
        M = make.uniform(4, 3)
        M[1, 2] = value
        message = "M must not hold NaN or -inf"
        yield ErrorInput(f"M of {value}", {**given, "M": M}, ValueError, message, values=True)
    for line, place in (("row", 1), ("column", (slice(None), 1))):
        M = make.uniform(4, 3)
        M[place] = math.inf
        message = f"M has a {line} with mass and forbidden pairs only"
        yield ErrorInput(f"{line} forbidden", {**given, "M": M}, ValueError, message, values=True)


def _point_errors(make: Maker) -> Iterator[ErrorInput]:
    given = {"X_a": make.normal(4, 2), "X_b": make.normal(3, 2), "reg": 0.5}
    given |= {"a": make.uniform(4), "b": make.uniform(3)}
    yield from _shared_errors(given, "X_a", make)
    for shape in ((3, 1), (1, 3, 2)):
        wrong = {**given, "X_b": make.uniform(*shape)}
        yield ErrorInput(f"X_b {shape}", wrong, ValueError, "X_b must have the batch and the dim")
    for bad in ("sqeuclid", None, 1):
        wrong = {**given, "metric": bad}
        yield ErrorInput(f"metric {bad}", wrong, ValueError, "metric must be one of")
    for name in ("X_a", "X_b"):
        for value in (math.nan, math.inf):
            points = given[name].clone()
            points[1, 1] = value
            wrong = {**given, name: points}
            message = f"{name} must be finite"
            yield ErrorInput(f"{name} of {value}", wrong, ValueError, message, values=True)


# --- properties ---------------------------------------------------------------------------------------


def _of_product(sample: Sample, output: Tensor) -> None:
    """No more than the value of the plan a b^T."""
    given = sample.arguments
    M = given["M"].double()
    a, b = (
        normalised(given.get(k), count, M) for k, count in (("a", M.shape[-2]), ("b", M.shape[-1]))
    )
    product = (M.clamp(max=1e300) * b.unsqueeze(-2)).sum(-1)
    bound = (product * a).sum(-1)
    assert bool((output.double() <= bound + 1e-6).all())


def _means_agree(sample: Sample, output: Tensor) -> None:
    """Both potentials have the same mean over the masses where a constant is free."""
    given = sample.arguments
    if given.get("unbalanced") is not None:
        return
    M = given["M"].double()
    n = M.shape[-2]
    a, b = normalised(given.get("a"), n, M), normalised(given.get("b"), M.shape[-1], M)
    f, g = output.double().split([n, M.shape[-1]], -1)
    torch.testing.assert_close((a * f).sum(-1), (b * g).sum(-1), rtol=0, atol=1e-6)


def _marginals(sample: Sample, output: Tensor) -> None:
    """Not negative; in the balanced problem the sums are the masses."""
    given = sample.arguments
    assert bool((output >= 0).all())
    if given.get("unbalanced") is not None:
        return
    plan, M = output.double(), given["M"].double()
    bound = max(2 * TOL, 2 * torch.finfo(output.dtype).eps)
    for name, dim in (("a", -1), ("b", -2)):
        masses = normalised(given.get(name), plan.shape[-3 - dim], M)
        assert bool(((plan.sum(dim) - masses).abs().sum(-1) <= bound).all())


def _sized(make: Maker, n: int) -> Arguments:
    return _given(make, n, 4, 3, unbalanced=None)


def _sized_points(make: Maker, n: int) -> Arguments:
    return _points(make, n, 4, 3, 2)


def _because(reason: str, *checks: str) -> dict[str, str]:
    return dict.fromkeys(checks, reason)


_NOT_APPLICABLE = {
    "nan": "NaN is refused: see the errors",
    "reference": "iterations differ: test_solver.py compares what they lead to",
    "cuda_graph": "the host looks between rounds",
    "third_order": "the value has two orders",
    **_because("the number of passes depends on the numbers", "traffic", "cuda_kernels"),
}
if fusee.engine("cpu") == "emulated":
    reason = "thousands of solves for finite differences, which the other engines do"
    _NOT_APPLICABLE |= _because(reason, "gradcheck", "gradgradcheck")
_TRACED = _because(
    "traced as sinkhorn_newton is, with one operator more",
    "recompilations",
    "compile_without_gradients",
    "bad_values_in_compiled_code",
    "checked_values_in_compiled_code",
    "export_with_a_dynamic_batch",
    "aotinductor_package",
    "saved_program",
    "autocast_in_compiled_code",
)
_FIRST_ORDER = {
    **_NOT_APPLICABLE,
    **_TRACED,
    **_because(
        "potentials and plans have one order, which jacrev has",
        "gradgradcheck",
        "third_order",
        "hessian",
        "func_grad",
        "transforms_in_compiled_code",
        "second_order_of_compiled_code",
    ),
    "compile": _TRACED["recompilations"],
}


def _float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _record(name: str, **changes: Any) -> OpSpec:
    fields: dict[str, Any] = {
        "samples": _samples,
        "large": _large,
        "error_inputs": _error_inputs,
        "sized": _sized,
        "batch_dims": {"M": 0, "a": 0, "b": 0},
        "differentiable": ("M", "a", "b"),
        "output_dtype": _float32,
        # Values and gradients are sums of both signs, and iterations end elsewhere below the tolerance.
        "least_scale": 1.0,
        "engine_ulps": 128.0,
        "not_applicable": _FIRST_ORDER,
        **changes,
    }
    return OpSpec(name=name, **fields)


_SOLVER = {"sinkhorn_newton": (0, 1, 3, 4)}
_GRADIENT = {"transport_plan_gradient": (0, 1, 3, 4, 6, 7, 8, 9)}

RECORDS = [
    _record(
        "sinkhorn_newton",
        function=_costs(lambda result: result.value),
        oracle=value_oracle,
        straightforward=_loop_value,
        raw={**_SOLVER, **_GRADIENT},
        properties={"at most the product's": _of_product},
        not_applicable=_NOT_APPLICABLE,
    ),
    _record(
        "sinkhorn_newton_potentials",
        function=_costs(lambda result: torch.cat(result.potentials, -1)),
        samples=_common,
        oracle=_potentials_oracle,
        straightforward=_loop_potentials,
        raw={**_SOLVER, **_GRADIENT, "transport_solve": ()},
        properties={"equal means": _means_agree},
    ),
    _record(
        "sinkhorn_newton_plan",
        function=_costs(lambda result: result.plan),
        oracle=plan_oracle,
        straightforward=_loop_plan,
        raw={**_SOLVER, **_GRADIENT, "transport_solve": (), "transport_plan": (0, 1, 3, 4, 6, 7)},
        properties={"marginals": _marginals},
    ),
    _record(
        "sinkhorn_newton_samples",
        function=_samples_value,
        samples=_point_samples,
        large=_large_points,
        error_inputs=_point_errors,
        oracle=_samples_oracle,
        straightforward=_loop_samples,
        sized=_sized_points,
        batch_dims={"X_a": 0, "X_b": 0, "a": 0, "b": 0},
        differentiable=("X_a", "X_b", "a", "b"),
        raw={**_SOLVER, **_GRADIENT},
        not_applicable={**_NOT_APPLICABLE, **_TRACED},
    ),
]
