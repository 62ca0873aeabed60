"""The operators beneath the public functions, and the calls that the public functions make of
them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import fusee
import torch
from fusee._op import Op
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.helpers import cotangent
from tests.harness.spec import OpSpec, Sample, detached


def shipped_ops() -> dict[str, Op]:
    """Every ``Op`` of the package, by the name of its operator."""
    found: dict[str, Op] = {}
    for module in pkgutil.walk_packages(fusee.__path__, "fusee."):
        if module.name.rpartition(".")[2] in ("__main__", "_C"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Op):
                found[value.name] = value
    return found


def schema_names() -> set[str]:
    """Every operator that the library of schemas registers."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fusee::") for name in names if name.startswith("fusee::")}


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an operator of fusee."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusee":
            assert not kwargs
            copies = (a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func._schema.name.removeprefix("fusee::"), tuple(copies)))
        return func(*args, **(kwargs or {}))


def raw_calls(spec: OpSpec, sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The calls of operators in a forward and a backward pass of a sample."""
    names = spec.has_gradient(sample.arguments)
    leaves = detached(sample.arguments, names)
    with _Recorder() as recorder:
        output = spec.function(**leaves)
        torch.autograd.grad(output, [leaves[n] for n in names], cotangent(output))
    return recorder.calls


def layout_variants(args: tuple[Any, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    """The call with contiguous and with non-contiguous tensors."""

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        wide = torch.zeros(*value.shape, 2, dtype=value.dtype, device=value.device)
        wide[..., 0] = value
        return wide[..., 0]

    return [("contiguous", args), ("not contiguous", tuple(map(spread, args)))]


def with_gradients(args: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """The call with leaves that require gradients where the operator has them."""
    return tuple(
        value.detach().clone().requires_grad_(value.is_floating_point() and place in places)
        if isinstance(value, Tensor)
        else value
        for place, value in enumerate(args)
    )
