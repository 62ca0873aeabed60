"""SGD and AdamW with the proximal operator of the group envelope after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusee._checks import accumulate_dtype
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import Dims, Weights
from fusee.prox.prox_host import HostPlan, ProxHost
from fusee.prox.prox_options import OPTIONS, Number, has_operator, own_options_first
from fusee.prox.sharded import is_sharded


def without_hooks(step: Any) -> Any:
    """The step of a torch optimiser as it is written: once the class has been used, its step runs the
    hooks of the instance, which ours does already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


class _ProxOptimizer(ProxHost):
    """A torch optimiser, named after this class among the bases, with the operator after its step."""

    _options: dict[str, Any] = {}  # noqa: RUF012  # set before the base's constructor makes groups
    _step_of_base: Any

    def __init__(self, params: ParamsT, options: dict[str, Any], **of_base: Any) -> None:
        self._tables = []
        self._options = {n: options[n] for n in (*OPTIONS, "groups") if n in options}
        super().__init__(params, **of_base)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, which may have options of its own; the others are those of the
        constructor, ``groups`` too."""
        for name, value in self._options.items():
            self.defaults.setdefault(name, value)
        if isinstance(param_group, dict):  # otherwise the base refuses it
            param_group = dict(param_group)  # it may be used again
            own_options_first(param_group)
        super().add_param_group(param_group)
        self._adopt_added()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step, and applies the operator; returns what the closure does."""
        prepared = self._prepare_step()
        loss = self._step_of_base(closure)
        self._finish_step(prepared)
        return loss


class ProxSGD(_ProxOptimizer, torch.optim.SGD):
    r"""SGD that makes groups of weights exactly zero.

    After the step of :class:`torch.optim.SGD`, with momentum and all, the proximal operator of the group
    envelope acts on the weights, in one call for all of them:

    .. math:: w \leftarrow \operatorname*{argmin}_x \tfrac12 \lVert x - v \rVert^2 + \eta \lambda S_k(x)

    where v is what SGD's step gave and η its learning rate; see :func:`fusee.prox_group_envelope`. This
    is the proximal gradient method for the loss plus :math:`\lambda S_k`.

    The groups that share one k are a scope: those of one parameter, of all parameters of a parameter
    group, or of a table. One step may leave more than k groups: k of them are free of the threshold, and
    the others die as far as the penalty is stronger than their gradients. With mini-batches the debiased
    form reaches k groups, and leaves them unbiased, where the plain one must bias all weights heavily.
    :meth:`fix_support`, or a :class:`fusee.optim.SparsityController`, makes the number exact.

    Args:
        params: as of any torch optimiser. Every option below may also be in a parameter group.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused: as of
            :class:`torch.optim.SGD`.
        k: how many groups of a scope are free, not necessarily an integer. A number or a tensor of one
            element, or in a parameter group of one for each of its scopes.
        density: instead of k, its share of the groups of the scope, in (0, 1]; rounded to the nearest
            integer, at least 1. A parameter group with neither has no operator.
        lam: the λ of the objective, not negative; a number or a tensor, as k. Needed with k or density.
        factor: if given, the factor of the penalty instead of ``lr * lam``.
        dim: the dimension or dimensions that number the groups of a parameter: 0 for filters.
        scope: ``"tensor"``, or ``"group"``: all parameters of the parameter group share k.
        groups: a :class:`fusee.GroupTable` of the parameters of the parameter group, which are then one
            scope.
        weights: of the groups: None, ``"size"``, ``"inverse_size"``, or where the parameter group is one
            scope, a tensor.
        debiased: whether the penalty is the debiased one.

    Raises:
        TypeError: an option is of another type than described, or a parameter with an operator is not a
            dense floating-point tensor.
        ValueError: ``k`` and ``density`` are both given, or one without ``lam``; ``k`` is NaN; ``lam``
            or ``factor`` is negative; ``density`` is not in (0, 1]; ``scope`` is unknown; the parameters
            do not have the shapes of ``groups``, or are on several devices where they are one scope; a
            parameter is given twice, or two share memory; ``weights`` or ``support`` does not fit the
            groups; a parameter group is one of another optimiser, without its table.
        IndexError: ``dim`` is out of range.

    The numbers among the options may be changed in ``param_groups`` at any time, by learning rate
    schedulers too. With k, lam and lr as tensors and ``fused=True`` a step reads nothing back,
    and can be captured. ``differentiable`` is not offered.

    A scope is left alone in a step in which none of its parameters has a gradient, as torch leaves such
    a parameter alone; so are frozen ones. Where one has, the whole scope takes part.

    The state dict is that of SGD, with the options in its parameter groups. ``groups`` is not in it, nor
    in ``param_groups``: like the parameters, it is given when the optimiser is made again. It resumes
    exactly, and the state dict of a plain SGD can be loaded. Before ``torch.distributed.checkpoint``
    loads a state into an optimiser that has none, it takes a step with a learning rate of zero: where
    there is a ``factor``, load the model after the optimiser.

    DTensors, of FSDP2 and tensor parallelism, count as the whole tensors they stand for; one number a
    group travels.

    Deterministic as :func:`fusee.prox_group_envelope`.

    Attributes:
        kept: how many groups the last step left in each scope, tensors on the device.

    Source: stochastic proximal gradient descent, see Yun, Lozano and Yang, "Adaptive Proximal Gradient
    Methods for Structured Neural Networks", NeurIPS 2021; the operator as in
    :func:`fusee.prox_group_envelope`.

    Example:
        >>> import torch, fusee
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = fusee.optim.ProxSGD([layer.weight], lr=0.1, k=2, lam=20.0, debiased=True)
        >>> layer(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.kept
        [tensor(2)]
    """

    _step_of_base = without_hooks(torch.optim.SGD.step)

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        k: Number | None = None,
        density: float | None = None,
        lam: Number | None = None,
        factor: Number | None = None,
        dim: Dims = 0,
        scope: str = "tensor",
        groups: GroupTable | None = None,
        weights: Weights = None,
        debiased: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            locals(),
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )


