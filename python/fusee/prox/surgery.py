"""Cuts units out of a model, and tells whether its outputs are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fusee.prox.channels import Coupling, Place, call, map_tensors, tensors_of
from fusee.prox.dependencies import torch_pruning


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has an attribute, and the attribute's own name."""
    owner, _, attribute = path.rpartition(".")
    return model.get_submodule(owner), attribute


def zero_units(model: nn.Module, coupling: Coupling) -> Tensor:
    """Which units are exactly zero, as booleans."""
    alive = torch.zeros(coupling.units, dtype=torch.bool)
    for _, parameter, dim, ids in coupling.owned(model):
        slices = (
            parameter.detach().transpose(0, dim).flatten(1) if parameter.dim() > 1 else parameter
        )
        # NaN is not zero.
        some = (slices != 0).reshape(len(slices), -1).any(1).cpu()
        alive[ids[some & (ids >= 0)]] = True
    return ~alive


def spare_one(coupling: Coupling, dead: Tensor) -> tuple[Tensor, list[str]]:
    """The units to be cut, with one kept wherever a layer would lose its last channel; those layers."""
    empty = {place: ids for place, ids in coupling.ids.items() if _all_dead(ids, dead)}
    dead = dead.clone()
    for ids in empty.values():
        if _all_dead(ids, dead):
            dead[ids[0]] = False
    return dead, [place.name for place in empty if place.side == "out"]


def _all_dead(ids: Tensor, dead: Tensor) -> bool:
    return bool(((ids >= 0) & dead[ids]).all())


def zero_out(model: nn.Module, coupling: Coupling, dead: Tensor) -> None:
    """Sets units to zero, in place."""
    with torch.no_grad():
        for _, parameter, dim, ids in coupling.owned(model):
            chosen = ((ids >= 0) & dead[ids]).nonzero().view(-1).to(parameter.device)
            parameter.index_fill_(dim, chosen, 0)


def cut_units(model: nn.Module, cuts: Sequence[tuple[Coupling, Tensor]]) -> None:
    """Cuts units out of all their places, in place. Parameters that change are new ones."""
    tp = torch_pruning()
    removed: dict[Place, Tensor] = {}
    for coupling, dead in cuts:
        for place, ids in coupling.ids.items():
            chosen = (ids >= 0) & dead[ids]
            if bool(chosen.any()):
                removed[place] = removed.get(place, torch.zeros_like(chosen)) | chosen
    work: list[Callable[[], Any]] = []
    for place, chosen in removed.items():
        if place.side == "parameter":
            work.append(_parameter_cut(model, place, ~chosen))
        else:
            module = model.get_submodule(place.name)
            # By what the layer was before: a grouped convolution may become a depthwise one.
            pruner = tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
            prune = pruner.prune_out_channels if place.side == "out" else pruner.prune_in_channels
            work.append(_module_cut(prune, module, chosen.nonzero().view(-1).tolist()))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for step in work:
            step()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    for coupling, dead in cuts:
        for path in coupling.head_counts:
            owner, attribute = owner_of(model, path)
            setattr(owner, attribute, getattr(owner, attribute) - int(dead.sum()))


def _module_cut(prune: Callable[..., Any], module: nn.Module, channels: list[int]) -> Any:
    return lambda: prune(module, channels)


def _parameter_cut(model: nn.Module, place: Place, kept: Tensor) -> Any:
    def cut() -> None:
        owner, attribute = owner_of(model, place.name)
        parameter = getattr(owner, attribute)
        chosen = kept.nonzero().view(-1).to(parameter.device)
        setattr(owner, attribute, nn.Parameter(parameter.detach().index_select(place.dim, chosen)))

    return cut


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The outputs without gradients; whatever a model draws at random is the same each time."""
    device = tensors_of(example_inputs)[0].device
    elsewhere = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with (
        torch.random.fork_rng(elsewhere, device_type=kind),
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
    ):
        torch.manual_seed(0)
        return [tensor.detach().clone() for tensor in tensors_of(call(model, example_inputs))]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class Trial:
    """A copy of a model in float64, in evaluation mode, with which a cut is tried.

    A model that does not run in float64 is tried as it is, with a wider tolerance.

    Args:
        model: the model.
        example_inputs: what it is run on.
        perturbed: whether its parameters are moved a little. What is zero or one at the start, as a
            scale that begins at zero, could hide what a cut changes.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, *, perturbed: bool = False) -> None:
        self.model, self.inputs, self.tolerance = deepcopy(model).eval(), example_inputs, 1e-6
        try:
            double = deepcopy(self.model).double()
            inputs = map_tensors(example_inputs, _double)
            outputs_of(double, inputs)
            self.model, self.inputs = double, inputs
        except Exception:
            # Some layers make float32 themselves, and some devices have no float64.
            self.tolerance = 1e-3
        if perturbed:
            moved = deepcopy(self.model)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in moved.parameters():
                    if parameter.is_floating_point() and parameter.numel():
                        size = parameter.double().square().mean().sqrt().clamp(min=0.1).item()
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.add_(noise.to(parameter), alpha=0.1 * size)
            if all(bool(out.isfinite().all()) for out in outputs_of(moved, self.inputs)):
                self.model = moved

    def difference(self, cuts: Sequence[tuple[Coupling, Tensor]]) -> str | None:
        """What changes when the units are first set to zero and then cut; None if nothing does."""
        zeroed = deepcopy(self.model)
        for coupling, dead in cuts:
            zero_out(zeroed, coupling, dead)
        wanted = outputs_of(zeroed, self.inputs)
        try:
            cut_units(zeroed, cuts)
            found = outputs_of(zeroed, self.inputs)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            return f"the model does not run without its channels: {type(error).__name__}: {text[0]}"
        if [out.shape for out in found] != [out.shape for out in wanted]:
            return "its channels are outputs of the model"
        for ours, theirs in zip(found, wanted, strict=True):
            if not ours.is_floating_point():
                same = torch.equal(ours, theirs)
                gap = 1.0
            else:
                finite = theirs[theirs.isfinite()]
                scale = float(finite.abs().max()) if finite.numel() else 0.0
                same = torch.allclose(
                    ours, theirs, rtol=0.0, atol=self.tolerance * scale, equal_nan=True
                )
                gap = float((ours - theirs).abs().max()) / scale if scale else 1.0
            if not same:
                return f"to cut its channels changes the outputs, by {gap:.2g} of the largest"
        return None
