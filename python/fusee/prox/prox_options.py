"""The options of parameter groups that host the proximal operator, and their numbers for each scope."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusee._checks import check_floating
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import check_dims, check_no_dim, check_scalar, marked
from fusee.prox.scopes import Scope, memory_order, scope_groups, scope_weights
from fusee.prox.sharded import is_sharded

Number = float | Tensor

OPTIONS: dict[str, Any] = {
    "k": None,
    "density": None,
    "lam": None,
    "factor": None,
    "dim": 0,
    "scope": "tensor",
    "weights": None,
    "debiased": False,
    "support": None,
}
"""What the parameter groups hold, so that it is in state dicts, with the defaults."""

OF_TABLE = "table"
"""The scope of a parameter group whose table of groups is kept beside it, as it is in no state dict."""


class Part(NamedTuple):
    """The scopes of one parameter group in a plan."""

    group: int
    scopes: int
    """How many the parameter group has, on all devices."""
    chosen: Tensor | None
    """Which of them are in this plan, None for all."""
    groups: Tensor
    """How many groups each has that is in this plan."""


def check_numbers(name: str, value: Any, part: Part, like: Tensor, *, positive: bool) -> Tensor:
    """A number, or a tensor of one or of one for each scope, as float64, one for each in the plan."""
    count = part.groups.shape[0]
    if isinstance(value, Tensor):
        value = value.detach().to(like.device)
        if part.scopes > 1 and value.shape == (part.scopes,):
            each = value.double() if part.chosen is None else value.double()[part.chosen]
        elif value.numel() == 1:
            each = check_scalar(name, value, like, positive=positive).expand(count)
        else:
            raise ValueError(
                f"{name} must have one element, or one for each of the {part.scopes} scopes, got shape "
                f"{tuple(value.shape)}"
            )
        if positive:
            return marked(name, each, each >= 0, "not negative")
        return marked(name, each, ~each.isnan(), "not NaN")
    return check_scalar(name, value, like, positive=positive).expand(count)


def requested_groups(group: dict[str, Any], part: Part, like: Tensor) -> Tensor:
    """The k of each scope."""
    density = group["density"]
    if density is None:
        return check_numbers("k", group["k"], part, like, positive=False)
    if group["k"] is not None:
        raise ValueError(
            f"k and density must not be given together, got k={group['k']}, density={density}"
        )
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"density must be a number, got {type(density).__name__}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return (part.groups * density).round().clamp(min=1)


def own_options_first(group: dict[str, Any]) -> None:
    """A parameter group's own k or density switches off the default of the other, and lam of factor."""
    if "k" in group or "density" in group:
        group.setdefault("k", None)
        group.setdefault("density", None)
    if "lam" in group:
        group.setdefault("factor", None)


def has_operator(group: dict[str, Any]) -> bool:
    return group["k"] is not None or group["density"] is not None


def scopes_of_group(group: dict[str, Any], table: GroupTable | None) -> list[Scope]:
    """The scopes of the parameters of a group, whether it has an operator or not."""
    params, dim, weights = group["params"], group["dim"], group["weights"]
    if not params:
        return []
    if table is not None:
        check_no_dim(dim)
        table = table.to(params[0].device)
        return [Scope(tuple(table.check("params", params)), 0, table, weights)]
    for i, param in enumerate(params):
        check_floating(f"params[{i}]", param)
        check_dims(dim, param.dim())
    if group["scope"] == "tensor":
        return [Scope((param,), dim, None, weights) for param in params]
    if any(param.device != params[0].device for param in params):
        raise ValueError("params must be on one device where scope is 'group'")
    return [Scope(tuple(params), dim, None, weights)]


def check_group(group: dict[str, Any], table: GroupTable | None) -> None:
    """Raises where the options of a parameter group are not what they must be."""
    if table is not None and not isinstance(table, GroupTable):
        raise TypeError(f"groups must be a GroupTable, got {type(table).__name__}")
    if group["scope"] == OF_TABLE and table is None:
        raise ValueError(
            "groups must be given again: the parameter group or the state dict is of an optimiser "
            "that has them in a table, which is not part of it"
        )
    if group["scope"] not in ("tensor", "group", OF_TABLE):
        raise ValueError(f"scope must be 'tensor' or 'group', got {group['scope']!r}")
    if not has_operator(group):
        return
    if group["lam"] is None and group["factor"] is None:
        raise ValueError("lam must be given with k or density")
    scopes = scopes_of_group(group, table)
    if isinstance(group["weights"], Tensor) and len(scopes) > 1:
        raise ValueError(
            f"weights must not be a tensor for {len(scopes)} scopes: give them to parameter groups "
            "of one parameter, or with scope='group' or groups"
        )
    for scope in scopes:
        scope_weights(scope)
    if scopes:
        counts = torch.tensor([scope_groups(s) for s in scopes], dtype=torch.float64)
        part = Part(0, len(scopes), None, counts)
        requested_groups(group, part, counts)
        for name in ("lam", "factor"):
            if group[name] is not None:
                check_numbers(name, group[name], part, counts, positive=True)
    if group["support"] is not None:
        _check_support(group["support"], [scope_groups(s) for s in scopes])


def _check_support(support: Sequence[Tensor], groups: Sequence[int]) -> None:
    if len(support) != len(groups):
        raise ValueError(
            f"support must have a mask for each of the {len(groups)} scopes, got {len(support)}"
        )
    for i, (mask, count) in enumerate(zip(support, groups, strict=True)):
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(
                f"support[{i}] must be of dtype torch.bool and shape ({count},), got {mask.dtype} and "
                f"{tuple(mask.shape)}"
            )


def check_apart(groups: Sequence[dict[str, Any]]) -> None:
    """Raises where a parameter with an operator is there twice, or two of them share memory."""
    names: dict[int, str] = {}
    spans = []
    for number, group in enumerate(groups):
        if not has_operator(group):
            continue
        for i, param in enumerate(group["params"]):
            name = repr(group["param_names"][i]) if "param_names" in group else f"params[{i}]"
            name += f" of parameter group {number}"
            if id(param) in names:
                raise ValueError(
                    f"params must be different, got {name}, which is {names[id(param)]}"
                )
            names[id(param)] = name
            # Without gaps, so that memory between the ends is that of the parameter.
            if not is_sharded(param) and param.data_ptr() and memory_order(param) is not None:
                begin = param.data_ptr()
                end = begin + param.numel() * param.element_size()
                spans.append((str(param.device), begin, end, name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in itertools.pairwise(spans):
        if device == other_device and begin < end:
            raise ValueError(f"params must not share memory, got {name} and {other}, which do")
