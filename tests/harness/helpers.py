"""Steps that many checks take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, Maker, OpSpec, Sample, detached, select


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Says in a failure which sample it was."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"[{what}] {type(error).__name__}: {error}") from error


def chosen(
    spec: OpSpec,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    tiny: bool,
    smooth: bool = False,
) -> list[Sample]:
    """The samples of a record that a check wants; never none."""
    emulated = device == "cpu" and fusee.engine("cpu") == "emulated"
    every = spec.samples(spec.make(dtype, device))
    samples = list(select(every, tiny=tiny, smooth=smooth, emulated=emulated))
    assert samples, f"{spec.name} has no samples for this check"
    return samples


def cotangent(output: Tensor, seed: int = 1) -> Tensor:
    """A gradient to send back through ``output``."""
    return Maker(output.dtype, str(output.device), seed).normal(*output.shape)


def value_and_grad(
    function: Callable[..., Tensor],
    arguments: Arguments,
    names: list[str],
    grad: Callable[[Tensor], Tensor] = cotangent,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and the gradients in the named arguments."""
    leaves = detached(arguments, names)
    output = function(**leaves)
    if not names:
        return output.detach(), {}
    grads = torch.autograd.grad(output, [leaves[name] for name in names], grad(output))
    return output.detach(), dict(zip(names, grads, strict=True))


def everything(function: Callable[..., Tensor], arguments: Arguments, spec: OpSpec) -> list[Tensor]:
    """The result and all gradients, in a fixed order."""
    names = spec.has_gradient(arguments)
    output, grads = value_and_grad(function, arguments, names)
    return [output, *grads.values()]


def contiguous(arguments: Arguments) -> Arguments:
    """Copies of all tensors, contiguous."""
    return {
        k: v.detach().clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
