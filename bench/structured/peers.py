"""What people use, or would write, instead of our products with structured matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FlyMonarch(torch.autograd.Function):
    """The formulation of HazyResearch/fly: two batched products whose results are written in the order
    in which they are needed next, and a copy for the permutation between them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        rows, (k, q, p), (outer, s, r) = len(input), w1.shape, w2.shape
        x = input.view(rows, k, p).transpose(0, 1)
        hidden = input.new_empty(rows, k, q)
        torch.bmm(x, w1.mT, out=hidden.transpose(0, 1))
        middle = hidden.view(rows, r, outer).transpose(1, 2).contiguous().transpose(0, 1)
        output = input.new_empty(rows, outer, s)
        torch.bmm(middle, w2.mT, out=output.transpose(0, 1))
        ctx.save_for_backward(x, w1, w2, middle)
        return output.transpose(1, 2).reshape(rows, s * outer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w1, w2, middle = ctx.saved_tensors
        rows, (k, q, p), (outer, s, r) = len(grad), w1.shape, w2.shape
        of_output = grad.view(rows, s, outer).transpose(1, 2).contiguous().transpose(0, 1)
        grad_w2 = torch.bmm(of_output.mT, middle)
        of_middle = grad.new_empty(rows, outer, r)
        torch.bmm(of_output, w2, out=of_middle.transpose(0, 1))
        of_hidden = of_middle.transpose(1, 2).reshape(rows, k, q).transpose(0, 1)
        grad_w1 = torch.bmm(of_hidden.mT, x)
        grad_input = grad.new_empty(rows, k, p)
        torch.bmm(of_hidden, w1, out=grad_input.transpose(0, 1))
        return grad_input.view(rows, k * p), grad_w1, grad_w2


def fly_monarch(input: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    """Two batched products and the permutations."""
    result: Tensor = FlyMonarch.apply(input, w1, w2)
    return result


def plain_monarch(input: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    """The same in plain operators, which a compiler can trace."""
    rows, (k, _, p), (outer, s, r) = len(input), w1.shape, w2.shape
    hidden = torch.bmm(input.view(rows, k, p).transpose(0, 1), w1.mT).transpose(0, 1)
    middle = hidden.reshape(rows, r, outer).permute(2, 0, 1)
    return torch.bmm(middle, w2.mT).permute(1, 2, 0).reshape(rows, s * outer)


def dense_linear(input: Tensor, w1: Tensor, w2: Tensor, dense: Tensor) -> Tensor:
    """A dense layer of the same size."""
    return F.linear(input, dense)


def batched_blocks(input: Tensor, weight: Tensor) -> Tensor:
    """A batched product over the blocks, and copies there and back."""
    blocks, q, p = weight.shape
    columns = input.view(len(input), blocks, p).transpose(0, 1)
    return torch.bmm(columns, weight.mT).transpose(0, 1).reshape(len(input), blocks * q)
