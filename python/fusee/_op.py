"""What makes a registered operator a good PyTorch citizen, once for all operators.

A compiled operator (``torch.ops.fusee.<name>``) gets its fake kernel, its reference as the kernel of
every device that has no engine, autograd, and a vmap rule. ``register_autograd`` alone makes
``torch.func.grad`` raise and ``torch.func.jvp`` return zeros, so in eager mode the operator is called
through an ``autograd.Function`` that also has a ``jvp``. Dynamo cannot trace such a Function; while it
compiles, the registered operator itself is called, and its registered backward is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusee._library import LOADED

_vjp: Any = torch.func.vjp  # whose annotation allows for has_aux

_implementations = torch.library.Library("fusee", "IMPL")


def in_functorch_transform() -> bool:
    """Whether a ``torch.func`` transform is being applied to the calling code."""
    return torch._C._are_functorch_transforms_active()


def without_autocast(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """A context in which references compute in the dtypes of their tensors."""
    device = next(value.device.type for value in args if isinstance(value, Tensor))
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def is_readable(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read here: not while something traces or batches it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not in_functorch_transform()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def backward_follows(*tensors: Tensor | None) -> tuple[bool, ...]:
    """For each tensor, whether a plain first-order backward pass may ask for its gradient: not while
    compiling, under a ``torch.func`` transform or in forward mode."""
    if torch.compiler.is_compiling() or in_functorch_transform() or forward_ad._current_level >= 0:
        return (False,) * len(tensors)
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)


_shardings: list[tuple[Any, Callable[..., Any]]] = []
"""The sharding rules that DTensor does not know yet."""


# The decorator makes it run while a compiler traces the caller.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _register_shardings() -> None:
    """Makes the rules known once there may be DTensors: their module takes long to import."""
    if _shardings and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _shardings:
            overload, rule = _shardings.pop()
            register_sharding(overload)(rule)


class Op:
    """A compiled operator with everything PyTorch may ask of it.

    Args:
        name: the operator in the ``fusee`` namespace.
        fake: its shapes and dtypes, for tracing.
        reference: the same computation in plain torch operators. It is the test oracle, the kernel of
            devices without an engine, and the source of every derivative that is not given.
        vmap: as in ``torch.library.register_vmap``.
        differentiable: the positions of the arguments that have gradients, and of the outputs.
        saved: the positions of the outputs that the derivatives need; by default those without
            gradients. One that has a gradient carries higher orders through itself.
        backward: ``backward(ctx, args, saved, *grads)`` returns a gradient or None for each argument,
            as in ``torch.library.register_autograd``; ``args`` are the arguments, and ``saved`` the
            saved outputs. It calls differentiable functions only. Without it the derivative is that of
            the reference.
        jvp: ``jvp(args, saved, *tangents)`` returns a tangent for each output that has a gradient;
            ``tangents`` has one, or None, for each argument that has one. Without it forward mode takes
            the derivative of the reference.
        sharding: how a DTensor may be sharded, as in
            ``torch.distributed.tensor.experimental.register_sharding``; without it the operator does not
            take DTensors.
    """

    def __init__(
        self,
        name: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        vmap: Callable[..., Any],
        differentiable: tuple[Sequence[int], Sequence[int]] = ((), ()),
        saved: Sequence[int] | None = None,
        backward: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        sharding: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.overload = getattr(torch.ops.fusee, name).default
        qualified = f"fusee::{name}"
        torch.library.register_fake(qualified, fake)
        torch.library.register_vmap(qualified, vmap)
        _implementations.impl(name, reference, "CompositeExplicitAutograd")
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if LOADED[device].engine is None:
                _implementations.impl(name, _missing_engine(name, device), key)
        if sharding is not None:
            _shardings.append((self.overload, sharding))
        self._function: type[torch.autograd.Function] | None = None
        if differentiable[0]:
            self._function = _make_function(name, self, *differentiable, saved, backward, jvp)
            torch.library.register_autograd(
                qualified, self._function.backward, setup_context=self._function.setup_context
            )

    def __call__(self, *args: Any) -> Any:
        _register_shardings()
        if self._function is None:
            return self.overload(*args)
        if torch.compiler.is_compiling():
            if in_functorch_transform():
                # The registered operator alone would give wrong derivatives here.
                torch._dynamo.graph_break()
            return self.overload(*args)
        if in_functorch_transform():
            return self._function.apply(*args)
        # Function.apply spends 40 us in binding default arguments, of which there are none, so the
        # apply below it is called, and none where there is nothing to differentiate.
        wanted = torch.is_grad_enabled() and any(
            value.requires_grad for value in args if isinstance(value, Tensor)
        )
        if wanted or forward_ad._current_level >= 0:
            return super(torch.autograd.Function, self._function).apply(*args)  # type: ignore[misc]
        return self._below_autograd(*args)

    def _below_autograd(self, *args: Any) -> Any:
        """Calls the kernel past the registered autograd, a Python function that would add 10 us."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def _missing_engine(name: str, device: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"fusee has no {device.upper()} engine for {name!r}: {LOADED[device].reason}. "
            "`python -m fusee` shows what was built and chosen."
        )

    return kernel


