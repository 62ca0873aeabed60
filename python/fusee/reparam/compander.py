"""Weight compander as a parametrisation of a module's weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusee._checks import FLOATING_DTYPES, accumulate_dtype, check_floating
from fusee._op import is_readable
from fusee.reparam.compand import Parameter, check_kind, compand, over_channels
from fusee.reparam.compand_inverse import LIMITS, compand_inverse

CLAMP = 0.99
"""The share of a bounded curve's range that assigned weights may fill."""

POWER = 2.0
"""The exponent of ``powerprop`` where none is given."""


class Compander(nn.Module):
    r"""A parametrisation of a weight by :func:`fusee.compand`, with ``a`` and ``b`` that may learn.

    .. math:: w = \Psi(v; a, b), \qquad a = a_0 e^\alpha, \quad b = b_0 e^\beta

    It is made for one weight and handed to
    :func:`torch.nn.utils.parametrize.register_parametrization`; :func:`fusee.nn.compand_model` does
    both for every layer of a model. The optimizer trains v, which is the ``Parameter`` that the weight
    was, and the logarithmic ratios α and β, which begin at zero and keep ``a`` and ``b`` positive.

    :math:`a_0` and :math:`b_0` are chosen for the weight, such that nothing is clamped and the layer
    computes what it did before, to 1e-6 relative in float32 (in half types to the rounding of v):

    .. math:: a_0 = h \max|w| / L, \qquad b_0 = a_0 / s

    with the headroom h and the slope s at zero; L is π/2 for ``"arctan"`` and 1 otherwise. So the
    largest weight lies at 1 / h of the range of a bounded curve. For ``"mu_law"``, :math:`b_0` is what
    gives its curve the slope s (0.53 for 1.25; telephony's 255 has the slope 46, and the steps of SGD
    grow with its square). For ``"powerprop"``, :math:`a_0 = 1` and :math:`b_0 = 2`. A channel of zeros
    gets the constants of the whole tensor. A tensor of zeros, or an empty one, counts as one with
    :math:`\max|w| = 1 / \sqrt{n}` for n weights in an output channel, as torch initialises layers.

    Args:
        weight: the weight to be parametrised; read, not kept.
        kind: the curve, see :func:`fusee.compand`.
        a: :math:`a_0` instead of the above: a number or a tensor of one element, or with
            ``per_channel`` of one for each channel. Weights outside the range that it gives will be
            clamped.
        b: :math:`b_0`, likewise.
        headroom: h; more than 1 / 0.99 for the bounded curves.
        slope: s; unused where ``b`` is given, and for ``"powerprop"``. Above one, small weights are
            pushed away from zero; ``"mu_law"`` has no other.
        per_channel: whether each output channel has an ``a`` and a ``b`` of its own.
        channel_dim: the dimension of the output channels: 0, but 1 in transposed convolutions (where
            groups share them).
        learnable: whether ``a`` and ``b`` are parameters. They are frozen if ``weight`` is a frozen
            one.
        device: where ``a`` and ``b`` are. Default: where ``weight`` is.
        dtype: of α and β. Default: that of ``weight``, since FSDP2 wants one dtype for all.

    Shape: any weight; the result has its shape and dtype. α, β, ``a`` and ``b`` have the shape (1,) or
    (channels,), never (), which FSDP2 refuses.

    Attributes:
        a, b: their present values; gradients flow through them to α and β.
        log_ratio_a, log_ratio_b: the parameters α and β; None if not ``learnable``.
        initial_a, initial_b: the buffers :math:`a_0` and :math:`b_0`. They are in the ``state_dict``,
            so that it fits a module whose weights began elsewhere, and stay in float32 when the module
            is converted to a half type.
        clamped: how many weights the last assignment clamped; not in the ``state_dict``.

    Raises:
        TypeError: ``weight`` is not a dense floating-point tensor, or another argument has a wrong
            type.
        ValueError: ``weight`` is not finite or is sharded, ``kind`` is unknown, a number is out of
            range, ``a`` or ``b`` has a wrong number of elements, or ``weight`` is all zero for
            ``"powerprop"`` with ``b > 1``, whose gradient would be zero for ever.
        IndexError: ``channel_dim`` is out of range.

    A later assignment, ``layer.weight = w``, finds v for the present ``a`` and ``b``. Weights outside
    99 % of the range of a bounded curve are clamped to that, and so is v where its dtype has no such
    number; these are counted in ``clamped``, and a warning tells how many there were. Initialisers
    that write in place (``nn.init``, ``reset_parameters``) write to a copy, without effect: initialise
    before.

    Where the output of the layer is normalised (BatchNorm, LayerNorm), scaling its weights changes
    nothing. The gradient of ``a`` is then zero but for rounding, and only ``b`` learns; Adam, which
    divides gradients by their size, makes ``a`` wander all the same. Weight decay on α and β pulls
    ``a`` and ``b`` back to where they began; :func:`fusee.nn.compander_param_groups` keeps them out of
    it. Weight decay on v moves w by :math:`\lambda v \Psi'(v)`: small weights shrink as ever,
    saturated ones hardly.

    Works with ``deepcopy``, ``torch.compile(fullgraph=True)``, autocast and
    :func:`torch.nn.utils.parametrize.cached`, in which a weight is computed once, for one backward
    pass. FSDP2: call ``fully_shard`` afterwards. Outside of forward the weight is then sharded too,
    and ``a`` and ``b`` are gathered by a collective call. Meta device: nothing is known of the weight,
    so load a ``state_dict`` after ``to_empty``. A ``Parameter`` that several modules share: only by
    :func:`fusee.nn.compand_model`, for a registration changes it under the others. torch pickles no
    module with a parametrisation, but its ``state_dict``.

    Deterministic, as :func:`fusee.compand`.

    Source: see :func:`fusee.compand`; how the constants are chosen is ours.

    Example:
        >>> import torch, fusee
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -0.5]]))
        >>> parametrize.register_parametrization(layer, "weight", fusee.nn.Compander(layer.weight))
        ParametrizedLinear(
          in_features=2, out_features=1, bias=False
          (parametrizations): ModuleDict(
            (weight): ParametrizationList(
              (0): Compander('arctan')
            )
          )
        )
        >>> layer.weight
        tensor([[ 0.1000, -0.5000]], grad_fn=<Fusee_compandBackward>)
        >>> layer.parametrizations.weight.original
        Parameter containing:
        tensor([[ 0.0812, -0.6616]], requires_grad=True)
        >>> layer.parametrizations.weight[0].a
        tensor([0.4775], grad_fn=<MulBackward0>)
    """

    initial_a: Tensor
    initial_b: Tensor
    log_ratio_a: nn.Parameter | None
    log_ratio_b: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        kind: str = "arctan",
        *,
        a: Parameter | None = None,
        b: Parameter | None = None,
        headroom: float = 1.5,
        slope: float = 1.25,
        per_channel: bool = False,
        channel_dim: int = 0,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_floating("weight", weight)
        _check_whole("weight", weight)
        check_kind(kind)
        if dtype is not None and dtype not in FLOATING_DTYPES:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        self.kind = kind
        self.per_channel = per_channel
        self.channel_dim = _check_channel_dim(channel_dim, weight.dim())
        self.learnable = learnable
        self.clamped = 0
        first_a, first_b = _constants(
            weight, kind, a, b, headroom, slope, per_channel, self.channel_dim
        )
        device = weight.device if device is None else torch.device(device)
        trained = learnable and not (isinstance(weight, nn.Parameter) and not weight.requires_grad)
        for name, value in (("a", first_a), ("b", first_b)):
            constant = value.to(accumulate_dtype(weight.dtype))
            _check_constant(name, constant)
            self.register_buffer(f"initial_{name}", constant.to(device))
            ratio: nn.Parameter | None = None
            if learnable:
                zeros = torch.zeros(constant.shape, device=device, dtype=dtype or weight.dtype)
                ratio = nn.Parameter(zeros, requires_grad=trained)
            self.register_parameter(f"log_ratio_{name}", ratio)

    @property
    def a(self) -> Tensor:
        """The present scale of the curve."""
        return _times_exp(self.initial_a, self.log_ratio_a)

    @property
    def b(self) -> Tensor:
        """The present shape parameter of the curve."""
        return _times_exp(self.initial_b, self.log_ratio_b)

    def forward(self, v: Tensor) -> Tensor:
        a, b = _beside(v, self.a), _beside(v, self.b)
        return self._swap(compand(self._swap(v), a, b, self.kind))

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_floating("weight", weight)
        _check_whole("weight", weight)
        _check_whole("log_ratio_a", self.log_ratio_a)
        dtype = weight.dtype
        with torch.no_grad():
            a, b = self.a, self.b
            w = inside = self._swap(weight).to(accumulate_dtype(dtype))
            if self.kind in LIMITS:
                bound = over_channels(a, w).to(w.dtype) * (CLAMP * LIMITS[self.kind])
                inside = w.clamp(-bound, bound)
            v = compand_inverse(inside, a, b, self.kind).to(dtype)
            clamped = (w.abs() > inside.abs()) | v.isinf()
            limit = torch.finfo(dtype).max
            v = self._swap(v.clamp(-limit, limit))
            self.clamped = int(clamped.sum()) if _has_values(clamped) else 0
        if self.clamped:
            warnings.warn(
                f"{self.clamped} of {weight.numel()} weights "
                f"({100 * self.clamped / weight.numel():.3g} %) were clamped: they lie outside "
                f"{CLAMP:.0%} of the range of {self!r}, or their v outside that of {dtype}",
                stacklevel=5,  # past parametrize, to the assignment or the call of compand_model
            )
        return v

    def _swap(self, tensor: Tensor) -> Tensor:
        """The output channels brought to dimension 0, where that matters, or back."""
        if self.per_channel and self.channel_dim != 0:
            return tensor.transpose(0, self.channel_dim)
        return tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Compander:
        """As of any module, but :math:`a_0` and :math:`b_0` are never rounded to a half type."""
        before = {name: self._buffers[name] for name in ("initial_a", "initial_b")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None and new is not None
            if new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        text = repr(self.kind)
        if self.per_channel:
            text += f", channels={self.initial_a.numel()}"
            text += f", channel_dim={self.channel_dim}" if self.channel_dim else ""
        return text if self.learnable else text + ", learnable=False"


def _times_exp(initial: Tensor, log_ratio: Tensor | None) -> Tensor:
    if log_ratio is None:
        return initial
    return initial * gathered(log_ratio).to(initial.dtype).exp()


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, by a collective call; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _beside(v: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as one that may be computed with beside v, which may be sharded."""
    if not hasattr(v, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = v.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _has_values(tensor: Tensor) -> bool:
    return is_readable(tensor) and not tensor.is_meta


def _check_whole(name: str, tensor: Tensor | None) -> None:
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} must not be sharded: put companders on, and assign weights, before fully_shard"
        )


def _check_channel_dim(dim: Any, ndim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"channel_dim must be an int, got {type(dim).__name__}")
    extent = max(ndim, 1)
    if not -extent <= dim < extent:
        raise IndexError(f"channel_dim must be in [{-extent}, {extent - 1}], got {dim}")
    return dim % extent


def _check_number(name: str, value: Any, above: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > above and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and more than {above:.5g}, got {value}")


def _check_constant(name: str, value: Tensor) -> None:
    if _has_values(value) and not bool(((value > 0) & value.isfinite()).all()):
        worst = value[~((value > 0) & value.isfinite())][0].item()
        raise ValueError(f"{name} must be positive and finite in {value.dtype}, got {worst}")


# --- the constants, in float64 --------------------------------------------------------------------


def _constants(
    weight: Tensor,
    kind: str,
    a: Parameter | None,
    b: Parameter | None,
    headroom: float,
    slope: float,
    per_channel: bool,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """What ``a`` and ``b`` begin with."""
    _check_number("headroom", headroom, 1 / CLAMP if kind in LIMITS else 0)
    _check_number("slope", slope, 1 if kind == "mu_law" and b is None else 0)
    largest = _largest(weight, channel_dim, per_channel)
    if a is not None:
        scale = _given("a", a, largest, per_channel)
    elif kind == "powerprop":
        scale = torch.ones_like(largest)
    else:
        scale = headroom * _or_default(largest, weight, channel_dim) / LIMITS.get(kind, 1.0)
    if b is not None:
        shape = _given("b", b, largest, per_channel)
    elif kind == "powerprop":
        shape = torch.full_like(largest, POWER)
    elif kind == "mu_law":
        shape = torch.full_like(largest, _mu(slope))
    else:
        shape = scale / slope
    dead = kind == "powerprop" and weight.numel() > 0 and _has_values(largest)
    if dead and not largest.any() and bool((shape > 1).any()):
        raise ValueError(
            "weight must not be all zero for kind 'powerprop' with b > 1: its gradient would be zero "
            "for ever"
        )
    return scale, shape


def _largest(weight: Tensor, channel_dim: int, per_channel: bool) -> Tensor:
    """The largest absolute value of the weight, or of each of its channels."""
    w = weight.detach()
    w = w.reshape(1, -1) if w.dim() == 0 or not per_channel else w.movedim(channel_dim, 0)
    if w.numel() == 0:
        largest = w.new_zeros(w.shape[0])
    else:
        largest = w.flatten(1).abs().amax(1) if w.dim() > 1 else w.abs()
    # There are devices without float64.
    largest = largest.double() if largest.is_meta else largest.cpu().double()
    if _has_values(largest) and not bool(largest.isfinite().all()):
        worst = largest[~largest.isfinite()][0].item()
        raise ValueError(f"weight must be finite, got {worst}")
    return largest


def _or_default(largest: Tensor, weight: Tensor, channel_dim: int) -> Tensor:
    """The largest absolute values, with a stand-in where they are zero."""
    channels = weight.shape[channel_dim] if weight.dim() else 1
    default = 1 / math.sqrt(max(weight.numel() // max(channels, 1), 1))
    overall = largest.amax() if largest.numel() else largest.new_zeros(())
    overall = torch.where(overall > 0, overall, default)
    return torch.where(largest > 0, largest, overall)


def _given(name: str, value: Any, largest: Tensor, per_channel: bool) -> Tensor:
    """A constant that was given, for each channel."""
    if isinstance(value, Tensor):
        check_floating(name, value)
        if value.dim() > 1 or value.numel() not in (1, largest.numel()):
            wanted = f"one for each of {largest.numel()} channels" if per_channel else "no more"
            raise ValueError(
                f"{name} must have one element, or {wanted}, got shape {tuple(value.shape)}"
                + ("" if per_channel else " without per_channel")
            )
        given = value.detach().cpu().double().reshape(-1)
        _check_constant(name, given)
        return given.to(largest.device).expand_as(largest).clone()
    _check_number(name, value, 0)
    return torch.full_like(largest, value)


def _mu(slope: float) -> float:
    """The b of mu_law with this slope at zero, b / log(1 + b), which grows with b; by bisection."""
    low, high = 0.0, 1.0
    while high / math.log1p(high) < slope and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle > 0 and middle / math.log1p(middle) < slope:
            low = middle
        else:
            high = middle
    return high
