"""Certification: against counts made one by one, and what cannot be counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.bounds.networks import convolutional, fully_connected, settled


def data(samples: int, features: int) -> tuple[Tensor, Tensor]:
    """Points of the unit cube, and which third of its first axis they lie in."""
    torch.manual_seed(0)
    x = torch.rand(samples, features)
    return x, (3 * x[:, 0]).long().clamp(max=2)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that reads most of such points."""
    x, y = data(400, 4)
    torch.manual_seed(1)
    model = fully_connected(4, 32, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> tuple[int, int, int]:
    """Standard, over a fine grid of each box, and by interval arithmetic on plain matrices."""
    one, two = (layer.double() for layer in (model[0], model[2]))
    shares = torch.linspace(0, 1, 5).double()
    grid = torch.tensor(list(itertools.product(shares.tolist(), repeat=x.shape[1]))).double()
    standard = adversarial = certified = 0
    for point, label in zip(x.double(), y.tolist(), strict=True):
        if int(model(point).argmax()) != label:
            continue
        standard += 1
        lower, upper = (point - eps).clamp(min=0), (point + eps).clamp(max=1)
        if not bool((model(lower + grid * (upper - lower)).argmax(1) == label).all()):
            continue
        adversarial += 1
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        center, radius = one(center), radius @ one.weight.abs().T
        low, high = (center - radius).relu(), (center + radius).relu()
        rows = two.weight - two.weight[label]
        most = rows @ (low + high) / 2 + rows.abs() @ (high - low) / 2 + two.bias - two.bias[label]
        certified += all(most[j] < 0 for j in range(3) if j != label)
    return standard, adversarial, certified


@pytest.mark.parametrize("eps", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("sound", [False, True])
def test_against_counts_made_one_by_one(trained: nn.Sequential, eps: float, sound: bool) -> None:
    x, y = data(120, 4)
    y[::10] = (y[::10] + 1) % 3  # labels that are wrong
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    report = fusee.nn.certify(
        trained, loader, eps, attack_steps=20, restarts=3, sound=sound, progress=False
    )
    standard, adversarial, certified = by_hand(fully_connected_copy(trained), x, y, eps)
    assert (report.samples, report.eps) == (120, eps)
    assert (report.standard, report.certified) == (standard, certified)
    # Neither a grid nor an attack finds all there is.
    assert abs(report.adversarial - adversarial) <= 2
    assert report.certified <= report.adversarial <= report.standard < report.samples
    if eps == 0:
        assert report.certified == report.adversarial == report.standard
    if eps == 0.1:
        assert 0 < report.certified < report.adversarial < report.standard


def fully_connected_copy(model: nn.Module) -> Any:
    other = fully_connected(4, 32, 3)
    other.load_state_dict(model.state_dict())
    return other


def test_ties_are_not_right() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    batches = [(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))]
    report = fusee.nn.certify(model, batches, 0.1, progress=False)
    assert (report.standard, report.adversarial, report.certified) == (0, 0, 0)
    nn.init.constant_(model.weight, float("nan"))
    assert fusee.nn.certify(model, batches, 0.1, progress=False).standard == 0


def test_a_box_that_touches_is_not_certified() -> None:
    """The margin must be below zero: at 0.25 both outputs are the same at a corner."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    batches = [(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))]
    counts = [
        fusee.nn.certify(model, batches, eps, progress=False).certified for eps in (0.249, 0.25)
    ]
    assert counts == [1, 0]


def test_boxes_are_clipped() -> None:
    """Inside [0, 1] nothing changes the sign of x - 0.05; without the limits it does."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
        model.bias.copy_(torch.tensor([0.05, 0.0]))
    batches = [(torch.tensor([[0.0], [0.1]]), torch.tensor([0, 0]))]
    inside = fusee.nn.certify(model, batches, 0.2, progress=False)
    free = fusee.nn.certify(
        model, batches, 0.2, minimum=-torch.inf, maximum=torch.inf, progress=False
    )
    assert (inside.adversarial, inside.certified) == (2, 2)
    assert (free.standard, free.adversarial, free.certified) == (2, 0, 0)


def test_modes_and_interval_models() -> None:
    torch.manual_seed(2)
    model = settled(convolutional(), 2, 8, 8).train()
    model.leaky.eval()  # type: ignore[union-attr]
    x, y = torch.rand(20, 2, 8, 8), torch.randint(5, (20,))
    with torch.no_grad():
        y[:15] = model.eval()(x[:15]).argmax(1)
    model.train().leaky.eval()  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    reports = [
        fusee.nn.certify(
            m, [(x, y)], 1e-3, progress=False, generator=torch.Generator().manual_seed(0)
        )
        for m in (model, fusee.nn.IntervalModel(model))
    ]
    assert reports[0] == reports[1] and reports[0].standard >= 15
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_steps_and_restarts_of_the_attack(trained: nn.Module) -> None:
    calls = []
    handle = trained.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for steps, restarts in ((4, 1), (9, 1), (4, 3)):
        calls.clear()
        options = {"attack_steps": steps, "restarts": restarts, "progress": False}
        fusee.nn.certify(trained, [data(5, 4)], 0.01, **options)  # type: ignore[arg-type]
        counts.append(len(calls))
    handle.remove()
    assert counts[1] - counts[0] == 5 and counts[2] - counts[0] == 2 * (4 + 1)


class Remembers(nn.Module):
    """The identity, which keeps the boxes that it was given, and may lose them."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.boxes: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return x

    def interval_forward(
        self, center: Tensor, radius: Tensor, *, sound: bool
    ) -> tuple[Tensor, Tensor]:
        self.boxes.append((center, radius))
        return center, self.share * radius


def test_what_the_attack_changes_is_not_certified() -> None:
    """Even where the bounds, here of a module that forgets the radius, say so."""
    model = nn.Sequential(Remembers(0.0), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
    x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
    report = fusee.nn.certify(model, [(x, y)], 0.2, progress=False)
    assert (report.standard, report.adversarial, report.certified) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sound_box_has_all_of_the_radius(dtype: torch.dtype) -> None:
    """In exact arithmetic; with the usual rounding, many a box lacks a bit."""
    torch.manual_seed(4)
    x = torch.rand(500, 1, dtype=dtype)
    lacking = {}
    for sound in (False, True):
        model = nn.Sequential(Remembers(1.0), nn.Linear(1, 2, dtype=dtype))
        with torch.no_grad():
            y = model(x).argmax(1)
        fusee.nn.certify(model, [(x, y)], 0.1, minimum=-1, maximum=2, sound=sound, progress=False)
        ((center, radius),) = model[0].boxes
        lacking[sound] = sum(
            abs(Fraction(c) - Fraction(v)) + Fraction(0.1) > Fraction(r)
            for v, c, r in zip(*(t.flatten().tolist() for t in (x, center, radius)), strict=True)
        )
    assert lacking[True] == 0 and lacking[False] > 50


class Drops(nn.Module):
    """A network that says in its code what training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fully_connected(4, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x, training=self.training))


