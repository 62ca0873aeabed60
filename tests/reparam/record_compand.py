"""The records of ``fusee.compand``: with parameters of the whole tensor, and with those of channels.

Accuracy over the whole line is in ``test_compand.py``, gradients at the edges in
``test_compand_gradients.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import (
    Arguments,
    CudaKernel,
    ErrorInput,
    Maker,
    NanSample,
    OpSpec,
    Sample,
    Traffic,
)
from tests.reparam.curves import (
    KINDS,
    KINKED,
    LIMITS,
    kind_errors,
    normal,
    oracle,
    over_channels,
    parameter_errors,
    parameters,
    weight_errors,
    weights,
)

HALF = (torch.bfloat16, torch.float16)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _samples(make: Maker) -> Iterator[Sample]:
    """Parameters of the whole tensor."""
    yield Sample("numbers", {"input": weights(make, 3, 5), "a": 1.5, "b": 0.75}, tiny=True)
    for kind in KINDS:
        yield Sample(kind, {"input": weights(make, 3, 4), **parameters(make, kind)}, tiny=True)
    bare = {"input": weights(make, 7), "a": make.tensor(1.25), "b": make.tensor(0.5)}
    yield Sample("parameters without dimensions", bare, tiny=True)
    one = {"input": weights(make, 2, 3), "a": 2, "b": make.tensor([0.5]), "kind": "tanh"}
    yield Sample("a a number", one, tiny=True)
    kernels = {"input": weights(make, 2, 3, 2, 2), **parameters(make, "mu_law")}
    yield Sample("kernels", kernels, tiny=True)
    last = {"input": channels_last(weights(make, 2, 3, 2, 2)), **parameters(make, "softsign")}
    yield Sample("channels last", last, tiny=True)
    for name, shape, kind in (
        ("scalar", (), "arctan"),
        ("one element", (1,), "symlog"),
        ("no weights", (0, 5), "asinh"),
        ("no columns", (4, 0), "powerprop"),
    ):
        yield Sample(name, {"input": weights(make, *shape), **parameters(make, kind)}, tiny=True)
    for kind in KINKED:
        at_zero = {"input": make.tensor([0.0, -0.0, 1.0, -1.0, 0.25]), **parameters(make, kind)}
        yield Sample(f"{kind} at zero", at_zero, tiny=True, smooth=False)
    for kind in KINDS:
        given = parameters(make, kind)
        yield Sample(f"{kind}, kernels", {"input": normal(make, 40, 3, 3, 3), **given})
        yield Sample(f"{kind}, wide", {"input": normal(make, 1501, scale=2), **given})
    for shape in ((4096,), (7, 1000), (2, 3000)):
        yield Sample(f"{shape}", {"input": normal(make, *shape), **parameters(make, "arctan")})


def _channel_samples(make: Maker) -> Iterator[Sample]:
    """Parameters of channels, or one of them."""
    for kind in KINDS:
        arguments = {"input": weights(make, 4, 3), **parameters(make, kind, 4)}
        yield Sample(kind, arguments, tiny=True)
    for name, kind, changed in (
        ("a of one", "symlog", {"a": make.tensor([1.5])}),
        ("b of one", "arctan", {"b": make.tensor([0.5])}),
        ("a a number", "tanh", {"a": 2}),
    ):
        arguments = {"input": weights(make, 4, 3), **parameters(make, kind, 4), **changed}
        yield Sample(name, arguments, tiny=True)
    each = {"input": weights(make, 4), **parameters(make, "asinh", 4)}
    yield Sample("a channel each", each, tiny=True)
    one = {"input": weights(make, 1, 6), **parameters(make, "mu_law", 1)}
    yield Sample("one channel", one, tiny=True)
    kernels = {"input": weights(make, 4, 2, 3, 3), **parameters(make, "mu_law", 4)}
    yield Sample("kernels", {**kernels, "b": make.tensor([15.0])}, tiny=True)
    last = {"input": channels_last(weights(make, 4, 3, 2, 2)), **parameters(make, "softsign", 4)}
    yield Sample("channels last", last, tiny=True)
    none = {"input": weights(make, 0, 5), **parameters(make, "tanh", 0), "b": make.tensor([0.5])}
    yield Sample("no channels", none, tiny=True)
    empty = {"input": weights(make, 4, 0), **parameters(make, "arctan", 4)}
    yield Sample("empty channels", empty, tiny=True)
    kinks = make.tensor([[0.0, 1.0], [-0.0, 0.5], [0.0, -0.0], [-1.0, 0.0]])
    at_zero = {"input": kinks, **parameters(make, "symlog", 4)}
    yield Sample("at zero", at_zero, tiny=True, smooth=False)
    for kind in KINDS:
        wide = normal(make, 61, 129, scale=2)
        yield Sample(f"{kind}, 61 channels", {"input": wide, **parameters(make, kind, 61)})
    for shape in ((1001,), (301, 11), (7, 1000), (2, 3000)):
        given = {**parameters(make, "arctan", shape[0]), "b": make.tensor([0.5])}
        yield Sample(f"{shape}", {"input": normal(make, *shape), **given})
    last = {"input": channels_last(normal(make, 6, 4, 5, 7)), **parameters(make, "asinh", 6)}
    yield Sample("channels last, larger", last)


def _large(make: Maker) -> Iterator[Sample]:
    for kind in ("arctan", "mu_law", "powerprop"):
        row = {"input": normal(make, 400001), **parameters(make, kind)}
        yield Sample(f"{kind}, one row", row)
    kernels = {"input": normal(make, 301, 40, 5, 5), **parameters(make, "softsign")}
    yield Sample("kernels", kernels)


def _large_channels(make: Maker) -> Iterator[Sample]:
    for kind in ("tanh", "asinh"):
        rows = {"input": normal(make, 300, 1000), **parameters(make, kind, 300)}
        yield Sample(f"{kind}, rows", rows)
    last = channels_last(normal(make, 300, 40, 5, 5))
    yield Sample("channels last", {"input": last, **parameters(make, "symlog", 300)})
    few = {**parameters(make, "softsign", 5), "b": make.tensor([0.5])}
    yield Sample("long rows", {"input": normal(make, 5, 60001), **few})
    many = {**parameters(make, "arctan", 30001), "b": make.tensor([0.5])}
    yield Sample("short rows", {"input": normal(make, 30001, 9), **many})


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = {"input": make.normal(4, 3), "a": 1.5, "b": 0.5}
    yield from weight_errors(given, "input", make)
    yield from kind_errors(given)
    yield from parameter_errors(given, "input")
    for value in ("1", None, [1.0]):
        wanted = f"must be a number or a Tensor, got {type(value).__name__}"
        for name in ("a", "b"):
            arguments = {**given, name: value}
            yield ErrorInput(f"{name} {value}", arguments, TypeError, f"{name} {wanted}")


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for kind in KINDS:
        x = make.uniform(4, 6, low=-1.0)
        x[3, 2] = math.nan
        yield NanSample({"input": x, "a": 1.5, "b": 1.75, "kind": kind}, x.isnan())


# --- properties -----------------------------------------------------------------------------------


def _odd_function(sample: Sample, output: Tensor) -> None:
    mirrored = fusee.compand(**{**sample.arguments, "input": -sample.arguments["input"]})
    assert torch.equal(mirrored, -output)


def _sign_kept(sample: Sample, output: Tensor) -> None:
    """But of results that are too small for their dtype."""
    signs = output.sign() == sample.arguments["input"].sign()
    assert bool((signs | (output == 0)).all())


def _bounded(sample: Sample, output: Tensor) -> None:
    """Within the interval; half types round to the nearest number, which may lie on its end."""
    limit = LIMITS.get(sample.arguments.get("kind", "arctan"))
    if limit is not None:
        computed = torch.float64 if output.dtype == torch.float64 else torch.float32
        a = torch.as_tensor(sample.arguments["a"]).to(output.device, computed).double()
        most = over_channels(a, output) * limit
        if output.dtype in HALF:
            most = most.to(output.dtype).double()
        assert bool((output.double().abs() <= most).all())


def _monotone(sample: Sample, output: Tensor) -> None:
    """The order is kept within a channel, but for the error of single results."""
    parameters = [torch.as_tensor(sample.arguments[name]) for name in ("a", "b")]
    rows = max([p.numel() for p in parameters if p.numel() != 1], default=1)
    if output.numel() == 0:
        return
    v, w = (t.double().reshape(rows, -1) for t in (sample.arguments["input"], output))
    ordered = w.gather(1, v.argsort(1))
    slack = 8 * torch.finfo(output.dtype).eps * ordered[:, 1:].abs()
    assert bool((ordered.diff(dim=1) >= -slack).all())


# --- traffic --------------------------------------------------------------------------------------


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads the weights and the parameters and writes the result; backward reads the gradient,
    the weights and the parameters and writes the gradients of all. Parameters are of 4 bytes."""
    x = arguments["input"]
    size, parameters = x.numel() * x.element_size(), 4 * (arguments["a"].numel() + 1)
    return 2 * size + parameters, 3 * size + 2 * parameters


