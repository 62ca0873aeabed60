"""Latent weights: any optimiser steps dense weights, and the model has their proximal point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusee._wrapper import OptimizerWrapper
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import Dims, Weights
from fusee.prox.prox_host import Hosted, HostPlan, ProxHost
from fusee.prox.prox_options import OPTIONS, Number, has_operator, own_options_first
from fusee.prox.sharded import local_tensor


class LatentProx(OptimizerWrapper, ProxHost):
    r"""Wraps an optimiser so that it steps dense latent weights, of which the model has the proximal
    point.

    .. math::
        z \leftarrow \text{step of the base}(z;\ \nabla f(w)), \qquad
        w \leftarrow \operatorname*{argmin}_x \tfrac12 \lVert x - z \rVert^2 + \gamma \lambda S_k(x)

    The base takes its step on the latents z, with the gradients taken at the weights w; γ is the sum of
    the learning rates so far. This is dual averaging in its simplest form. As the penalty of a step
    grows with γ, groups that are not needed die for good, which with the small penalty of each single
    step of :class:`fusee.optim.ProxSGD` they may not. The latents of zero groups go on being trained
    with what gradient there is at zero; before a ReLU there is none, where scale and shift are in the
    group. In the debiased form, w is the latents with their k largest groups alone once
    :math:`\gamma \lambda \max_j d_j \ge 1`.

    ``param_groups``, ``state`` and ``defaults`` are those of the base optimiser, schedulers may be
    attached to either, and every other attribute that the wrapper lacks is looked up in the base.

    Args:
        base_optimizer: an instance of any :class:`torch.optim.Optimizer`. Its parameter groups may hold
            the options below, which go before those here. Those with neither ``k`` nor ``density`` have
            no latents.
        k, density, lam, dim, scope, groups, weights, debiased: as of :class:`fusee.optim.ProxSGD`.
        factor: if given, the factor of the penalty instead of :math:`\gamma \lambda`: of all steps
            together, not of one. For schedules that lead from dense weights to the projection.

    A parameter group has ``"gamma"`` beside the options: a number, or where the learning rate is a
    tensor, one of float64. It is in the state dict, and may be set. It grows in every step, also where
    no parameter of the group has a gradient, and during the warm-up of a
    :class:`fusee.optim.SparsityController`.

    Parameters whose scope has no gradient in a step are left alone as torch leaves them, weights and
    latents. In ``step(closure)`` the closure is always called with the weights in place, and a scope
    takes part unless it is frozen; a base that does not call it has not stepped the latents. These begin
    as the weights are in the first step, and need as much memory. They are not the weights to evaluate,
    save or deploy. Weights that are loaded into the model after the first step do not last: the next
    step computes them from the latents.

    :meth:`fix_support`, or a :class:`fusee.optim.SparsityController`, ends all this: the latents are
    dropped, and the base steps the weights, of which the zero groups stay zero.

    Attributes:
        latents: a dict from each parameter that has them to its latent weights.
        kept: how many groups the last step left in each scope, tensors on the device.

    Raises:
        TypeError: ``base_optimizer`` is not an optimiser instance, or has the operator itself; and as
            :class:`fusee.optim.ProxSGD`.
        ValueError, IndexError: as :class:`fusee.optim.ProxSGD`.

    The state dict is that of the base with the latents in the state of their parameters, and resumes
    exactly; that of a bare base can be loaded too. ``torch.distributed.checkpoint`` can save and load
    it, but not with ``flatten_optimizer_state_dict``, which drops the latents. With
    ``torch.amp.GradScaler`` use the wrapper as the optimiser. Deterministic as
    :func:`fusee.prox_group_envelope`. Nothing is read back from the device.

    Source: dual averaging is that of Nesterov, "Primal-dual subgradient methods for convex problems",
    2009, and Xiao, "Dual Averaging Methods for Regularized Stochastic Learning and Online Optimization",
    2010; with the latents stepped by any optimiser, that of Jin et al., "PARQ: Piecewise-Affine
    Regularized Quantization", arXiv:2503.15748.

    Example:
        >>> import torch, fusee
        >>> layer = torch.nn.Linear(4, 3)
        >>> base = torch.optim.AdamW([layer.weight], lr=0.01)
        >>> optimizer = fusee.optim.LatentProx(base, k=2, lam=100.0, debiased=True)
        >>> layer(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.kept
        [tensor(2)]
        >>> (optimizer.latents[layer.weight] != 0).all()
        tensor(True)
    """

    _own = ("latents", "_moved", "_options", "_tables")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
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
    ) -> None:
        if isinstance(base_optimizer, ProxHost):
            raise TypeError(
                "base_optimizer must be an optimiser without the operator, got a "
                f"{type(base_optimizer).__name__}"
            )
        given = locals()
        super().__init__(base_optimizer)
        self.latents: dict[Tensor, Tensor] = {}
        self._moved: set[tuple[int, int]] = set()
        self._options = {name: given[name] for name in (*OPTIONS, "groups") if name in given}
        self._tables = []
        self._adopt()

    def _with_options(self, group: dict[str, Any]) -> dict[str, Any]:
        own = dict(group)
        own_options_first(own)
        return super()._with_options({**self._options, "gamma": 0.0, **own})

    def __repr__(self) -> str:
        base = repr(self.base_optimizer).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {base}\n)"

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's ``state_dict``, in which the state of each parameter that has latent
        weights holds them as ``"latent"``."""
        saved = self.base_optimizer.state_dict()
        state = dict(saved["state"])
        for of_group, group in zip(saved["param_groups"], self.param_groups, strict=True):
            for key, param in zip(of_group["params"], group["params"], strict=True):
                # The others have one too, as torch.distributed.checkpoint wants all or none to.
                latent = {"latent": self.latents[param]} if param in self.latents else {}
                state[key] = {**state.get(key, {}), **latent}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the ``state_dict`` of a wrapper, or that of a bare base optimiser; then the latents
        begin as the weights are in the next step."""
        self._adopt()
        before = self.param_groups
        state = dict(state_dict["state"])
        for of_group in state_dict["param_groups"]:
            for key in of_group["params"]:
                held = {n: v for n, v in state.pop(key, {}).items() if n != "latent"}
                if held:  # there are optimisers that take an empty state for one
                    state[key] = held
        self.base_optimizer.load_state_dict({**state_dict, "state": state})
        self._keep_options(before)
        for group in self.param_groups:
            group.setdefault("gamma", 0.0)
        self.latents = {}
        for of_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, param in zip(of_group["params"], group["params"], strict=True):
                held = state_dict["state"].get(key, {})
                if "latent" in held:
                    self.latents[param] = held["latent"].to(param, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have options of its own, to the base optimiser."""
        self.base_optimizer.add_param_group(param_group)
        self._adopt_added()

    def _scale_of_lam(self, group: dict[str, Any]) -> Number:
        gamma: Number = group["gamma"]
        return gamma

    def _next_scale_of_lam(self, group: dict[str, Any]) -> Number:
        gamma, lr = group["gamma"], group["lr"]
        if isinstance(lr, Tensor) and not isinstance(gamma, Tensor):
            gamma = torch.full((), gamma, dtype=torch.float64, device=lr.device)
        grown: Number = gamma + lr
        return grown

    def _grow(self) -> None:
        """Adds the learning rates to their sums."""
        for group in self.param_groups:
            if not has_operator(group) or group["support"] is not None:
                continue
            if isinstance(group["gamma"], Tensor):
                group["gamma"] += group["lr"]  # what a captured step reads stays where it is
            else:
                group["gamma"] = self._next_scale_of_lam(group)

    def _takes_part(self, hosted: Hosted) -> bool:
        return (hosted.group, hosted.number) in self._moved

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the base optimiser on the latents, and computes the weights from them; returns
        what the base does. Where that raises, γ has not grown, and the model has the weights of the
        latents as they were."""
        prepared = self._prepare_step()
        moved = [h for plan, _, _ in prepared for h in plan.hosted if self._moves(h, closure)]
        self._moved.clear()
        self._moved.update((h.group, h.number) for h in moved)
        weights = [tensor.detach() for h in moved for tensor in h.scope.tensors]
        latents = [self._latent(tensor) for h in moved for tensor in h.scope.tensors]
        loss, stepped = self._step_of_base(closure, prepared, weights, latents)
        if stepped:
            _copy(latents, weights)
        else:
            self._moved.clear()
        self._finish_step(prepared)
        with torch.no_grad():
            self._grow()
        return loss

    def _step_of_base(
        self,
        closure: Callable[[], Any] | None,
        prepared: list[tuple[HostPlan, Tensor, Tensor]],
        weights: list[Tensor],
        latents: list[Tensor],
    ) -> tuple[Any, bool]:
        """Also returns whether it was one of the latents, which the model then has. A base that does not
        call the closure has not stepped them."""
        dense = closure is None  # whether the model has the latents

        def at_weights() -> Any:
            nonlocal dense
            assert closure is not None
            if dense:  # of a base that calls it again, at other latents
                _copy(latents, weights)
                self._finish_step(prepared)
                dense = False
            loss = closure()
            _copy(weights, latents)
            dense = True
            return loss

        try:
            if closure is None:
                _copy(weights, latents)
                return self.base_optimizer.step(), True
            loss = self.base_optimizer.step(at_weights)
        except BaseException:
            if dense:
                _copy(weights, latents)
                self._finish_step(self._prepare_step(ahead=False))
            raise
        return loss, dense

    @staticmethod
    def _moves(hosted: Hosted, closure: Any) -> bool:
        tensors = hosted.scope.tensors
        if closure is None:
            return any(tensor.grad is not None for tensor in tensors)
        return any(tensor.requires_grad for tensor in tensors)

    def _latent(self, param: Tensor) -> Tensor:
        if param not in self.latents:
            self.latents[param] = param.detach().clone()
        return self.latents[param]

    def fix_support(self) -> None:
        """As of :class:`fusee.optim.ProxSGD`; the latents are dropped, the base steps the weights."""
        super().fix_support()
        fixed = {
            param
            for group in self.param_groups
            if group["support"] is not None
            for param in group["params"]
        }
        self.latents = {p: latent for p, latent in self.latents.items() if p not in fixed}


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        with torch.no_grad():
            torch._foreach_copy_([local_tensor(t) for t in to], [local_tensor(t) for t in source])
