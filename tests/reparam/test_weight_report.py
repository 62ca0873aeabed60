"""The report on weights: its numbers by hand, its table, its pictures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fusee.nn import Compander, compand_model, plot_weight_histograms, weight_report
from fusee.reparam import weight_report as implementation
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.reparam.test_compander_model import NAMES, Net, tied


def linear(weight: list[list[float]]) -> nn.Linear:
    w = torch.tensor(weight)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data.copy_(w)
    return layer


# --- numbers --------------------------------------------------------------------------------------


def test_plain_layer() -> None:
    (row,) = weight_report(linear([[3.0, -4.0], [0.2, 0.0]]), near=0.1).rows
    # The root mean square is 2.5.
    assert (row.name, row.shape, row.numel, row.kind) == ("weight", (2, 2), 4, "-")
    assert (row.near_zero, row.largest) == (0.5, 4.0)
    assert (row.saturated, row.a, row.b, row.clamped) == (None, None, None, None)
    assert row.sample.tolist() == [3.0, pytest.approx(-4.0), pytest.approx(0.2), 0.0]


@pytest.mark.parametrize(("near", "share"), [(0.0, 0.25), (0.07, 0.25), (0.09, 0.5), (2.0, 1.0)])
def test_near_zero(near: float, share: float) -> None:
    """Relative to the root mean square of the tensor, so the scale does not matter."""
    for scale in (1.0, 1e-30, 1e30):
        layer = linear([[3.0, -4.0], [0.2, 0.0]])
        layer.weight.data *= scale
        assert weight_report(layer, near=near).near_zero == share


def test_companded_layer() -> None:
    layer = linear([[1.0, -2.0], [0.5, 0.1]])
    compand_model(layer, "tanh", a=2.2, b=1.5)
    (row,) = weight_report(layer, saturated=0.8).rows
    assert (row.kind, row.saturated, row.clamped) == ("tanh", 0.25, 0)
    assert row.largest == pytest.approx(2.0)
    assert row.a == (pytest.approx(2.2),) * 2 and row.b == (1.5, 1.5)
    assert weight_report(layer, saturated=0.95).rows[0].saturated == 0.0


@pytest.mark.parametrize("transposed", [False, True])
def test_channels(transposed: bool) -> None:
    """Each is measured by its own range."""
    weight = torch.tensor([[1.0, 0.5, 0.1], [10.0, 7.0, -9.9]])
    layer = nn.ConvTranspose1d(3, 2, 1) if transposed else nn.Conv1d(3, 2, 1)
    layer.weight.data.copy_((weight.T if transposed else weight).unsqueeze(-1))
    compand_model(layer, "softsign", per_channel=True, headroom=1.05)
    (row,) = weight_report(layer).rows
    assert row.saturated == pytest.approx(3 / 6)
    assert row.a == (pytest.approx(1.05), pytest.approx(10.5))


def test_no_limit() -> None:
    layer = linear([[1.0, -2.0]])
    compand_model(layer, "asinh")
    report = weight_report(layer)
    assert report.rows[0].saturated is report.saturated_share is None
    assert report.rows[0].kind == "asinh" and report.clamped == 0


def test_clamped() -> None:
    layer = linear([[1.0, -2.0]])
    compand_model(layer)
    with pytest.warns(UserWarning, match="1 of 2"):
        layer.weight = torch.tensor([[0.3, 9.0]])
    report = weight_report(layer)
    assert report.clamped == report.rows[0].clamped == 1
    assert report.rows[0].saturated == 0.5


def test_total() -> None:
    model = nn.Sequential(linear([[3.0, -4.0], [0.2, 0.0]]), linear([[1.0, 1.0]]))
    compand_model(model, "tanh", filter=lambda name, _: name == "1", headroom=1.1)
    report = weight_report(model)
    assert (report.numel, report.largest) == (6, 4.0)
    assert report.near_zero == pytest.approx(2 / 6)
    assert report.saturated_share == 1.0  # of those that can be
    assert report.clamped == 0


def test_rows_are_those_of_a_plain_model() -> None:
    """The same before and after, so that they can be compared; and what has a compander otherwise."""
    model = Net()
    before = weight_report(model)
    assert [row.name for row in before.rows] == NAMES
    compand_model(model)
    after = weight_report(model)
    assert [row.name for row in after.rows] == NAMES
    for old, new in zip(before.rows, after.rows, strict=True):
        torch.testing.assert_close(new.sample, old.sample, rtol=1e-6, atol=0)
    compander = Compander(model.embedding.weight)
    parametrize.register_parametrization(model.embedding, "weight", compander)
    assert [row.name for row in weight_report(model).rows] == ["embedding.weight", *NAMES]


def test_shared_parameter_has_one_row() -> None:
    model = tied()
    assert [row.name for row in weight_report(model).rows] == ["0.weight", "3.weight"]
    compand_model(model)
    assert [row.name for row in weight_report(model).rows] == ["0.weight", "3.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_other_parametrisations(norm: Any) -> None:
    model = nn.Sequential(norm(linear([[3.0, -4.0]])), norm(linear([[1.0]])))
    rows = weight_report(model).rows
    assert [row.name for row in rows] == ["0.weight", "1.weight"]
    assert [row.kind for row in rows] == ["-", "-"]
    assert [row.largest for row in rows] == [pytest.approx(4.0), pytest.approx(1.0)]


def test_extremes() -> None:
    (row,) = weight_report(linear([[0.0, 0.0]])).rows
    assert (row.near_zero, row.largest) == (1.0, 0.0)
    (row,) = weight_report(linear([[math.nan, 1.0]])).rows
    assert math.isnan(row.largest) and row.near_zero == 0.0
    assert math.isnan(weight_report(nn.Sequential(linear([[math.nan]]), nn.Linear(1, 1))).largest)
    for per_channel in (False, True):
        layer = nn.Conv1d(3, 2, 1)
        layer.weight = nn.Parameter(torch.empty(0, 3, 1))
        compand_model(layer, per_channel=per_channel)
        (row,) = weight_report(layer).rows
        assert (row.numel, row.near_zero, row.largest, row.saturated) == (0, 0.0, 0.0, 0.0)
    assert weight_report(nn.ReLU()).rows == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = linear([[300.0, -400.0], [20.0, 0.0]]).to(dtype)  # squares leave float16
    compand_model(layer)
    (row,) = weight_report(layer).rows
    assert row.near_zero == 0.5 and row.largest == pytest.approx(400, rel=0.01)


def test_nothing_is_changed() -> None:
    model = Net()
    compand_model(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    report = weight_report(model)
    report.plot()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(row.sample.requires_grad for row in report.rows)
    layer = linear([[1.0]])
    report = weight_report(layer)
    layer.weight.data.fill_(2.0)
    assert report.rows[0].sample.tolist() == [1.0]


def test_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weights are shown by some, the same in every report; the numbers are of all."""
    monkeypatch.setattr(implementation, "SAMPLES", 10)
    layer = nn.Linear(30, 20)
    layer.weight.data[3, 7] = 5.0
    first, second = (weight_report(layer).rows[0] for _ in range(2))
    assert len(first.sample) == 10 and torch.equal(first.sample, second.sample)
    assert first.largest == 5.0