def _of_tensor(*shape: int) -> Callable[[Maker], Arguments]:
    return lambda make: {
        "input": normal(make, *shape),
        "a": make.tensor([1.5]),
        "b": make.tensor([0.5]),
    }


def _of_channels(*shape: int) -> Callable[[Maker], Arguments]:
    return lambda make: {
        "input": normal(make, *shape),
        "a": make.uniform(shape[0], low=0.5, high=2.0),
        "b": make.tensor([0.5]),
    }


_TRAFFIC = (
    Traffic("small", _of_tensor(16, 64), (1, 1), _bytes),
    Traffic("one long row", _of_tensor(256, 256), (1, 2), _bytes),
)
_CHANNEL_TRAFFIC = (
    Traffic("rows", _of_channels(8, 4096), (1, 1), _bytes),
    Traffic("short rows", _of_channels(256, 32, 3, 3), (1, 1), _bytes),
    Traffic("long rows", _of_channels(2, 65536), (1, 2), _bytes),
)


KERNELS = (CudaKernel("compand_kernel<"), CudaKernel(r"\bgradient_kernel<"))


def _sized(make: Maker, n: int) -> Arguments:
    return {"input": weights(make, n, 7), "a": make.tensor([1.5]), "b": make.tensor([0.5])}


def _sized_channels(make: Maker, n: int) -> Arguments:
    return {**_sized(make, n), "a": make.uniform(n, low=0.5, high=2.0), "kind": "asinh"}


