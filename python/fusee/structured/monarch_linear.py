"""Monarch linear layer: two block-diagonal factors in the place of a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusee.structured.monarch_matmul import monarch_matmul
from fusee.structured.monarch_project import MonarchShape, monarch_project, monarch_to_dense


class MonarchLinear(nn.Module):
    r"""A linear layer whose weight is a Monarch matrix, in the place of :class:`torch.nn.Linear`.

    .. math:: y = x M^\top + b, \qquad M = P\, \text{blkdiag}(W^2)\, P^\top\, \text{blkdiag}(W^1)

    With ``nblocks`` blocks in each factor it has 2 / ``nblocks`` of the weights and products of a square
    dense layer, fewest with ``nblocks`` near the root of the width. See :func:`fusee.monarch_matmul`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has an additive bias.
        nblocks: blocks of each factor. Where it does not divide the features, the input is padded with
            zeros and the output cut, which costs a copy of each.
        rank: of each of the ``nblocks``² tiles of the matrix: the middle is ``rank * nblocks`` wide for
            each block. None for a middle width of ceil(min(in_features, out_features) / nblocks), and at
            least ``nblocks``, with which every input reaches every output.
        device, dtype: of the parameters.

    Shape: inputs (..., in_features), outputs (..., out_features).

    Attributes:
        w1: the parameter W¹ (nblocks, q, ceil(in_features / nblocks)).
        w2: the parameter W² (nblocks, ceil(out_features / nblocks), q).
        bias: the parameter b (out_features), or None.
        weight: the dense matrix M, for what reads a linear layer's weight (the fast path of
            ``TransformerEncoderLayer``); it is computed at each access, and what is written to it is
            lost.

    The factors begin uniform, with variances such that the variance of the output is that of
    ``torch.nn.Linear``, a third of the input's mean square; the bias as there.

    Raises:
        TypeError: a number is no int.
        ValueError: ``nblocks`` or ``rank`` is not positive, or the number of features is negative.

    Source: see :func:`fusee.monarch_matmul`.

    Example:
        >>> import torch, fusee
        >>> layer = fusee.nn.MonarchLinear(1024, 1024, nblocks=32)
        >>> layer(torch.randn(5, 1024)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 1024]), 66560)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        nblocks: int = 4,
        rank: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = MonarchShape(
            _check_features("in_features", in_features),
            _check_features("out_features", out_features),
            nblocks,
            rank,
        )
        self.in_features, self.out_features = in_features, out_features
        self.nblocks, self.rank = nblocks, rank
        self.w1 = nn.Parameter(torch.empty(shape.w1, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(shape.w2, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        # Half of the variance of torch.nn.Linear's output, in logarithms, from each factor.
        reached = max(self.in_features / self.nblocks, 1), max(self.w2.shape[2], 1)
        for weight, fan_in in zip((self.w1, self.w2), reached, strict=True):
            bound = 3**0.25 / fan_in**0.5
            nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            bound = max(self.in_features, 1) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have {self.in_features} features in its last dimension, got "
                f"{tuple(input.shape)}"
            )
        return self._product(input, self.w1, self.w2, self.bias)

    def _product(self, input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.w1.shape[0] * self.w1.shape[2] - self.in_features
        cut = self.w2.shape[0] * self.w2.shape[1] - self.out_features
        input = F.pad(input, (0, padding)) if padding else input
        bias = F.pad(bias, (0, cut)) if cut and bias is not None else bias
        output = monarch_matmul(input, w1, w2, bias)
        return output[..., : self.out_features].contiguous() if cut else output

    def interval_forward(
        self, center: Tensor, radius: Tensor, *, sound: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What :class:`fusee.nn.IntervalModel` asks for: a box through both factors, each with its
        magnitudes. With a rank of one that is as tight as the dense matrix's."""
        if sound:
            raise NotImplementedError("no sound interval rule for MonarchLinear")
        return self(center), self._product(radius, self.w1.abs(), self.w2.abs(), None)

    @property
    def weight(self) -> Tensor:
        """The matrix M (out_features, in_features), made anew; differentiable in the factors."""
        return monarch_to_dense(self.w1, self.w2)[: self.out_features, : self.in_features]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, nblocks: int = 4, rank: int | None = None
    ) -> MonarchLinear:
        """The layer nearest to a dense one, with its bias, by :func:`fusee.monarch_project`."""
        return nearest_layer(cls, linear, nblocks, rank)[0]

    def to_linear(self) -> nn.Linear:
        """A dense layer that computes the same."""
        weight = self.weight.detach().contiguous()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        linear.weight = nn.Parameter(weight, self.w1.requires_grad or self.w2.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nblocks={self.nblocks}, rank={self.rank}"
        )


def _check_features(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def nearest_layer(
    kind: type[MonarchLinear], linear: nn.Linear, nblocks: int, rank: int | None
) -> tuple[MonarchLinear, Tensor]:
    """:meth:`MonarchLinear.from_linear`, and the norm of what the projection leaves out."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    weight = linear.weight.detach()
    w1, w2, error = monarch_project(weight, nblocks, rank)
    layer = kind(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        nblocks,
        rank,
        device="meta",
        dtype=weight.dtype,
    )
    layer.w1 = nn.Parameter(w1, linear.weight.requires_grad)
    layer.w2 = nn.Parameter(w2, linear.weight.requires_grad)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
    return layer.train(linear.training), error
