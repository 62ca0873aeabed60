"""What each operation of a network makes of a box.

A rule is called as the operation is, with a :class:`Box` where that has a tensor; a module's rule gets
the module first. All take ``sound``; those of layers that ReLU may follow take ``relu``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusee.bounds.boxes import Box
from fusee.bounds.elementwise import (
    add,
    average,
    divide,
    monotone,
    multiply,
    negate,
    single_minimum,
    subtract,
)
from fusee.bounds.interval_affine import affine_box
from fusee.bounds.interval_batch_norm import batch_norm_box
from fusee.bounds.interval_conv2d import conv2d_box, convolve_box
from fusee.bounds.interval_linear import linear_box

Rule = Callable[..., Any]
MODULES: dict[type[nn.Module], Rule] = {}
FUNCTIONS: dict[Any, Rule] = {}
METHODS: dict[str, Rule] = {}
WITH_RELU: set[Rule] = set()
"""The rules that take ``relu``."""
ALIASES: set[Rule] = set()
"""The rules of what may return its input, or a part of it, in the same memory."""
CURVED: set[Rule] = set()
"""The rules of what is not linear, ReLU aside."""


def no_sound_rule(what: str) -> NotImplementedError:
    return NotImplementedError(f"no sound interval rule for {what}; sound=False has one")


# --- layers -----------------------------------------------------------------------------------------
def linear(box: Box, weight: Tensor, bias: Tensor | None = None, **how: bool) -> Box:
    return linear_box(box, weight, bias, **how)


def linear_module(module: nn.Linear, box: Box, **how: bool) -> Box:
    return linear_box(box, module.weight, module.bias, **how)


def conv2d(
    box: Box, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any
) -> Box:
    return conv2d_box(box, weight, bias, *options, **named)


def conv_module(module: Any, box: Box, *, relu: bool = False, sound: bool = False) -> Box:
    padding = module.padding
    if module.padding_mode != "zeros":
        # Copies of what lies at the borders, of center and radius alike.
        sides = module._reversed_padding_repeated_twice
        box = Box(*(F.pad(part, sides, mode=module.padding_mode) for part in box))
        padding = 0
    options = (module.stride, padding, module.dilation, module.groups)
    if isinstance(module, nn.Conv2d):
        return conv2d_box(box, module.weight, module.bias, *options, relu=relu, sound=sound)
    if sound:
        raise no_sound_rule(type(module).__name__)
    convolution = F.conv1d if isinstance(module, nn.Conv1d) else F.conv3d
    return convolve_box(convolution, box, module.weight, module.bias, relu, options)


def conv_transpose_module(
    module: Any, box: Box, output_size: Any = None, *, relu: bool = False, sound: bool = False
) -> Box:
    if output_size is not None:
        raise NotImplementedError("no interval rule for a transposed convolution with output_size")
    if sound:
        raise no_sound_rule(type(module).__name__)
    one, two = isinstance(module, nn.ConvTranspose1d), isinstance(module, nn.ConvTranspose2d)
    convolution = F.conv_transpose1d if one else F.conv_transpose2d if two else F.conv_transpose3d
    options = (
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
        module.dilation,
    )
    return convolve_box(convolution, box, module.weight, module.bias, relu, options)


def batch_norm_module(
    module: Any,
    box: Box,
    *,
    clean: Tensor | None = None,
    relu: bool = False,
    sound: bool = False,
) -> Box:
    """With the statistics that the module uses: in training those of the clean batch where there is one,
    and else of the centers."""
    batch_statistics = module.training or module.running_mean is None
    if batch_statistics and not module.training and module.track_running_stats:
        raise ValueError("batch norm in eval mode has no running statistics")
    if batch_statistics:
        if sound:
            raise no_sound_rule("batch norm of a batch's own statistics")
        points = box.center if clean is None else clean
        if points.numel() // max(points.shape[1], 1) <= 1:
            raise ValueError(
                "batch norm in training needs more than one value for each channel, got shape "
                f"{tuple(points.shape)}"
            )
        dims = [d for d in range(points.dim()) if d != 1]
        # In two steps, which torch computes several times as fast as torch.var_mean.
        mean = points.mean(dims)
        shape = [-1 if d == 1 else 1 for d in range(points.dim())]
        var = (points - mean.view(shape)).square().mean(dims)
    else:
        mean, var = module.running_mean, module.running_var
    return batch_norm_box(box, mean, var, module.weight, module.bias, module.eps, relu, sound)


MODULES.update(
    dict.fromkeys((nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear), linear_module)
)
MODULES.update(dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), conv_module))
MODULES.update(
    dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), conv_transpose_module
    )
)
MODULES.update(dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm_module))
FUNCTIONS[F.linear] = linear
FUNCTIONS[F.conv2d] = FUNCTIONS[torch.conv2d] = conv2d
WITH_RELU |= {linear, linear_module, conv2d, conv_module, conv_transpose_module, batch_norm_module}


# --- activations ------------------------------------------------------------------------------------
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


def _monotone_function(function: Any, exact: bool) -> Rule:
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
FUNCTIONS.update({f: _monotone_function(f, exact=True) for f in _exact})
FUNCTIONS.update({f: _monotone_function(f, exact=False) for f in _inexact})
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
CURVED -= {relu, relu_module, *WITH_RELU}


# --- pooling ----------------------------------------------------------------------------------------
def _ends_module(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
    """Largest values never fall, and none is computed."""
    if getattr(module, "return_indices", False):
        raise NotImplementedError("no interval rule for the indices of largest values")
    return monotone(module, box, sound)


def _average_module(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
    return average(module, box, sound)


def _average_function(function: Any) -> Rule:
    def rule(box: Box, *args: Any, sound: bool = False, **named: Any) -> Box:
        if sound and named.get("dtype") is not None:
            raise no_sound_rule(f"{function.__name__} in another dtype")
        return average(lambda x: function(x, *args, **named), box, sound)

    return rule


for d in (1, 2, 3):
    for name in (f"MaxPool{d}d", f"AdaptiveMaxPool{d}d"):
        MODULES[getattr(nn, name)] = _ends_module
    for name in (f"AvgPool{d}d", f"AdaptiveAvgPool{d}d"):
        MODULES[getattr(nn, name)] = _average_module
    for name in (f"max_pool{d}d", f"adaptive_max_pool{d}d"):
        FUNCTIONS[getattr(F, name)] = _monotone_function(getattr(F, name), exact=True)
        CURVED |= {_ends_module, FUNCTIONS[getattr(F, name)]}
    for name in (f"avg_pool{d}d", f"adaptive_avg_pool{d}d"):
        FUNCTIONS[getattr(F, name)] = _average_function(getattr(F, name))
METHODS["mean"] = FUNCTIONS[torch.mean] = _average_function(torch.mean)
METHODS["sum"] = FUNCTIONS[torch.sum] = _average_function(torch.sum)


# --- shapes -----------------------------------------------------------------------------------------
def _both(function: Any) -> Rule:
    """The rule of what moves elements without computing."""

    def rule(box: Box, *args: Any, sound: bool = False, **named: Any) -> Box:
        return Box(*(function(part, *args, **named) for part in box))

    return rule


def _cast(function: Any) -> Rule:
    def rule(box: Box, *args: Any, sound: bool = False, **named: Any) -> Box:
        if sound:
            raise no_sound_rule(function.__name__)
        made = Box(*(function(part, *args, **named) for part in box))
        if not made.center.is_floating_point():
            raise NotImplementedError(f"no interval rule for a cast to {made.center.dtype}")
        return made

    return rule


def _attribute(box: Box, name: str, *, sound: bool = False) -> Box:
    if name not in ("T", "mT", "data"):
        raise NotImplementedError(f"no interval rule for the attribute {name!r} of a tensor")
    return Box(*(getattr(part, name) for part in box))


def _both_module(module: nn.Module, box: Box, *, sound: bool = False) -> Box:
    return Box(*(module(part) for part in box))


def concatenate(boxes: Any, dim: int = 0, *, axis: int | None = None, sound: bool = False) -> Box:
    dim = dim if axis is None else axis
    pairs = [box if isinstance(box, Box) else Box(box, torch.zeros_like(box)) for box in boxes]
    return Box(*(torch.cat(parts, dim) for parts in zip(*pairs, strict=True)))


def stack(boxes: Any, dim: int = 0, *, sound: bool = False) -> Box:
    pairs = [box if isinstance(box, Box) else Box(box, torch.zeros_like(box)) for box in boxes]
    return Box(*(torch.stack(parts, dim) for parts in zip(*pairs, strict=True)))


def pad(
    box: Box, pad: Any, mode: str = "constant", value: float | None = None, *, sound: bool = False
) -> Box:
    """What is added is exact, or a copy."""
    of_radius = 0.0 if mode == "constant" else None
    return Box(F.pad(box.center, pad, mode, value), F.pad(box.radius, pad, mode, of_radius))


def zero_pad_module(module: Any, box: Box, *, sound: bool = False) -> Box:
    return pad(box, module.padding)


def dropout_module(module: Any, box: Box, *, sound: bool = False) -> Box:
    return dropout(box, module.p, module.training)


def dropout(
    box: Box, p: float = 0.5, training: bool = True, inplace: bool = False, *, sound: bool = False
) -> Box:
    if training and p > 0:
        raise NotImplementedError("no interval rule for dropout in training mode")
    return box


MODULES.update(dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity), _both_module))
MODULES.update(
    dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), dropout_module)
)
MODULES.update(dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), zero_pad_module))
FUNCTIONS.update({F.dropout: dropout, F.pad: pad, torch.stack: stack})
FUNCTIONS[torch.cat] = FUNCTIONS[torch.concat] = concatenate
_moves = (
    *("flatten", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "movedim"),
    *("chunk", "split"),
)
for name in _moves:
    FUNCTIONS[getattr(torch, name)] = _both(getattr(torch, name))
    METHODS[name] = _both(getattr(torch.Tensor, name))
for name in ("view", "contiguous", "unflatten", "expand", "clone", "detach"):
    METHODS[name] = _both(getattr(torch.Tensor, name))
for name in ("to", "float", "double"):
    METHODS[name] = _cast(getattr(torch.Tensor, name))
FUNCTIONS[operator.getitem] = _both(operator.getitem)
FUNCTIONS[getattr] = _attribute
ALIASES |= {MODULES[kind] for kind in (nn.Flatten, nn.Dropout)} | {FUNCTIONS[F.dropout], _attribute}
ALIASES |= {FUNCTIONS[operator.getitem], *(METHODS[name] for name in ("to", "float", "double"))}
for name in _moves:
    ALIASES |= {FUNCTIONS[getattr(torch, name)], METHODS[name]}
ALIASES |= {METHODS[name] for name in ("view", "contiguous", "unflatten", "expand", "detach")}

# --- arithmetic -------------------------------------------------------------------------------------
FUNCTIONS.update(dict.fromkeys((operator.add, operator.iadd, torch.add), add))
FUNCTIONS.update(dict.fromkeys((operator.sub, operator.isub, torch.sub), subtract))
FUNCTIONS.update(dict.fromkeys((operator.mul, operator.imul, torch.mul), multiply))
FUNCTIONS.update(dict.fromkeys((operator.truediv, operator.itruediv, torch.div), divide))
FUNCTIONS[operator.neg] = FUNCTIONS[torch.neg] = negate
METHODS.update({"add": add, "sub": subtract, "mul": multiply, "div": divide, "neg": negate})
METHODS.update({"add_": add, "sub_": subtract, "mul_": multiply, "div_": divide})
