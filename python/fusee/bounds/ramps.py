"""Numbers that change in the course of a training: the radius of the boxes, the weight of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from fusee.bounds.options import check_number


@dataclass(frozen=True)
class LinearRamp:
    """A number that goes from one value to another in a straight line.

    Args:
        start, end: its value up to ``first_step``, and from ``last_step`` on. Either may be the larger.
        first_step, last_step: in any unit, such as steps of the optimiser or epochs, fractions too. If
            they are equal, the value jumps there.

    Called with a step it returns the value, a float. It has no state.

    Raises:
        TypeError: an argument is no number.
        ValueError: one is not finite, or ``last_step`` is before ``first_step``.

    Deterministic.

    Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
    robust models", 2018, section 5.

    Example:
        >>> import fusee
        >>> eps = fusee.optim.LinearRamp(0.0, 0.3, first_step=10, last_step=20)
        >>> eps(5), eps(15), eps(1000)
        (0.0, 0.15, 0.3)
    """

    start: float
    end: float
    first_step: float
    last_step: float

    def __post_init__(self) -> None:
        for name in ("start", "end", "first_step", "last_step"):
            check_number(name, getattr(self, name), -inf, inf)
            if abs(getattr(self, name)) == inf:
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.last_step < self.first_step:
            raise ValueError(
                f"last_step must not be before first_step {self.first_step}, got {self.last_step}"
            )

    def __call__(self, step: float) -> float:
        check_number("step", step, -inf, inf)
        if step >= self.last_step:
            return float(self.end)
        if step <= self.first_step:
            return float(self.start)
        share = self._share((step - self.first_step) / (self.last_step - self.first_step))
        return float(self.start + (self.end - self.start) * share)

    def _share(self, done: float) -> float:
        """Of the way from start to end, after so much of the ramp."""
        return done


@dataclass(frozen=True)
class SmoothRamp(LinearRamp):
    r"""A number that leaves its first value slowly, as a power, and then goes on in a straight line.

    After the share s of the ramp it has gone the share

    .. math:: p(s) = a\, s^\beta \;\;(s \le m), \qquad
              p(s) = a\, m^\beta + a \beta m^{\beta - 1} (s - m) \;\;(s > m)

    of the way, with a such that p(1) = 1. Value and slope are continuous, but for the slope at the end.
    So the radius of the boxes grows by little while the bounds are still loose.

    Args:
        start, end, first_step, last_step: see :class:`fusee.optim.LinearRamp`.
        beta: the power β, at least 1, which makes it linear.
        middle: m, the share of the ramp after which the line begins, in (0, 1]. The authors' code rounds
            this step down to a whole one.

    Raises:
        TypeError: an argument is no number.
        ValueError: one is out of range; see :class:`fusee.optim.LinearRamp`.

    Deterministic.

    Source: the schedule of Gowal et al., 2018, in their code and in that of Xu et al., "Automatic
    perturbation analysis for scalable certified robustness and beyond", 2020.

    Example:
        >>> import fusee
        >>> eps = fusee.optim.SmoothRamp(0.0, 1.0, first_step=0, last_step=100)
        >>> [round(eps(step), 4) for step in (0, 10, 25, 50, 100)]
        [0.0, 0.002, 0.0769, 0.3846, 1.0]
    """

    beta: float = 4.0
    middle: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 1, inf)
        check_number("middle", self.middle, 0, 1)
        if self.beta == inf or self.middle == 0:
            raise ValueError(
                f"beta must be finite and middle positive, got {self.beta} and {self.middle}"
            )

    def _share(self, done: float) -> float:
        beta, middle = self.beta, self.middle
        # Over the value at the middle, where the slope is beta / middle.
        whole = 1 + beta * (1 - middle) / middle
        if done <= middle:
            return (done / middle) ** beta / whole
        return (1 + beta * (done - middle) / middle) / whole