class ProxAdamW(_ProxOptimizer, torch.optim.AdamW):
    r"""AdamW that makes groups of weights exactly zero, with the operator in its own metric.

    After the step of :class:`torch.optim.AdamW`, which gives v, in one call for all weights:

    .. math::
        w \leftarrow \operatorname*{argmin}_x \tfrac12 \sum_i h_i (x_i - v_i)^2 + \eta \lambda S_k(x),
        \qquad h = \sqrt{\hat v} + \epsilon

    with Adam's denominator h (of the largest :math:`\hat v` so far with ``amsgrad``), as the step itself
    is one of gradient descent in that metric. The solution is exact, also where h differs within groups.

    h is as small as the gradients, so the same λ acts more strongly than with :class:`ProxSGD`. In the
    debiased form the operator is the projection onto k groups as soon as one element of the scope has
    :math:`\eta \lambda d_j \ge h_i`, and one whose gradients were always zero has :math:`h = \epsilon`.
    With AdamW, :class:`fusee.optim.LatentProx` is the better host of that form.

    Args:
        params: as of any torch optimiser. Every option below may also be in a parameter group.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: as of
            :class:`torch.optim.AdamW`.
        k, density, lam, factor, dim, scope, groups, weights, debiased: as of :class:`ProxSGD`.

    All else is as :class:`ProxSGD` says: errors, parameters without gradients, state dicts, schedulers.
    A DTensor raises NotImplementedError, as the metric would have to travel.

    Source: Yun, Lozano and Yang, "Adaptive Proximal Gradient Methods for Structured Neural Networks",
    NeurIPS 2021; the operator as in :func:`fusee.prox_group_envelope`.

    Example:
        >>> import torch, fusee
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = fusee.optim.ProxAdamW([layer.weight], lr=0.01, k=2, lam=1.0)
        >>> layer(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.report()[0].requested
        2.0
    """

    _step_of_base = without_hooks(torch.optim.AdamW.step)

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        k: Number | None = None,
        density: float | None = None,
        lam: Number | None = None,
        factor: Number | None = None,
        dim: Dims = 0,
        scope: str = "tensor",
        groups: GroupTable | None = None,
        weights: Weights = None,
        debiased: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            locals(),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )

    def _check_group(self, group: dict[str, Any], table: GroupTable | None) -> None:
        super()._check_group(group, table)
        if has_operator(group) and any(map(is_sharded, group["params"])):
            raise NotImplementedError(
                "ProxAdamW does not take DTensors: its metric would have to travel. "
                "fusee.optim.LatentProx around AdamW takes them"
            )

    def _metric(self, plan: HostPlan) -> list[Tensor]:
        return [
            self._denominator(tensor, self.param_groups[h.group])
            for h in plan.hosted
            for tensor in h.scope.tensors
        ]

    def _denominator(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """As of the step that was just taken; in float32 for half types, whose range eps may leave."""
        state, beta2 = self.state.get(param), group["betas"][1]
        dtype = accumulate_dtype(param.dtype)
        if not state:
            return torch.full_like(param, group["eps"], dtype=dtype, requires_grad=False)
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].to(dtype)
        # A fused step that found infinities leaves the number of steps at zero.
        correction = 1 - beta2 ** state["step"].double().clamp(min=1)
        return square.sqrt().div_(correction.sqrt()).add_(group["eps"])
