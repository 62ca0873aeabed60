"""Monarch layers in the place of a model's linear layers, and dense ones again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fusee.structured.monarch_linear import MonarchLinear, nearest_layer
from fusee.structured.monarch_project import check_count


@dataclass(frozen=True)
class MonarchRow:
    """What :func:`fusee.nn.monarchize` says of one layer."""

    name: str
    """As in ``named_modules``; of a layer that the model has in several places the first."""
    in_features: int
    out_features: int
    dense_parameters: int
    parameters: int
    """Weights and bias, before and after."""
    dense_flops: int
    flops: int
    """Multiplications and additions of one sample, without the bias, before and after."""
    error: float | None
    """The norm of what the projection left out over that of the weight; None where the layer begins
    anew."""


@dataclass(frozen=True, repr=False)
class MonarchReport:
    """What :func:`fusee.nn.monarchize` returns: its ``str`` is a table."""

    rows: list[MonarchRow]

    @property
    def parameters_saved(self) -> int:
        """How many parameters fewer the model has."""
        return sum(row.dense_parameters - row.parameters for row in self.rows)

    @property
    def flops_saved(self) -> int:
        """How many multiplications and additions fewer a sample takes, each layer counted once."""
        return sum(row.dense_flops - row.flops for row in self.rows)

    def __repr__(self) -> str:
        return f"MonarchReport({len(self.rows)} layers, {self.parameters_saved} parameters saved)"

    def __str__(self) -> str:
        head = ("layer", "in", "out", "parameters", "of", "FLOPs", "of", "error")
        cells: list[tuple[str, ...]] = [
            (
                row.name or "(model)",
                str(row.in_features),
                str(row.out_features),
                f"{row.parameters:,}",
                f"{row.dense_parameters:,}",
                f"{row.flops:,}",
                f"{row.dense_flops:,}",
                "-" if row.error is None else f"{row.error:.3f}",
            )
            for row in self.rows
        ]
        sums = [
            f"{sum(getattr(row, name) for row in self.rows):,}"
            for name in ("parameters", "dense_parameters", "flops", "dense_flops")
        ]
        cells.append(("all", "", "", *sums, ""))
        table: list[tuple[str, ...]] = [head, *cells]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        )


def monarchize(
    model: nn.Module,
    nblocks: int = 4,
    rank: int | None = None,
    *,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    min_features: int = 0,
    project: bool = True,
) -> MonarchReport:
    """Puts a :class:`fusee.nn.MonarchLinear` in the place of each linear layer of a model, in place.

    Those are the modules of the class ``torch.nn.Linear`` itself. Its subclasses stay, such as the
    output projection of ``MultiheadAttention``, which is used by its weight alone.

    Args:
        model: a model that contains linear layers.
        nblocks: see :class:`fusee.nn.MonarchLinear`.
        rank: likewise.
        filter: if given, called with the name and the module of each such layer, as ``named_modules``
            has them; only where it returns True is the layer replaced.
        min_features: layers with fewer inputs or outputs than this stay.
        project: whether the new layers begin as the nearest Monarch matrices of the dense weights, to
            train on from there. Otherwise they begin as new layers do.

    A layer that the model has in several places stays one. Make the optimizer afterwards: the parameters
    are new ones. Layers with hooks lose these.

    Returns:
        A :class:`fusee.nn.MonarchReport` with the parameters and FLOPs of every layer before and after.

    Raises:
        TypeError: ``model`` is not a module, or a number is no int.
        ValueError: a number is not positive; a chosen layer is the model itself (use
            :meth:`fusee.nn.MonarchLinear.from_linear`), has a parametrised weight or none of its own
            (``weight_norm``, ``prune``), or one that is not finite; is not initialised (``LazyLinear``),
            is sharded or on the meta device, or shares its weight with another module (tied embeddings).
            The model is then left as it was.

    Deterministic as far as ``torch.linalg.svd`` is; with ``project=False`` it draws from torch's random
    generator.

    Source: see :func:`fusee.monarch_matmul`.

    Example:
        >>> import torch, fusee
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = fusee.nn.monarchize(model, nblocks=8, min_features=32)
        >>> model[0].nblocks, report.parameters_saved
        (8, 3072)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    check_count("nblocks", nblocks)
    if rank is not None:
        check_count("rank", rank)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and parametrize.type_before_parametrizations(module) in (nn.Linear, nn.LazyLinear)
        and min(module.in_features, module.out_features) >= min_features
        and (filter is None or filter(name, module))
    }
    _check(model, chosen, "MonarchLinear.from_linear()", project)
    rows: list[MonarchRow] = []
    made: dict[nn.Module, nn.Module] = {}
    for name, linear in chosen.items():
        layer, error = _layer_for(linear, nblocks, rank, project)
        made[linear] = layer
        rows.append(
            MonarchRow(
                name,
                linear.in_features,
                linear.out_features,
                sum(p.numel() for p in linear.parameters()),
                sum(p.numel() for p in layer.parameters()),
                2 * linear.weight.numel(),
                2 * (layer.w1.numel() + layer.w2.numel()),
                error,
            )
        )
    _replace(model, made)
    return MonarchReport(rows)


