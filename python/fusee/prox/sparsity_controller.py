"""The course of a training run with groups: dense at first, then ever fewer, at last exactly k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee.prox.prox_host import ProxHost, ScopeReport
from fusee.prox.prox_options import Part, check_numbers, requested_groups
from fusee.prox.scopes import scope_groups

K_CURVES = {
    "cubic": lambda s: (1 - s) ** 3,
    "linear": lambda s: 1 - s,
    "constant": lambda s: 0.0,
}
"""What share of the way from k to all groups is left after the share s of the ramp."""


class SparsityController:
    r"""Leads an optimiser from dense weights to exactly k groups in each scope, in four phases.

    1. Warm-up: no penalty.
    2. Ramp: k falls from m, all groups of the scope, to what the optimiser was made with; after the
       share s of the ramp it is

       .. math:: k + (m - k) (1 - s)^3

       or falls linearly; it is no integer on the way. λ may rise meanwhile.
    3. Hold: k and λ have their last values, so that the choice of groups settles.
    4. Fixed: the k largest groups are kept as they are, the others become zero and stay so, and what is
       kept is trained on without a penalty; see :meth:`fusee.optim.ProxSGD.fix_support`.

    With ``interval``, λ is steered besides: each scope has a correction of its own, which is multiplied
    by ``gain`` while more groups than the present k are left, and divided by it while not.

    ``step`` is called after each step of the optimiser, as that of a learning rate scheduler. It sets
    ``k`` and ``lam`` (or ``factor``, where a parameter group has one) in the parameter groups, as
    tensors of one number for each scope, which it writes in place; ``density`` becomes k. It leads to
    the values that it finds when it is made. One that is made in the middle of the ramp of another takes
    those of the ramp for them: to resume, make it with the optimiser, and load both state dicts.

    Args:
        optimizer: a :class:`fusee.optim.ProxSGD`, :class:`fusee.optim.ProxAdamW` or
            :class:`fusee.optim.LatentProx`. Its present parameter groups that have an operator are led.
        warmup, ramp: how many steps the first two phases take.
        hold: how many steps the third takes. With None, until :meth:`finish` is called.
        k_curve: ``"cubic"``, ``"linear"``, or ``"constant"``: k is what it is.
        lam_curve: how λ gets from ``lam_start`` times its value to its value during the ramp,
            ``"linear"`` or ``"geometric"``.
        lam_start: that share. 1 leaves λ as it is.
        interval: every how many steps λ is corrected; None for never.
        gain: by what, more than 1.
        bounds: between what the correction stays.

    Attributes:
        last_step: how many steps were taken.

    Raises:
        TypeError: ``optimizer`` is none of those.
        ValueError: no parameter group has an operator, a curve is unknown, or a number is out of range.

    The report tells for each scope how many groups were wanted and how many there are. Where fewer than
    k groups are not zero when the fourth phase begins, those are what is kept.

    All this is made for the debiased penalty. The plain one needs a large λ to get near k groups with
    the gradients of mini-batches, and biases all weights until the support is fixed: leave ``interval``
    out there, as corrections would raise λ until it spoils the weights.

    Nothing is read back from the device. The state dict holds the count of steps, the targets and the
    corrections; with those of the model and the optimiser a run resumes exactly.

    Example:
        >>> import torch, fusee
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ... )
        >>> table = fusee.GroupTable.hidden_units(
        ...     model[0].weight, model[2].weight, rows=[model[0].bias]
        ... )
        >>> units = {"params": [model[0].weight, model[0].bias, model[2].weight], "groups": table}
        >>> units.update(k=4, lam=1.0, debiased=True)
        >>> optimizer = fusee.optim.ProxSGD([units, {"params": [model[2].bias]}], lr=0.1, momentum=0.9)
        >>> control = fusee.optim.SparsityController(optimizer, warmup=20, ramp=60, hold=20)
        >>> for _ in range(150):
        ...     x = torch.randn(32, 5)
        ...     optimizer.zero_grad()
        ...     (model(x) - x[:, :1] * x[:, 1:2]).square().mean().backward()
        ...     optimizer.step()
        ...     control.step()
        >>> [(row.groups, row.requested, row.kept) for row in control.report()]
        [(16, 4.0, 4)]
    """

    def __init__(
        self,
        optimizer: ProxHost,
        *,
        warmup: int = 0,
        ramp: int = 0,
        hold: int | None = None,
        k_curve: str = "cubic",
        lam_curve: str = "geometric",
        lam_start: float = 1.0,
        interval: int | None = None,
        gain: float = 1.5,
        bounds: tuple[float, float] = (0.01, 100.0),
    ) -> None:
        if not isinstance(optimizer, ProxHost):
            raise TypeError(
                "optimizer must be a ProxSGD, a ProxAdamW or a LatentProx, got "
                f"{type(optimizer).__name__}"
            )
        for name, steps, least in (
            ("warmup", warmup, 0),
            ("ramp", ramp, 0),
            ("hold", hold, 0),
            ("interval", interval, 1),
        ):
            if steps is not None and not steps >= least:
                raise ValueError(f"{name} must not be less than {least}, got {steps}")
        if k_curve not in K_CURVES:
            raise ValueError(f"k_curve must be 'cubic', 'linear' or 'constant', got {k_curve!r}")
        if lam_curve not in ("linear", "geometric"):
            raise ValueError(f"lam_curve must be 'linear' or 'geometric', got {lam_curve!r}")
        if not (lam_start > 0 or (lam_start == 0 and lam_curve == "linear")):
            raise ValueError(
                f"lam_start must be positive, or 0 where lam_curve is 'linear', got {lam_start}"
            )
        if not gain > 1:
            raise ValueError(f"gain must be more than 1, got {gain}")
        if not 0 < bounds[0] <= 1 <= bounds[1]:
            raise ValueError(f"bounds must be positive and around 1, got {bounds}")
        self.optimizer = optimizer
        self.warmup, self.ramp, self.hold = warmup, ramp, hold
        self.k_curve, self.lam_curve, self.lam_start = k_curve, lam_curve, lam_start
        self.interval, self.gain, self.bounds = interval, gain, bounds
        self.last_step = 0
        self._targets = self._read_targets()
        if not self._targets:
            raise ValueError("optimizer must have a parameter group with k or density")
        self._set()

    def _read_targets(self) -> dict[int, dict[str, Tensor]]:
        """What the parameter groups hold now, one number for each scope."""
        targets = {}
        self.optimizer._current_plans()
        for number, group in enumerate(self.optimizer.param_groups):
            scopes = [h.scope for h in self.optimizer._scopes if h.group == number]
            if not scopes:
                continue
            device = scopes[0].tensors[0].device
            counts = [scope_groups(scope) for scope in scopes]
            groups = torch.tensor(counts, dtype=torch.float64, device=device)
            part = Part(number, len(scopes), None, groups)
            name = self._penalty(group)
            targets[number] = {
                "groups": groups,
                "k": requested_groups(group, part, groups).clone(),
                "penalty": check_numbers(name, group[name], part, groups, positive=True).clone(),
                "correction": torch.ones_like(groups),
            }
        return targets

    @staticmethod
    def _penalty(group: dict[str, Any]) -> str:
        return "lam" if group["factor"] is None else "factor"

    @property
    def finished(self) -> bool:
        """Whether the support is fixed."""
        groups = self.optimizer.param_groups
        return all(groups[number]["support"] is not None for number in self._targets)

    def step(self) -> None:
        """Sets the options for the next step of the optimiser; in time, fixes the support."""
        self.last_step += 1
        if self.finished:
            return
        since = self.last_step - self.warmup
        if self.interval is not None and since > 0 and since % self.interval == 0:
            self._correct()
        if self.hold is not None and since >= self.ramp + self.hold:
            self.finish()
        else:
            self._set()

    def finish(self) -> None:
        """Begins the fourth phase now: exactly k groups in each scope, and these from now on."""
        for number, target in self._targets.items():
            self._write(number, target["k"], target["penalty"] * target["correction"])
        self.optimizer.fix_support()

    def report(self) -> list[ScopeReport]:
        """As of the optimiser, with the k that is wanted in the end; waits for the device."""
        wanted = {number: target["k"].tolist() for number, target in self._targets.items()}
        return [
            row._replace(requested=wanted[row.param_group].pop(0))
            for row in self.optimizer.report()
            if row.param_group in wanted
        ]

    def _present_k(self, target: dict[str, Tensor]) -> Tensor:
        left = 1.0 if self.last_step < self.warmup else K_CURVES[self.k_curve](self._share())
        return target["k"] + (target["groups"] - target["k"]).clamp(min=0) * left

    def _share(self) -> float:
        """Of the ramp that is over."""
        since = self.last_step - self.warmup
        return min(since / self.ramp, 1.0) if self.ramp else 1.0

    def _set(self) -> None:
        share, start = self._share(), self.lam_start
        if self.last_step < self.warmup:
            scale = 0.0
        elif self.lam_curve == "linear":
            scale = start + (1 - start) * share
        else:
            scale = start ** (1 - share)
        for number, target in self._targets.items():
            penalty = target["penalty"] * target["correction"] * scale
            self._write(number, self._present_k(target), penalty)

    def _write(self, number: int, k: Tensor, penalty: Tensor) -> None:
        group = self.optimizer.param_groups[number]
        group["density"] = None
        for name, value in (("k", k), (self._penalty(group), penalty)):
            old = group[name]
            if isinstance(old, Tensor) and old.shape == value.shape and old.is_floating_point():
                old.copy_(value)  # what a captured step reads stays where it is
            else:
                group[name] = value

    def _correct(self) -> None:
        kept = self.optimizer.kept
        scopes = self.optimizer._scopes
        for number, target in self._targets.items():
            counts = [c for c, h in zip(kept, scopes, strict=True) if h.group == number]
            group = self.optimizer.param_groups[number]
            device = target["k"].device
            count = torch.stack([c.to(device) for c in counts])
            part = Part(number, len(counts), None, target["groups"])
            over = count > requested_groups(group, part, target["groups"]).ceil()
            change = torch.where(over, self.gain, 1 / self.gain)
            target["correction"] = (target["correction"] * change).clamp(*self.bounds)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and targets and corrections of each parameter group."""
        targets = {
            number: {name: value.clone() for name, value in target.items()}
            for number, target in self._targets.items()
        }
        return {"last_step": self.last_step, "targets": targets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned, after the optimiser's was loaded."""
        if state_dict["targets"].keys() != self._targets.keys():
            raise ValueError(
                f"state_dict must be of the parameter groups {list(self._targets)}, got "
                f"{list(state_dict['targets'])}"
            )
        self.last_step = state_dict["last_step"]
        self._targets = {
            number: {
                name: value.to(self._targets[number][name], copy=True)
                for name, value in target.items()
            }
            for number, target in state_dict["targets"].items()
        }
