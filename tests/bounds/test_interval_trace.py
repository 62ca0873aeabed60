"""What is easily bounded wrong: writes, hooks, replaced tensors, modes, and functions that fall."""

from __future__ import annotations

import copy
from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune


def contained(model: nn.Module, *shape: int, eps: float = 0.3) -> None:
    """Corners of boxes go to points between the bounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator)
    lower, upper = fusee.interval_bounds(model, x - eps, x + eps)
    assert bool(lower.isfinite().all() and upper.isfinite().all())
    for _ in range(200):
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
        y = model(x + eps * signs)
        assert bool((y >= lower - 1e-5).all() and (y <= upper + 1e-5).all())


class Skip(nn.Module):
    """A sum around an activation that writes to what the sum reads, or not."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.write(x)) + x


def add_in_place(x: Tensor) -> Tensor:
    y = x
    y += 1.0
    return y


def view_first(x: Tensor) -> Tensor:
    y = x.view(-1, 3)
    F.relu_(x)
    return y


@pytest.mark.parametrize(
    "write",
    [
        nn.ReLU(inplace=True),
        nn.Hardtanh(inplace=True),
        F.relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(x, True),
        lambda x: x.relu_(),
        lambda x: x.add_(1.0),
        lambda x: F.relu_(x.view(-1, 3)),
        view_first,
        add_in_place,
    ],
)
def test_a_tensor_that_is_read_after_it_was_written_to(write: Any) -> None:
    with pytest.raises(NotImplementedError, match="which writes to what node"):
        contained(Skip(write), 3)


class Block(nn.Module):
    """The block of a ResNet, which writes to what nobody reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = (
            nn.Conv2d(2, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(True),
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.norm(self.conv(x)))
        out += identity
        unused = out.size(0) > 0
        F.relu(self.norm(identity))
        del unused
        return self.relu(out)


def test_writes_that_nobody_reads() -> None:
    contained(Block().eval(), 2, 4, 4)


class Own(nn.Linear):
    """A linear layer of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3

    def interval_forward(self, center: Tensor, radius: Tensor, *, sound: bool) -> Any:
        return self(center), 3 * F.linear(radius, self.weight.abs())


def test_a_last_layer_of_another_kind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Own(4, 3))
    contained(model, 3)
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    margins = fusee.nn.IntervalModel(model).margins(x, x, target)
    y = model(x)
    torch.testing.assert_close(margins, y - y.gather(1, target[:, None]), atol=1e-5, rtol=1e-5)


def test_hooks_are_refused() -> None:
    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    pruned = nn.Linear(3, 2)
    prune.l1_unstructured(pruned, "weight", 0.5)
    for layer in (hooked, pruned):
        with pytest.raises(NotImplementedError, match="no interval rule for the hooks of Linear"):
            fusee.nn.IntervalModel(nn.Sequential(layer))
    prune.remove(pruned, "weight")
    contained(nn.Sequential(pruned), 3)


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(1, 3)) * (1 / self.scale)[None]


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_of_the_models_own_are_read_anew(nested: bool) -> None:
    norm = Normalise()
    model = nn.Sequential(norm, nn.Linear(3, 2)) if nested else norm
    net = fusee.nn.IntervalModel(model)
    norm.mean = torch.tensor([-5.0, 0.0, 5.0])
    x = torch.randn(2, 3)
    torch.testing.assert_close(net(x, x)[0], model(x))
    net.double()
    torch.testing.assert_close(net(x.double(), x.double())[0], model(x.double()))
    net.float()
    state = {name: value + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    torch.testing.assert_close(net(x, x)[0], model(x))

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, parameters, (x, x))[0].sum()

    parameters = {name: value.detach() for name, value in net.named_parameters()}
    slopes = torch.func.grad(total)(parameters)
    assert all(bool((slope != 0).any()) for slope in slopes.values())


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        return self.last(x if self.training else -x)


def test_the_mode_of_the_moment_counts() -> None:
    x = torch.randn(4, 3)
    for built_in_training in (False, True):
        model = Dropping().train(built_in_training)
        net = fusee.nn.IntervalModel(model)
        torch.testing.assert_close(net.eval()(x, x)[0], model(x))
        with pytest.raises(NotImplementedError, match="dropout in training mode"):
            net.train()(x, x)
        assert copy.deepcopy(net.eval()).training is False


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Softplus(threshold=1), "softplus with beta=1.0, threshold=1"),
        (nn.ELU(-1.0), "elu with alpha=-1.0"),
        (nn.CELU(-1.0), "celu with alpha=-1.0"),
        (nn.LeakyReLU(-0.1), "leaky_relu with negative_slope=-0.1"),
    ],
)
def test_functions_that_fall(model: nn.Module, match: str) -> None:
    with pytest.raises(NotImplementedError, match=match):
        contained(model, 3)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_a_module_in_a_mode_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Noisy())
    net, x = fusee.nn.IntervalModel(model), torch.randn(2, 3)
    model.eval()
    torch.testing.assert_close(net(x, x)[0], model(x))
    model[1].train()
    with pytest.raises(NotImplementedError, match="dropout in training mode"):
        net(x, x)