def register_in_place(
    name: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Registers an operator that writes to its arguments and has no derivatives: its shapes for tracing,
    and the same computation in plain torch operators for devices without an engine."""
    _implementations.impl(name, reference, "CompositeExplicitAutograd")
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if LOADED[device].engine is None:
            _implementations.impl(name, _missing_engine(name, device), key)
    torch.library.register_fake(f"fusee::{name}", fake)


def _make_function(
    name: str,
    op: Op,
    inputs_with_grad: Sequence[int],
    outputs_with_grad: Sequence[int],
    saved_outputs: Sequence[int] | None,
    backward: Callable[..., Any] | None,
    forward_mode: Callable[..., Any] | None,
) -> type[torch.autograd.Function]:
    """The autograd.Function of an operator; its backward serves ``register_autograd`` too."""

    def forward(*args: Any) -> Any:
        return op.overload(*args) if in_functorch_transform() else op._below_autograd(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        constants = [o for i, o in enumerate(outputs) if i not in outputs_with_grad]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.number_of_outputs = len(outputs)
        tensors = [inputs[i] for i in ctx.places]
        saved = constants if saved_outputs is None else [outputs[i] for i in saved_outputs]
        ctx.save_for_backward(*tensors, *saved)
        ctx.save_for_forward(*tensors, *saved)

    def restore(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        saved = ctx.saved_tensors
        args = list(ctx.others)
        for place, tensor in zip(ctx.places, saved, strict=False):
            args[place] = tensor
        return tuple(args), saved[len(ctx.places) :]

    def call_backward(ctx: Any, *grads: Tensor | None) -> Any:
        carried = [grads[i] for i in outputs_with_grad]
        if all(grad is None for grad in carried):
            return (None,) * len(ctx.others)
        args, saved = restore(ctx)
        if backward is not None:
            return backward(ctx, args, saved, *carried)
        function, tensors = _of_tensors(op.reference, args, inputs_with_grad, outputs_with_grad)
        outputs, pull = _vjp(function, *tensors)
        cotangents = tuple(
            torch.zeros_like(out) if grad is None else grad
            for out, grad in zip(outputs, carried, strict=True)
        )
        gradients = iter(pull(cotangents))
        return tuple(
            next(gradients) if i in inputs_with_grad and _has_gradient(value) else None
            for i, value in enumerate(args)
        )

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        args, saved = restore(ctx)
        if forward_mode is not None:
            derivatives = forward_mode(args, saved, *(tangents[i] for i in inputs_with_grad))
        else:
            function, tensors = _of_tensors(op.reference, args, inputs_with_grad, outputs_with_grad)
            given = [tangents[i] for i in inputs_with_grad if _has_gradient(args[i])]
            derivatives = push_forward(function, tensors, given)
        result: list[Tensor | None] = [None] * ctx.number_of_outputs
        for i, derivative in zip(outputs_with_grad, derivatives, strict=True):
            result[i] = derivative
        return tuple(result) if len(result) > 1 else result[0]

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(call_backward),
        "jvp": staticmethod(jvp),
    }
    return type(f"Fusee_{name}", (torch.autograd.Function,), members)


def push_forward(
    function: Callable[..., Any], tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Any:
    """The derivative of a function's tuple of results along tangents, where None is zero.

    It is J t as the transpose of the transpose: forward mode does not nest within itself.
    """
    directions = tuple(
        torch.zeros_like(tensor) if tangent is None else tangent
        for tensor, tangent in zip(tensors, tangents, strict=True)
    )
    outputs, pull = _vjp(function, *tensors)
    _, push = _vjp(pull, tuple(torch.zeros_like(out) for out in outputs))
    (derivatives,) = push(directions)
    return derivatives


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _of_tensors(
    reference: Callable[..., Any],
    args: Sequence[Any],
    inputs_with_grad: Sequence[int],
    outputs_with_grad: Sequence[int],
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The reference as a function of its differentiable tensors alone, and those tensors."""
    places = [i for i in inputs_with_grad if _has_gradient(args[i])]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        with without_autocast(filled):
            output = reference(*filled)
        outputs = output if isinstance(output, tuple) else (output,)
        return tuple(outputs[i] for i in outputs_with_grad)

    return function, [args[i] for i in places]


def batch_first(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> list[Any]:
    """Every tensor with the vmapped dimension as its first; one that is not vmapped is repeated."""
    return [
        value
        if not isinstance(value, Tensor)
        else value.expand(info.batch_size, *value.shape)
        if dim is None
        else value.movedim(dim, 0)
        for value, dim in zip(args, in_dims, strict=True)
    ]


def fold_batch(
    info: Any, in_dims: Sequence[int | None], args: Sequence[Tensor | None]
) -> list[Any]:
    """Moves the vmapped dimension of every tensor into its first one, for operators whose tensors all
    begin with independent rows; a tensor that is not vmapped is repeated."""
    folded: list[Any] = []
    for tensor, dim in zip(args, in_dims, strict=True):
        if tensor is None:
            folded.append(None)
            continue
        batch = (info.batch_size, *tensor.shape)
        first = tensor.expand(batch) if dim is None else tensor.movedim(dim, 0)
        folded.append(first.flatten(0, 1))
    return folded


def unfold_batch(info: Any, tensor: Tensor, outer: int) -> Tensor:
    """The inverse of :func:`fold_batch` for a result whose first dimension was ``outer``."""
    return tensor.unflatten(0, (info.batch_size, outer))


def batch_outer(args: Sequence[Tensor], in_dims: Sequence[int | None]) -> int:
    """The first dimension, without the batch, of the first tensor."""
    shape = list(args[0].shape)
    if in_dims[0] is not None:
        del shape[in_dims[0]]
    return shape[0]
