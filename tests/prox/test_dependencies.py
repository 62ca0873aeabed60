"""Groups of the channels of a model."""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusee.prox.cut import cut_zero_groups
from fusee.prox.prunable import CoupledGroups, PrunableGroups, prunable_groups
from torch import Tensor, nn

from tests.prox.networks import NETWORKS, Network, Residual, images, perceptron, vgg

ALL = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def find(model: nn.Module, inputs: Any, **options: Any) -> PrunableGroups:
    return prunable_groups(model, inputs, **options)


def sets_of(groups: PrunableGroups) -> dict[tuple[str, ...], int]:
    return {coupled.layers: len(coupled.table) for coupled in groups}


def zero(coupled: CoupledGroups, chosen: Iterable[int]) -> None:
    """Sets some groups to zero, through the table."""
    scales = torch.ones(len(coupled.table), dtype=torch.float64)
    scales[list(chosen)] = 0
    with torch.no_grad():
        scaled = coupled.table.scale(coupled.parameters, scales)
        for parameter, value in zip(coupled.parameters, scaled, strict=True):
            parameter.copy_(value)


def made(network: Network, smooth: bool = False) -> tuple[nn.Module, Any]:
    """A network in float64 with running statistics, scales and shifts of all sizes."""
    torch.manual_seed(0)
    model, inputs = network.make().double(), network.inputs()
    for name, module in list(model.named_children()):
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Hardswish)) and smooth:
            setattr(model, name, nn.SiLU())
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm)):
            with torch.no_grad():
                module.weight.uniform_(0.5, 2).mul_(torch.randn_like(module.weight).sign())
                module.bias.normal_()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval(), inputs.double() if inputs.is_floating_point() else inputs


@ALL
def test_sets(network: Network) -> None:
    model, inputs = made(network)
    groups = find(model, inputs, heads=network.heads)
    assert sets_of(groups) == network.sets
    assert len(groups) == len(network.sets)
    named = dict(model.named_parameters())
    for coupled in groups:
        assert [named[name] for name in coupled.names] == list(coupled.parameters)
        assert coupled.table.shapes == [tuple(p.shape) for p in coupled.parameters]