@pytest.mark.parametrize(
    ("model", "options", "error_type", "match"),
    [
        ([nn.ReLU()], {}, TypeError, "model must be a Module, got list"),
        (nn.ReLU(), {"near": "0"}, TypeError, "near must be a number, got str"),
        (nn.ReLU(), {"near": -1.0}, ValueError, "near must be finite and at least zero"),
        (nn.ReLU(), {"saturated": 1.0}, ValueError, r"saturated must be in \(0, 1\), got 1\.0"),
        (nn.ReLU(), {"saturated": True}, TypeError, "saturated must be a number"),
        (nn.Linear(2, 2, device="meta"), {}, ValueError, "weight must have values"),
        (nn.Sequential(nn.LazyLinear(2)), {}, ValueError, r"0\.weight must have values"),
    ],
)
def test_errors(
    model: Any, options: dict[str, Any], error_type: type[Exception], match: str
) -> None:
    with pytest.raises(error_type, match=match):
        weight_report(model, **options)


# --- the table ------------------------------------------------------------------------------------


def test_table() -> None:
    model = nn.Sequential(linear([[3.0, -4.0], [0.2, 0.0]]), nn.Conv1d(3, 2, 1), nn.Linear(40, 30))
    model[1].weight.data.copy_(torch.tensor([[[1.0], [0.5], [0.1]], [[10.0], [7.0], [-9.9]]]))
    model[2].weight.data.fill_(0.25)
    compand_model(model, "tanh", filter=lambda name, _: name == "1", per_channel=True)
    report = weight_report(model, near=0.2)
    assert str(report) == repr(report)
    assert str(report) == (
        "weight    shape      kind  near zero  largest  saturated          a          b  clamped\n"
        "---------------------------------------------------------------------------------------\n"
        "0.weight  2 x 2      -        50.00%        4          -          -          -        -\n"
        "1.weight  2 x 3 x 1  tanh     50.00%       10      0.00%  1.5 to 15  1.2 to 12        0\n"
        "2.weight  30 x 40    -         0.00%     0.25          -          -          -        -\n"
        "---------------------------------------------------------------------------------------\n"
        "total     1,210                0.41%       10      0.00%                              0\n"
        "near zero: |w| <= 0.2 root mean square of its tensor; saturated: |w| > 0.9 of the range"
    )


