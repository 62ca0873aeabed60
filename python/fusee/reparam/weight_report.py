"""What the weights of a model look like, with companders and without, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fusee._checks import accumulate_dtype
from fusee.reparam.compand_inverse import LIMITS
from fusee.reparam.compand_model import Place, companded_weights, linear_weights
from fusee.reparam.compander import gathered

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

SAMPLES = 100_000
"""How many weights of a tensor are kept for its histogram."""


@dataclass(frozen=True)
class WeightRow:
    """What :func:`fusee.nn.weight_report` says of one weight."""

    name: str
    """As in ``named_parameters`` of the plain model."""
    shape: tuple[int, ...]
    kind: str
    """The curve of the compander, ``"-"`` without one."""
    near_zero: float
    """The share of elements near zero."""
    largest: float
    """The largest absolute value."""
    saturated: float | None
    """The share of elements near the limit of the range; None where there is no limit."""
    a: tuple[float, float] | None
    """The least and the greatest ``a`` of the channels; None without a compander."""
    b: tuple[float, float] | None
    """Likewise of ``b``."""
    clamped: int | None
    """How many elements the last assignment clamped; None without a compander."""
    sample: Tensor = field(repr=False, compare=False)
    """The elements, or a fixed choice of them where they are many, for histograms."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class WeightReport:
    """What :func:`fusee.nn.weight_report` returns: its ``str`` is a table."""

    rows: list[WeightRow]
    near: float
    saturated: float

    @property
    def numel(self) -> int:
        """The number of weights."""
        return sum(row.numel for row in self.rows)

    @property
    def near_zero(self) -> float:
        """The share of all weights that are near zero, each by the measure of its tensor."""
        return _share([(row.near_zero, row.numel) for row in self.rows])

    @property
    def saturated_share(self) -> float | None:
        """The share that is near the limit, of the weights that have one; None without such."""
        limited = [(row.saturated, row.numel) for row in self.rows if row.saturated is not None]
        return _share(limited) if limited else None

    @property
    def largest(self) -> float:
        """The largest absolute value of all; NaN if there is any."""
        values = [row.largest for row in self.rows]
        return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)

    @property
    def clamped(self) -> int | None:
        """How many weights the last assignments clamped; None without a compander."""
        counts = [row.clamped for row in self.rows if row.clamped is not None]
        return sum(counts) if counts else None

    def plot(self, path: str | os.PathLike[str] | None = None, *, layers: int = 12) -> Figure:
        """:func:`fusee.nn.plot_weight_histograms` of this report alone."""
        from fusee.reparam.weight_histograms import plot_weight_histograms

        return plot_weight_histograms({"": self}, path, layers=layers)

    def __str__(self) -> str:
        head = ("weight", "shape", "kind", "near zero", "largest", "saturated", "a", "b", "clamped")
        rows = [
            (
                row.name,
                " x ".join(map(str, row.shape)) or "1",
                row.kind,
                f"{row.near_zero:.2%}",
                f"{row.largest:.4g}",
                _percent(row.saturated),
                _range(row.a),
                _range(row.b),
                _number(row.clamped),
            )
            for row in self.rows
        ]
        total = (
            "total",
            f"{self.numel:,}",
            "",
            f"{self.near_zero:.2%}",
            f"{self.largest:.4g}",
            _percent(self.saturated_share),
            "",
            "",
            _number(self.clamped),
        )
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        head_line, *lines, last = (_line(cells, widths) for cells in (head, *rows, total))
        rule = "-" * len(head_line)
        note = f"near zero: |w| <= {self.near:g} root mean square of its tensor"
        if self.saturated_share is not None:
            note += f"; saturated: |w| > {self.saturated:g} of the range"
        return "\n".join([head_line, rule, *lines, rule, last, note])

    __repr__ = __str__