@ALL
def test_parameters_are_in_one_place(network: Network) -> None:
    model, inputs = made(network)
    groups = find(model, inputs, heads=network.heads)
    optimizer = torch.optim.SGD(groups.param_groups(momentum=0.5), lr=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [g["momentum"] for g in optimizer.param_groups] == [0.5] * len(groups) + [0]
    assert [g.get("groups") for g in optimizer.param_groups] == [c.table for c in groups] + [None]


@ALL
def test_zero_groups_are_dead(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of all layers that the outputs are blind to, found by moving each, are as many as go
    with the groups that are zero."""
    # An activation that is zero for many inputs would make more of them blind.
    monkeypatch.setattr(F, "relu", F.silu)
    model, inputs = made(network, smooth=True)
    groups = find(model, inputs, heads=network.heads)
    for coupled in groups:
        zero(coupled, range(0, len(coupled.table), 2))
    small = cut_zero_groups(model, inputs, heads=network.heads, check=False)[0]
    wanted = model(inputs)
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        dim = 0 if isinstance(module, nn.ConvTranspose2d) else 1
        blind = 0
        for column in range(module.weight.shape[dim]):
            kept = module.weight.detach().clone()
            with torch.no_grad():
                part = module.weight.select(dim, column)
                part.add_(torch.randn_like(part))
                blind += int((model(inputs) - wanted).abs().max() < 1e-12)
                module.weight.copy_(kept)
        assert blind == module.weight.shape[dim] - small.get_submodule(name).weight.shape[dim], name
        total += blind
    assert total > 0


@ALL
def test_groups_are_least(network: Network) -> None:
    """No parameter of a group may stay: with all but one at zero, the channel lives."""
    model, inputs = made(network)
    for coupled in find(model, inputs, heads=network.heads):
        for number, (parameter, ids) in enumerate(
            zip(coupled.parameters, coupled.table.ids, strict=True)
        ):
            if not bool((ids == 0).any()):
                continue
            saved = [p.detach().clone() for p in coupled.parameters]
            zero(coupled, [0])
            with torch.no_grad():
                parameter[ids == 0] = saved[number][ids == 0]
            report = cut_zero_groups(model, inputs, heads=network.heads, check=False)[1]
            assert all(layer.after == layer.before for layer in report.layers)
            with torch.no_grad():
                for p, value in zip(coupled.parameters, saved, strict=True):
                    p.copy_(value)


def test_model_is_left_as_it_was() -> None:
    """Torch-Pruning leaves a model in evaluation mode."""
    model, inputs = vgg(), images()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.random.get_rng_state()
    find(model, inputs)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert all(not module._forward_hooks for module in model.modules())


def test_without_gradients() -> None:
    with torch.no_grad():
        assert sets_of(find(vgg(), images())) == NETWORKS["vgg"].sets
    model = vgg()
    with torch.inference_mode():
        assert sets_of(find(model, images())) == NETWORKS["vgg"].sets
    with torch.autocast("cpu", torch.bfloat16):
        assert sets_of(find(vgg(), images())) == NETWORKS["vgg"].sets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    groups = find(vgg().to(dtype), images().to(dtype))
    assert sets_of(groups) == NETWORKS["vgg"].sets
    assert groups[0].parameters[0].dtype == dtype


def test_single_sample() -> None:
    """Torch-Pruning unpacks a tensor into one argument for each sample if the model takes that."""
    groups = find(perceptron(), torch.randn(1, 5))
    assert sets_of(groups) == NETWORKS["perceptron"].sets


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.end = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Any]:
        return {"logits": (self.end(torch.relu(self.left(x) + self.right(y))),), "note": "none"}


def test_arguments() -> None:
    """Arguments by name, and outputs in nested containers."""
    inputs = {"x": torch.randn(2, 3), "y": torch.randn(2, 4)}
    groups = find(Pair(), inputs)
    assert sets_of(groups) == {("left", "right"): 6}
    assert groups[0].names == ("left.weight", "left.bias", "right.weight", "right.bias")
    assert groups.left_out == {"end": "its channels are outputs of the model"}
    pair = nn.Bilinear(3, 4, 2)
    with pytest.raises(ValueError, match="no layer makes channels"):
        find(pair, (torch.randn(2, 3), torch.randn(2, 4)))


@pytest.mark.parametrize("by_name", [True, False])
def test_ignored(by_name: bool) -> None:
    model = vgg()
    groups = find(model, images(), ignored=["0"] if by_name else [model[0]])
    assert sets_of(groups) == {k: v for k, v in NETWORKS["vgg"].sets.items() if k != ("0",)}
    assert groups.left_out["0"] == "ignored"
    parts = nn.Sequential(Residual(3, 6, 1), nn.Conv2d(6, 2, 1))
    assert sets_of(find(parts, images())) == {("0.conv1",): 6, ("0.conv2", "0.down.0"): 6}
    # A layer that is coupled keeps the others' channels; a block is ignored with all its parts.
    left = find(parts, images(), ignored=["0.down"]).left_out
    assert left["0.conv2"] == left["0.down.0"] == "ignored"
    with pytest.raises(ValueError, match=r"can be cut \(0.conv1: ignored; "):
        find(parts, images(), ignored=["0"])


def test_frozen() -> None:
    """An optimiser leaves frozen parameters alone: their channels would never vanish. But they can be
    cut, if they are zero."""
    model = vgg()
    model[4].bias.requires_grad_(False)
    groups = find(model, images())
    assert ("3",) not in sets_of(groups) and ("0",) in sets_of(groups)
    assert groups.left_out["3"] == "4.bias is frozen"
    assert any(p is model[4].bias for p in groups.others)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for part in (model[3], model[4]):
            part.weight[2:5], part.bias[2:5] = 0, 0
    small, report = cut_zero_groups(model, images())
    assert {c.name: c.before - c.after for c in report.layers if c.after != c.before} == {"3": 3}
    assert not any(p.requires_grad for p in small.parameters())


def behind(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.Conv2d(8, 2, 1))


class RootMeanSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1).sqrt()


class Shuffle(nn.Module):
    """Channels in another order, of which the graph knows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ([nn.Sigmoid()], "changes the outputs"),
        ([nn.Softplus()], "changes the outputs"),
        ([nn.Softmax(1)], "changes the outputs"),
        ([nn.ConstantPad2d(1, 1.0)], "changes the outputs"),
        ([RootMeanSquare()], "changes the outputs"),
        ([Shuffle()], "does not run without its channels"),
        ([nn.LayerNorm([8, 6, 6])], "takes its statistics over channels"),
        ([nn.GroupNorm(2, 8)], "takes its statistics over channels"),
        ([nn.BatchNorm2d(8, affine=False)], "no scale and shift"),
        ([nn.Conv2d(8, 8, 1, groups=8), nn.Sigmoid()], "changes the outputs"),
        ([nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))], "parametrisation"),
        ([nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 8, 1)], "only be cut all together"),
        ([nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(4, 8, 1)], "groups that are not cut"),
        ([nn.ConvTranspose2d(8, 8, 1, groups=2)], "groups that are not cut"),
    ],
    ids=lambda value: type(value[0]).__name__ if isinstance(value, list) else "",
)
def test_what_cannot_be_cut(middle: list[nn.Module], reason: str) -> None:
    """Such channels are found out before an optimiser spends days on them, and the layers around stay
    available."""
    around = [nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)]
    groups = find(nn.Sequential(behind(*middle), *around), images())
    assert ("1",) in sets_of(groups) and "0.0" not in {n for c in groups for n in c.layers}
    assert reason in groups.left_out["0.0"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_normalisation_of_tokens(norm: type[nn.Module]) -> None:
    """The channels between the blocks of a transformer stay."""
    network = NETWORKS["together"]
    model = network.make()
    model.norm1, model.norm2 = norm(12), norm(12)
    groups = find(model, network.inputs(), heads=network.heads)
    assert sets_of(groups) == network.sets
    assert set(groups.left_out) == {"embed", "attn.proj", "fc2", "head"}


def test_depthwise_transposed() -> None:
    groups = find(behind(nn.ConvTranspose2d(8, 8, 2, groups=8)), images())
    assert sets_of(groups) == {("0", "1"): 8}


def test_input_that_is_added() -> None:
    """The channels of the input stay, so those that are added to it do."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
            self.end, self.beside = nn.Conv2d(3, 2, 1), nn.Conv2d(7, 2, 1)
            self.wide = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.second(torch.relu(self.first(x)))
            return self.end(y) + self.beside(torch.cat([x, self.wide(y)], 1))

    groups = find(Added(), images())
    assert sets_of(groups) == {("first",): 8}
    assert groups.left_out["second"].startswith("the model does not run without its channels")
    assert set(groups.left_out) == {"second", "end", "beside", "wide"}


def test_layers_that_are_not_called() -> None:
    """Such as a second output in training mode only: nobody knows how they read what would be cut."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.end, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.end(torch.relu(self.first(x)))
            return (y, self.aux(x)) if self.training else y

    groups = find(Auxiliary(), torch.randn(3, 4))
    assert sets_of(groups) == {("first",): 8}
    assert groups.left_out["aux"] == (
        "the model does not call it on example_inputs, in evaluation mode"
    )


def test_part_of_an_output() -> None:
    """A layer of which some channels are outputs is left out whole, with what is added to it."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
            self.inner, self.end = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left, right = self.both(x).chunk(2, 1)
            return right, self.end(torch.relu(self.inner(left + self.other(x))))

    groups = find(Halves(), images())
    assert sets_of(groups) == {("inner",): 6}
    assert groups.left_out["both"] == groups.left_out["other"] == groups.left_out["end"]


def test_shared_weights() -> None:
    """Two layers with one weight: to cut one would part them."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    model.append(nn.Linear(6, 2))
    model[4].weight = model[0].weight
    groups = find(
        nn.Sequential(model, nn.ReLU(), nn.Linear(2, 5), nn.Linear(5, 1)), torch.randn(3, 4)
    )
    assert sets_of(groups) == {("0.5",): 2, ("2",): 5}
    assert groups.left_out["0.0"] == "0.0.weight is shared with 0.4.weight"
    assert groups.left_out["0.2"] == "0.4.weight is shared with 0.0.weight"


class Shuffled(nn.Module):
    """Half of the channels by a convolution, then all in another order, as in ShuffleNet."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.part, self.end = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1)
        self.times, self.last = times, nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.part(right)], 1)
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
            x = x.view(batch, channels, height, width)
        return self.last(torch.relu(self.end(x)))


@pytest.mark.parametrize("times", [1, 2])
def test_shuffled_channels(times: int) -> None:
    """The graph maps them wrongly; done twice, the library's own search does not end."""
    groups = find(Shuffled(times), images())
    assert sets_of(groups) == {("end",): 6}
    assert {"first", "part"} <= set(groups.left_out)


def test_the_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises is told from what the model itself does."""
    import torch_pruning

    def fail(graph: Any, nodes: Any) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "_build_dependency", fail)
    with pytest.raises(RuntimeError, match=r"did not get through .* ZeroDivisionError: integer"):
        find(vgg(), images())
    with pytest.raises(RuntimeError, match="expected input"):
        find(vgg(), torch.randn(2, 4, 8, 8))


def test_recurrent() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn, self.end = nn.Linear(3, 6), nn.LSTM(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.rnn(torch.relu(self.fc(x)))[0][-1])

    groups = find(Last(), torch.randn(4, 2, 3))
    assert sets_of(groups) == {("fc",): 6}


def test_scales_that_begin_at_zero() -> None:
    """Blocks whose last scale begins at zero put out nothing, so no cut in them shows; but it would
    later."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
    model.extend([nn.ReLU(), nn.Conv2d(6, 2, 1)])
    nn.init.zeros_(model[3].weight)
    groups = find(model, images())
    assert sets_of(groups) == {("2",): 6}
    assert "changes the outputs" in groups.left_out["0"]


def test_random_outputs() -> None:
    """What a model draws is the same in each trial; without a trial nothing is compared."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.end = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(torch.relu(self.first(x + torch.rand_like(x)))) + torch.randn(3, 2)

    assert sets_of(find(Noisy(), torch.randn(3, 4))) == {("first",): 8}
    sigmoid = behind(nn.Sigmoid())
    assert sets_of(find(sigmoid, images(), check=False)) == {("0",): 8}


def test_float32_inside() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.end = nn.Linear(4, 8), nn.Linear(8, 2)
            self.middle = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x @ torch.eye(4)))
            return self.end(y)

    assert sets_of(find(Fixed(), torch.randn(3, 4))) == {("first",): 8}


def test_heads_unnamed() -> None:
    """Single channels of heads cannot be cut."""
    network = NETWORKS["together"]
    groups = find(network.make(), network.inputs())
    assert sets_of(groups) == {("fc1",): 20}
    assert "attn.qkv" in groups.left_out


def test_errors() -> None:
    model = vgg()
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        find(3, images())  # type: ignore[arg-type]
    for nothing in (None, [], "x"):
        with pytest.raises(TypeError, match="example_inputs must be a Tensor, or a tuple or dict"):
            find(model, nothing)
    with pytest.raises(ValueError, match=r"ignored must be layers of the model .* got 'first'"):
        find(model, images(), ignored=["first"])
    with pytest.raises(ValueError, match=r"ignored must be layers of the model .* got Linear"):
        find(model, images(), ignored=[nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="ignored must be a list"):
        find(model, images(), ignored="0")
    with pytest.raises(ValueError, match="not initialised"):
        find(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="not initialised"):
        find(nn.Sequential(nn.Linear(3, 4, device="meta"), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="no layer makes channels"):
        find(nn.Sequential(nn.BatchNorm1d(3)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="0: its channels are outputs of the model"):
        find(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="must put out tensors that depend on its parameters"):
        find(nn.Sequential(nn.ReLU()), torch.randn(2, 3))


def test_errors_of_heads() -> None:
    network = NETWORKS["together"]
    for heads, text in (
        ({"attn": "attn.num_heads"}, "names of linear layers, got 'attn'"),
        ({"attn.qkv": "attn.heads"}, "counts the heads of attn.qkv, got 'attn.heads'"),
        ({"attn.qkv": "attn.scale"}, "counts the heads of attn.qkv, got 'attn.scale'"),
    ):
        with pytest.raises(ValueError, match=text):
            find(network.make(), network.inputs(), heads=heads)
    model = network.make()
    model.other = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"divide the 12 channels of attn.qkv, got 5 heads"):
        find(model, network.inputs(), heads={"attn.qkv": "other"})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name == "torch_pruning":
            raise ModuleNotFoundError("No module named 'torch_pruning'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'fusee\[prune\]'"):
        find(vgg(), images())


def test_texts() -> None:
    groups = find(vgg(), images())
    assert repr(groups[3]) == "CoupledGroups(groups=10, names=['11.weight', '11.bias'])"
    lines = str(groups).splitlines()
    assert lines[0] == "8 groups: 0" and lines[3] == "10 groups: 11"
    assert lines[4] == "left out: 13: its channels are outputs of the model"
    assert isinstance(builtins.repr(groups), str)
