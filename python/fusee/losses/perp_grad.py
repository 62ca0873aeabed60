"""PerpGrad: gradients without their component along the weights, in place for a whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusee._checks import (
    FLOATING_DTYPES,
    check_floating,
    check_same_device,
    check_tensor,
    has_twice,
)
from fusee._op import register_in_place
from fusee._wrapper import OptimizerWrapper

TAU = 1e-10
"""The default square of the sine between g and w below which what is left of g counts as noise."""


def _rows(grad: Tensor, per_row: bool) -> Any:
    # The rows of a vector are single numbers, so a vector is one unit in either mode.
    return grad.shape[0] if per_row and grad.dim() > 1 else 1


def _reference(
    weights: list[Tensor],
    grads: list[Tensor],
    per_row: bool,
    rescale: bool,
    skip_single: bool,
    threshold: float,
) -> Tensor:
    """The same computation in plain torch operators; writes to ``grads``."""
    return torch.cat(
        [
            _reference_pair(w, g, per_row, rescale, skip_single, threshold).reshape(-1)
            for w, g in zip(weights, grads, strict=True)
        ]
    )


def _reference_pair(
    weight: Tensor, grad: Tensor, per_row: bool, rescale: bool, skip_single: bool, threshold: float
) -> Tensor:
    rows = _rows(grad, per_row)
    if grad.numel() == 0 or (grad.numel() == rows and skip_single):
        return torch.zeros(rows, dtype=torch.bool, device=grad.device)
    # Metal has no float64; sums in float32 know the sine to about 1e-3.
    exact = grad.device.type != "mps"
    dtype = torch.float64 if exact else torch.float32
    tau = max(threshold if exact else max(threshold, 1e-6), (torch.finfo(grad.dtype).eps / 2) ** 2)
    w, g = weight.to(dtype), grad.to(dtype)
    dims = tuple(range(1 if per_row and grad.dim() > 1 else 0, grad.dim()))
    ww, wg, gg = ((x * y).sum(dims, keepdim=True) for x, y in ((w, w), (w, g), (g, g)))
    alpha = wg / ww
    rest = gg - alpha * wg
    degenerate = (rest <= tau * gg) & (ww != 0) & (gg != 0) & gg.isfinite() & ww.isfinite()
    scale = (gg / rest).sqrt() if rescale else torch.ones_like(rest)
    finite = (ww + wg + gg).isfinite()
    projected = torch.where(finite, scale * (g - alpha * w), float("nan"))
    projected = torch.where(degenerate, torch.zeros_like(g), projected)
    # Without weights there is no direction to remove, and from nothing there is nothing to remove.
    keep = (ww == 0) | (finite & (gg == 0))
    grad.copy_(torch.where(keep, g, projected))
    return degenerate


def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    per_row: bool,
    rescale: bool,
    skip_single: bool,
    threshold: float,
) -> Tensor:
    units = sum(_rows(grad, per_row) for grad in grads)
    return grads[0].new_empty((units,), dtype=torch.bool)


register_in_place("perp_grad_", reference=_reference, fake=_fake)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as real ones with the same units: a vector stays one."""
    if not any(tensor.dtype.is_complex for tensor in tensors):
        return tensors
    return [_real_of_complex(t) if t.is_complex() else t for t in tensors]


def _real_of_complex(tensor: Tensor) -> Tensor:
    parts = torch.view_as_real(tensor.resolve_conj())
    return parts.unsqueeze(0) if tensor.dim() == 1 else parts


def _check_options(per: str, tau: float) -> None:
    if per not in ("tensor", "row"):
        raise ValueError(f"per must be 'tensor' or 'row', got {per!r}")
    if not isinstance(tau, (int, float)):
        raise TypeError(f"tau must be a number, got {type(tau).__name__}")
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be in [0, 1), got {tau}")


_DTYPES = {*FLOATING_DTYPES, torch.complex64, torch.complex128}


def _check_pairs(weights: list[Any], grads: list[Any]) -> None:
    first = grads[0]
    check_tensor("grads[0]", first)
    device = first.device
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        # What a model has hundreds of is found right at once; only what is wrong is looked into.
        if not (
            isinstance(weight, Tensor)
            and isinstance(grad, Tensor)
            and weight.dtype is grad.dtype
            and weight.dtype in _DTYPES
            and weight.layout is grad.layout is torch.strided
            and weight.device == grad.device == device
            and weight.shape == grad.shape
        ):
            _check_pair(i, weight, grad, first)


