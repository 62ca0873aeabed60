"""Sums over the groups of a table, in one order on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusee._op import is_readable


class Segments(NamedTuple):
    """Which elements of a tensor belong to each group."""

    places: Tensor
    """The place of each element's group: 0 for those in none, which count from -1, else one more."""
    order: Tensor | None
    """The elements that are in a group, one group after another; None where all lie so."""
    sizes: Tensor
    """How many there are of each group."""


_of_tables: WeakKeyDictionary[Any, dict[Any, Segments]] = WeakKeyDictionary()


def segments_of(table: Any, key: Any, ids: Tensor) -> Segments:
    """Those of the numbers ``ids``, found once for each table and key."""
    known = _of_tables.setdefault(table, {})
    if key in known:
        return known[key]
    with _disable_current_modes(), torch.inference_mode(False):
        places = ids.reshape(-1) + 1
        sizes = torch.bincount(places, minlength=table.groups + 1)
        order = places.argsort(stable=True)[int(sizes[0]) :].clone()  # without those in none
        lie_so = torch.equal(order, torch.arange(places.numel(), device=places.device))
        segments = Segments(places, None if lie_so else order, sizes[1:].clone())
    if is_readable(places):
        known[key] = segments
    return segments


# Each is the other's transpose, so that derivatives of any order are these two again. The gradients of
# torch's own operators add with float atomics on CUDA, in an order that changes from call to call.
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, _: Tensor, order: Tensor | None, sizes: Tensor) -> Tensor:
        chosen = values if order is None else values.index_select(0, order)
        if not chosen.numel():
            return values.new_zeros((sizes.numel(), *values.shape[1:]))
        return torch.segment_reduce(chosen, "sum", lengths=sizes, axis=0, unsafe=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Any:
        return _Sum.apply(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, *segments: Any) -> Any:
        return _vmapped(_Sum.apply, in_dims, values, segments)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(numbers: Tensor, places: Tensor, order: Tensor | None, sizes: Tensor) -> Tensor:
        first = numbers.new_zeros((1, *numbers.shape[1:]))
        return torch.cat([first, numbers]).index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Any:
        return _Spread.apply(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, numbers: Tensor, *segments: Any) -> Any:
        return _vmapped(_Spread.apply, in_dims, numbers, segments)


def _vmapped(function: Callable[..., Any], in_dims: Any, values: Tensor, segments: Any) -> Any:
    if any(d is not None for d in in_dims[1:]):
        raise NotImplementedError("the groups of a table cannot be vmapped")
    # The function takes any further dimensions behind the first.
    return function(values.movedim(in_dims[0], -1), *segments), values.dim() - 1


def _traced(values: Tensor) -> bool:
    """Whether plain operators are needed: a compiler does not see the functions' derivatives, and other
    devices have no sums of segments."""
    return torch.compiler.is_compiling() or values.device.type not in ("cpu", "cuda")


def sum_of_groups(table: Any, key: Any, ids: Tensor, values: Tensor) -> Tensor:
    """The sum of the ``values`` (n,) of each group, whose numbers are ``ids``: (groups,)."""
    if _traced(values):
        zeros = values.new_zeros(table.groups + 1)
        return zeros.index_add(0, ids.reshape(-1) + 1, values)[1:]
    sums: Tensor = _Sum.apply(values, *segments_of(table, key, ids))
    return sums


def spread_to_elements(table: Any, key: Any, ids: Tensor, numbers: Tensor) -> Tensor:
    """For each element, whose numbers are ``ids``, that of its group among ``numbers`` (groups,); zero
    for elements in none: (n,)."""
    if _traced(numbers):
        return torch.cat([numbers.new_zeros(1), numbers]).index_select(0, ids.reshape(-1) + 1)
    each: Tensor = _Spread.apply(numbers, *segments_of(table, key, ids))
    return each
