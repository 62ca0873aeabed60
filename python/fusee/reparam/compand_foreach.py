"""The weight compander over all weights of a model in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusee._checks import (
    FLOATING_DTYPES,
    accumulate_dtype,
    check_floating,
    check_same_device,
)
from fusee._library import LOADED
from fusee._op import _missing_engine, in_functorch_transform
from fusee.reparam.compand import (
    Parameter,
    _backward_fake,
    _backward_reference,
    _backward_vmap,
    _compand,
    _compand_backward,
    _fake,
    _reference,
    _vmap,
    check_kind,
    check_parameter,
)

Tensors = list[Tensor]
PLAIN = (Tensor, torch.nn.Parameter)
_ACCUMULATE = {dtype: accumulate_dtype(dtype) for dtype in FLOATING_DTYPES}


def _foreach_reference(inputs: Tensors, a: Tensors, b: Tensors, kind: int) -> Tensors:
    """The same computation in plain torch operators."""
    return [_reference(*item, kind) for item in zip(inputs, a, b, strict=True)]


def _foreach_fake(inputs: Tensors, a: Tensors, b: Tensors, kind: int) -> Tensors:
    return [_fake(*item, kind) for item in zip(inputs, a, b, strict=True)]


def _by_argument(items: list[tuple[Tensor, ...]]) -> Tensors:
    """The gradients of all inputs, then of all a, then of all b."""
    return [gradients[place] for place in range(3) for gradients in items]


def _foreach_backward_reference(
    grads: Tensors, inputs: Tensors, a: Tensors, b: Tensors, kind: int
) -> Tensors:
    items = zip(grads, inputs, a, b, strict=True)
    return _by_argument([_backward_reference(*item, kind) for item in items])


def _foreach_backward_fake(
    grads: Tensors, inputs: Tensors, a: Tensors, b: Tensors, kind: int
) -> Tensors:
    items = zip(grads, inputs, a, b, strict=True)
    return _by_argument([_backward_fake(*item, kind) for item in items])


# Op of fusee._op is for functions of tensors; these are of lists of them.
_library = torch.library.Library("fusee", "IMPL")
for _name, _ref, _meta in (
    ("compand_foreach", _foreach_reference, _foreach_fake),
    ("compand_foreach_backward", _foreach_backward_reference, _foreach_backward_fake),
):
    _library.impl(_name, _ref, "CompositeExplicitAutograd")
    for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if LOADED[_device].engine is None:
            _library.impl(_name, _missing_engine(_name, _device), _key)
    torch.library.register_fake(f"fusee::{_name}", _meta)


def _foreach_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    """Batches are taken one by one."""
    lists: list[Tensors] = list(args[:-1])
    outputs = [
        _vmap(info, dims, *item, args[-1])[0]  # type: ignore[call-arg]
        for dims, item in zip(_transposed(in_dims), zip(*lists, strict=True), strict=True)
    ]
    return outputs, [0] * len(outputs)


def _foreach_backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    lists: list[Tensors] = list(args[:-1])
    items = [
        _backward_vmap(info, dims, *item, args[-1])[0]  # type: ignore[call-arg]
        for dims, item in zip(_transposed(in_dims), zip(*lists, strict=True), strict=True)
    ]
    return _by_argument(items), [0] * (3 * len(items))


def _transposed(in_dims: Any) -> list[tuple[int | None, ...]]:
    """The dimensions of each tensor's arguments, from those of each argument's tensors."""
    return list(zip(*in_dims[:-1], strict=True))


torch.library.register_vmap("fusee::compand_foreach", _foreach_vmap)
torch.library.register_vmap("fusee::compand_foreach_backward", _foreach_backward_vmap)


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, a, b, ctx.kind = inputs
    ctx.save_for_backward(*tensors, *a, *b)


def _registered_backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    count = len(grads)
    saved = ctx.saved_tensors
    gradients = _pull(_filled(grads, saved), saved, ctx.kind)
    parts = [list(gradients[i * count : (i + 1) * count]) for i in range(3)]
    return (*parts, None)


torch.library.register_autograd(
    "fusee::compand_foreach", _registered_backward, setup_context=_setup_registered
)


def _filled(grads: Sequence[Tensor | None], saved: Sequence[Tensor]) -> Tensors:
    return [
        torch.zeros_like(input) if grad is None else grad
        for grad, input in zip(grads, saved, strict=False)
    ]


def _thirds(tensors: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    count = len(tensors) // 3
    inputs, a, b = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
    return inputs, a, b


def _pull(grads: Tensors, saved: Sequence[Tensor], kind: int) -> Sequence[Tensor]:
    """The gradients in all inputs, a and b; differentiable where that is asked for."""
    inputs, a, b = _thirds(saved)
    batched = any(map(torch._C._functorch.is_legacy_batchedtensor, grads))
    if batched or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        items = zip(grads, inputs, a, b, strict=True)
        return _by_argument([_compand_backward(*item, kind) for item in items])
    return torch.ops.fusee.compand_foreach_backward(grads, inputs, a, b, kind)


def _below_autograd(tensors: Sequence[Tensor], kind: int) -> Tensors:
    with torch._C._AutoDispatchBelowAutograd():
        outputs: Tensors = torch.ops.fusee.compand_foreach.default(*_thirds(tensors), kind)
        return outputs


class _Foreach(torch.autograd.Function):
    """The operator over lists as a function of tensors: of all inputs, all a, all b."""

    @staticmethod
    def forward(ctx: Any, kind: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kind = kind
        ctx.save_for_backward(*tensors)
        return tuple(_below_autograd(tensors, kind))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        return (None, *_pull(_filled(grads, saved), saved, ctx.kind))


def compand_foreach(
    inputs: Sequence[Tensor],
    a: Parameter | Sequence[Parameter],
    b: Parameter | Sequence[Parameter],
    kind: str = "arctan",
) -> tuple[Tensor, ...]:
    r"""Maps the weights of a whole model through a curve: :func:`fusee.compand` of each, in one call.

    It saves what a call costs for each tensor: on CUDA all of a dtype, up to some 400, are read and
    written in one launch, and one or two give all their gradients.

    Args:
        inputs: the free weights, tensors of any shapes, strides and floating-point dtypes on one
            device.
        a: positive number or tensor for all, or a sequence with one for each; a tensor has one
            element, or one for each channel (dimension 0 of its input).
        b: likewise.
        kind: the curve of all, see :func:`fusee.compand`.

    Returns:
        A tuple of tensors, with the shape and dtype of each input.

    Raises:
        TypeError: as :func:`fusee.compand`, or ``inputs`` is a single tensor.
        ValueError: as :func:`fusee.compand`, or the numbers of tensors or their devices differ.

    Accuracy, derivatives, determinism and source are those of :func:`fusee.compand`. Under
    ``torch.func`` transforms, in forward mode, for second derivatives and among DTensors the tensors are
    taken one by one.

    Example:
        >>> import torch, fusee
        >>> weights = [torch.tensor([0.1, 1.0]), torch.tensor([[-10.0]])]
        >>> fusee.compand_foreach(weights, a=1.0, b=[0.5, 2.0])
        (tensor([0.1974, 1.1071]), tensor([[-1.3734]]))
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs must be a sequence of Tensors, got {type(inputs).__name__}")
    inputs = list(inputs)
    number = check_kind(kind)
    if not inputs:
        return ()
    if not _are_plain(inputs):
        for i, input in enumerate(inputs):
            check_floating(f"inputs[{i}]", input)
            check_same_device(f"inputs[{i}]", input, "inputs[0]", inputs[0])
    tensors = inputs + _equal_sizes(
        _parameters("a", a, inputs), _parameters("b", b, inputs), inputs
    )
    if in_functorch_transform() and torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    one_by_one = any(type(t) not in PLAIN and is_traceable_wrapper_subclass(t) for t in tensors)
    if one_by_one or in_functorch_transform() or forward_ad._current_level >= 0:
        return tuple(_compand(*item, number) for item in zip(*_thirds(tensors), strict=True))
    if torch.compiler.is_compiling():
        return tuple(torch.ops.fusee.compand_foreach(*_thirds(tensors), number))
    if not torch.is_grad_enabled():
        return tuple(_below_autograd(tensors, number))
    return _Foreach.apply(number, *tensors)