def _layer_for(
    linear: nn.Linear, nblocks: int, rank: int | None, project: bool
) -> tuple[MonarchLinear, float | None]:
    """The layer in the place of a dense one, and the relative error of its projection."""
    weight = linear.weight.detach()
    if project:
        layer, left = nearest_layer(MonarchLinear, linear, nblocks, rank)
        norm = weight.to(left.dtype).norm()
        return layer, float(left / norm) if norm > 0 else 0.0
    layer = MonarchLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        nblocks,
        rank,
        device=weight.device,
        dtype=weight.dtype,
    )
    for name, parameter in layer.named_parameters():
        like = linear.bias if name == "bias" else linear.weight
        parameter.requires_grad_(like.requires_grad)
    return layer.train(linear.training), None


def densify(model: nn.Module) -> list[str]:
    """Puts a dense layer in the place of each :class:`fusee.nn.MonarchLinear` of a model, in place.

    The model computes what it did before, but layers with hooks lose these. So a model can be trained
    with Monarch layers first, which is cheap, and then go on dense from the same function (reverse
    sparsification). Subclasses of the layer stay.

    Args:
        model: a model that contains Monarch layers.

    Returns:
        The names of the layers that were replaced. Make the optimizer anew: the parameters are new ones.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model itself is such a layer (use :meth:`fusee.nn.MonarchLinear.to_linear`), or
            one is parametrised, sharded or on the meta device, or shares a factor with another module.
            The model is then left as it was.

    Deterministic.

    Source: see :func:`fusee.monarch_matmul`.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(fusee.nn.MonarchLinear(64, 64), torch.nn.ReLU())
        >>> fusee.nn.densify(model), model[0]
        (['0'], Linear(in_features=64, out_features=64, bias=True))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    chosen = {
        name: module
        for name, module in model.named_modules()
        if parametrize.type_before_parametrizations(module) is MonarchLinear
    }
    _check(model, chosen, "MonarchLinear.to_linear()", False)
    _replace(model, {module: module.to_linear() for module in chosen.values()})
    return list(chosen)


def _check(model: nn.Module, chosen: Mapping[str, nn.Module], instead: str, finite: bool) -> None:
    """Raises where a chosen layer cannot be replaced."""
    users: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(module)
    for name, layer in chosen.items():
        if layer is model:
            raise ValueError(f"model is a {type(layer).__name__} itself, for {instead} to replace")
        problem = _problem(layer, users)
        if not problem and finite and not cast(Tensor, layer.weight).isfinite().all():
            problem = "has a weight that is not finite"
        if problem:
            raise ValueError(f"{name} {problem}")


def _problem(layer: nn.Module, users: dict[int, set[nn.Module]]) -> str:
    if parametrize.is_parametrized(layer):
        return "has a parametrised weight or bias; remove that first"
    names = ("w1", "w2") if isinstance(layer, MonarchLinear) else ("weight",)
    for name in names:
        if name not in layer._parameters:
            return (
                f"has a {name} that is no parameter (weight_norm or prune, say); remove that first"
            )
    for name, parameter in layer.named_parameters(recurse=False):
        if is_lazy(parameter):
            return "is not initialised: run the model on a batch first"
        if type(parameter.data) is not Tensor:
            return f"has a {name} that is a {type(parameter.data).__name__}: gather it first"
        if parameter.is_meta:
            return f"has a {name} on the meta device, without numbers"
        if len(users[id(parameter)]) > 1:
            return f"shares its {name} with another module; untie them first"
    return ""


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def _replace(model: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    for parent, name, child in list(_places(model)):
        if child in made:
            setattr(parent, name, made[child])
