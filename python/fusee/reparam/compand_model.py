"""Weight companders on all layers of a model, and off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fusee.reparam.compander import Compander

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Place(NamedTuple):
    """A weight of a module of a model."""

    layer: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """As in ``named_parameters`` of the plain model."""
        return f"{self.layer}.{self.attribute}" if self.layer else self.attribute

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight, None where it is parametrised or not a parameter."""
        return self.module._parameters.get(self.attribute)

    @property
    def parametrizations(self) -> Any:
        """The ``ParametrizationList`` of the weight, None where it has none."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        return self.module.parametrizations[self.attribute]  # type: ignore[index]

    @property
    def compander(self) -> Compander | None:
        """The weight's compander, None where it has none."""
        for parametrization in self.parametrizations or ():
            if isinstance(parametrization, Compander):
                return parametrization
        return None


def linear_weights(model: nn.Module) -> Iterator[Place]:
    """The weights of convolutions and linear layers, those in attention included."""
    for layer, module in model.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            yield Place(layer, module, "weight")
        elif isinstance(module, nn.MultiheadAttention):
            for attribute in PROJECTIONS:
                # One in-projection or three; torch keeps None for those that are not there.
                if attribute not in module._parameters or module._parameters[attribute] is not None:
                    yield Place(layer, module, attribute)


def companded_weights(model: nn.Module) -> Iterator[Place]:
    """The weights with a compander, whatever their layer."""
    for layer, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute in module.parametrizations:
                place = Place(layer, module, attribute)
                if place.compander is not None:
                    yield place


