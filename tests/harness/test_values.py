"""Results and gradients against the oracle, in every dtype and layout, on every engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import SAVED
from tests.harness.helpers import (
    chosen,
    contiguous,
    cotangent,
    everything,
    naming,
    value_and_grad,
)
from tests.harness.layouts import LAYOUTS, expanded, sliced
from tests.harness.measure import (
    accumulation,
    check_error,
    same_bits,
    straightforward,
    ulps,
)
from tests.harness.spec import OpSpec, map_tensors, of_floats


def test_values(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """Results within the error bound, of the documented dtype."""
    for sample in chosen(spec, dtype, device, tiny=False):
        with naming(sample.name):
            output = spec.function(**sample.arguments)
            exact = spec.oracle(**of_floats(sample.arguments, torch.float64))
            assert output.shape == exact.shape
            assert output.dtype == sample.arguments.get("dtype", spec.output_dtype(dtype))
            plain = straightforward(spec, sample.arguments)
            check_error(output, plain, exact, "result", dtype, half_inside=spec.half_inside)


def test_gradients(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """First-order gradients within the error bound, in the dtype of their argument."""
    for sample in chosen(spec, dtype, device, tiny=False):
        names = spec.has_gradient(sample.arguments)
        if not names:
            continue
        with naming(sample.name):
            output, grads = value_and_grad(spec.function, sample.arguments, names)
            grad = cotangent(output)

            def plain(**arguments: object) -> Tensor:
                return straightforward(spec, arguments)

            def sent(out: Tensor, grad: Tensor = grad) -> Tensor:
                return grad.to(out.dtype)

            exact_arguments = of_floats(sample.arguments, torch.float64)
            _, exact = value_and_grad(spec.oracle, exact_arguments, names, sent)
            plain_arguments = of_floats(sample.arguments, accumulation(dtype))
            if spec.straightforward is not None:
                plain_arguments = sample.arguments
            _, rough = value_and_grad(plain, plain_arguments, names, sent)
            for name in names:
                assert grads[name].dtype == dtype
                what = f"gradient in {name}"
                inside = spec.half_inside
                check_error(grads[name], rough[name], exact[name], what, dtype, half_inside=inside)


def test_properties(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """What the mathematics promises of every result."""
    for sample in chosen(spec, dtype, device, tiny=False):
        output = spec.function(**sample.arguments)
        for name, holds in spec.properties.items():
            with naming(f"{sample.name}: {name}"):
                holds(sample, output)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(spec: OpSpec, dtype: torch.dtype, device: str, layout: str) -> None:
    """The same results and gradients from any strides and offsets as from contiguous copies."""
    changed = False
    for sample in chosen(spec, dtype, device, tiny=False):
        arguments = map_tensors(sample.arguments, LAYOUTS[layout])
        changed |= any(
            not t.is_contiguous() or t.storage_offset() for t in spec.tensors(arguments).values()
        )
        with naming(sample.name):
            actual = everything(spec.function, arguments, spec)
            expected = everything(spec.function, contiguous(arguments), spec)
            for a, e in zip(actual, expected, strict=True):
                assert ulps(a, e, spec.least_scale) <= spec.ulps(dtype)
    assert changed, f"no sample was changed by {layout}"


def test_gradient_layouts(spec: OpSpec, device: str) -> None:
    """Incoming gradients of any strides, constant and expanded ones included."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        names = spec.has_gradient(sample.arguments)
        for change in (sliced, expanded):
            with naming(f"{sample.name}, {change.__name__}"):

                def strided(out: Tensor, change: object = change) -> Tensor:
                    return change(cotangent(out))  # type: ignore[operator]

                _, actual = value_and_grad(spec.function, sample.arguments, names, strided)
                _, expected = value_and_grad(
                    spec.function, sample.arguments, names, lambda out: strided(out).contiguous()
                )
                for name in names:
                    assert ulps(actual[name], expected[name]) <= spec.ulps(torch.float32)


def test_inputs_unwritten(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """Neither forward nor backward writes to an argument."""
    for sample in chosen(spec, dtype, device, tiny=False):
        before = contiguous(sample.arguments)
        versions = {k: t._version for k, t in spec.tensors(sample.arguments).items()}
        spec.function(**sample.arguments)
        everything(spec.function, sample.arguments, spec)
        for name, tensor in spec.tensors(sample.arguments).items():
            with naming(f"{sample.name}: {name}"):
                assert same_bits(tensor, before[name])
                assert tensor._version == versions[name]


def test_strides_of_fake(spec: OpSpec, dtype: torch.dtype) -> None:
    """Traced results have the shape, dtype and strides of real ones, contiguous or not."""
    for sample in chosen(spec, dtype, tiny=True):
        for layout in (lambda t: t, LAYOUTS["transposed"], LAYOUTS["padded"]):
            arguments = map_tensors(sample.arguments, layout)
            real = spec.function(**arguments)
            with FakeTensorMode() as mode:
                fake = spec.function(**map_tensors(arguments, mode.from_tensor))
            with naming(sample.name):
                assert fake.shape == real.shape
                assert fake.dtype == real.dtype
                assert fake.stride() == real.stride()


def test_nan(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """NaN goes through, and stays in its row, in the result and in the gradient."""
    assert spec.nan_samples is not None, "declare nan_samples, or the check not applicable"
    for sample in spec.nan_samples(spec.make(dtype, device)):
        names = spec.has_gradient(sample.arguments)
        output, grads = value_and_grad(spec.function, sample.arguments, names)
        assert torch.equal(output.isnan(), sample.expected.to(device))
        clean = map_tensors(
            sample.arguments, lambda t: t.nan_to_num(0.5) if t.is_floating_point() else t
        )
        _, expected = value_and_grad(spec.function, clean, names)
        for name in names:
            # Elements that differ from the clean call's belong to a row with NaN.
            touched = grads[name] != expected[name]
            assert bool(grads[name].isnan().any()), f"the gradient in {name} forgot the NaN"
            rows_with_nan = sample.arguments[name].isnan()
            for dim in range(touched.dim()):
                if rows_with_nan.any(dim).sum() == 1 and touched.any(dim).sum() <= 1:
                    break
            else:
                pytest.fail(f"NaN left its row in the gradient in {name}")


def test_same_bits_again(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """The same call gives the same bits."""
    for sample in chosen(spec, dtype, device, tiny=False):
        first = everything(spec.function, sample.arguments, spec)
        again = everything(spec.function, sample.arguments, spec)
        with naming(sample.name):
            assert all(map(same_bits, first, again))


def test_outputs_for_comparison(
    spec: OpSpec, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Keeps results and gradients, which ``test_engines.py`` compares across engines."""
    saved = request.config.stash[SAVED]
    for sample in chosen(spec, dtype, tiny=False):
        key = f"{spec.name} | {str(dtype).removeprefix('torch.')} | {sample.name}"
        assert key not in saved, "two samples have the same name"
        saved[key] = everything(spec.function, sample.arguments, spec)
