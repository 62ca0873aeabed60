"""Bounds of ordinary networks: what a model does with points, done with boxes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusee.bounds.boxes import Box
from fusee.bounds.interval_program import Programs
from fusee.bounds.options import check_model
from fusee.bounds.propagate import IntervalOutput, propagate


class IntervalModel(nn.Module):
    """Bounds of what a network makes of boxes, by interval arithmetic.

    The model is traced with ``torch.fx`` once and shares its parameters and buffers; whatever trains,
    loads or moves the one does so for the other. ReLU is computed with the layer before it, and the last
    linear layer with the classes' differences where margins are asked for.

    There are rules for linear layers, convolutions and transposed ones, batch norm, the activations of
    ``torch.nn`` that never fall or fall to one minimum (GELU, SiLU, Mish, Hardswish), pooling, dropout
    in evaluation, reshaping, sums, averages and concatenation, and arithmetic with constants. A module
    of another kind joins with a method ``interval_forward(center, radius, *, sound)`` that returns
    ``(center, radius)``.

    Batch norm in training uses the statistics of ``input``, the clean batch, with their gradients;
    without one those of the boxes' centers, and then the running statistics stay as they are.

    Args:
        model: a network from one tensor to one tensor, which ``torch.fx`` can trace.

    Attributes:
        model: that network.

    Raises:
        ValueError: the model cannot be traced, or has not one input and one output.
        NotImplementedError: an operation has no rule; the message names it.

    Works under ``torch.compile`` and in training; pickles and copies with the model. The network must
    not be given other layers afterwards.

    Source: see :func:`fusee.interval_linear`; statistics of the clean batch: Shi et al., "Fast certified
    robust training with short warmup", 2021.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> net = fusee.nn.IntervalModel(model)
        >>> x = torch.rand(5, 4)
        >>> lower, upper = net(x - 0.1, x + 0.1)
        >>> bool((lower <= model(x)).all() and (model(x) <= upper).all())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_model(model)
        self.model: nn.Module = model.model if isinstance(model, IntervalModel) else model
        # No module, so that the parameters are not registered again.
        self._programs = Programs(self.model)
        self._programs.build_all()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_programs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._programs = Programs(self.model)
        self._programs.build_all()

    def forward(
        self, lower: Tensor, upper: Tensor, *, input: Tensor | None = None, sound: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the outputs.

        Args:
            lower, upper: the ends of the boxes, in the unit of the model's input: a normalisation
                belongs into the model. Finite, and ``lower <= upper``.
            input: the clean batch, for batch norm in training.
            sound: whether to round outward; see :func:`fusee.interval_linear`. float32 and float64.

        Returns:
            ``(lower, upper)``, each of the shape of the output.

        Raises:
            TypeError: an argument is not a dense floating-point tensor, or the dtypes differ.
            ValueError: shapes or devices differ, an end is infinite, or ``lower`` above ``upper``.
            NotImplementedError: an operation has no rule for ``sound``.
        """
        made = self.propagate(lower, upper, input=input, sound=sound)
        assert made.lower is not None and made.upper is not None
        return made.lower, made.upper

    def margins(
        self,
        lower: Tensor,
        upper: Tensor,
        target: Tensor,
        *,
        input: Tensor | None = None,
        sound: bool = False,
    ) -> Tensor:
        """Upper bounds of how far each class's output may lie above that of ``target`` (batch, classes);
        the boxes for which all others are below zero are certified. Raises as :meth:`forward` does, and
        IndexError where a target is no class."""
        made = self.propagate(lower, upper, target=target, input=input, sound=sound)
        assert made.margins is not None
        return made.margins

    def propagate(
        self,
        lower: Tensor,
        upper: Tensor,
        *,
        target: Tensor | None = None,
        input: Tensor | None = None,
        before_relu: bool = False,
        sound: bool = False,
    ) -> IntervalOutput:
        """All that one pass gives: the arguments of :meth:`forward` and :meth:`margins`, and
        ``before_relu``, whether to keep the boxes before each ReLU."""
        return propagate(
            self._programs, Box(lower, upper), target, input, before_relu=before_relu, sound=sound
        )


def interval_bounds(
    model: nn.Module, lower: Tensor, upper: Tensor, *, sound: bool = False
) -> tuple[Tensor, Tensor]:
    """Bounds of what a network makes of boxes, by interval arithmetic, in one pass over its weights.

    The model is traced at each call; :class:`fusee.nn.IntervalModel` traces it once, gives margins, and
    trains.

    Args:
        model: an ordinary network from one tensor to one tensor; its operations must have rules, which
            :class:`fusee.nn.IntervalModel` lists.
        lower, upper: the ends of the boxes, of one shape, dtype and device, in the unit of the model's
            input; finite, and ``lower <= upper``.
        sound: whether to round outward, so that the bounds hold for the network in exact arithmetic,
            whatever the rounding. By default they have the rounding error of the network itself, a few
            units in the last place for each layer, and may cut off as much.

    Returns:
        ``(lower, upper)``, each of the shape of the output.

    Raises:
        TypeError: an argument is no module or no dense floating-point tensor, or the dtypes differ.
        ValueError: the model cannot be traced; shapes or devices differ; an end is infinite, or
            ``lower`` above ``upper`` (on CUDA and under compile these give NaN). NaN goes through as
            NaN.
        NotImplementedError: an operation has no rule; the message names it.

    Differentiable in the ends and the parameters.

    Source: see :func:`fusee.interval_linear`.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        >>> fusee.interval_bounds(model, torch.zeros(1, 2), torch.ones(1, 2))
        (tensor([[0., 0.]], grad_fn=...), tensor([[1., 2.]], grad_fn=...))
    """
    check_model(model)
    if isinstance(model, IntervalModel):
        return model.forward(lower, upper, sound=sound)
    made = propagate(Programs(model), Box(lower, upper), sound=sound)
    assert made.lower is not None and made.upper is not None
    return made.lower, made.upper