def test_functional_dropout_in_a_model_in_training() -> None:
    x, y = data(20, 4)
    model = Drops().train()
    assert fusee.nn.certify(model, [(x, y)], 0.01, progress=False).samples == 20
    assert fusee.propagation_tightness(model, x, x + 0.01, y).nanmean() > 0


def test_report() -> None:
    report = fusee.nn.CertificationReport(2000, 1900, 1000, 501, 8 / 255)
    lines = str(report).splitlines()
    assert lines[0] == "2,000 samples, eps 0.0313725"
    assert [line.split() for line in lines[1:]] == [
        ["right", "1,900", "95.00", "%"],
        ["under", "attack", "1,000", "50.00", "%"],
        ["certified", "501", "25.05", "%"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_progress(capsys: pytest.CaptureFixture[str], trained: nn.Module) -> None:
    x, y = data(40, 4)
    batches = [(x, y), (x[:0], y[:0])]
    fusee.nn.certify(trained, batches, 0.01, attack_steps=1)
    shown = capsys.readouterr()
    assert shown.out == "" and "batch 2 of 2, 0 s left" in shown.err and shown.err.endswith("\n")

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y

    fusee.nn.certify(trained, endless(), 0.01, attack_steps=1)
    assert "of 40, batch 1" in capsys.readouterr().err
    fusee.nn.certify(trained, batches, 0.01, attack_steps=1, progress=False)
    assert capsys.readouterr().err == ""


MODEL, X, Y = nn.Linear(3, 2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "model must be", ([], [(X, Y)], 0.1), {}),
        (ValueError, "eps must be in", (MODEL, [(X, Y)], -0.1), {}),
        (ValueError, "eps must be in", (MODEL, [(X, Y)], float("inf")), {}),
        (TypeError, "eps must be a number", (MODEL, [(X, Y)], "0.1"), {}),
        (ValueError, "minimum must be below maximum", (MODEL, [(X, Y)], 0.1), {"minimum": 1}),
        (ValueError, "attack_steps must be positive", (MODEL, [(X, Y)], 0.1), {"attack_steps": 0}),
        (TypeError, "restarts must be an int", (MODEL, [(X, Y)], 0.1), {"restarts": None}),
        (ValueError, "loader has no samples", (MODEL, [], 0.1), {}),
        (ValueError, "loader has no samples", (MODEL, [(X[:0], Y[:0])], 0.1), {}),
        (ValueError, r"inputs must be in \[0.0, 1.0\]", (MODEL, [(X - 1, Y)], 0.1), {}),
        (TypeError, "input must have dtype", (MODEL, [(Y, Y)], 0.1), {}),
        (TypeError, "target must have dtype int64", (MODEL, [(X, X)], 0.1), {}),
        (TypeError, "target must be a Tensor", (MODEL, [(X, [0, 0])], 0.1), {}),
        (IndexError, "target must be in", (MODEL, [(X, Y - 1)], 0.1), {}),
        (ValueError, "model must return", (nn.Sequential(nn.Flatten(0)), [(X, Y)], 0.1), {}),
        (
            NotImplementedError,
            "no interval rule",
            (nn.Sequential(nn.Softmax(1)), [(X, Y)], 0.1),
            {},
        ),
    ],
)
def test_errors(
    error: type[Exception], match: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        fusee.nn.certify(*arguments, progress=False, **options)
