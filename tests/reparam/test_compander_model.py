"""Companders on a whole model: which weights, attention, shared parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusee.nn import Compander, compand_model, fold_companders
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.harness.measure import relative_error


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Something of everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 4, 2)
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embedding(index).transpose(1, 2)))
        return self.inner(self.up(x).transpose(1, 2))


INDEX = torch.arange(14).reshape(2, 7) % 7
NAMES = ["conv.weight", "up.weight", "inner.0.weight", "inner.2.weight"]


def plain_and_companded(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
    plain = make()
    model = copy.deepcopy(plain)
    compand_model(model, **options)
    return plain, model


def train(model: nn.Module, *inputs: Tensor, steps: int = 2, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


# --- which weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["arctan", "softsign", "mu_law", "powerprop"])
def test_whole_model(kind: str, per_channel: bool) -> None:
    plain, model = plain_and_companded(Net, kind=kind, per_channel=per_channel)
    assert [m.kind for m in model.modules() if isinstance(m, Compander)] == [kind] * 4
    assert relative_error(model(INDEX), plain(INDEX).double()) <= 1e-6
    sizes = {
        name: module.parametrizations.weight[0].a.numel()
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
    }
    channels = {"conv": 8, "up": 4, "inner.0": 5, "inner.2": 3}
    assert sizes == (channels if per_channel else dict.fromkeys(channels, 1))


def test_names_and_identity() -> None:
    model = Net()
    before = {name: model.get_parameter(name) for name in NAMES}
    assert compand_model(model) == NAMES
    for name, parameter in before.items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert module.parametrizations.weight.original is parameter


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    for kind in ("Conv", "ConvTranspose"):
        module = getattr(nn, f"{kind}{dims}d")(4, 6, 3, groups=2)
        x = randn(2, 4, *(5,) * dims)
        expected = module(x).double()
        assert compand_model(module, per_channel=True) == ["weight"]
        assert relative_error(module(x), expected) <= 1e-6
        compander = module.parametrizations.weight[0]
        assert compander.a.shape == ((6,) if kind == "Conv" else (3,))  # shared by the groups


def test_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3))
    model.to(memory_format=torch.channels_last)
    compand_model(model, per_channel=True)
    for module in model:
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
        original = module.parametrizations.weight.original
        assert original.is_contiguous(memory_format=torch.channels_last)
    fold_companders(model)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_filter() -> None:
    model, seen = Net(), []

    def chosen(name: str, module: nn.Module) -> bool:
        seen.append(name)
        return isinstance(module, nn.Linear)

    assert compand_model(model, filter=chosen) == NAMES[2:]
    assert seen == ["conv", "up", "inner.0", "inner.2"]
    assert not parametrize.is_parametrized(model.conv)


def test_settings_may_follow_one_another() -> None:
    """What has a compander keeps it."""
    model = Net()
    assert compand_model(model, "tanh", filter=lambda name, _: name == "conv") == NAMES[:1]
    assert compand_model(model, "softsign", learnable=False) == NAMES[1:]
    assert compand_model(model) == []
    assert len(model.conv.parametrizations.weight) == 1
    assert model.conv.parametrizations.weight[0].kind == "tanh"
    assert len(list(model.inner[0].parameters())) == 2


def test_options_reach_every_compander() -> None:
    model = Net()
    compand_model(model, "asinh", a=2.0, slope=4.0, learnable=False)
    for module in model.modules():
        if isinstance(module, Compander):
            assert (module.a.item(), module.b.item(), module.learnable) == (2.0, 0.5, False)
    model = Net()
    compand_model(model, "asinh", b=3.0, headroom=2.0)
    compander = model.conv.parametrizations.weight[0]
    assert compander.b.item() == 3.0
    assert compander.a.item() == pytest.approx(2 * Net().conv.weight.abs().max().item())


def test_gradients_are_dropped() -> None:
    model = nn.Linear(3, 2)
    model(randn(4, 3)).sum().backward()
    compand_model(model)
    assert model.parametrizations.weight.original.grad is None
    assert model.bias.grad is not None
    model(randn(4, 3)).sum().backward()
    fold_companders(model)
    assert model.weight.grad is None


def test_clamping_is_reported_at_the_call() -> None:
    model = Net()
    with pytest.warns(UserWarning, match="were clamped") as caught:
        compand_model(model, "tanh", a=0.05)
    assert {warning.filename for warning in caught} == {__file__}
    assert model.conv.weight.abs().max() <= 0.05


def test_lower_precision() -> None:
    plain, model = plain_and_companded(lambda: Net().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative_error(model(INDEX), plain(INDEX).double()) <= 0.02
    train(model, INDEX)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [True, False])
def test_attention(one: bool) -> None:
    """The projections of attention, one or three on the way in."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        size = None if one else 5
        return nn.MultiheadAttention(8, 2, kdim=size, vdim=size, batch_first=True)

    plain, model = plain_and_companded(make)
    names = ["in_proj_weight"] if one else [f"{p}_proj_weight" for p in "qkv"]
    assert compand_model(make()) == [*names, "out_proj.weight"]
    x, y = randn(3, 4, 8), randn(3, 4, 8 if one else 5)
    expected = plain(x, y, y)[0].double()
    assert relative_error(model(x, y, y)[0], expected) <= 1e-6
    model(x, y, y)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x, y, y)[0], expected) <= 1e-6
    fold_companders(model)
    assert type(model) is nn.MultiheadAttention
    assert relative_error(model(x, y, y)[0], expected) <= 1e-6


