"""The rules of activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fusee.bounds.boxes import Box
from fusee.bounds.elementwise import monotone, single_minimum
from fusee.bounds.interval_affine import affine_box
from fusee.bounds.rule_tables import CURVED, FUNCTIONS, METHODS, MODULES, Rule, no_sound_rule


def relu(box: Box, inplace: bool = False, *, sound: bool = False) -> Box:
    return affine_box(box, None, None, relu=True, sound=sound)


def relu_module(module: nn.ReLU, box: Box, *, sound: bool = False) -> Box:
    return relu(box, sound=sound)


def local_relu(box: Box, inplace: bool = False, *, sound: bool = False) -> Box:
    """ReLU as the linear function that it is at the center."""
    active = box.center >= 0
    return Box(*(torch.where(active, part, 0) for part in box))


def local_relu_module(module: nn.ReLU, box: Box, *, sound: bool = False) -> Box:
    return local_relu(box)


def monotone_function(function: Any, exact: bool) -> Rule:
    """The rule of a function that never falls; ``exact`` where torch's is within four units in the last
    place."""

    def rule(box: Box, *args: Any, sound: bool = False, **named: Any) -> Box:
        if sound and not exact:
            raise no_sound_rule(function.__name__)
        named.pop("inplace", None)
        return monotone(lambda x: function(x, *args, **named), box, sound)

    return rule


def _monotone_module(exact: bool) -> Rule:
    def rule(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
        if sound and not exact:
            raise no_sound_rule(type(module).__name__)
        return monotone(module, box, sound)

    return rule


def falling(what: str) -> NotImplementedError:
    return NotImplementedError(f"no interval rule for {what}, with which the function falls")


def leaky_relu(
    box: Box, negative_slope: float = 0.01, inplace: bool = False, *, sound: bool = False
) -> Box:
    if negative_slope < 0:
        raise falling(f"leaky_relu with {negative_slope=}")
    return monotone(lambda x: F.leaky_relu(x, negative_slope), box, sound)


def elu(box: Box, alpha: float = 1.0, inplace: bool = False, *, sound: bool = False) -> Box:
    if alpha < 0:
        raise falling(f"elu with {alpha=}")
    return monotone(lambda x: F.elu(x, alpha), box, sound)


def celu(box: Box, alpha: float = 1.0, inplace: bool = False, *, sound: bool = False) -> Box:
    if sound:
        raise no_sound_rule("celu")
    if alpha < 0:
        raise falling(f"celu with {alpha=}")
    return monotone(lambda x: F.celu(x, alpha), box)


def softplus(box: Box, beta: float = 1.0, threshold: float = 20.0, *, sound: bool = False) -> Box:
    if sound:
        raise no_sound_rule("softplus")
    # It falls at the threshold, by log(1 + exp(-threshold)) / beta.
    if beta <= 0 or threshold < 20:
        raise falling(f"softplus with {beta=}, {threshold=}")
    return monotone(lambda x: F.softplus(x, beta, threshold), box)


def _of_options(rule: Rule, *names: str) -> Rule:
    """The rule of a module with the options of a function."""

    def of_module(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
        return rule(box, **{name: getattr(module, name) for name in names}, sound=sound)

    return of_module


MODULES[nn.ReLU] = relu_module
MODULES[nn.LeakyReLU] = _of_options(leaky_relu, "negative_slope")
MODULES[nn.ELU], MODULES[nn.CELU] = _of_options(elu, "alpha"), _of_options(celu, "alpha")
MODULES[nn.Softplus] = _of_options(softplus, "beta", "threshold")
FUNCTIONS.update({F.leaky_relu: leaky_relu, F.elu: elu, F.celu: celu, F.softplus: softplus})
FUNCTIONS.update(dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_), relu))
METHODS["relu"] = METHODS["relu_"] = relu
MODULES.update(
    dict.fromkeys((nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.ReLU6), _monotone_module(exact=True))
)
MODULES.update(
    dict.fromkeys(
        (nn.SELU, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign),
        _monotone_module(exact=False),
    )
)
_exact = (torch.sigmoid, torch.tanh, F.hardtanh, F.relu6)
_inexact = (F.selu, F.hardsigmoid, F.logsigmoid, F.softsign, torch.exp)
FUNCTIONS.update({f: monotone_function(f, exact=True) for f in _exact})
FUNCTIONS.update({f: monotone_function(f, exact=False) for f in _inexact})
for name in ("sigmoid", "tanh"):
    METHODS[name] = FUNCTIONS[getattr(torch, name)]
FUNCTIONS[F.sigmoid], FUNCTIONS[F.tanh] = METHODS["sigmoid"], METHODS["tanh"]

# Where these have their only minimum.
_MINIMA = {
    F.gelu: -0.7517916243,
    F.silu: -1.2784645428,
    F.mish: -1.1924312116,
    F.hardswish: -1.5,
}


def _single_minimum(function: Any, what: str) -> Rule:
    def rule(box: Box, *args: Any, sound: bool = False, **named: Any) -> Box:
        approximate = named.get("approximate", "none")
        if sound:
            raise no_sound_rule(what)
        if approximate != "none":
            raise NotImplementedError(f"no interval rule for {what} with {approximate=}")
        return single_minimum(function, _MINIMA[function], box)

    return rule


def _single_minimum_module(rule: Rule) -> Rule:
    def of_module(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
        return rule(box, sound=sound, approximate=getattr(module, "approximate", "none"))

    return of_module


FUNCTIONS.update({f: _single_minimum(f, f.__name__) for f in _MINIMA})
MODULES[nn.GELU] = _single_minimum_module(FUNCTIONS[F.gelu])
MODULES[nn.SiLU] = _single_minimum_module(FUNCTIONS[F.silu])
MODULES[nn.Mish] = _single_minimum_module(FUNCTIONS[F.mish])
MODULES[nn.Hardswish] = _single_minimum_module(FUNCTIONS[F.hardswish])
CURVED |= {*MODULES.values(), *FUNCTIONS.values(), *METHODS.values()}
CURVED -= {relu, relu_module}