def _record(name: str, **fields: Any) -> OpSpec:
    properties = {
        "odd": _odd_function,
        "the sign is kept": _sign_kept,
        "the range": _bounded,
        "monotone": _monotone,
    }
    return OpSpec(
        name=name,
        function=fusee.compand,
        oracle=oracle,
        error_inputs=_error_inputs,
        differentiable=("input", "a", "b"),
        raw={"compand": (0, 1, 2), "compand_backward": (0, 1, 2, 3)},
        autocast_dtype=lambda dtype, cast: dtype,
        properties=properties,
        # The gradients in a and b of mu_law are differences of two sums.
        engine_ulps=8.0,
        least_scale=1.0,
        nan_samples=_nan_samples,
        cuda_kernels=KERNELS,
        **fields,
    )


_SAME_CHECKS = (
    "errors errors_while_tracing values_are_not_read_while_tracing bad_values_in_compiled_code "
    "checked_values_in_compiled_code checked_values_in_eager_mode unchecked_values nan "
    "documentation saved_program"
)
RECORDS = [
    _record(
        "compand",
        samples=_samples,
        large=_large,
        sized=_sized,
        batch_dims={"input": 0},
        traffic=_TRAFFIC,
    ),
    _record(
        "compand_channels",
        samples=_channel_samples,
        large=_large_channels,
        sized=_sized_channels,
        batch_dims={"input": 0, "a": 0},
        traffic=_CHANNEL_TRAFFIC,
        not_applicable=dict.fromkeys(
            _SAME_CHECKS.split(), "the same function: checked through compand"
        ),
    ),
]
