"""Monarch layers in the place of a model's linear layers, and dense ones again."""

from __future__ import annotations

import warnings
from typing import Any

import fusee
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

MonarchLinear = fusee.nn.MonarchLinear


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def test_every_layer_becomes_the_nearest() -> None:
    model = mlp()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = fusee.nn.monarchize(model, nblocks=4)
    assert [row.name for row in report.rows] == list(layers)
    for row in report.rows:
        layer, dense = model.get_submodule(row.name), layers[row.name]
        assert isinstance(layer, MonarchLinear)
        expected = MonarchLinear.from_linear(dense, 4)
        assert torch.equal(layer.w1, expected.w1) and torch.equal(layer.w2, expected.w2)
        off = (layer.weight - dense.weight).norm() / dense.weight.norm()
        assert row.error == pytest.approx(float(off), rel=1e-5, abs=1e-6)


def test_report_counts() -> None:
    model = mlp()
    before = sum(p.numel() for p in model.parameters())
    report = fusee.nn.monarchize(model, nblocks=4, min_features=8)
    assert isinstance(model[0], MonarchLinear) and type(model[4]) is nn.Linear
    after = sum(p.numel() for p in model.parameters())
    assert report.parameters_saved == before - after
    first = report.rows[0]
    assert (first.dense_flops, first.flops) == (2 * 16 * 32, 2 * (4 * 4 * 4 + 4 * 8 * 4))
    assert report.flops_saved == sum(row.dense_flops - row.flops for row in report.rows)
    table = str(report).splitlines()
    assert table[0].split() == ["layer", "in", "out", "parameters", "of", "FLOPs", "of", "error"]
    assert table[1].split()[:3] == ["0", "16", "32"] and table[-1].startswith("all")


def test_filter_and_new_layers() -> None:
    model = mlp().double().eval()
    torch.manual_seed(1)
    report = fusee.nn.monarchize(model, 4, 2, filter=lambda name, m: name == "2", project=False)
    layer = model[2]
    assert isinstance(layer, MonarchLinear) and layer.rank == 2 and not layer.training
    assert layer.w1.dtype == torch.float64 and report.rows[0].error is None
    torch.manual_seed(1)
    expected = MonarchLinear(32, 16, nblocks=4, rank=2, dtype=torch.float64)
    assert torch.equal(layer.w1, expected.w1)
    assert type(model[0]) is nn.Linear


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = fusee.nn.monarchize(model, 2)
    assert model["a"] is model["b"][0] and isinstance(model["a"], MonarchLinear)  # type: ignore[index]
    assert len(report.rows) == 1
    assert fusee.nn.densify(model) == ["a"]
    assert model["a"] is model["b"][0]  # type: ignore[index]


def test_attention_keeps_what_it_reads_itself() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    names = [row.name for row in fusee.nn.monarchize(model, 4).rows]
    assert names == ["linear1", "linear2"]
    x = torch.randn(2, 5, 16)
    model.eval()
    expected = model(x)
    with torch.no_grad():  # where torch's fast path reads the dense weights
        torch.testing.assert_close(model(x), expected)
    torch.nn.utils.parametrizations.weight_norm(model.self_attn.out_proj)
    assert fusee.nn.monarchize(model, 2).rows == []


def test_sparse_to_dense() -> None:
    """Training goes on dense from the same function."""
    model = mlp()
    fusee.nn.monarchize(model, 4, project=False)
    x = torch.randn(5, 16)
    before = model(x)
    assert fusee.nn.densify(model) == ["0", "2", "4"]
    torch.testing.assert_close(model(x), before)
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def parametrised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old form is deprecated, and in use
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def not_finite() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, float("nan"))
    return layer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (weight_normed, "1 has a weight that is no parameter"),
        (not_finite, "1 has a weight that is not finite"),
        (lambda: nn.Linear(4, 4, device="meta"), "1 has a weight on the meta device"),
        (Tied, r"1\.head shares its weight with another module"),
        (parametrised, r"1\.0 has a parametrised weight"),
        (lambda: nn.LazyLinear(4), "1 is not initialised"),
    ],
)
def test_layers_that_cannot_go(make: Any, match: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    first = model[0]
    with pytest.raises(ValueError, match=match):
        fusee.nn.monarchize(model, 2)
    assert model[0] is first


def test_frozen_layers_stay_frozen() -> None:
    for project in (False, True):
        model = mlp()
        model[0].weight.requires_grad_(False)
        fusee.nn.monarchize(model, 4, project=project)
        assert not model[0].w1.requires_grad and not model[0].w2.requires_grad
        assert model[0].bias.requires_grad and model[2].w1.requires_grad


def test_autocast_changes_no_weights() -> None:
    model = nn.Sequential(MonarchLinear(8, 8, nblocks=2))
    x = torch.randn(3, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0].weight.dtype == torch.float32
        fusee.nn.densify(model)
    torch.testing.assert_close(model(x), expected)


def test_densify_leaves_what_it_does_not_know() -> None:
    class Doubled(MonarchLinear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4, nblocks=2), MonarchLinear(4, 4, nblocks=2))
    assert fusee.nn.densify(model) == ["1"]
    shared = nn.Sequential(MonarchLinear(4, 4, nblocks=2), MonarchLinear(4, 4, nblocks=2))
    shared[1].w1 = shared[0].w1
    with pytest.raises(ValueError, match="0 shares its w1 with another module"):
        fusee.nn.densify(shared)
    assert type(shared[0]) is MonarchLinear


def test_errors() -> None:
    with pytest.raises(TypeError, match="model must be a Module, got list"):
        fusee.nn.monarchize([], 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a Module, got list"):
        fusee.nn.densify([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nblocks must be positive"):
        fusee.nn.monarchize(mlp(), 0)
    with pytest.raises(ValueError, match=r"from_linear\(\)"):
        fusee.nn.monarchize(nn.Linear(4, 4), 2)
    with pytest.raises(ValueError, match=r"to_linear\(\)"):
        fusee.nn.densify(MonarchLinear(4, 4))
