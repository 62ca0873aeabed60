"""``torch.func`` transforms, against the same transforms of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from tests.harness.helpers import chosen, cotangent, naming
from tests.harness.measure import ulps
from tests.harness.spec import OpSpec, Sample, as_function

pytestmark = pytest.mark.rules

Function = Callable[..., Tensor]


def _close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def _scalar(function: Function) -> Function:
    """A scalar of the result, in which no element has the same part."""

    def scalar(*values: Tensor) -> Tensor:
        output = function(*values)
        parts = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device)
        return (output.reshape(-1) * parts).sum()

    return scalar


def _each(spec: OpSpec, device: str) -> list[tuple[Sample, Function, Function, list[Tensor]]]:
    """Samples with the function and the oracle in their differentiable arguments."""
    result = []
    for sample in chosen(spec, torch.float64, device, tiny=True, smooth=True):
        names = spec.has_gradient(sample.arguments)
        pair = [as_function(f, sample.arguments, names) for f in (spec.function, spec.oracle)]
        result.append((sample, *pair, [sample.arguments[name] for name in names]))
    return result


def test_func_grad(spec: OpSpec, device: str) -> None:
    """``grad``, and the gradient of a norm of the gradient."""
    for sample, function, oracle, tensors in _each(spec, device):
        every = tuple(range(len(tensors)))

        def twice(f: Function, every: tuple[int, ...] = every) -> Function:
            first = grad(_scalar(f), every)
            return grad(lambda *v: torch.stack([g.square().sum() for g in first(*v)]).sum(), every)

        with naming(sample.name):
            _close(grad(_scalar(function), every)(*tensors), grad(_scalar(oracle), every)(*tensors))
            _close(twice(function)(*tensors), twice(oracle)(*tensors))


def test_jacrev(spec: OpSpec, device: str) -> None:
    """``jacrev``: a vmap over backward passes."""
    for sample, function, oracle, tensors in _each(spec, device):
        with naming(sample.name):
            _close(jacrev(function)(*tensors), jacrev(oracle)(*tensors))


def test_jacfwd(spec: OpSpec, device: str) -> None:
    """``jacfwd``: a vmap over forward-mode passes."""
    for sample, function, oracle, tensors in _each(spec, device):
        if tensors[0].numel():
            with naming(sample.name):
                _close(jacfwd(function)(*tensors), jacfwd(oracle)(*tensors))


def test_jvp(spec: OpSpec, device: str) -> None:
    """``jvp`` in all differentiable arguments at once, never a silent zero."""
    for sample, function, oracle, tensors in _each(spec, device):
        tangents = tuple(cotangent(t, seed=i) for i, t in enumerate(tensors))
        with naming(sample.name):
            _close(jvp(function, tuple(tensors), tangents), jvp(oracle, tuple(tensors), tangents))


def test_dual_numbers(spec: OpSpec, device: str) -> None:
    """Forward mode through ``torch.autograd.forward_ad``."""
    from torch.autograd import forward_ad

    for sample, function, oracle, tensors in _each(spec, device):
        with naming(sample.name), forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, cotangent(t)) for t in tensors]
            actual, expected = (forward_ad.unpack_dual(f(*duals)) for f in (function, oracle))
            assert actual.tangent is not None
            _close(actual, expected)


def test_hessian(spec: OpSpec, device: str) -> None:
    """``hessian``: forward mode over reverse mode."""
    for sample, function, oracle, tensors in _each(spec, device):
        if tensors[0].numel():
            with naming(sample.name):
                _close(hessian(_scalar(function))(*tensors), hessian(_scalar(oracle))(*tensors))


def _varied(tensor: Tensor, items: int = 3) -> Tensor:
    """A batch: the tensor, and permutations of it along its first dimension."""
    if tensor.dim() == 0:
        return torch.stack([tensor] * items)
    return torch.stack([tensor.roll(i, 0) for i in range(items)])


def _batched_names(spec: OpSpec, sample: Sample) -> list[str]:
    return [n for n in spec.tensors(sample.arguments) if n not in spec.not_batched]


def test_vmap(spec: OpSpec, device: str) -> None:
    """``vmap`` over all tensors, over each alone, and along the last dimension, against a loop."""
    for sample in chosen(spec, torch.float64, device, tiny=True):
        every = _batched_names(spec, sample)
        for names in ([every], *([[n]] for n in every)) if len(every) > 1 else ([every],):
            (batched,) = names
            function = as_function(spec.function, sample.arguments, batched)
            tensors = [_varied(sample.arguments[name]) for name in batched]
            expected = torch.stack([function(*items) for items in zip(*tensors, strict=True)])
            with naming(f"{sample.name} over {batched}"):
                _close(vmap(function)(*tensors).nan_to_num(7), expected.nan_to_num(7))
                last = [t.movedim(0, -1) for t in tensors]
                _close(vmap(function, in_dims=-1)(*last).nan_to_num(7), expected.nan_to_num(7))


def test_per_sample_gradients(spec: OpSpec, device: str) -> None:
    """``vmap(grad)`` over all tensors, against a loop."""
    for sample in chosen(spec, torch.float64, device, tiny=True, smooth=True):
        names = _batched_names(spec, sample)
        function = _scalar(as_function(spec.function, sample.arguments, names))
        where = tuple(names.index(n) for n in spec.has_gradient(sample.arguments) if n in names)
        tensors = [_varied(sample.arguments[name]) for name in names]
        gradient = grad(function, where)
        items = [gradient(*item) for item in zip(*tensors, strict=True)]
        expected = tuple(torch.stack(parts) for parts in zip(*items, strict=True))
        with naming(sample.name):
            _close(vmap(gradient)(*tensors), expected)


def test_vmap_of_vmap(spec: OpSpec, device: str) -> None:
    """Nested ``vmap``."""
    for sample in chosen(spec, torch.float64, device, tiny=True):
        names = _batched_names(spec, sample)
        function = as_function(spec.function, sample.arguments, names)
        tensors = [_varied(_varied(sample.arguments[name], 2), 2) for name in names]
        flat = [t.flatten(0, 1) for t in tensors]
        expected = torch.stack([function(*items) for items in zip(*flat, strict=True)])
        with naming(sample.name):
            actual = vmap(vmap(function))(*tensors).flatten(0, 1)
            assert ulps(actual, expected, spec.least_scale) <= spec.ulps(torch.float64)


def test_transforms_on_float32(spec: OpSpec, device: str) -> None:
    """Transforms keep the dtype of single-precision and half arguments."""
    for dtype in (torch.float32, torch.bfloat16):
        for sample in chosen(spec, dtype, device, tiny=True, smooth=True):
            names = spec.has_gradient(sample.arguments)
            function = as_function(spec.function, sample.arguments, names)
            tensors = [sample.arguments[name] for name in names]
            with naming(f"{sample.name}, {dtype}"):
                first = grad(_scalar(function))(*tensors)
                assert first.dtype == dtype
                tangents = tuple(map(torch.ones_like, tensors))
                output, tangent = jvp(function, tuple(tensors), tangents)
                assert output.dtype == tangent.dtype