def _are_plain(tensors: list[Any]) -> bool:
    """Whether all are right at first sight, which is what a model has hundreds of."""
    device = getattr(tensors[0], "device", None)
    return all(
        type(t) in PLAIN
        and t.dtype in FLOATING_DTYPES
        and t.layout is torch.strided
        and t.device == device
        for t in tensors
    )


def _are_single_numbers(values: list[Any], inputs: Tensors) -> bool:
    """Whether each is a tensor of one valid element on the CPU, in the accumulation dtype."""
    if torch.compiler.is_compiling() or in_functorch_transform() or not inputs[0].is_cpu:
        return False
    is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
    return all(
        type(value) in PLAIN
        and value.numel() == 1
        and value.is_cpu
        and value.dim() <= 1
        and value.dtype is _ACCUMULATE.get(input.dtype)
        and not is_legacy_batched(value)
        and 0 < value.item() < math.inf
        for value, input in zip(values, inputs, strict=True)
    )


def _parameters(name: str, value: Any, inputs: Tensors) -> Tensors:
    """``a`` or ``b`` of every input."""
    if isinstance(value, (Tensor, int, float)):
        if not isinstance(value, Tensor) or value.numel() == 1:
            return _shared(name, value, inputs)
        value = [value] * len(inputs)
    if not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be a number, a Tensor or a sequence of these, got {type(value).__name__}"
        )
    value = list(value)
    if len(value) != len(inputs):
        raise ValueError(f"{name} must be as many as inputs, got {len(value)} and {len(inputs)}")
    if _are_single_numbers(value, inputs):
        return value
    return [
        check_parameter(f"{name}[{i}]", item, input, f"inputs[{i}]")
        for i, (item, input) in enumerate(zip(value, inputs, strict=True))
    ]


def _equal_sizes(a: Tensors, b: Tensors, inputs: Tensors) -> Tensors:
    """All a and all b, expanded where one of the two has an element for each channel."""
    for i, input in enumerate(inputs):
        if a[i].numel() != b[i].numel():
            a[i], b[i] = (t.reshape(-1).expand(input.shape[0]) for t in (a[i], b[i]))
    return a + b


def _shared(name: str, value: Parameter, inputs: Tensors) -> Tensors:
    """One parameter for all, checked and converted once for each dtype."""
    made: dict[torch.dtype, Tensor] = {}
    for input in inputs:
        if input.dtype not in made:
            made[input.dtype] = check_parameter(name, value, input, "inputs")
    return [made[input.dtype] for input in inputs]