def test_table_of_a_plain_model() -> None:
    lines = str(weight_report(linear([[1.0]]))).splitlines()
    assert lines[2].split() == ["weight", "1", "x", "1", "-", "0.00%", "1", "-", "-", "-", "-"]
    assert lines[-1] == "near zero: |w| <= 0.1 root mean square of its tensor"
    assert len(str(weight_report(nn.ReLU())).splitlines()) == 5


# --- pictures -------------------------------------------------------------------------------------


def heights(axis: Any) -> list[Tensor]:
    """The curves of a panel, filled ones left out."""
    patches = [p for p in axis.patches if not p.get_fill()]
    return [torch.as_tensor(p.get_data().values) for p in patches]


@pytest.mark.tracing
def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "weights.png"
    figure = weight_report(Net()).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["all weights", *NAMES]
    (single,) = weight_report(nn.Linear(30, 30)).plot().axes
    assert single.get_title() == "weight" and single.get_legend() is None


@pytest.mark.tracing
def test_densities() -> None:
    """Each curve is a density, and two tensors count by their sizes, whatever was sampled."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
    model[0].weight.data.fill_(0.5)
    model[1].weight.data.fill_(-1.0)
    (curve,) = heights(weight_report(model).plot().axes[0])
    filled = curve.nonzero().flatten()
    assert filled.tolist() == [0, len(curve) * 3 // 4]
    width = 2.0 / len(curve)
    assert curve.sum() * width == pytest.approx(1.0)
    assert curve[filled[1]] / curve[filled[0]] == pytest.approx(10.0)


@pytest.mark.tracing
def test_density_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "SAMPLES", 1000)
    test_densities()


@pytest.mark.tracing
def test_comparison(tmp_path: Path) -> None:
    model = Net()
    before = weight_report(model)
    compand_model(model)
    reports = {"plain": before, "companded": weight_report(model), "part": weight_report(model.up)}
    figure = plot_weight_histograms(reports, tmp_path / "weights.svg", layers=3)
    assert (tmp_path / "weights.svg").stat().st_size > 0
    top, *panels = figure.axes
    assert [text.get_text() for text in top.get_legend().get_texts()] == list(reports)
    # The largest three of four, and what only one of the reports has.
    assert [axis.get_title() for axis in panels] == ["conv.weight", "up.weight", "weight"]
    assert [len(heights(axis)) for axis in panels] == [2, 2, 1]
    torch.testing.assert_close(*heights(panels[0]), rtol=0.3, atol=0.3)
    assert len(plot_weight_histograms(reports, layers=0).axes) == 1


@pytest.mark.tracing
def test_picture_of_extremes() -> None:
    model = nn.Sequential(
        linear([[math.nan, 1.0, math.inf]]), linear([[0.0]]), linear([[math.nan]])
    )
    figure = weight_report(model).plot()
    assert [len(heights(axis)) for axis in figure.axes] == [1, 1, 1, 0]


@pytest.mark.tracing
def test_picture_errors() -> None:
    report = weight_report(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers must be at least zero, got -1"):
        report.plot(layers=-1)
    for nothing in (
        {},
        {"none": weight_report(nn.ReLU())},
        {"": weight_report(linear([[math.nan]]))},
    ):
        with pytest.raises(ValueError, match="reports must hold finite weights, got none"):
            plot_weight_histograms(nothing)


@pytest.mark.tracing
def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    report = weight_report(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plotting weights needs matplotlib, .* pip install"):
        report.plot()
