"""Tests of the harness itself: each of its measures and samples must be able to say no."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import _cell
from tests.harness.helpers import naming, value_and_grad
from tests.harness.layouts import LAYOUTS
from tests.harness.measure import check_error, relative_error, same_bits, ulps
from tests.harness.spec import Maker, OpSpec, Sample, detached, of_floats, select


def test_relative_error() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(x + torch.tensor([0, 0.05]), x) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(torch.tensor([1.0, math.nan]), x) == math.inf
    infinite = torch.tensor([math.inf, 1.0])
    assert relative_error(infinite, infinite) == 0
    assert relative_error(-infinite, infinite) == math.inf
    assert relative_error(torch.tensor([0.25]), torch.zeros(1)) == 0.25
    with pytest.raises(AssertionError, match="shape"):
        relative_error(x, x[:1])


def test_ulps() -> None:
    one = torch.ones(3)
    assert ulps(one, one) == 0
    assert ulps(torch.nextafter(one, 2 * one), one) == pytest.approx(1)
    assert ulps(one * math.nan, one) == math.inf
    assert ulps(one * math.nan, one * math.nan) == 0
    small = torch.tensor([1e-7])
    assert ulps(-small, small) > 1e6
    assert ulps(-small, small, least=1.0) < 2


def test_same_bits() -> None:
    zero = torch.zeros(2)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    nan = torch.full((2,), math.nan)
    assert same_bits(nan, nan.clone())


def test_error_bound() -> None:
    """Twice the straightforward error passes, three times does not, and the cap holds."""
    exact = torch.ones(4, dtype=torch.float64)
    plain = (exact * (1 + 3e-6)).float()
    check_error((exact * (1 + 5e-6)).float(), plain, exact, "x")
    with pytest.raises(AssertionError, match="bound"):
        check_error((exact * (1 + 9e-6)).float(), plain, exact, "x")
    rough = (exact * (1 + 1e-3)).float()
    check_error((exact * (1 + 1e-4)).float(), rough, exact, "x", torch.bfloat16)
    with pytest.raises(AssertionError, match="bound"):
        check_error((exact * (1 + 1e-4)).float(), rough, exact, "x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Layouts keep shape and dtype, and (unless they expand) values, in another place of memory."""
    x = torch.arange(24.0).view(2, 3, 4)
    moved = LAYOUTS[layout](x)
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype
    assert not moved.is_contiguous() or moved.storage_offset() == 1
    assert torch.equal(moved, x) or layout.startswith("expanded")
    for other in (torch.tensor(1.0), torch.zeros(0, 3), torch.arange(6).view(2, 3)):
        assert LAYOUTS[layout](other).shape == other.shape


def test_makers_agree() -> None:
    """The same seed gives the same numbers in every dtype."""
    single, double = Maker(torch.float32), Maker(torch.float64)
    assert torch.equal(single.normal(5), double.normal(5).float())
    assert torch.equal(single.integers(9, 5), double.integers(9, 5))
    assert not torch.equal(Maker(torch.float32).normal(5), Maker(torch.float32, seed=1).normal(5))


def test_arguments() -> None:
    arguments = {"x": torch.ones(2), "n": 3, "y": torch.ones(2, dtype=torch.int64)}
    doubles = of_floats(arguments, torch.float64)
    assert doubles["x"].dtype == torch.float64
    assert doubles["y"].dtype == torch.int64
    leaves = detached(arguments, ["x"])
    assert leaves["x"].requires_grad and not arguments["x"].requires_grad
    output, grads = value_and_grad(lambda x, n, y: x * n, arguments, ["x"], torch.ones_like)
    assert torch.equal(grads["x"], torch.full((2,), 3.0))
    assert not output.requires_grad


def test_select() -> None:
    samples = [
        Sample("a", {}, tiny=True),
        Sample("b", {}),
        Sample("c", {}, tiny=True, smooth=False),
    ]
    samples.append(Sample("d", {}, emulated=False))
    assert [s.name for s in select(samples, tiny=False)] == ["a", "b", "c", "d"]
    assert [s.name for s in select(samples, tiny=True)] == ["a", "c"]
    assert [s.name for s in select(samples, tiny=True, smooth=True)] == ["a"]
    assert [s.name for s in select(samples, tiny=False, emulated=True)] == ["a", "b", "c"]


def test_naming() -> None:
    with pytest.raises(AssertionError, match=r"\[sample 3\] ValueError: no"), naming("sample 3"):
        raise ValueError("no")


def test_samples_of_records(spec: OpSpec, dtype: torch.dtype) -> None:
    """Names are unique, there are tiny, smooth, empty and non-tiny samples, and errors of shape."""
    samples = list(spec.samples(spec.make(dtype)))
    assert len({s.name for s in samples}) == len(samples)
    assert any(s.tiny and s.smooth for s in samples)
    assert any(not s.tiny for s in samples)
    assert any(t.numel() == 0 for s in samples for t in spec.tensors(s.arguments).values())
    assert all(
        t.numel() <= 200 for s in samples if s.tiny for t in spec.tensors(s.arguments).values()
    )
    assert list(spec.error_inputs(spec.make(dtype)))
    assert spec.sized(spec.make(dtype), 3).keys() >= spec.batch_dims.keys()


def test_reasons(spec: OpSpec) -> None:
    """What does not apply is the name of a check, and has a reason."""
    from tests.harness.table import TESTS

    text = "".join(path.read_text() for path in TESTS.glob("**/test_*.py"))
    for check, reason in spec.not_applicable.items():
        assert reason
        assert f"def test_{check}(" in text or check in ("traffic", "cuda_kernels"), check


def test_capability_cells() -> None:
    """A failure anywhere shows, and a skipped device does not look as if it had passed."""
    assert _cell({("cpu", "passed"), ("cuda", "skipped")}) == "cpu"
    assert _cell({("cpu", "passed"), ("cuda", "passed")}) == "cpu+cuda"
    assert _cell({("cuda", "skipped")}) == _cell(set()) == "not run"
    assert _cell({("cpu", "passed"), ("cpu", "failed")}) == "FAIL"
