"""Plans of entropic transport, and sums over them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusee._op import Op
from fusee.transport.batches import sharding_of_problems, vmap_of_problems
from fusee.transport.plans import costs, exponentials, root


def plan_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    f: Tensor,
    g: Tensor,
) -> Tensor:
    e = exponentials(costs(x, y, metric), reg, f, g)
    return (a.unsqueeze(2) * b.unsqueeze(1) * e).to(x.dtype).contiguous()


def gradient_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    f: Tensor,
    g: Tensor,
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e = exponentials(costs(x, y, metric), reg, f, g)
    of_rows, of_columns = b.unsqueeze(1) * e, a.unsqueeze(2) * e
    row_sums = (of_rows * right.unsqueeze(1)).sum(2)
    column_sums = (of_columns * left.unsqueeze(2)).sum(1)
    weight = a.unsqueeze(2) * of_rows * (left.unsqueeze(2) + right.unsqueeze(1))
    if y is None:
        return weight.to(x.dtype).contiguous(), x.new_zeros(0), row_sums, column_sums
    from_, to = x.double(), y.double()
    if metric == 4:
        grad_x, grad_y = -(weight @ to), -(weight.mT @ from_)
    else:
        difference = from_.unsqueeze(2) - to.unsqueeze(1)
        if metric == 3:
            slope = difference.sign()
        elif metric == 2:
            distance = root(difference.square().sum(-1, keepdim=True))
            slope = difference / torch.where(distance > 0, distance, 1.0)
        else:
            slope = 2 * difference
        pulls = weight.unsqueeze(-1) * slope
        grad_x, grad_y = pulls.sum(2), -pulls.sum(1)
    grad_x, grad_y = grad_x.to(x.dtype).contiguous(), grad_y.to(x.dtype).contiguous()
    return grad_x, grad_y, row_sums, column_sums


def _plan_fake(
    x: Tensor, y: Tensor | None, metric: int, a: Tensor, b: Tensor, *others: Tensor
) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[1], b.shape[1]))


def _gradient_fake(
    x: Tensor, y: Tensor | None, metric: int, a: Tensor, b: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y = x.new_empty((0,) if y is None else y.shape)
    return x.new_empty(x.shape), grad_y, a.new_empty(a.shape), b.new_empty(b.shape)


transport_plan = Op(
    "transport_plan",
    fake=_plan_fake,
    reference=plan_reference,
    vmap=vmap_of_problems("transport_plan"),
    sharding=sharding_of_problems(1),
    differentiable=((0, 1, 3, 4, 6, 7), (0,)),
)
transport_plan_gradient = Op(
    "transport_plan_gradient",
    fake=_gradient_fake,
    reference=gradient_reference,
    vmap=vmap_of_problems("transport_plan_gradient"),
    sharding=sharding_of_problems(4),
    differentiable=((0, 1, 3, 4, 6, 7, 8, 9), (0, 1, 2, 3)),
)
