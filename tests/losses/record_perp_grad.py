"""The record of ``fusee.optim.perp_grad_``, seen as a function that returns the projected gradient.

Lists of tensors, rows of odd layouts, the optimiser around it, and the operator's registration are
in ``test_perp_grad.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, CudaKernel, ErrorInput, Maker, NanSample, OpSpec, Sample


def _projected(weights: Any, grads: Any, **options: Any) -> Tensor:
    """The result on a copy, so that a sample can be used again."""
    result = grads.clone() if isinstance(grads, Tensor) else grads
    fusee.optim.perp_grad_(weights, result, **options)
    return result


def _oracle(
    weights: Tensor, grads: Tensor, *, per: str = "tensor", rescale: bool = True, tau: float = 0.0
) -> Tensor:
    if grads.numel() == 0:
        return grads
    rows = grads.shape[0] if per == "row" and grads.dim() > 1 else 1
    w, g = weights.reshape(rows, -1), grads.reshape(rows, -1)
    across = g - (w * g).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True) * w
    if rescale:
        across = across * (g.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True))
    return across.reshape(grads.shape)


def _samples(make: Maker) -> Iterator[Sample]:
    def call(*shape: int, **options: Any) -> Arguments:
        return {"weights": make.normal(*shape), "grads": make.normal(*shape), **options}

    yield Sample("vector", call(7), tiny=True)
    yield Sample("matrix", call(4, 5), tiny=True)
    yield Sample("rows", call(4, 5, per="row"), tiny=True)
    yield Sample("a projection", call(4, 5, rescale=False), tiny=True)
    yield Sample("kernels", call(3, 2, 3, 3, per="row"), tiny=True)
    yield Sample("no rows", call(0, 5), tiny=True)
    for size in (31, 1000):
        yield Sample(f"{size} wide", call(9, size))
        yield Sample(f"{size} wide, rows", call(9, size, per="row"))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    x = make.normal(3, 5)
    given = {"weights": x, "grads": x + 1}

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    yield error("not a tensor", TypeError, r"grads\[0\] must be a Tensor", grads=[1.0])
    yield error("integers", TypeError, r"grads\[0\]", grads=x.long(), weights=x.long())
    yield error("shapes", ValueError, r"grads\[0\] must have the shape", grads=x[:2])
    yield error("dtypes", TypeError, r"grads\[0\] must have the dtype", grads=x.double())
    yield error("devices", ValueError, r"weights\[0\] .*device", weights=x.to("meta"))
    yield error("numbers", ValueError, "weights must be as many", weights=[x, x])
    yield error("per", ValueError, "per must be .*'column'", per="column")
    yield error("tau", ValueError, "tau must be in", tau=1.0)
    yield error("tau NaN", ValueError, "tau must be in", tau=math.nan)
    yield error("tau a string", TypeError, "tau must be a number", tau="0")


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for name in ("weights", "grads"):
        arguments = {"weights": make.normal(4, 6), "grads": make.normal(4, 6), "per": "row"}
        arguments[name][2, 3] = math.nan
        expected = torch.zeros(4, 6, dtype=torch.bool, device=make.device)
        expected[2] = True
        yield NanSample(arguments, expected)


def _large(make: Maker) -> Iterator[Sample]:
    for per in ("tensor", "row"):
        for shape in ((300, 1000), (5, 60001), (400001,)):
            arguments = {"weights": make.normal(*shape), "grads": make.normal(*shape), "per": per}
            yield Sample(f"{shape}, {per}", arguments)


def _sized(make: Maker, n: int) -> Arguments:
    return {"weights": make.normal(n, 7), "grads": make.normal(n, 7), "per": "row"}


def _units(sample: Sample, *tensors: Tensor) -> list[Tensor]:
    by_row = sample.arguments.get("per") == "row" and tensors[0].dim() > 1
    rows = tensors[0].shape[0] if by_row else 1
    return [t.double().reshape(rows, -1) for t in tensors]


def _perpendicular(sample: Sample, output: Tensor) -> None:
    if output.numel():
        w, g = _units(sample, sample.arguments["weights"], output)
        cosine = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))
        assert float(cosine.abs().max()) <= 2 * torch.finfo(output.dtype).eps


def _norm_kept(sample: Sample, output: Tensor) -> None:
    if output.numel() and sample.arguments.get("rescale", True):
        before, after = _units(sample, sample.arguments["grads"], output)
        ratio = after.norm(dim=1) / before.norm(dim=1)
        assert float((ratio - 1).abs().max()) <= 2 * torch.finfo(output.dtype).eps


_NO_DERIVATIVES = (
    "gradients gradient_layouts gradcheck gradgradcheck third_order retain_graph checkpoint "
    "no_grad each_gradient_alone func_grad jacrev jacfwd jvp dual_numbers hessian "
    "per_sample_gradients transforms_on_float32 transforms_in_compiled_code "
    "second_order_of_compiled_code"
)
_IN_PLACE = "reference raw_inputs_unwritten opcheck strides_of_fake documentation"
_NOT_APPLICABLE = {
    **dict.fromkeys(_NO_DERIVATIVES.split(), "an optimiser's step has no derivative"),
    **dict.fromkeys(_IN_PLACE.split(), "it writes to lists of tensors: see test_perp_grad.py"),
    **dict.fromkeys(("vmap", "vmap_of_vmap"), "it writes to its arguments, which vmap cannot"),
    **dict.fromkeys(
        ("values_are_not_read_while_tracing", "bad_values_in_compiled_code"), "no value is an error"
    ),
    "checked_values_in_compiled_code": "no value is an error",
    "checked_values_in_eager_mode": "no value is an error",
    "unchecked_values": "no value is an error",
    "traffic": "measured over lists of tensors in test_perp_grad.py",
}

RECORDS = [
    OpSpec(
        name="perp_grad_",
        function=_projected,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=_sized,
        batch_dims={"weights": 0, "grads": 0},
        differentiable=(),
        raw={"perp_grad_": ()},
        autocast_dtype=lambda dtype, cast: dtype,
        properties={"perpendicular": _perpendicular, "the norm is kept": _norm_kept},
        nan_samples=_nan_samples,
        large=_large,
        cuda_kernels=(CudaKernel("project_kernel"), CudaKernel("sum_kernel", stores=False)),
        not_applicable=_NOT_APPLICABLE,
    )
]