def _share(shares: list[tuple[float, int]]) -> float:
    count = sum(numel for _, numel in shares)
    return sum(share * numel for share, numel in shares) / count if count else 0.0


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _range(ends: tuple[float, float] | None) -> str:
    """One number, or the least and the greatest."""
    if ends is None:
        return "-"
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def weight_report(model: nn.Module, *, near: float = 0.1, saturated: float = 0.9) -> WeightReport:
    r"""Tells how many weights of a model are near zero, how large they get, how many are saturated.

    It looks at the weights on which :func:`fusee.nn.compand_model` puts companders, whether they have
    one or not, and at every other weight that has one; so a plain model can be compared with a
    companded one.

    Args:
        model: the model; not changed.
        near: an element counts as near zero if :math:`|w| \le` ``near`` times the root mean square of
            its tensor. (Of normally distributed weights, 8 % are within 0.1.)
        saturated: an element counts as saturated if :math:`|w|` is more than this share of the range
            of its curve. At 0.9 the slope of ``"arctan"`` is 2.4 % of that at zero.

    Returns:
        A ``WeightReport``. ``str`` makes a table of it, ``plot(path)`` a picture; its list ``rows`` has
        for each weight the ``name``, ``shape`` and ``kind``, the shares ``near_zero`` and ``saturated``
        (None without a limit), the ``largest`` absolute value, the least and the greatest ``a`` and
        ``b`` of its channels, and how many elements the last assignment ``clamped`` (None without a
        compander). It keeps a copy of at most 100 000 elements of each weight for the picture.

    Raises:
        TypeError: ``model`` is not a module, or ``near`` or ``saturated`` is not a number.
        ValueError: a weight is on the meta device or not initialised yet, ``near`` is negative, or
            ``saturated`` is outside (0, 1).

    A parameter that several layers share has one row. Sharded parameters are gathered one by one, by a
    collective call. Deterministic.

    Example:
        >>> import torch, fusee
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.6, -0.6], [0.0, 0.3]]))
        >>> model = torch.nn.Sequential(layer)
        >>> _ = fusee.nn.compand_model(model, headroom=1.05)
        >>> print(fusee.nn.weight_report(model))
        weight    shape  kind    near zero  largest  saturated       a       b  clamped
        -------------------------------------------------------------------------------
        0.weight  2 x 2  arctan     25.00%      0.6     50.00%  0.4011  0.3209        0
        -------------------------------------------------------------------------------
        total     4                 25.00%      0.6     50.00%                        0
        near zero: |w| <= 0.1 root mean square of its tensor; saturated: |w| > 0.9 of the range
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    for name, value in (("near", near), ("saturated", saturated)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= near < math.inf:
        raise ValueError(f"near must be finite and at least zero, got {near}")
    if not 0 < saturated < 1:
        raise ValueError(f"saturated must be in (0, 1), got {saturated}")
    places = {place.name: place for place in (*linear_weights(model), *companded_weights(model))}
    order = [layer for layer, _ in model.named_modules()]
    rows: list[WeightRow] = []
    seen: set[int] = set()
    with torch.no_grad():
        for place in sorted(places.values(), key=lambda place: order.index(place.layer)):
            stored = place.parametrizations
            if stored is None:
                kept = getattr(place.module, place.attribute)
            else:
                kept = getattr(stored, "original", stored)
            if id(kept) not in seen:
                seen.add(id(kept))
                rows.append(_row(place, near, saturated))
    return WeightReport(rows, near, saturated)


def _row(place: Place, near: float, saturated: float) -> WeightRow:
    weight, compander = gathered(getattr(place.module, place.attribute)), place.compander
    if weight.is_meta or is_lazy(weight):
        raise ValueError(f"{place.name} must have values, but is not initialised yet")
    w = weight.detach().to(accumulate_dtype(weight.dtype))
    size = w.abs()
    count = max(w.numel(), 1)
    # The largest is taken out of the sum of squares, which would overflow or vanish.
    largest = float(size.max()) if w.numel() else 0.0
    scaled = size / largest if largest > 0 else size
    within = scaled <= near * scaled.square().mean().sqrt() if w.numel() else size
    share: float | None = None
    if compander is not None and compander.kind in LIMITS:
        limit = saturated * LIMITS[compander.kind] * compander.a
        if compander.per_channel:
            shape = [1] * w.dim()
            shape[compander.channel_dim] = -1
            limit = limit.reshape(shape)
        share = float((size > limit).sum()) / count
    return WeightRow(
        name=place.name,
        shape=tuple(w.shape),
        kind="-" if compander is None else compander.kind,
        near_zero=float(within.sum()) / count,
        largest=largest,
        saturated=share,
        a=None if compander is None else _ends(compander.a),
        b=None if compander is None else _ends(compander.b),
        clamped=None if compander is None else compander.clamped,
        sample=_sample(w),
    )


def _ends(values: Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)


def _sample(w: Tensor) -> Tensor:
    w = w.flatten()
    if w.numel() > SAMPLES:
        # At random, since even steps could walk along a column.
        chosen = torch.randint(w.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(0))
        w = w[chosen.to(w.device)]
    return w.float().cpu().clone()