def compand_model(
    model: nn.Module,
    kind: str = "arctan",
    *,
    filter: Callable[[str, nn.Module], bool] | None = None,
    a: float | None = None,
    b: float | None = None,
    headroom: float = 1.5,
    slope: float = 1.25,
    per_channel: bool = False,
    learnable: bool = True,
) -> list[str]:
    r"""Puts a :class:`fusee.nn.Compander` on every convolution and linear layer of a model, in place.

    Those are the weights of ``Linear``, ``Conv1d`` to ``Conv3d`` and ``ConvTranspose1d`` to
    ``ConvTranspose3d``, and the projections of ``MultiheadAttention``; not biases, normalisations,
    embeddings or recurrent layers. The model computes what it did before, and its parameters remain
    the same objects. Initialise it, and load weights of the plain model, before; make the optimizer
    after, for there are new parameters (:func:`fusee.nn.compander_param_groups`).

    Args:
        model: a model, or a single layer.
        kind: the curve, see :func:`fusee.compand`.
        filter: if given, called with the name and the module of each such layer, as ``named_modules``
            has them; only where it returns True is a compander put on.
        a: see :class:`fusee.nn.Compander`.
        b: likewise.
        headroom: likewise.
        slope: likewise.
        per_channel: whether each output channel has an ``a`` and a ``b`` of its own. The channels are
            in dimension 0 of a weight, but in dimension 1 for transposed convolutions.
        learnable: whether ``a`` and ``b`` are parameters.

    A weight that has a compander keeps it, so calls with other settings may follow one another, the
    special ones first. A ``Parameter`` that several of the layers share gets one compander and stays
    shared. Gradients that a weight holds are dropped: they are not those of v.

    Returns:
        The names of the weights that got a compander, in order, such as ``"0.weight"``.

    Raises:
        TypeError, ValueError: as :class:`fusee.nn.Compander`, beginning with the name of the weight.
        ValueError: a weight is shared with something that gets no compander, has another
            parametrisation (``weight_norm`` or ``prune``, say), is not initialised yet
            (``LazyLinear``) or is sharded. The model is then left as it was.

    Deterministic.

    Source: see :func:`fusee.compand`.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> fusee.nn.compand_model(model, kind="tanh", filter=lambda name, module: name != "2")
        ['0.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    chosen = [
        place
        for place in linear_weights(model)
        if place.compander is None and (filter is None or filter(place.layer, place.module))
    ]
    made: list[tuple[Compander, list[Place]]] = []
    for parameter, places in _by_parameter(model, chosen):
        try:
            compander = Compander(
                parameter,
                kind,
                a=a,
                b=b,
                headroom=headroom,
                slope=slope,
                per_channel=per_channel,
                channel_dim=1 if isinstance(places[0].module, TRANSPOSED) else 0,
                learnable=learnable,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{places[0].name}: {error}") from None
        made.append((compander, places))
    for compander, (first, *others) in made:
        _separate(first, others)
        for place in (first, *others):
            parametrize.register_parametrization(place.module, place.attribute, compander)
        for place in others:
            place.parametrizations.original = first.parametrizations.original
    return [place.name for place in chosen]


def _by_parameter(
    model: nn.Module, chosen: list[Place]
) -> Iterator[tuple[nn.Parameter, list[Place]]]:
    """The parameters of the chosen places, each once, after checking that a compander can be put on."""
    everywhere: dict[int, list[str]] = {}
    for layer, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{layer}.{attribute}" if layer else attribute
                everywhere.setdefault(id(parameter), []).append(name)
    found: dict[int, tuple[nn.Parameter, list[Place]]] = {}
    for place in chosen:
        parameter = place.parameter
        if parameter is None:
            raise ValueError(
                f"{place.name} must be a parameter, but it has another parametrisation; remove "
                "that, or leave the layer out by filter"
            )
        if is_lazy(parameter):
            raise ValueError(f"{place.name} must be initialised: run the model on a batch first")
        found.setdefault(id(parameter), (parameter, []))[1].append(place)
    for key, (_, places) in found.items():
        others = set(everywhere[key]) - {place.name for place in places}
        if others:
            raise ValueError(
                f"{places[0].name} is shared with {min(others)}, which gets no compander; untie "
                "them, or leave the layer out by filter"
            )
    yield from found.values()


def _separate(first: Place, others: list[Place]) -> None:
    """Gives the other places of a shared parameter one of their own, to be parametrised likewise."""
    parameter = first.parameter
    assert parameter is not None
    parameter.grad = None
    for place in others:
        setattr(place.module, place.attribute, nn.Parameter(parameter.detach().clone()))


def fold_companders(model: nn.Module) -> list[str]:
    r"""Takes all companders off a model, in place, and leaves the weights they made, bit for bit.

    For inference, and to save the model as a plain one. The parameters remain the same objects,
    without their gradients, and ``a`` and ``b`` are gone. To train on, make a new optimizer: what the
    old one has gathered is about v.

    Args:
        model: a model; also a deep copy of one that goes on training with its companders
            (``torch.nn.utils.parametrize.remove_parametrizations`` would break that).

    Returns:
        The names of the weights that had a compander, such as ``"0.weight"``.

    Raises:
        ValueError: a weight has another parametrisation beside the compander, or is sharded: then load
            the full state dict into a companded model that is not. The model is left as it was.

    Deterministic.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> fusee.nn.compand_model(model)
        ['0.weight']
        >>> weight = model[0].weight
        >>> fusee.nn.fold_companders(model)
        ['0.weight']
        >>> torch.equal(model[0].weight, weight)
        True
        >>> model
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
        )
    """
    places = list(companded_weights(model))
    for place in places:
        if len(place.parametrizations) != 1:
            raise ValueError(f"{place.name} must have no parametrisation beside its compander")
        if hasattr(place.parametrizations.original, "full_tensor"):
            raise ValueError(
                f"{place.name} must not be sharded: load the full state dict into a companded "
                "model that is not, and fold that"
            )
    folded: set[int] = set()
    for module, attribute in [(place.module, place.attribute) for place in places]:
        original = module.parametrizations[attribute].original  # type: ignore[union-attr, index]
        _own_class(module)
        # A shared parameter holds the weight from the first time on.
        parametrize.remove_parametrizations(
            module, attribute, leave_parametrized=id(original) not in folded
        )
        original.grad = None
        folded.add(id(original))
    return [place.name for place in places]


def _own_class(module: nn.Module) -> None:
    """Gives a module a class of its own. Removing a parametrisation takes a property from the class,
    which deep copies share."""
    shared = type(module)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def compander_param_groups(
    model: nn.Module, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    r"""Parameter groups for an optimizer, with weight decay on everything but ``a`` and ``b``.

    Decay would pull these back to where they began.

    Args:
        model: a model, with companders or without; sharded or not.
        weight_decay: that of all other parameters, the free weights v included.
        options: more settings of the group of ``a`` and ``b``, such as ``lr=1e-4``.

    Returns:
        One or two dicts with ``params``, which together hold every parameter of the model once, and
        ``weight_decay``, which is 0 in the group of ``a`` and ``b``. That also tells
        :class:`fusee.optim.PerpGrad` to leave them alone: they are no weights. A group without
        parameters is left out.

    Raises:
        TypeError, ValueError: ``weight_decay`` is not a finite number of at least zero.

    Deterministic.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Linear(3, 4)
        >>> _ = fusee.nn.compand_model(model)
        >>> groups = fusee.nn.compander_param_groups(model, weight_decay=0.1, lr=1e-4)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> [(g["weight_decay"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
        [(0.1, 0.001, 2), (0.0, 0.0001, 2)]
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
        raise TypeError(f"weight_decay must be a number, got {type(weight_decay).__name__}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and at least zero, got {weight_decay}")
    ratios = {
        id(parameter): parameter
        for module in model.modules()
        if isinstance(module, Compander)
        for parameter in module.parameters()
    }
    others = [parameter for parameter in model.parameters() if id(parameter) not in ratios]
    groups = [
        {"params": others, "weight_decay": float(weight_decay)},
        {"params": list(ratios.values()), "weight_decay": 0.0, "perp_grad": False, **options},
    ]
    return [group for group in groups if group["params"]]