def _check_pair(i: int, weight: Any, grad: Any, first: Tensor) -> None:
    check_tensor(f"weights[{i}]", weight)
    check_tensor(f"grads[{i}]", grad)
    if grad.shape != weight.shape:
        raise ValueError(
            f"grads[{i}] must have the shape of weights[{i}], got {tuple(grad.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if grad.dtype != weight.dtype:
        raise TypeError(
            f"grads[{i}] must have the dtype of weights[{i}], got {grad.dtype} and {weight.dtype}"
        )
    if grad.dtype not in (torch.complex64, torch.complex128):
        check_floating(f"grads[{i}]", grad)
    check_same_device(f"weights[{i}]", weight, "grads[0]", first)
    check_same_device(f"grads[{i}]", grad, "grads[0]", first)


def perp_grad_(
    weights: Tensor | Iterable[Tensor],
    grads: Tensor | Iterable[Tensor],
    *,
    per: str = "tensor",
    rescale: bool = True,
    skip_single: bool = True,
    tau: float = TAU,
) -> Tensor:
    r"""Removes from each gradient its component along the weights, in place.

    .. math:: g \leftarrow \frac{\|g\|}{\|p\|}\, p, \qquad p = g - \frac{\langle w, g\rangle}{\langle w,
              w\rangle}\, w

    over a unit, which is a tensor, or with ``per="row"`` each slice along the first dimension (the
    output channels of linear and convolution layers; the input channels of transposed convolutions).

    A unit whose gradient is parallel to its weights (:math:`\|p\|^2 \le \tau \|g\|^2`) gets zeros: what
    is left of it is rounding noise. One whose weights are all zero keeps its gradient. One that holds a
    NaN or an infinity, in the gradient or in the weights, gets NaN as a whole.

    Args:
        weights: a tensor, or several of any shapes; float32, float64, bfloat16, float16 or complex,
            also mixed. Complex numbers count as pairs of real ones.
        grads: their gradients, of the same shapes, dtypes and device, each tensor once; overwritten.
            Any strides; a copy is made only where they differ from those of the weight, where the
            memory of a gradient has gaps, or with ``per="row"`` where its rows are not in one piece.
        per: ``"tensor"`` or ``"row"``. The rows of a vector would be single numbers, so a vector is one
            unit in either case.
        rescale: whether each unit gets its norm back. Without it ``p`` is the result.
        skip_single: leave units of one element alone. A number has no direction across itself, so
            otherwise they become zero.
        tau: as above; never less than the square of half a unit in the last place of the dtype, to
            which a multiple of ``w`` is rounded (1.5e-5 in bfloat16, 2.4e-7 in float16).

    Returns:
        For each unit, in order, whether it was parallel and got zeros: a one-dimensional bool tensor
        on the device of the gradients. Nothing is read back from the device.

    Raises:
        TypeError: an argument is not a dense tensor of a floating-point dtype, or the dtypes differ.
        ValueError: numbers or shapes of tensors differ, they are on several devices, a gradient is
            given twice, ``per`` is neither ``"tensor"`` nor ``"row"``, or ``tau`` is not in [0, 1).
        RuntimeError: a gradient is an expanded tensor, whose elements share memory.

    The dot products have the precision of float64 in every dtype, and the last step rounds once. With
    an angle of sine s between g and w, the norm is restored to about 1e-16 / s^2 (which shows in float64
    only). Numbers of float64 whose squares leave its range, beyond about 1e154 or below 1e-162, count as
    infinite and as zero; in float16 a large element of ``p`` may pass 65504 by the rescaling, and is
    then infinite. Deterministic:
    the same bits on the same engine, whatever the number of threads. Not differentiable. Tensors of
    FSDP2 and tensor parallelism (DTensor) are projected as the whole tensors they stand for, by plain
    torch operators; flat shards of a parameter (FSDP1, ZeRO) are not known as such and must not be
    given.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.

    Example:
        >>> import torch, fusee
        >>> w, g = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> fusee.optim.perp_grad_(w, g)
        tensor([False])
        >>> g
        tensor([0., 5.])
    """
    _check_options(per, tau)
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    grads = [grads] if isinstance(grads, Tensor) else list(grads)
    if len(weights) != len(grads):
        raise ValueError(f"weights must be as many as grads, got {len(weights)} and {len(grads)}")
    if has_twice(grads):
        raise ValueError("grads must not hold the same tensor twice")
    if not grads:
        return torch.zeros(0, dtype=torch.bool)
    _check_pairs(weights, grads)
    args = (per == "row", rescale, skip_single, float(tau))
    if torch.compiler.is_compiling():
        # Detached rather than under no_grad, which a saved program cannot hold.
        weights = [weight.detach() for weight in weights]
        grads = [grad.detach() for grad in grads]
        return torch.ops.fusee.perp_grad_(_real(weights), _real(grads), *args)
    with torch.no_grad():
        if any(map(is_traceable_wrapper_subclass, grads)):
            flags = [
                _whole(_reference_pair(w, g, *args)).reshape(-1)
                for w, g in zip(weights, grads, strict=True)
            ]
            return torch.cat(flags)
        degenerate: Tensor = torch.ops.fusee.perp_grad_(_real(weights), _real(grads), *args)
        increment_version(grads)
        return degenerate


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class PerpGrad(OptimizerWrapper):
    r"""Wraps an optimizer so that it sees gradients without their component along the weights.

    Before each step of the base optimizer, every gradient goes through :func:`fusee.optim.perp_grad_`:

    .. math:: g \leftarrow \frac{\|g\|}{\|p\|}\, p, \qquad p = g - \frac{\langle w, g\rangle}{\langle w,
              w\rangle}\, w

    The removed direction scales the weights, and with them the logits of a homogeneous network, without
    changing a prediction. Weight decay of the base optimizer acts as ever, whether it is decoupled or
    added to the gradient.

    The wrapper keeps nothing of its own: ``param_groups``, ``state`` and ``defaults`` are those of the
    base optimizer, schedulers may be attached to either, and ``state_dict`` is that of the base, so that
    checkpoints can be exchanged. Every other attribute that the wrapper lacks is looked up in the base.

    Args:
        base_optimizer: an instance of any :class:`torch.optim.Optimizer`. A parameter group that holds
            ``"perp_grad": False`` is left alone.
        rescale: whether gradients keep their norms.
        per: ``"tensor"`` or ``"row"``, see :func:`fusee.optim.perp_grad_`.
        project: ``"grad"``, or ``"update"``: the base takes its step, and the change that it made to the
            weights is projected instead. That also removes what momentum and preconditioning bring
            along the weights, at the price of a copy of the weights and four more passes over them.
            Decoupled weight decay is kept: of a torch optimizer that has it, and of a group that holds
            ``"decoupled_weight_decay": True`` (a decay by ``1 - lr * weight_decay`` is assumed).
        params: if given, only parameters for which it returns True are projected, for example
            ``lambda p: p.ndim > 1``.
        skip_single: leave parameters (rows) of one element alone, see :func:`fusee.optim.perp_grad_`.
        tau: when a gradient counts as parallel to the weights, see :func:`fusee.optim.perp_grad_`.

    Parameters without a gradient are skipped, and one that is used in several places is projected once.
    In ``step(closure)`` the gradients are projected after every call of the closure. (A line search, as
    of
    LBFGS, then compares losses along a direction that is not quite that of descent.) With
    ``torch.amp.GradScaler`` use the wrapper as the optimizer; it unscales first, and skips the step
    where
    it finds infinities, which the projection would leave non-finite in any case. When gradients are
    clipped by their global norm, the order does not matter with ``rescale=True``.

    Raises:
        TypeError: ``base_optimizer`` is not an optimizer instance, or in ``step`` a gradient is sparse.
        ValueError: ``per``, ``project`` or ``tau`` is none of the values above.

    Deterministic as :func:`fusee.optim.perp_grad_`; no host sync, so a step can be captured in a CUDA
    graph whenever the base's can.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = fusee.optim.PerpGrad(torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> model(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_degenerate
        0
    """

    _own = ("rescale", "per", "project", "params", "skip_single", "tau")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        *,
        rescale: bool = True,
        per: str = "tensor",
        project: str = "grad",
        params: Callable[[Tensor], bool] | None = None,
        skip_single: bool = True,
        tau: float = TAU,
    ) -> None:
        super().__init__(base_optimizer)
        _check_options(per, tau)
        if project not in ("grad", "update"):
            raise ValueError(f"project must be 'grad' or 'update', got {project!r}")
        self.rescale = rescale
        self.per = per
        self.project = project
        self.params = params
        self.skip_single = skip_single
        self.tau = tau

    def _prepare(self) -> None:
        super()._prepare()
        self._degenerate: list[Tensor] = []

    def __repr__(self) -> str:
        options = f"rescale={self.rescale}, per={self.per!r}, project={self.project!r}"
        base = repr(self.base_optimizer).replace("\n", "\n  ")
        return f"{type(self).__name__}({options},\n  {base}\n)"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the ``state_dict`` of a wrapper or of a bare base optimizer into the base."""
        self.base_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; ``"perp_grad": False`` in it switches projection off."""
        self.base_optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Projects, and takes a step of the base optimizer; returns what that returns."""
        if self.project == "update":
            return self._step_and_project(closure)
        if closure is None:
            self._project_gradients()
            return self.base_optimizer.step()

        def projecting_closure() -> Any:
            loss = closure()
            self._project_gradients()
            return loss

        return self.base_optimizer.step(projecting_closure)

    @property
    def last_degenerate(self) -> int:
        """How many units were parallel to their weights in the last projection.

        They got zeros. Reading this waits for the device; nothing else does.
        """
        return sum(int(flags.sum()) for flags in self._degenerate)

    def _selected(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters to project, each once, with their groups."""
        found: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        for group in self.param_groups:
            if group.get("perp_grad", True):
                for param in group["params"]:
                    if self.params is None or self.params(param):
                        found.setdefault(id(param), (param, group))
        return list(found.values())

    def _project_gradients(self) -> None:
        pairs = [(p, p.grad) for p, _ in self._selected() if p.grad is not None]
        for param, grad in pairs:
            if grad.layout != torch.strided:
                raise TypeError(
                    f"gradients must be dense, got layout {grad.layout} for a parameter of shape "
                    f'{tuple(param.shape)}; put it in a group with "perp_grad": False'
                )
        self._project(pairs)

    def _project(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        by_device: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for weight, grad in pairs:
            # A sharded tensor takes another path than the plain ones beside it.
            key = (grad.device, type(grad))
            weights, grads = by_device.setdefault(key, ([], []))
            weights.append(weight)
            grads.append(grad)
        self._degenerate = [
            perp_grad_(
                weights,
                grads,
                per=self.per,
                rescale=self.rescale,
                skip_single=self.skip_single,
                tau=self.tau,
            )
            for weights, grads in by_device.values()
        ]

    def _step_and_project(self, closure: Callable[[], Any] | None) -> Any:
        selected = [
            (param, self._kept_by_decay(group))
            for param, group in self._selected()
            if (closure is not None or param.grad is not None)
            and not (self.skip_single and param.numel() == 1)
        ]
        params = [param.detach() for param, _ in selected]
        start = [param.clone() for param in params]
        loss = self.base_optimizer.step() if closure is None else self.base_optimizer.step(closure)
        if not params:
            return loss
        with torch.no_grad():
            for weight, (_, kept) in zip(start, selected, strict=True):
                if kept is not None:
                    weight.mul_(kept)
            updates = list(torch._foreach_sub(params, start))
            self._project(zip(start, updates, strict=True))
            torch._foreach_copy_(params, start)
            torch._foreach_add_(params, updates)
        return loss

    def _kept_by_decay(self, group: dict[str, Any]) -> Any:
        """By what decoupled weight decay multiplies the weights in a step; None where there is none."""
        always = tuple(
            getattr(torch.optim, name)
            for name in ("AdamW", "Adafactor", "Muon")
            if hasattr(torch.optim, name)
        )
        decoupled = group.get("decoupled_weight_decay", isinstance(self.base_optimizer, always))
        decay = group.get("weight_decay", 0)
        return 1 - group["lr"] * decay if decoupled and decay != 0 else None
