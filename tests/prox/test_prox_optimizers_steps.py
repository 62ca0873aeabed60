"""A step of ProxSGD and ProxAdamW: that of torch's optimiser and the operator, against float64."""

from __future__ import annotations

from typing import Any

import fusee
import pytest
import torch
from fusee.optim import ProxAdamW, ProxSGD
from fusee.prox.prox_host import ProxHost
from torch import Tensor

from tests.prox.hosts import WAYS, backward, error, network, param_groups, slow_operator, zero_rows

SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "foreach": {"momentum": 0.9, "dampening": 0.1, "foreach": True},
    "fused": {"momentum": 0.9, "fused": True},
    "maximize": {"maximize": True, "weight_decay": torch.tensor(0.3)},
}


def compare_sgd(way: str, options: dict[str, Any], steps: int = 3) -> ProxSGD:
    model, twin = network(), network()
    optimizer = ProxSGD(param_groups(model, way), lr=0.2, **options)
    plain = torch.optim.SGD(twin.parameters(), lr=0.2, **options)
    for step in range(steps):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        plain.step()
        counts = slow_operator(twin, way, 0.2)
        assert error(model, twin) < 1e-12
        assert [int(c) for c in optimizer.kept] == counts
        assert [row.kept for row in optimizer.report()] == counts
    return optimizer


@pytest.mark.parametrize("way", WAYS)
def test_step_is_that_of_sgd_and_the_operator(way: str) -> None:
    compare_sgd(way, SGDS["momentum"])


@pytest.mark.parametrize("name", SGDS)
def test_options_of_sgd(name: str) -> None:
    compare_sgd("debiased", SGDS[name])


ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "foreach": {"foreach": True},
    "fused": {"fused": True, "amsgrad": True},
    "maximize": {"maximize": True},
}
# The gradients are of the order of 1, and so is the metric.
ADAM_WAYS = [way for way in WAYS if way != "weights"]


def denominator(state: Any, options: dict[str, Any]) -> Any:
    def of(param: Tensor) -> Tensor:
        of_param = state[param]
        square = of_param["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
        return (square / (1 - 0.99 ** of_param["step"].item())).sqrt() + 1e-3

    return of


def compare_adamw(way: str, options: dict[str, Any]) -> None:
    model, twin = network(), network()
    given = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3, **options}
    optimizer = ProxAdamW(param_groups(model, way), **given)
    plain = torch.optim.AdamW(twin.parameters(), **given)
    for step in range(2):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        plain.step()
        counts = slow_operator(twin, way, 0.05, denominator(plain.state, options))
        assert error(model, twin) < 1e-12
        assert [int(c) for c in optimizer.kept] == counts


@pytest.mark.parametrize("way", ADAM_WAYS)
def test_step_is_that_of_adamw_and_the_operator_in_its_metric(way: str) -> None:
    compare_adamw(way, {})


@pytest.mark.parametrize("name", ADAMS)
def test_options_of_adamw(name: str) -> None:
    compare_adamw("k", ADAMS[name])


def test_adamw_agrees_with_the_function() -> None:
    """On the weights that a plain AdamW had before the operator."""
    model, twin = network(), network()
    optimizer = ProxAdamW([model[0].weight], lr=0.05, k=2, lam=0.7)
    plain = torch.optim.AdamW([twin[0].weight], lr=0.05)
    for step in range(2):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        plain.step()
        state = plain.state[twin[0].weight]
        h = (state["exp_avg_sq"] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        x = fusee.prox_group_envelope(twin[0].weight.detach(), 2, 0.05 * 0.7, metric=h)
        twin[0].weight.data.copy_(x)
        assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
def test_other_dtypes(kind: type[ProxHost], dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    options: Any = {"lr": 0.05, "k": 2, "lam": 30.0, "debiased": True}
    if kind is ProxAdamW:
        options["eps"] = 1e-4  # torch's own default is zero in float16
    optimizer = kind([model[0].weight, model[2].weight], **options)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        assert zero_rows(model[0].weight) == 4 and zero_rows(model[2].weight) == 2
        assert all(p.isfinite().all() for p in model.parameters())
