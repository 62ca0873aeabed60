"""Ramps: their ends, that they are continuous, and the published schedule."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
from fusee.optim import LinearRamp, SmoothRamp

BOTH = [LinearRamp, SmoothRamp]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.3), (1.0, 0.5), (1e-6, 0.1), (2, -2)])
def test_ends_and_direction(kind: Any, start: float, end: float) -> None:
    ramp = kind(start, end, 7, 29)
    assert ramp(-5) == ramp(7) == start and ramp(29) == ramp(10**9) == end
    values = [ramp(7 + 22 * i / 1000) for i in range(1001)]
    signs = [(b - a) * (end - start) for a, b in itertools.pairwise(values)]
    assert min(signs) >= 0
    assert isinstance(ramp(8), float) and isinstance(ramp(0), float)


def test_linear_values() -> None:
    ramp = LinearRamp(1.0, 0.5, 10, 50)
    assert [ramp(s) for s in (10, 20, 30, 50)] == pytest.approx([1.0, 0.875, 0.75, 0.5])


@pytest.mark.parametrize(("beta", "middle"), [(4.0, 0.25), (2.0, 0.5), (1.0, 0.3), (6.0, 1.0)])
def test_value_and_slope_are_continuous(beta: float, middle: float) -> None:
    """Of any two neighbours, however near: no jump of the value, nor of the slope inside the ramp."""
    ramp = SmoothRamp(0.0, 1.0, 0, 100, beta, middle)
    step = 1e-3
    values = [ramp(i * step) for i in range(int(100 / step) + 1)]
    slopes = [(b - a) / step for a, b in itertools.pairwise(values)]
    bends = [abs(b - a) for a, b in itertools.pairwise(slopes)]
    # The second derivative is largest at the middle, where the power ends.
    at_middle = 100 * middle
    curvature = max(abs(ramp.beta * (ramp.beta - 1)), 1) * max(slopes) / at_middle
    assert max(b - a for a, b in itertools.pairwise(values)) <= step * max(slopes) * 1.001
    assert max(bends) <= 2 * curvature * step + 1e-9
    assert values[-1] == 1


def published(step: int, first: int, last: int, start: float, end: float) -> float:
    """The schedule as the authors' code writes it: beta 4, a quarter."""
    beta = 4.0
    middle = first + math.floor(0.25 * (last - first))
    t = (middle - first) ** (beta - 1)
    alpha = (end - start) / ((last - middle) * beta * t + (middle - first) * t)
    if step <= middle:
        return start + alpha * (step - first) ** beta
    value = start + alpha * (middle - first) ** beta
    return value + (end - value) * (step - middle) / (last - middle)


def test_the_published_schedule() -> None:
    ramp = SmoothRamp(0.1, 0.4, 20, 420)
    for step in range(20, 421):
        assert ramp(step) == pytest.approx(published(step, 20, 420, 0.1, 0.4), rel=1e-12)


def test_special_cases() -> None:
    jump = SmoothRamp(0.0, 1.0, 3, 3)
    assert (jump(2.999), jump(3), jump(4)) == (0.0, 1.0, 1.0)
    straight, smooth = LinearRamp(0.0, 2.0, 0, 8), SmoothRamp(0.0, 2.0, 0, 8, beta=1)
    assert all(straight(s) == pytest.approx(smooth(s)) for s in range(9))
    power = SmoothRamp(0.0, 1.0, 0, 10, beta=3, middle=1)
    assert power(5) == pytest.approx(0.125)


@pytest.mark.parametrize("kind", BOTH)
def test_copies(kind: Any) -> None:
    ramp = kind(0.0, 0.3, 10, 20)
    for other in (pickle.loads(pickle.dumps(ramp)), copy.deepcopy(ramp)):
        assert other == ramp and other(13) == ramp(13)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "start must be a number, got str", lambda: LinearRamp("0", 1, 0, 1)),  # type: ignore[arg-type]
        (TypeError, "last_step must be a number, got bool", lambda: LinearRamp(0, 1, 0, True)),
        (ValueError, "end must be finite", lambda: LinearRamp(0, math.inf, 0, 1)),
        (ValueError, "start must be in", lambda: LinearRamp(math.nan, 1, 0, 1)),
        (ValueError, "last_step must not be before first_step 5", lambda: SmoothRamp(0, 1, 5, 4)),
        (ValueError, "beta must be in", lambda: SmoothRamp(0, 1, 0, 1, beta=0.5)),
        (ValueError, "beta must be finite", lambda: SmoothRamp(0, 1, 0, 1, beta=math.inf)),
        (ValueError, "middle positive", lambda: SmoothRamp(0, 1, 0, 1, middle=0)),
        (ValueError, "middle must be in", lambda: SmoothRamp(0, 1, 0, 1, middle=1.5)),
        (TypeError, "step must be a number, got NoneType", lambda: LinearRamp(0, 1, 0, 1)(None)),  # type: ignore[arg-type]
        (ValueError, "step must be in", lambda: LinearRamp(0, 1, 0, 1)(math.nan)),
    ],
)
def test_errors(error: type[Exception], match: str, make: Any) -> None:
    with pytest.raises(error, match=match):
        make()
