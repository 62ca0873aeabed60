"""Channels that are zero are cut out of a model, which computes the same."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusee.prox.cut import CutReport, LayerCut, cut_zero_groups
from fusee.prox.prox_optimizers import ProxSGD
from fusee.prox.prunable import prunable_groups
from torch import Tensor, nn

from tests.prox.networks import NETWORKS, Network, Transformer, images, perceptron, resnet, vgg
from tests.prox.test_dependencies import ALL, made, zero


def zero_at_random(
    model: nn.Module, inputs: Any, heads: Any = None, seed: int = 0
) -> dict[str, int]:
    """Sets random groups to zero, but leaves each layer one; how many channels each layer is to lose."""
    generator = torch.Generator().manual_seed(seed)
    lost: dict[str, int] = {}
    for coupled in prunable_groups(model, inputs, heads=heads):
        spared = torch.stack([ids.flatten()[0] for ids in coupled.table.ids])
        some = torch.rand(len(coupled.table), generator=generator) < 0.6
        some[spared] = False
        zero(coupled, some.nonzero().view(-1).tolist())
        for name, ids in zip(coupled.names, coupled.table.ids, strict=True):
            layer, _, attribute = name.rpartition(".")
            if attribute == "weight" and layer in coupled.layers:
                moved = isinstance(model.get_submodule(layer), (nn.Embedding, nn.ConvTranspose2d))
                lost[layer] = int(some[ids.movedim(int(moved), 0).flatten(1)[:, 0]].sum())
    return lost


def gap(model: nn.Module, other: nn.Module, inputs: Any) -> float:
    with torch.no_grad():
        wanted, found = model(inputs), other(inputs)
    assert wanted.shape == found.shape
    return float((wanted - found).abs().max() / wanted.abs().max())


def cuts(report: CutReport) -> dict[str, int]:
    return {layer.name: layer.before - layer.after for layer in report.layers}


@ALL
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_agree(network: Network, seed: int) -> None:
    model, inputs = made(network)
    lost = zero_at_random(model, inputs, network.heads, seed)
    before = copy.deepcopy(model.state_dict())
    small, report = cut_zero_groups(model, inputs, heads=network.heads)
    assert {name: n for name, n in cuts(report).items() if n} == {
        k: n for k, n in lost.items() if n
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gap(model, small, inputs) < 1e-12
    # And on other inputs, of other sizes.
    others = made(network)[1]
    others = torch.cat([others, others.flip(0)])
    if others.is_floating_point():
        others = others + torch.randn_like(others)
    assert gap(model, small, others) < 1e-12
    assert sum(p.numel() for p in small.parameters()) == report.parameters[1] < report.parameters[0]
    assert report.macs[1] < report.macs[0]


@ALL
def test_gradients_agree(network: Network) -> None:
    """The cut model trains as the other: the gradients of what is left are the same."""
    model, inputs = made(network)
    zero_at_random(model, inputs, network.heads)
    small, _ = cut_zero_groups(model, inputs, heads=network.heads)
    for each in (model, small):
        each(inputs).square().sum().backward()
    for (name, whole), part in zip(model.named_parameters(), small.parameters(), strict=True):
        if whole.shape == part.shape:
            torch.testing.assert_close(part.grad, whole.grad, rtol=1e-9, atol=1e-9, msg=name)
        else:
            assert part.grad.square().sum() <= whole.grad.square().sum() * (1 + 1e-9) + 1e-20, name


@ALL
def test_saved_and_loaded(network: Network) -> None:
    model, inputs = made(network)
    zero_at_random(model, inputs, network.heads)
    small, _ = cut_zero_groups(model, inputs, heads=network.heads)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter != 0] = parameter[parameter != 0].neg() + 1.5
    again, _ = cut_zero_groups(model, inputs, heads=network.heads)
    assert gap(small, again, inputs) > 1e-3
    file.seek(0)
    again.load_state_dict(torch.load(file))
    assert gap(small, again, inputs) == 0
    whole = pickle.loads(pickle.dumps(small))
    assert gap(small, whole, inputs) == 0


@ALL
def test_cut_again(network: Network) -> None:
    """A second cut finds nothing, and what vanishes later is cut then."""
    model, inputs = made(network)
    zero_at_random(model, inputs, network.heads)
    small, _ = cut_zero_groups(model, inputs, heads=network.heads)
    same, report = cut_zero_groups(small, inputs, heads=network.heads)
    assert not any(cuts(report).values()) and report.parameters[0] == report.parameters[1]
    assert gap(small, same, inputs) == 0


def test_in_place() -> None:
    model, inputs = vgg().eval(), images()
    zero_at_random(model, inputs)
    small, report = cut_zero_groups(model, inputs)
    model(inputs).sum().backward()
    result, other = cut_zero_groups(model, inputs, inplace=True)
    assert result is model and report == other
    assert gap(small, model, inputs) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_mode() -> None:
    """Batch statistics of a zero channel make zero of it as well: zero times the scale, and no shift."""
    model, inputs = made(NETWORKS["resnet"])
    zero_at_random(model, inputs)
    model.train()
    model[3].bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    statistics = model[1].running_mean.clone()
    small, _ = cut_zero_groups(model, inputs)
    assert {name: module.training for name, module in small.named_modules()} == modes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model[1].running_mean, statistics)
    assert gap(model, small, inputs) < 1e-12
    # Both moved the running statistics, the same way.
    assert gap(model.eval(), small.eval(), inputs) < 1e-12


def test_running_statistics() -> None:
    """They may be anything where scale and shift are zero, and go with their channel."""
    model, inputs = made(NETWORKS["vgg"])
    with torch.no_grad():
        for part in model[:2]:
            part.weight[3], part.bias[3] = 0, 0
    model[1].running_mean[3], model[1].running_var[3] = 1e6, 1e-6
    small, report = cut_zero_groups(model, inputs)
    assert cuts(report)["0"] == 1 and gap(model, small, inputs) < 1e-12
    assert small[1].running_mean.tolist() == model[1].running_mean[[0, 1, 2, 4, 5, 6, 7]].tolist()


def test_shift_keeps_a_channel() -> None:
    """A row of zeros whose shift is not zero puts out something, so it stays; so does what is only
    nearly zero, or is not a number."""
    model, inputs = made(NETWORKS["vgg"])
    with torch.no_grad():
        for part in model[:2]:
            part.weight[:4], part.bias[:4] = 0, 0
        model[1].bias[0] = 0.3
        model[0].weight[1, 0, 0, 0] = 1e-300
        model[0].bias[2] = float("nan")
        model[0].bias[3] = -0.0
    small, report = cut_zero_groups(model, inputs, check=False)
    assert cuts(report)["0"] == 1
    assert torch.equal(small[1].bias[0], model[1].bias[0])


def test_regularised_but_not_zero() -> None:
    """OTO 43: a penalty that shrinks leaves nothing to cut; only exact zeros go, and the report tells
    that nothing did."""
    model, inputs = vgg(), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)
    small, report = cut_zero_groups(model, inputs)
    assert not any(cuts(report).values()) and report.parameters[0] == report.parameters[1]
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]


def test_all_zero() -> None:
    """A layer keeps one channel, and the report says which layers did."""
    model, inputs = made(NETWORKS["resnet"])
    for coupled in prunable_groups(model, inputs):
        if coupled.layers == ("4.conv2", "4.down.0"):
            zero(coupled, range(len(coupled.table)))
    small, report = cut_zero_groups(model, inputs)
    assert report.spared == ["4.conv2", "4.down.0"]
    assert {c.name: c.after for c in report.layers if c.before != c.after} == {
        "4.conv2": 1,
        "4.down.0": 1,
    }
    assert gap(model, small, inputs) < 1e-12
    assert "all zero, one channel kept: 4.conv2" in str(report)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    least, report = cut_zero_groups(model, inputs)
    assert {layer.after for layer in report.layers[:-1]} == {1}
    assert least(inputs).abs().max() == 0


def test_branch_all_zero() -> None:
    """Of branches side by side each keeps a channel, though the layer that reads them has others."""
    model, inputs = made(NETWORKS["partly"])
    (coupled,) = prunable_groups(model, inputs)
    chosen = coupled.table.ids[0][:, 0, 0, 0]
    zero(coupled, chosen.tolist())
    small, report = cut_zero_groups(model, inputs)
    assert cuts(report) == {"a": 3, "b": 0, "c": 3, "end": 0}
    assert report.spared == ["a"] and gap(model, small, inputs) < 1e-12


def test_heads_are_counted() -> None:
    model, inputs = made(NETWORKS["together"])
    groups = prunable_groups(model, inputs, heads=NETWORKS["together"].heads)
    zero(groups[0], [1, 2, 3])
    small, report = cut_zero_groups(model, inputs, heads=NETWORKS["together"].heads)
    assert (model.attn.num_heads, small.attn.num_heads) == (4, 1)
    assert cuts(report)["attn.qkv"] == 27 and small.attn.proj.in_features == 3
    assert gap(model, small, inputs) < 1e-12
    # Values that are zero are enough for a head to be dead, but its queries still stand in the model.
    again = Transformer()
    with torch.no_grad():
        again.attn.qkv.weight[24:27], again.attn.qkv.bias[24:27] = 0, 0
    report = cut_zero_groups(again, inputs.float(), heads=NETWORKS["together"].heads)[1]
    assert cuts(report)["attn.qkv"] == 0


def test_ignored_stays() -> None:
    model, inputs = vgg(), images()
    with torch.no_grad():
        for part in model[:2]:
            part.weight[3], part.bias[3] = 0, 0
    assert cuts(cut_zero_groups(model, inputs)[1])["0"] == 1
    assert cuts(cut_zero_groups(model, inputs, ignored=["0"])[1])["0"] == 0


def test_frozen_parts_stay_frozen() -> None:
    model, inputs = vgg(), images()
    zero_at_random(model, inputs)
    model[0].weight.requires_grad_(False)
    small, _ = cut_zero_groups(model, inputs)
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, inputs = vgg().eval(), images()
    zero_at_random(model, inputs)
    model.to(dtype)
    small, report = cut_zero_groups(model, inputs.to(dtype))
    assert any(cuts(report).values()) and {p.dtype for p in small.parameters()} == {dtype}
    assert gap(model, small, inputs.to(dtype)) < 20 * torch.finfo(dtype).eps


def test_inference_mode() -> None:
    model, inputs = vgg(), images()
    zero_at_random(model, inputs)
    with torch.inference_mode():
        small, report = cut_zero_groups(model, inputs)
    small(inputs).sum().backward()
    assert any(cuts(report).values())


def test_outputs_that_change_are_an_error() -> None:
    """What the trials with other weights do not see, the comparison in the end does."""

    class Threshold(nn.Module):
        """Adds the number of channels, but only for the weights that the model has."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.end = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("sign", torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.end(torch.relu(self.first(x)))
            return y + self.first.out_features * (self.first.weight[-1, 0] == 5)

    model, inputs = Threshold(), torch.randn(3, 4)
    with torch.no_grad():
        model.first.weight[-1, 0] = 5
        model.first.weight[:2], model.first.bias[:2] = 0, 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="were not cut: to cut its channels changes the outputs"):
        cut_zero_groups(model, inputs, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cut_zero_groups(model, inputs, check=False)[0].first.out_features == 6


def test_nothing_to_cut() -> None:
    """No error: what a script does at the end of every run."""
    model = nn.Sequential(nn.Linear(3, 4))
    small, report = cut_zero_groups(model, torch.randn(2, 3))
    assert report.layers == [LayerCut("0", 4, 4)] and report.spared == []
    assert report.left_out == {"0": "its channels are outputs of the model"}
    assert small is not model and gap(model, small, torch.randn(2, 3)) == 0
    with pytest.raises(TypeError, match="example_inputs must be a Tensor"):
        cut_zero_groups(model, None)
    with pytest.raises(TypeError, match="model must be a Module"):
        cut_zero_groups(None, images())  # type: ignore[arg-type]


def test_report() -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = 0, 0
        model[2].weight.zero_()
    report = cut_zero_groups(model, torch.randn(3, 5))[1]
    # 5 -> 9 -> 7 -> 3 and 5 -> 4 -> 1 -> 3, three samples.
    assert report.parameters == (5 * 9 + 9 + 63 + 21 + 3, 5 * 4 + 4 + 4 + 3 + 3)
    assert report.macs == (3 * (45 + 63 + 21), 3 * (20 + 4 + 3))
    assert report.layers == [LayerCut("0", 9, 4), LayerCut("2", 7, 1), LayerCut("4", 3, 3)]
    assert str(report).splitlines() == [
        "layer       before  after",
        "-------------------------",
        "0                9      4",
        "2                7      1",
        "4                3      3",
        "-------------------------",
        "parameters     141     34",
        "MACs           387     81",
        "all zero, one channel kept: 2",
        "left out: 4: its channels are outputs of the model",
    ]


def test_trained_and_cut() -> None:
    """From an ordinary training loop to a smaller model: as many channels as were asked for."""
    torch.manual_seed(0)
    model, inputs = resnet(), torch.randn(64, 3, 8, 8)
    target = inputs.mean((2, 3)).argmax(1)
    groups = prunable_groups(model, inputs[:2])
    optimizer = ProxSGD(
        groups.param_groups(density=0.5, lam=1.0, debiased=True), lr=0.05, momentum=0.9
    )
    losses = []
    for epoch in range(60):
        if epoch == 40:
            optimizer.fix_support()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    small, report = cut_zero_groups(model, inputs[:2])
    assert [layer.after for layer in report.layers] == [4, 4, 4, 6, 6, 6, 4]
    assert gap(model.eval(), small.eval(), inputs) < 1e-5


def test_layers_are_smaller() -> None:
    """The layers are smaller ones, not masked ones."""
    model, inputs = made(NETWORKS["resnet"])
    groups = prunable_groups(model, inputs)
    for coupled in groups:
        zero(coupled, range(len(coupled.table) // 2))
    small, report = cut_zero_groups(model, inputs)
    assert str(small[3].conv2).startswith("Conv2d(4, 4, kernel_size=(3, 3), ")
    assert str(small[1]).startswith("BatchNorm2d(4, ")
    assert report.macs[1] < 0.3 * report.macs[0]
    assert type(small) is type(model) and list(small.state_dict()) == list(resnet().state_dict())
