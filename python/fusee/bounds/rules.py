"""What each operation of a network makes of a box.

A rule is called as the operation is, with a :class:`Box` where that has a tensor; a module's rule gets
the module first. All take ``sound``; those of layers that ReLU may follow take ``relu``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusee.bounds.activation_rules import (
    local_relu,
    local_relu_module,
    monotone_function,
    relu,
    relu_module,
)
from fusee.bounds.boxes import Box
from fusee.bounds.elementwise import (
    add,
    average,
    divide,
    monotone,
    multiply,
    negate,
    subtract,
)
from fusee.bounds.interval_batch_norm import batch_norm_box
from fusee.bounds.interval_conv2d import conv2d_box, convolve_box
from fusee.bounds.interval_linear import linear_box
from fusee.bounds.rule_tables import (
    ALIASES,
    CURVED,
    FUNCTIONS,
    METHODS,
    MODULES,
    WITH_RELU,
    Rule,
    no_sound_rule,
)

__all__ = [
    "ALIASES",
    "CURVED",
    "FUNCTIONS",
    "METHODS",
    "MODULES",
    "WITH_RELU",
    "Rule",
    "batch_norm_module",
    "linear_module",
    "local_relu",
    "local_relu_module",
    "relu",
    "relu_module",
]


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
        FUNCTIONS[getattr(F, name)] = monotone_function(getattr(F, name), exact=True)
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
