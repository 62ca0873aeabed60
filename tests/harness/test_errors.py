"""Bad input: the right exception with a message that names the argument, in every mode of
execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.harness.helpers import naming, value_and_grad
from tests.harness.spec import ErrorInput, OpSpec, map_tensors


def _inputs(spec: OpSpec, device: str, *, values: bool) -> list[ErrorInput]:
    inputs = spec.error_inputs(spec.make(torch.float32, device))
    return [error for error in inputs if error.values == values]


def test_errors(spec: OpSpec, device: str) -> None:
    """The exact exception type, and a message that names the argument."""
    inputs = _inputs(spec, device, values=False)
    if device == "cpu":
        inputs += _inputs(spec, device, values=True)
    assert inputs
    for error in inputs:
        with naming(error.name):
            with pytest.raises(error.error, match=error.match) as caught:
                spec.function(**error.arguments)
            assert caught.type is error.error


def test_errors_while_tracing(spec: OpSpec, device: str) -> None:
    """What shapes and types show raises the same for fake tensors."""
    for error in _inputs(spec, device, values=False):
        with naming(error.name), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            arguments = map_tensors(error.arguments, lambda t, mode=mode: mode.from_tensor(t))
            with pytest.raises(error.error, match=error.match) as caught:
                spec.function(**arguments)
            assert caught.type is error.error


def test_values_are_not_read_while_tracing(spec: OpSpec, device: str) -> None:
    """What only values show raises nothing for fake tensors."""
    for error in _inputs(spec, device, values=True):
        with naming(error.name), FakeTensorMode() as mode:
            output = spec.function(**map_tensors(error.arguments, mode.from_tensor))
            assert isinstance(output, Tensor)


def _gradients(spec: OpSpec, function: Any, arguments: dict[str, Any]) -> list[Tensor]:
    names = spec.has_gradient(arguments)
    output, grads = value_and_grad(function, arguments, names)
    return [output, *grads.values()]


@pytest.mark.tracing
def test_bad_values_in_compiled_code(
    spec: OpSpec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code does not look at values: what they touch is NaN, in the result and its
    gradient."""
    monkeypatch.delenv("FUSEE_CHECK_VALUES", raising=False)
    for error in _inputs(spec, device, values=True):
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
        with naming(error.name):
            for tensor in _gradients(spec, compiled, error.arguments):
                assert bool(tensor.isnan().any())


@pytest.mark.tracing
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checked_values_in_compiled_code(
    spec: OpSpec, device: str, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """With FUSEE_CHECK_VALUES=1 compiled code raises, for bad values alone."""
    monkeypatch.setenv("FUSEE_CHECK_VALUES", "1")
    if device == "cuda":
        pytest.skip("a failed assertion on the device ends the process's use of it")
    for error in _inputs(spec, device, values=True):
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=True, backend=backend)
        with naming(error.name), pytest.raises(RuntimeError, match="range"):
            compiled(**error.arguments)
    arguments = spec.sized(spec.make(torch.float32, device), 5)
    assert not bool(torch.compile(spec.function, backend=backend)(**arguments).isnan().any())


def test_checked_values_in_eager_mode(
    spec: OpSpec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FUSEE_CHECK_VALUES=1 every device raises the exception that the CPU always raises."""
    monkeypatch.setenv("FUSEE_CHECK_VALUES", "1")
    for error in _inputs(spec, device, values=True):
        with naming(error.name), pytest.raises(error.error, match=error.match):
            spec.function(**error.arguments)


def test_unchecked_values(spec: OpSpec, device: str) -> None:
    """On CUDA nothing is read back: what bad values touch is NaN. On the CPU, under ``vmap``,
    likewise."""
    for error in _inputs(spec, device, values=True):
        with naming(error.name):
            if device == "cpu":
                stacked = map_tensors(error.arguments, lambda t: torch.stack([t, t]))
                names = [n for n in spec.tensors(stacked) if n not in spec.not_batched]
                fixed = {k: v for k, v in error.arguments.items() if k not in names}

                def call(values: dict[str, Tensor], fixed: Any = fixed) -> Tensor:
                    return spec.function(**values, **fixed)

                if any(error.arguments[n] is not None for n in names):
                    result = torch.func.vmap(call)({n: stacked[n] for n in names})
                    assert bool(result.isnan().any())
            else:
                for tensor in _gradients(spec, spec.function, error.arguments):
                    assert bool(tensor.isnan().any())
