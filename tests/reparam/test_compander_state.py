"""How a compander travels: state dicts, copies, dtypes, devices, compiled code."""

from __future__ import annotations

import copy
import io
import pickle

import fusee
import pytest
import torch
from fusee.nn import Compander
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.reparam.test_compander import linear, randn


@pytest.mark.parametrize("per_channel", [False, True])
def test_state_dict(per_channel: bool) -> None:
    """It fits a layer whose weights began elsewhere, and holds what was learned."""
    module, other = (linear(seed, per_channel=per_channel) for seed in (0, 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert not torch.equal(other.weight, module.weight)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.weight, module.weight)
    a, b = (m.parametrizations.weight[0].a for m in (module, other))
    assert torch.equal(a, b)
    assert pickle.loads(pickle.dumps(module.state_dict())).keys() == other.state_dict().keys()


def test_deepcopy() -> None:
    module = linear(per_channel=True)
    twin = copy.deepcopy(module)
    weight = module.weight.detach().clone()
    assert torch.equal(twin.weight, weight)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(module.weight, weight) and not torch.equal(twin.weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    """A module that is converted keeps a and b; one that is made in a half type is all of it."""
    module = linear()
    compander = module.parametrizations.weight[0]
    weight, a = module.weight.detach(), compander.a.item()
    module.to(dtype)
    assert compander.a.item() == a and compander.initial_a.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {module.weight.dtype} == {dtype}
    torch.testing.assert_close(module.weight.float(), weight, rtol=2 ** (-7), atol=1e-6)
    module(randn(2, 5, dtype=dtype)).sum().backward()
    assert compander.log_ratio_b.grad.dtype == dtype and compander.log_ratio_b.grad.any()
    made = Compander(randn(4, dtype=dtype))
    assert (made.log_ratio_a.dtype, made.a.dtype) == (dtype, torch.float32)
    assert module.double().parametrizations.weight[0].a.dtype == torch.float64


def test_autocast() -> None:
    module = linear()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(randn(3, 5))
        assert module.weight.dtype == torch.float32
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_dtype_and_device_arguments() -> None:
    made = Compander(randn(3), dtype=torch.float64)
    assert (made.log_ratio_a.dtype, made.initial_a.dtype) == (torch.float64, torch.float32)
    assert Compander(randn(3), device="meta").a.is_meta


def test_meta_device() -> None:
    """Built without memory, then loaded."""
    with torch.device("meta"):
        module = nn.Linear(5, 4)
        parametrize.register_parametrization(
            module, "weight", Compander(module.weight, per_channel=True)
        )
    assert all(t.is_meta for t in module.state_dict().values()) and module.weight.is_meta
    module.to_empty(device="cpu")
    source = linear(per_channel=True)
    module.load_state_dict(source.state_dict())
    assert torch.equal(module.weight, source.weight)


@pytest.mark.tracing
@pytest.mark.parametrize("per_channel", [False, True])
def test_compiled_training_step(per_channel: bool) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.Tanh(), nn.Conv1d(4, 5, 2))
        fusee.nn.compand_model(model, per_channel=per_channel)
        return model

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    eager, compiled = made(), made()
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function, model in ((loss, eager), (step, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            function(model, randn(2, 3, 6, seed=seed)).backward()
            optimizer.step()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    assert (eager[0].parametrizations.weight[0].log_ratio_a != 0).all()