def test_fast_path_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients torch hands the weights to a kernel of its own: the companded ones."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)

    calls = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or kernel(*args)
    )
    _, model = plain_and_companded(make)
    x = randn(3, 4, 8)
    train(model, x)
    model.eval()
    slow = model(x).detach()
    assert not calls
    with torch.inference_mode():
        fast = model(x)
    assert len(calls) == 2
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


# --- shared parameters ----------------------------------------------------------------------------


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("kind", ["arctan", "powerprop"])
def test_shared_parameter(kind: str) -> None:
    """One compander, one v, and one weight again when folded."""
    plain, model = plain_and_companded(tied, kind=kind)
    x = randn(5, 4)
    assert relative_error(model(x), plain(x).double()) <= 1e-6
    lists = [model[i].parametrizations.weight for i in (0, 2, 3)]
    assert lists[0].original is lists[1].original is not lists[2].original
    assert lists[0][0] is lists[1][0] is not lists[2][0]
    assert len(list(model.parameters())) == 3 + 2 + 4
    start = model[0].weight.detach()
    train(model, x)
    assert torch.equal(model[0].weight, model[2].weight)
    assert not torch.equal(model[0].weight, start)

    other = tied()
    compand_model(other, kind)
    other.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(other(x), expected)
    for each in (copy.deepcopy(model), other):
        assert fold_companders(each) == ["0.weight", "2.weight", "3.weight"]
        assert each[0].weight is each[2].weight
        assert torch.equal(each(x), expected)


def test_module_that_is_used_twice() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert compand_model(model) == ["0.weight"]
    assert fold_companders(model) == ["0.weight"]


def spoilt(how: str) -> nn.Module:
    model = Net()
    match how:
        case "tied":
            model.head = nn.Linear(6, 7)
            model.head.weight = model.embedding.weight
        case "weight norm":
            nn.utils.parametrizations.weight_norm(model.inner[2])
        case "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(model.inner[2])
        case "lazy":
            model.head = nn.LazyLinear(3)
        case "nan":
            model.inner[2].weight.data[1, 2] = torch.nan
        case "integers":
            model.inner[2].weight = nn.Parameter(torch.ones(3, 5).int(), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("how", "error_type", "match"),
    [
        ("tied", ValueError, r"head\.weight is shared with embedding\.weight, which gets no"),
        ("weight norm", ValueError, r"inner\.2\.weight must be a parameter, but it has another"),
        ("old weight norm", ValueError, r"inner\.2\.weight must be a parameter"),
        ("lazy", ValueError, r"head\.weight must be initialised: run the model"),
        ("nan", ValueError, r"inner\.2\.weight: weight must be finite, got nan"),
        ("integers", TypeError, r"inner\.2\.weight: weight must have dtype"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    how: str, error_type: type[Exception], match: str
) -> None:
    model = spoilt(how)
    weight = model.conv.weight.detach().clone()
    with pytest.raises(error_type, match=match):
        compand_model(model)
    assert not any(isinstance(module, Compander) for module in model.modules())
    assert torch.equal(model.conv.weight, weight)
    assert compand_model(model, filter=lambda name, _: name in ("conv", "up")) == NAMES[:2]


@pytest.mark.parametrize(("kind", "partner"), [("arctan", 0), ("tanh", 2)])
def test_filter_must_not_part_what_is_shared(kind: str, partner: int) -> None:
    with pytest.raises(ValueError, match=r"weight is shared with \d\.weight"):
        compand_model(tied(), kind, filter=lambda name, _: name == str(partner))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model must be a Module, got list"):
        compand_model([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"conv\.weight: kind must be one of"):
        compand_model(Net(), "sigmoid")
    with pytest.raises(ValueError, match=r"conv\.weight: headroom must be"):
        compand_model(Net(), headroom=1.0)
