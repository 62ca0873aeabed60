"""Slow proximal steps in float64 for the tests of the optimisers, and models to train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import fusee
import torch
from torch import Tensor, nn

DOUBLE = torch.float64


def ids_of(tensor: Tensor, dim: Any) -> Tensor:
    """The number of each element's group along a dimension, or several."""
    dims = sorted(d % tensor.dim() for d in ([dim] if isinstance(dim, int) else dim))
    extents = [n if d in dims else 1 for d, n in enumerate(tensor.shape)]
    numbers = torch.arange(int(torch.tensor(extents).prod())).reshape(extents)
    return numbers.expand(tensor.shape)


def joined_ids(tensors: Sequence[Tensor], dim: Any) -> list[Tensor]:
    """Of several tensors, the groups of one after those of another."""
    ids, first = [], 0
    for tensor in tensors:
        ids.append(ids_of(tensor, dim) + first)
        first = int(ids[-1].max()) + 1
    return ids


def shares(c: Tensor, h: Tensor, b: Tensor, mu: Tensor) -> Tensor:
    """For each group the u in [0, 1] where b |c / (h u + b)|^2 falls to mu, by bisection."""

    def phi(u: Tensor) -> Tensor:
        return (b[:, None] * (c / (h * u[:, None] + b[:, None])).square()).sum(1)

    low, high = torch.zeros_like(b), torch.ones_like(b)
    for _ in range(54):
        middle = (low + high) / 2
        above = phi(middle) > mu
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(phi(torch.ones_like(b)) >= mu, 1.0, (low + high) / 2) * (
        phi(torch.zeros_like(b)) > mu
    )


def slow_prox_(
    tensors: Sequence[Tensor],
    ids: Sequence[Tensor],
    k: float,
    lam: float,
    *,
    weights: Any = None,
    metric: Sequence[Tensor] | None = None,
    debiased: bool = False,
) -> int:
    """argmin 1/2 sum h (x - v)^2 + lam S(x) over the groups with these numbers, in place, by nested
    bisection; returns how many groups are left."""
    where = torch.cat([i.reshape(-1) for i in ids])
    v = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    H = (
        torch.ones_like(v)
        if metric is None
        else torch.cat([m.double().reshape(-1) for m in metric])
    )
    groups = int(where.max()) + 1
    members = where == torch.arange(groups)[:, None]
    sizes = members.sum(1).double()
    d = (
        {"size": sizes, "inverse_size": 1 / sizes}.get(weights)
        if isinstance(weights, str)
        else weights
    )
    d = torch.ones(groups, dtype=DOUBLE) if d is None else d.double()
    # Rows of all elements, with zeros for those of other groups.
    h = torch.where(members, H, 1.0)
    of_group = torch.where(members, v, 0.0)
    b = lam * d
    h_left = h - torch.where(members, b[:, None], 0.0) if debiased else h
    c = h * of_group
    counted = (of_group != 0).any(1) & (d > 0)
    if debiased and bool((h_left <= 0).any()):
        keys = torch.where(members, h * of_group.square(), 0.0).sum(1) * d
        kept = keys.argsort(descending=True, stable=True)[: int(k)]
        x = torch.zeros_like(of_group)
        x[kept] = of_group[kept]
    elif lam == 0:
        x = of_group
    elif int(counted.sum()) <= k:
        x = c / (h_left + b[:, None])
    else:
        c, b_safe = torch.where(counted[:, None], c, 0.0), torch.where(counted, b, 1.0)
        low, high = torch.tensor(1e-30, dtype=DOUBLE), torch.tensor(1e30, dtype=DOUBLE)
        for _ in range(58):
            mu = (low * high).sqrt()
            many = shares(c, h_left, b_safe, mu).sum() > k
            low, high = torch.where(many, mu, low), torch.where(many, high, mu)
        u = shares(c, h_left, b_safe, (low * high).sqrt())
        u = torch.where(u > 1e-13, u, 0.0)  # where k are whole, rounding leaves a trace of the next
        x = c * u[:, None] / (h_left * u[:, None] + b_safe[:, None])
        x = torch.where(d[:, None] > 0, x, of_group)
    total = torch.where(where >= 0, x.sum(0), v)
    begin = 0
    for tensor in tensors:
        part = total[begin : begin + tensor.numel()].reshape(tensor.shape)
        with torch.no_grad():
            tensor.copy_(part)
        begin += tensor.numel()
    return int(((x != 0).any(1) & (d > 0)).sum())