def test_nothing_is_left_in_the_model() -> None:
    norm = Normalise()
    before = set(vars(norm)) | set(norm.state_dict())
    fusee.interval_bounds(norm, torch.rand(2, 3), torch.rand(2, 3) + 1)
    assert set(vars(norm)) | set(norm.state_dict()) == before


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="no NNPACK in this torch")  # type: ignore[attr-defined]
def test_convolutions_by_transforms() -> None:
    """Winograd's make small negative numbers of sums of positive ones."""
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    )
    lower = torch.rand(16, 32, 28, 28)
    upper = lower.clone()
    upper[:, :, ::7, ::5] += 10
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        lower, upper = fusee.interval_bounds(model, lower, upper)
    assert bool((lower <= upper).all())


class Attribute(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x, self.name) * 2  # type: ignore[no-any-return]


def test_attributes() -> None:
    contained(nn.Sequential(Attribute("data"), nn.Linear(3, 2)), 3)
    with pytest.raises(NotImplementedError, match="attribute 'real'"):
        contained(Attribute("real"), 3)


class Sizes(nn.Module):
    """A layer of which only the size is asked, one that nobody asks, and one tensor with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        width = self.a(x).size(1)
        self.b(x).relu()
        return self.b(x).relu() * width + self.b(x)


def test_what_is_not_used() -> None:
    contained(Sizes(), 3)


@pytest.mark.parametrize("kind", [nn.GELU, nn.SiLU, nn.Mish, nn.Softsign])
def test_small_boxes_about_a_minimum(kind: type[nn.Module]) -> None:
    """Rounding puts the value at the minimum above that at the ends."""
    x = torch.cat([torch.linspace(-2, 2, 4001), -1.2784645 + torch.linspace(-1e-4, 1e-4, 2001)])
    for eps in (0.0, 1e-7, 1e-5, 1e-4):
        lower, upper = fusee.interval_bounds(nn.Sequential(kind()), x - eps, x + eps)
        assert bool((lower <= upper).all())


def test_one_image_without_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 5, 5)
    for sound in (False, True):
        lower, upper = fusee.interval_bounds(model, x - 0.1, x + 0.1, sound=sound)
        expected = fusee.interval_bounds(model, (x - 0.1)[None], (x + 0.1)[None], sound=sound)
        torch.testing.assert_close((lower[None], upper[None]), expected)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, [8, 8])  # type: ignore[no-any-return]


def test_options_that_are_not_known() -> None:
    with pytest.raises(NotImplementedError, match="output_size"):
        contained(Transposed(), 2, 3, 3)


def test_a_box_of_another_dtype() -> None:
    x = torch.rand(2, 3).double()
    with pytest.raises(TypeError, match="boxes must have the dtype of the layer"):
        fusee.interval_bounds(nn.Linear(3, 2), x, x)
    net = fusee.nn.IntervalModel(nn.Linear(3, 2).double())
    with pytest.raises(TypeError, match="input must have the dtype of lower"):
        net.propagate(x, x, input=x.float())


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(input=torch.sigmoid(input=x), start_dim=1)
        return torch.cat(tensors=[x, torch.add(input=x, other=x)], dim=1)


def test_arguments_by_name() -> None:
    contained(Named(), 2, 3)


def test_an_interval_model_of_an_interval_model() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    net = fusee.nn.IntervalModel(model)
    assert fusee.nn.IntervalModel(net).model is model
    torch.testing.assert_close(fusee.interval_bounds(net, x, x), fusee.interval_bounds(model, x, x))


class Single(nn.Module):
    def interval_forward(self, center: Tensor, radius: Tensor, *, sound: bool) -> Any:
        return center


def test_what_is_no_box_is_refused() -> None:
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"Single.interval_forward must return a center and a radius"
    ):
        fusee.interval_bounds(nn.Sequential(Single()), x, x)
    with pytest.raises(NotImplementedError, match="indices"):
        fusee.interval_bounds(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), x, x)
    net = fusee.nn.IntervalModel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(ValueError, match=r"margins need outputs \(batch, classes\)"):
        net.margins(x, x, torch.zeros(4, 3, 2, dtype=torch.int64))
