"""``torch.compile``: one graph, the right result and gradients, few recompilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacrev, jvp, vmap

from tests.harness.helpers import chosen, cotangent, naming, value_and_grad
from tests.harness.measure import ulps
from tests.harness.spec import Arguments, OpSpec, as_function, detached

pytestmark = pytest.mark.tracing


def _check(spec: OpSpec, compiled: Callable[..., Tensor], arguments: Arguments) -> None:
    """Result and gradients of a compiled function against eager ones."""
    names = spec.has_gradient(arguments)
    output, grads = value_and_grad(compiled, arguments, names)
    expected, expected_grads = value_and_grad(spec.function, arguments, names)
    assert output.dtype == expected.dtype
    assert output.stride() == expected.stride()
    units = 4 * spec.ulps(expected.dtype)
    assert ulps(output, expected, spec.least_scale) <= units
    for name in names:
        assert ulps(grads[name], expected_grads[name]) <= units, f"gradient in {name}"


def _call(spec: OpSpec) -> Callable[..., Tensor]:
    """A fresh function, so that no other test's compiled code is found."""

    def call(**arguments: Any) -> Tensor:
        # An operation on either side, so that the operator stands inside a graph.
        return spec.function(**arguments) * 1

    return call


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(spec: OpSpec, device: str, dynamic: bool) -> None:
    """Inductor, as one graph, with its compiled backward."""
    compiled = torch.compile(_call(spec), fullgraph=True, dynamic=dynamic)
    make = spec.make(torch.float32, device)
    for n in (12, 9):
        _check(spec, compiled, spec.sized(make, n))


def test_compile_every_sample(spec: OpSpec, device: str) -> None:
    """Every option and shape traces as one graph, and so do half types."""
    calls = [(s.name, s.arguments) for s in chosen(spec, torch.float32, device, tiny=True)]
    half = spec.make(torch.bfloat16, device)
    for name, arguments in [*calls, ("bfloat16", spec.sized(half, 5))]:
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
        with naming(name):
            _check(spec, compiled, arguments)


def test_recompilations(spec: OpSpec, device: str) -> None:
    """With dynamic shapes the first compilation serves all sizes; by default there is one more."""
    for dynamic, more in ((True, 0), (None, 1)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(_call(spec), backend=counter, fullgraph=True, dynamic=dynamic)
        make = spec.make(torch.float32, device)
        # The first compilation may restart, which the counter counts.
        _check(spec, compiled, spec.sized(make, 12))
        first = counter.frame_count
        for n in (9, 14, 33):
            _check(spec, compiled, spec.sized(make, n))
        assert counter.frame_count <= first + more


def test_compile_without_gradients(spec: OpSpec, device: str) -> None:
    """An inference graph."""
    compiled = torch.compile(_call(spec), fullgraph=True, backend="aot_eager")
    arguments = spec.sized(spec.make(torch.float32, device), 6)
    with torch.no_grad():
        output, expected = compiled(**arguments), spec.function(**arguments)
    assert ulps(output, expected, spec.least_scale) <= spec.ulps(expected.dtype)


def _transforms(function: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Any]:
    def total(*values: Tensor) -> Tensor:
        output = function(*values)
        return (output.reshape(-1) * torch.linspace(0.5, 1.5, output.numel()).to(output)).sum()

    tangents = tuple(cotangent(t) for t in tensors)
    stacked = [torch.stack([t, t.roll(1, 0)]) for t in tensors]
    return {
        "grad": lambda: grad(total)(*tensors),
        "jvp": lambda: jvp(function, tuple(tensors), tangents),
        "jacrev": lambda: jacrev(function)(*tensors),
        "hessian": lambda: hessian(total)(*tensors),
        "vmap": lambda: vmap(function)(*stacked),
        "vmap of grad": lambda: vmap(grad(total))(*stacked),
    }


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch loses the derivative: see the README"
)
@pytest.mark.parametrize("dtype_", [torch.float64])
def test_transforms_in_compiled_code(spec: OpSpec, device: str, dtype_: torch.dtype) -> None:
    """A ``torch.func`` transform inside a compiled region gives the right result or an exception,
    with and without ``fullgraph``; never zeros."""
    arguments = spec.sized(spec.make(dtype_, device), 4)
    names = spec.has_gradient(arguments)
    function = as_function(spec.function, arguments, names)
    tensors = [arguments[name] for name in names]
    for fullgraph in (False, True):
        for name, transform in _transforms(function, tensors).items():
            torch._dynamo.reset()
            expected = transform()
            try:
                actual = torch.compile(transform, backend="aot_eager", fullgraph=fullgraph)()
            except Exception:
                continue
            with naming(f"{name}, {fullgraph=}"):
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_second_order_of_compiled_code(spec: OpSpec, device: str) -> None:
    """Double backward through compiled code gives the right result or an exception, never zeros."""
    arguments = spec.sized(spec.make(torch.float64, device), 4)
    names = spec.has_gradient(arguments)

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = detached(arguments, names)
        tensors = [leaves[name] for name in names]
        value = function(**leaves).square().sum()
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        return list(torch.autograd.grad(grads[0].square().sum(), tensors))

    compiled = torch.compile(_call(spec), backend="aot_eager")
    try:
        actual = second(compiled)
    except RuntimeError:
        return
    torch.testing.assert_close(actual, second(spec.function), rtol=1e-9, atol=1e-12)