def network(seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    """Gradients of a batch that the seed picks."""
    for p in model.parameters():
        p.grad = None
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 5, dtype=DOUBLE, generator=generator).to(dtype)
    loss = (model(x) - x[:, :4].cumsum(1)).square().mean()
    (loss * scale).backward()
    return loss.detach()


def error(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def zero_rows(tensor: Tensor) -> int:
    """Of exact zeros."""
    return int((tensor.detach() == 0).flatten(1).all(1).sum())


def toy(seed: int, groups: int = 60, true: int = 12, size: int = 4) -> Any:
    """Least squares with few groups that matter, of the spec."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(groups, size, dtype=DOUBLE)
    w[:true] = torch.randn(true, size, dtype=DOUBLE, generator=generator)
    w[:true] *= (1 + torch.rand(true, 1, dtype=DOUBLE, generator=generator)) / w[:true].norm(
        dim=1, keepdim=True
    )

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, groups * size, dtype=DOUBLE, generator=generator)
        noise = torch.randn(32, dtype=DOUBLE, generator=generator)
        return x, x @ w.reshape(-1) + 0.25 * noise

    return w, batch


WAYS: dict[str, dict[str, Any]] = {
    "k": {"k": 2, "lam": 0.8},
    "debiased": {"k": 2, "lam": 1.5, "debiased": True},
    "projection": {"k": 2.7, "lam": 50.0, "debiased": True},
    "real k": {"k": 0.6, "lam": 0.5},
    "density": {"density": 0.4, "lam": 0.8, "debiased": True},
    "columns": {"k": 2, "lam": 0.8, "dim": 1},
    "elements": {"k": 7, "lam": 0.8, "dim": (0, 1)},
    "together": {"k": 3, "lam": 0.8, "scope": "group", "weights": "inverse_size"},
    "size": {"k": 3, "lam": 0.1, "scope": "group", "weights": "size", "debiased": True},
    "tensors": {"k": torch.tensor(2), "lam": torch.tensor([0.8, 0.1]), "debiased": True},
    "factor": {"k": 2, "factor": 0.3},
    "table": {"k": 2, "lam": 0.5, "debiased": True, "weights": "inverse_size"},
    "weights": {"k": 2, "lam": 0.4, "weights": torch.tensor([1.0, 0, 2, 1, 0.5, 1])},
}
"""Of the two weight matrices of the network."""


def table_of(model: nn.Sequential) -> fusee.GroupTable:
    return fusee.GroupTable.hidden_units(model[0].weight, model[2].weight)


def param_groups(model: nn.Sequential, way: str) -> list[dict[str, Any]]:
    options = copy.deepcopy(WAYS[way])
    if way in ("table", "weights"):
        options["groups"] = table_of(model)
    return [
        {"params": [model[0].weight, model[2].weight], **options},
        {"params": [model[0].bias, model[2].bias]},
    ]


def slow_operator(
    model: nn.Sequential, way: str, lr: float, metric: Any = None, scale: float = 1.0
) -> list[int]:
    """What the operator should do to the weights; returns the counts."""
    options = WAYS[way]
    weights = [model[0].weight, model[2].weight]
    dim = options.get("dim", 0)
    if way in ("table", "weights"):
        scopes = [(weights, list(table_of(model).ids))]
    elif options.get("scope") == "group":
        scopes = [(weights, joined_ids(weights, dim))]
    else:
        scopes = [([w], joined_ids([w], dim)) for w in weights]
    counts = []
    for i, (tensors, ids) in enumerate(scopes):
        groups = max(int(x.max()) for x in ids) + 1
        k = options["k"] if "k" in options else max(round(options["density"] * groups), 1)
        lam = options.get("lam", 0.0)
        lam = lam.double()[i].item() if isinstance(lam, Tensor) else lam
        factor = options.get("factor", lr * lam * scale)
        h = None if metric is None else [metric(t) for t in tensors]
        counts.append(
            slow_prox_(
                tensors,
                ids,
                float(k),
                factor,
                weights=options.get("weights"),
                debiased=options.get("debiased", False),
                metric=h,
            )
        )
    return counts


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
