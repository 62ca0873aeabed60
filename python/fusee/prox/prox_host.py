"""What optimisers that host the proximal operator share: plans, fixed support, reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusee.prox.group_table import GroupTable
from fusee.prox.groups import check_dims, fold_groups
from fusee.prox.prox_options import (
    OF_TABLE,
    OPTIONS,
    Number,
    Part,
    check_apart,
    check_group,
    check_numbers,
    has_operator,
    requested_groups,
    scopes_of_group,
)
from fusee.prox.scope_plan import ScopePlan, scope_norms
from fusee.prox.scopes import Scope, groups_of_dims, scope_groups, scope_weights
from fusee.prox.sharded import is_sharded, local_part, local_tensor


class ScopeReport(NamedTuple):
    """How many groups of a scope were asked for, and how many are not zero."""

    param_group: int
    """The number of the parameter group."""
    params: tuple[str | int, ...]
    """Its tensors, by name if the optimiser was given names, otherwise by number in the group."""
    groups: int
    """How many groups the scope has."""
    requested: float
    """The present k."""
    kept: int
    """How many groups of the present weights are not zero; those of weight zero are not counted."""
    factor: float
    """The factor of the penalty in a step at the present options; zero where the support is fixed."""


class Hosted(NamedTuple):
    """A scope, and where it is among the parameter groups."""

    group: int
    number: int
    """Among the scopes of the parameter group."""
    params: tuple[int, ...]
    scope: Scope


class HostPlan:
    """All scopes on one device with the same form of the penalty: one call of the operator."""

    def __init__(self, hosted: Sequence[Hosted], scopes: Sequence[int], debiased: bool) -> None:
        self.hosted = list(hosted)
        self.debiased = debiased
        self.plan = ScopePlan([h.scope for h in hosted])
        self.device = self.plan.tensors[0].device
        self.like = torch.empty(0, device=self.device)
        self.counts: Tensor | None = None
        self.parts: list[Part] = []
        for group in dict.fromkeys(h.group for h in hosted):
            numbers = [h.number for h in hosted if h.group == group]
            counts = [c for h, c in zip(hosted, self.plan.groups, strict=True) if h.group == group]
            whole = len(numbers) == scopes[group]
            chosen = None if whole else torch.tensor(numbers, device=self.device)
            groups = torch.tensor(counts, dtype=torch.float64, device=self.device)
            self.parts.append(Part(group, scopes[group], chosen, groups))


def alive_groups(scope: Scope) -> Tensor:
    """Which groups of a scope have an element that is not zero."""
    if any(map(is_sharded, scope.tensors)):
        with torch.no_grad():
            return scope_norms(scope) != 0
    if scope.table is None:
        folded = [fold_groups(t.detach(), scope.dim).tensor for t in scope.tensors]
        return torch.cat([(f != 0).any(3).any(1).any(0) for f in folded])
    counts = torch.zeros(scope.table.groups + 1, dtype=torch.int64, device=scope.table.device)
    for tensor, ids in zip(scope.tensors, scope.table.ids, strict=True):
        counts.index_add_(0, ids.reshape(-1) + 1, (tensor.detach() != 0).long().reshape(-1))
    return counts[1:] > 0


def dead_elements(scope: Scope, support: Tensor) -> list[Tensor]:
    """Masks, for each tensor of a scope, of its elements outside the support, those of a DTensor of the
    elements of this process; they broadcast."""
    dead = ~support.to(scope.tensors[0].device)
    if scope.table is not None:
        dead = torch.cat([dead.new_zeros(1), dead])
        pairs = zip(scope.table.ids, scope.tensors, strict=True)
        return [dead[local_part(ids, tensor) + 1] for ids, tensor in pairs]
    parts = dead.split([groups_of_dims(t, scope.dim) for t in scope.tensors])
    masks = []
    for tensor, part in zip(scope.tensors, parts, strict=True):
        dims = check_dims(scope.dim, tensor.dim())
        along = part.reshape([n if d in dims else 1 for d, n in enumerate(tensor.shape)])
        masks.append(local_part(along, tensor))
    return masks


def _stamp(value: Any) -> Any:
    """Another one where it is another tensor, or was written to."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    return [_stamp(v) for v in value] if isinstance(value, list | tuple) else value


class ProxHost(torch.optim.Optimizer):
    """The base of the optimisers that apply the operator; see :class:`fusee.optim.ProxSGD`."""

    _tables: list[GroupTable | None]
    """Those of the parameter groups."""
    _plans: list[HostPlan] | None = None
    _scopes: Sequence[Hosted] = ()
    """All, in the order of the parameter groups."""
    _fixed: Sequence[tuple[Tensor, Tensor]] = ()
    _key: Any = None

    # --- options ---

    def _adopt(self) -> None:
        """Takes the options of parameter groups that are new, of all or of none."""
        begin = len(self._tables)
        if begin == len(self.param_groups):
            return
        groups = [self._with_options(group) for group in self.param_groups[begin:]]
        tables = [group.pop("groups", None) for group in groups]
        for group, table in zip(groups, tables, strict=True):
            if table is not None:
                group["scope"] = OF_TABLE
            self._check_group(group, table)
        check_apart(self.param_groups[:begin] + groups)
        self.param_groups[begin:] = groups
        self._tables += tables

    def _with_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """A copy, as the given one may be used again."""
        return {**OPTIONS, **group}

    def _check_group(self, group: dict[str, Any], table: GroupTable | None) -> None:
        check_group(group, table)

    def _adopt_added(self) -> None:
        """Takes the options of the parameter group just added, or refuses it."""
        try:
            self._adopt()
        except Exception:
            self.param_groups.pop()
            raise

    def _keep_options(self, before: Sequence[dict[str, Any]]) -> None:
        """Gives parameter groups that were loaded the options that a plain optimiser does not save."""
        for number, group in enumerate(self.param_groups):
            old = before[number] if number < len(before) else {}
            for name, default in OPTIONS.items():
                group.setdefault(name, old.get(name, default))
        self._plans = None

    def _scale_of_lam(self, group: dict[str, Any]) -> Number:
        """By what lam is multiplied to get the factor of the penalty."""
        return group["lr"]

    def _next_scale_of_lam(self, group: dict[str, Any]) -> Number:
        """The same of the step that begins."""
        return self._scale_of_lam(group)

    # --- plans ---

    def _present_key(self) -> list[Any]:
        return [
            (
                [id(param) for param in group["params"]],
                [param.device for param in group["params"]],
                has_operator(group),
                group["dim"],
                group["scope"],
                bool(group["debiased"]),
                _stamp(group["weights"]),
                _stamp(group["support"]),
            )
            for group in self.param_groups
        ]

    def _current_plans(self) -> list[HostPlan]:
        """The plans, made anew where parameters or options are no longer those of before."""
        if self._plans is not None and torch.compiler.is_compiling():
            return self._plans
        self._adopt()
        if self._plans is None or self._key != self._present_key():
            self._make_plans()
        assert self._plans is not None
        return self._plans

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _make_plans(self) -> None:
        self._key = self._present_key()
        by_call: dict[Any, list[Hosted]] = {}
        counts = [0] * len(self.param_groups)
        fixed: list[tuple[Tensor, Tensor]] = []
        self._scopes = self._hosted()
        for h in self._scopes:
            group = self.param_groups[h.group]
            counts[h.group] += 1
            if group["support"] is None:
                key = h.scope.tensors[0].device, bool(group["debiased"])
                by_call.setdefault(key, []).append(h)
            else:
                dead = dead_elements(h.scope, group["support"][h.number])
                fixed.extend(zip(h.scope.tensors, dead, strict=True))
        self._fixed = fixed
        self._plans = [HostPlan(h, counts, key[1]) for key, h in by_call.items()]

    def _hosted(self) -> list[Hosted]:
        found = []
        for number, group in enumerate(self.param_groups):
            if has_operator(group):
                check_group(group, self._tables[number])
                scopes = scopes_of_group(group, self._tables[number])
                whole = tuple(range(len(group["params"])))
                for i, scope in enumerate(scopes):
                    params = (i,) if len(scopes) > 1 else whole
                    found.append(Hosted(number, i, params, scope))
        check_apart(self.param_groups)
        return found

    # --- a step ---

    def _numbers(self, plan: HostPlan, *, ahead: bool) -> tuple[Tensor, Tensor]:
        """k and the factor of each scope of a plan; what is wrong raises."""
        ks, factors = [], []
        for part in plan.parts:
            group = self.param_groups[part.group]
            ks.append(requested_groups(group, part, plan.like))
            scale = self._next_scale_of_lam(group) if ahead else self._scale_of_lam(group)
            factors.append(self._factor_of(group, part, plan.like, scale))
        return torch.cat(ks), torch.cat(factors)

    def _factor_of(self, group: dict[str, Any], part: Part, like: Tensor, scale: Number) -> Tensor:
        if group["factor"] is not None:
            return check_numbers("factor", group["factor"], part, like, positive=True)
        lam = check_numbers("lam", group["lam"], part, like, positive=True)
        return lam * check_numbers("lr", scale, part, like, positive=True)

    def _prepare_step(self, *, ahead: bool = True) -> list[tuple[HostPlan, Tensor, Tensor]]:
        """What a step needs, before it changes anything; not ``ahead``, what the last one did."""
        with torch.no_grad():
            return [(plan, *self._numbers(plan, ahead=ahead)) for plan in self._current_plans()]

    def _takes_part(self, hosted: Hosted) -> bool:
        """Whether the operator acts on a scope in this step."""
        return any(tensor.grad is not None for tensor in hosted.scope.tensors)

    def _metric(self, plan: HostPlan) -> list[Tensor] | None:
        return None

    def _finish_step(self, prepared: Iterable[tuple[HostPlan, Tensor, Tensor]]) -> None:
        """Applies the operator, and keeps what is fixed at zero there."""
        with torch.no_grad():
            for plan, k, factor in prepared:
                # A factor of zero changes nothing, bit for bit.
                for i, h in enumerate(plan.hosted):
                    if not self._takes_part(h):
                        factor[i] = 0
                found_inf: Any = getattr(self, "found_inf", None)
                if found_inf is not None:
                    skipped = found_inf.to(factor.device) != 0
                    factor = torch.where(skipped, 0.0, factor)
                metric = self._metric(plan)
                options: Any = {} if metric is None else {"metric": metric}
                plan.counts = plan.plan.prox_(k, factor, debiased=plan.debiased, **options)
            self._keep_support()

    def _keep_support(self) -> None:
        for param, dead in self._fixed:
            local_tensor(param).masked_fill_(dead, 0)
            for name, value in self.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.shape == param.shape and name != "step":
                    local_tensor(value).masked_fill_(dead, 0)

    def fix_support(self) -> None:
        r"""Makes the number of groups exact, and fixes which they are.

        In every scope the :math:`\lfloor k \rfloor` groups of the largest :math:`\sqrt{d_j}\,\lVert
        w_{g_j} \rVert` stay as they are, and the others become zero, by the operator in its debiased
        form past the end of its factor. From then on the operator is off, and after each step the zero
        groups are set to zero again, and so is what the optimiser's state holds for them, as momentum.
        A scope in which no tensor requires a gradient stays as it is.

        The ``support`` of a parameter group then says for each scope which groups are not zero; it is in
        the state dict. Set it to None to free them, or change its masks. Zero groups are never revived
        to fill up k.
        """
        with torch.no_grad():
            for plan, k, factor in self._prepare_step():
                free = [any(t.requires_grad for t in h.scope.tensors) for h in plan.hosted]
                ends = [math.inf if f else 0.0 for f in free]  # zero changes nothing
                plan.plan.prox_(k, factor.new_tensor(ends), debiased=True)
            for number, group in enumerate(self.param_groups):
                if has_operator(group) and group["support"] is None:
                    scopes = scopes_of_group(group, self._tables[number])
                    group["support"] = [self._support(scope) for scope in scopes]
            self._current_plans()
            self._keep_support()

    @staticmethod
    def _support(scope: Scope) -> Tensor:
        weights = scope_weights(scope)
        alive = alive_groups(scope)
        return alive if weights is None else alive | (weights == 0)

    # --- what was done ---

    @property
    def kept(self) -> list[Tensor]:
        """How many groups the last step left in each scope, in the order of :meth:`report`: int64
        tensors without dimensions, on the devices of the scopes. Nothing is read back."""
        counted: dict[tuple[int, int], Tensor] = {}
        for plan in self._current_plans():
            if plan.counts is not None:
                for h, count in zip(plan.hosted, plan.counts.unbind(), strict=True):
                    counted[h.group, h.number] = count
        places = [(h.group, h.number) for h in self._scopes]
        return [
            counted[place] if place in counted else self._count(h.scope)
            for place, h in zip(places, self._scopes, strict=True)
        ]

    @staticmethod
    def _count(scope: Scope) -> Tensor:
        weights = scope_weights(scope)
        alive = alive_groups(scope)
        return (alive if weights is None else alive & (weights != 0)).sum()

    def report(self) -> list[ScopeReport]:
        """What was asked for and what the present weights have, a row for each scope; waits for the
        device.

        Example:
            >>> import torch, fusee
            >>> weight = torch.nn.Parameter(torch.eye(4))
            >>> optimizer = fusee.optim.ProxSGD([("weight", weight)], lr=0.1, k=2, lam=1.0)
            >>> print(*optimizer.report())
            ScopeReport(param_group=0, params=('weight',), groups=4, requested=2.0, kept=4, factor=0.1)
        """
        rows = []
        self._current_plans()
        scopes = Counter(h.group for h in self._scopes)
        for h in self._scopes:
            group = self.param_groups[h.group]
            names = group.get("param_names", range(len(group["params"])))
            groups = scope_groups(h.scope)
            counts = torch.tensor([groups], dtype=torch.float64)
            part = Part(h.group, scopes[h.group], torch.tensor([h.number]), counts)
            fixed = group["support"] is not None
            rows.append(
                ScopeReport(
                    param_group=h.group,
                    params=tuple(names[i] for i in h.params),
                    groups=groups,
                    requested=requested_groups(group, part, counts).item(),
                    kept=int(self._count(h.scope)),
                    factor=0.0 if fixed else self._present_factor(group, part, counts),
                )
            )
        return rows

    def _present_factor(self, group: dict[str, Any], part: Part, counts: Tensor) -> float:
        return self._factor_of(group, part, counts, self._scale_of_lam(group)).item()

    # --- copies and state ---

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": self._tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self._keep_options(before)
