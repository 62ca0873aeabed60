"""PerpGrad: the projection against float64, its degenerate cases, and the optimizer around it."""

from __future__ import annotations

import copy
import doctest
import io
import math
import pickle

import fusee
import pytest
import torch
from fusee.losses.perp_grad import _reference
from fusee.optim import PerpGrad, perp_grad_
from torch import Tensor, nn

from tests.harness.processes import run_in_two_processes
from tests.harness.spec import ALL_DTYPES
from tests.test_counters import EXCESS, SECTOR_EFFICIENCY, Counters, moved_bytes, sector_bytes

EMULATED = fusee.engine() == "emulated"
# On the CPU engines above 8192 elements a tensor is worked on in chunks; on CUDA above 1024 by a block,
# and above 16384 by several.
SIZES = [2, 33, 1500] + ([17000] if EMULATED else [8192, 8193, 100_000])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def exact(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    """The formula in float64, over the whole tensor."""
    w, g = w.double(), g.double()
    p = g - (w * g).sum() / (w * w).sum() * w
    return p * (g.norm() / p.norm()) if rescale else p


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# --- the projection -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rescale", [True, False])
def test_matches_float64(dtype: torch.dtype, size: int, rescale: bool) -> None:
    w, g = randn(size, seed=1, dtype=dtype), randn(size, seed=2, dtype=dtype)
    g += w / 2
    expected = exact(w, g, rescale)
    before, w_before, norm = g.clone(), w.clone(), g.double().norm()
    assert not perp_grad_(w, g, rescale=rescale).any()
    bound = max(torch.finfo(dtype).eps, 1e-14)
    assert error(g, expected) <= bound
    assert abs(cosine(g, w)) <= bound
    if rescale:
        assert float(g.double().norm() / norm) == pytest.approx(1, abs=bound)
    assert torch.equal(w, w_before) and not torch.equal(g, before)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("sine", [1e-1, 1e-2, 1e-3, 1e-4])
def test_nearly_parallel(dtype: torch.dtype, sine: float) -> None:
    """Dot products in the dtype leave a component along w that the rescaling blows up (fault 5)."""
    w = randn(1500, seed=1, dtype=dtype)
    g = (3 * w.double() + 3 * sine * randn(1500, seed=2).double()).to(dtype)
    expected = exact(w, g)
    degenerate = bool(perp_grad_(w, g))
    if degenerate:  # what is left is no more than the rounding of g to its dtype
        assert sine <= torch.finfo(dtype).eps
        assert not g.any()
    else:
        eps = torch.finfo(dtype).eps
        assert abs(cosine(g, w)) <= max(eps, 1e-15 / sine)
        # In float64 the norm is known less well than the direction: from sums that nearly cancel.
        assert error(g, expected) <= max(eps, 1e-15 / sine**2)


def test_mixed_list() -> None:
    """Every dtype and size in one call gives what each gives alone."""
    shapes = [(3,), (40, 30), (0,), (2, 3, 4, 5), (), (1,), (1100,), (5, 0)]
    pairs = [
        (randn(*shape, seed=i, dtype=dtype), randn(*shape, seed=i + 50, dtype=dtype))
        for i, (shape, dtype) in enumerate((s, d) for s in shapes for d in ALL_DTYPES)
    ]
    alone = [g.clone() for _, g in pairs]
    for (w, _), g in zip(pairs, alone, strict=True):
        perp_grad_(w, g)
    degenerate = perp_grad_([w for w, _ in pairs], [g for _, g in pairs])
    assert degenerate.shape == (len(pairs),) and degenerate.dtype == torch.bool
    for (_, g), expected in zip(pairs, alone, strict=True):
        assert torch.equal(g, expected)


def test_more_tensors_than_a_launch_takes() -> None:
    count = 70 if EMULATED else 700
    weights = [randn(3, seed=i) for i in range(count)]
    grads = [randn(3, seed=i + count) for i in range(count)]
    expected = [exact(w, g) for w, g in zip(weights, grads, strict=True)]
    assert perp_grad_(weights, grads).shape == (count,)
    assert all(error(g, e) < 1e-6 for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("shape", [(5, 7), (3, 1100), (40, 2, 3, 3), (9, 1), (2, 17000)])
def test_rows(shape: tuple[int, ...]) -> None:
    w, g = randn(*shape, seed=1), randn(*shape, seed=2)
    expected = torch.stack(
        [exact(a, b) if a.numel() > 1 else b.double() for a, b in zip(w, g, strict=False)]
    )
    degenerate = perp_grad_(w, g, per="row")
    assert degenerate.shape == shape[:1] and not degenerate.any()
    assert error(g, expected) <= 1e-7


def test_rows_of_a_vector_are_one_unit() -> None:
    w, g = randn(12, seed=1), randn(12, seed=2)
    expected = exact(w, g)
    assert perp_grad_(w, g, per="row").shape == (1,)
    assert error(g, expected) <= 1e-7


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def spread(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def shifted(t: Tensor) -> Tensor:
    """The same values one element off any alignment."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "plain": lambda t: t.clone(),
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "spread": spread,
    "shifted": shifted,
}


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
def test_layouts(of_weight: str, of_grad: str, per: str) -> None:
    """The reference's `view(-1)` raises for channels_last, `flatten` would pair wrongly (fault 3)."""
    w, g = randn(6, 4, 3, 5, seed=1), randn(6, 4, 3, 5, seed=2)
    expected = g.clone()
    perp_grad_(w, expected, per=per)
    w, g = LAYOUTS[of_weight](w), LAYOUTS[of_grad](g)
    strides, w_before = g.stride(), w.clone()
    perp_grad_(w, g, per=per)
    assert g.stride() == strides and torch.equal(w, w_before)
    assert error(g, expected.double()) <= 1e-7


def test_gaps_are_not_written() -> None:
    wide = torch.full((6, 8), 7.0)
    wide[:, ::2] = randn(6, 4)
    perp_grad_(randn(6, 4, seed=1), wide[:, ::2])
    assert (wide[:, 1::2] == 7).all()


# --- degenerate cases -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("factor", [3.0, -0.1, 1.0])
@pytest.mark.parametrize("size", [2, 1000, 20000])
def test_parallel_gives_zeros(dtype: torch.dtype, factor: float, size: int) -> None:
    """The reference returns a full-norm residue along w (fault 4)."""
    if EMULATED and size == 20000:
        size = 1500
    w = randn(size, seed=1, dtype=dtype)
    g = factor * w
    assert perp_grad_(w, g).tolist() == [True]
    assert not g.any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_single_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The reference turns a third of them into noise of full norm and either sign (fault 4)."""
    w, g = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    before = g.clone()
    assert perp_grad_(w, g).tolist() == [False]
    assert torch.equal(g, before)
    assert perp_grad_(w, g, skip_single=False).tolist() == [True]
    assert not g.any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_zero_weights_keep_the_gradient(dtype: torch.dtype) -> None:
    """The reference gives NaN in float16, where its 1e-30 is zero (fault 5)."""
    g = randn(50, dtype=dtype)
    before = g.clone()
    assert perp_grad_(torch.zeros_like(g), g).tolist() == [False]
    assert torch.equal(g, before)


def test_zero_gradient_stays() -> None:
    g = torch.zeros(50)
    assert perp_grad_(randn(50), g).tolist() == [False]
    assert torch.equal(g, torch.zeros(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("w_scale", "g_scale"), [(1, 1e-30), (1e-30, 1), (1e30, 1e-30), (1e-25, 1e25)]
)
def test_squares_out_of_range(dtype: torch.dtype, w_scale: float, g_scale: float) -> None:
    """Gradients after softmax collapse are tiny; their squares must not vanish."""
    w, g = randn(1500, seed=1).double(), randn(1500, seed=2).double() + 1
    w, g = (w * w_scale).to(dtype), (g * g_scale).to(dtype)
    expected = exact(w, g)
    assert not perp_grad_(w, g).any()
    bound = max(torch.finfo(dtype).eps, 1e-14)
    assert error(g, expected) <= bound
    assert abs(cosine(g, w)) <= bound


def test_tiny_float16() -> None:
    w, g = randn(500, seed=1) * 1e-4, randn(500, seed=2) * 1e-5
    w, g = w.half(), g.half()
    expected = exact(w, g)
    perp_grad_(w, g)
    assert g.isfinite().all()
    # Subnormal results are rounded to multiples of 6e-8.
    assert float((g.double() - expected).abs().max()) <= 3.1e-8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "grad"])
@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_non_finite(value: float, where: str, per: str, dtype: torch.dtype) -> None:
    w, g = randn(4, 20, seed=1, dtype=dtype), randn(4, 20, seed=2, dtype=dtype)
    others = [randn(7, seed=3), randn(7, seed=4)]
    (w if where == "weight" else g)[1, 3] = value
    degenerate = perp_grad_([w, others[0]], [g, others[1]], per=per)
    assert not degenerate.any()
    assert g[1].isnan().all()
    if per == "tensor":
        assert g.isnan().all()
    else:
        assert g[[0, 2, 3]].isfinite().all()
    assert others[1].isfinite().all()


def test_tau() -> None:
    w, g = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.01])
    assert perp_grad_(w, g.clone(), tau=1e-3).tolist() == [True]
    assert perp_grad_(w, g.clone(), tau=1e-5).tolist() == [False]


# --- the operator ---------------------------------------------------------------------------------


def large_list(seed: int) -> list[Tensor]:
    shapes = [(500, 400), (70_000,), (64,), (8193,), (300, 3, 3, 3), (1,)] + [(50,)] * 40
    return [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.skipif(EMULATED, reason="the emulator has no threads of its own")
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_same_bits_whatever_the_threads(per: str) -> None:
    weights, grads = large_list(0), large_list(1000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append([g.clone() for g in grads])
            perp_grad_(weights, results[-1], per=per)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_reference_agrees(per: str, dtype: torch.dtype) -> None:
    shapes = [(6, 5), (9,), (), (0, 4), (3, 0), (2, 3, 2, 2), (4, 1)]
    weights = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    grads = [randn(*s, seed=i + 20, dtype=dtype) for i, s in enumerate(shapes)]
    grads[1] = 2 * weights[1]
    plain = [g.clone() for g in grads]
    args = (per == "row", True, True, 1e-10)
    flags = perp_grad_(weights, grads, per=per)
    assert torch.equal(flags, _reference(weights, plain, *args))
    for a, b in zip(grads, plain, strict=True):
        if a.numel():
            assert float((a.double() - b.double()).norm()) <= 1e-12 + torch.finfo(
                dtype
            ).eps * float(b.double().norm())


@pytest.mark.skipif(EMULATED, reason="the tracing of an operator does not depend on its engine")
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(per_row: bool) -> None:
    shapes = [(6, 5), (9,), (), (0, 4), (2, 3, 2, 2)]
    weights = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    grads = [randn(*s, seed=i + 20) for i, s in enumerate(shapes)]
    weights[-1], grads[0] = channels_last(weights[-1]), spread(grads[0])
    for requires_grad in (False, True):
        args = (
            [w.requires_grad_(requires_grad) for w in weights],
            grads,
            per_row,
            True,
            True,
            1e-10,
        )
        torch.library.opcheck(torch.ops.fusee.perp_grad_, args)


@pytest.mark.skipif(EMULATED, reason="the tracing of an operator does not depend on its engine")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool) -> None:
    def step(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        scaled = g * 2
        flags = perp_grad_([w], [scaled], per="row")
        return scaled + 1, flags

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (4, 6):
        w, g = randn(rows, 5, seed=1), randn(rows, 5, seed=2)
        before = g.clone()
        for a, b in zip(compiled(w, g), step(w, g), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(g, before)


@pytest.mark.skipif(EMULATED, reason="the tracing of an operator does not depend on its engine")
def test_saved_program() -> None:
    class Step(nn.Module):
        def forward(self, w: Tensor, g: Tensor) -> Tensor:
            g = g.clone()
            perp_grad_(w, g)
            return g

    w, g = randn(4, 5, seed=1), randn(4, 5, seed=2)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Step(), (w, g)), buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(w, g), Step()(w, g))


@pytest.mark.emulated_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_traffic(dtype: torch.dtype, per: str) -> None:
    """All tensors in two launches, which read both tensors twice and write the gradient once."""
    if not EMULATED:
        pytest.skip("needs FUSEE_ENGINE=emulated")
    counters = Counters()
    shapes = [(40_000,), (64, 3, 3, 3), (64,), (30, 256), (1000, 32), (4, 1200)]
    weights = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    grads = [randn(*shape, seed=i + 9, dtype=dtype) for i, shape in enumerate(shapes)]
    counters.reset()
    perp_grad_(weights, grads, per=per)
    counted = counters.read()
    minimum = sum(5 * g.numel() * g.element_size() for g in grads)
    assert counted["totals"]["launches"] == 2
    assert 0.9 * minimum <= moved_bytes(counted) <= EXCESS * minimum
    assert moved_bytes(counted) >= SECTOR_EFFICIENCY * sector_bytes(counted)


@pytest.mark.parametrize("documented", [PerpGrad, perp_grad_])
def test_documentation(documented: object) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_autograd_knows_of_the_write() -> None:
    x = randn(5).requires_grad_()
    g = x * 1
    loss = (g * g).sum()
    perp_grad_(randn(5, seed=1), g.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_list() -> None:
    assert perp_grad_([], []).shape == (0,)


@pytest.mark.parametrize(
    ("weights", "grads", "options", "error_type", "match"),
    [
        ([randn(3)], [], {}, ValueError, "as many"),
        ([randn(3)], [randn(4)], {}, ValueError, r"grads\[0\] must have the shape"),
        ([randn(3)], [randn(3).double()], {}, TypeError, r"grads\[0\] must have the dtype"),
        ([randn(3).long()], [randn(3).long()], {}, TypeError, r"grads\[0\] must have dtype"),
        ([randn(3)], [randn(3).to_sparse()], {}, TypeError, r"grads\[0\] must be a dense"),
        ([randn(3)], [3.0], {}, TypeError, r"grads\[0\] must be a Tensor"),
        ([randn(3)], [randn(3)], {"per": "channel"}, ValueError, "per must be"),
        ([randn(3)], [randn(3)], {"tau": 1.5}, ValueError, "tau must be"),
        ([randn(3)], [randn(1).expand(3)], {}, RuntimeError, "expanded"),
        ([randn(3)], [torch.empty(3, device="meta")], {}, ValueError, "same device"),
    ],
)
def test_errors(weights, grads, options, error_type, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error_type, match=match):
        perp_grad_(weights, grads, **options)


def test_twice_the_same_gradient() -> None:
    g = randn(3)
    with pytest.raises(ValueError, match="twice"):
        perp_grad_([randn(3), randn(3)], [g, g])


@pytest.mark.parametrize("shape", [(9,), (4, 5), ()])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_complex(shape: tuple[int, ...], per: str) -> None:
    w = torch.complex(randn(*shape, seed=1), randn(*shape, seed=2))
    g = torch.complex(randn(*shape, seed=3), randn(*shape, seed=4))
    rows = list(zip(w, g, strict=True)) if per == "row" and len(shape) > 1 else [(w, g)]
    expected = [exact(torch.view_as_real(a), torch.view_as_real(b)) for a, b in rows]
    assert perp_grad_(w, g, per=per).shape == (len(rows),)
    got = torch.view_as_real(g).double().reshape(-1)
    assert error(got, torch.stack(expected).reshape(-1)) <= 1e-6


# --- the optimizer --------------------------------------------------------------------------------

BASES = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-25, **kw),
    "Adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, amsgrad=True, **kw),
    "RMSprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, **kw),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(randn(10, 6, seed=seed)).square().mean()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss


def by_hand(model: nn.Module, base: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Training with the gradients of every tensor projected by the formula."""
    for step in range(start, start + steps):
        backward(model, base, step)
        for p in model.parameters():
            p.grad.copy_(exact(p.detach(), p.grad))
        base.step()


def same_weights(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance)
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_as_by_hand(name: str, options: dict[str, bool]) -> None:
    """The base keeps its own settings; the reference replaces them by its defaults (fault 1)."""
    if "fused" in options and name == "RMSprop":
        pytest.skip("RMSprop has no fused form")
    model, twin = network(), network()
    optimizer = PerpGrad(BASES[name](model.parameters(), **options))
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    by_hand(twin, BASES[name](twin.parameters()), 3)
    assert same_weights(model, twin, 1e-5)


def test_settings_are_the_bases_own_objects() -> None:
    base = BASES["AdamW"](network().parameters())
    optimizer = PerpGrad(base)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is base.param_groups
    assert base.param_groups[0]["eps"] == 1e-25


def test_sgd_closure_steps_with_projected_gradients() -> None:
    """The reference projects stale gradients and steps with those of the closure (fault 2)."""
    model, twin = network(), network()
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        loss = optimizer.step(lambda step=step: backward(model, optimizer, step))
        assert float(loss.detach()) > 0
        for p in model.parameters():
            assert p.grad is not None
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 3)
    assert same_weights(model, twin, 1e-6)


def test_lbfgs_sees_projected_gradients_in_every_evaluation() -> None:
    """As LBFGS on a closure that projects by hand, at the weights of each evaluation."""
    model, twin = network(), network()
    optimizer = PerpGrad(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4))
    bare = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=4)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return backward(model, optimizer)

    def by_hand_closure() -> Tensor:
        loss = backward(twin, bare)
        for p in twin.parameters():
            p.grad.copy_(exact(p.detach(), p.grad))
        return loss

    first = float(loss_of(model).detach())
    optimizer.step(closure)
    bare.step(by_hand_closure)
    assert calls > 1
    assert float(loss_of(model).detach()) < first
    assert same_weights(model, twin, 1e-5)


@pytest.mark.parametrize("attach", ["wrapper", "base"])
def test_schedulers(attach: str) -> None:
    """Those of the reference stop working once a state dict was loaded (fault 1)."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = PerpGrad(base)
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer if attach == "wrapper" else base, step_size=1, gamma=0.5
    )
    for _ in range(2):
        backward(model, optimizer)
        optimizer.step()
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    backward(model, optimizer)
    optimizer.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.125
    assert scheduler.get_last_lr() == [0.125]


@pytest.mark.filterwarnings("error")
def test_one_cycle_scheduler_gives_no_warning() -> None:
    model = network()
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
    for _ in range(3):
        backward(model, optimizer)
        optimizer.step()
        scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("project", ["grad", "update"])
def test_resumes_exactly(name: str, project: str) -> None:
    model = network()
    optimizer = PerpGrad(BASES[name](model.parameters()), project=project)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            backward(model, optimizer, step)
            optimizer.step()

    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    train(model, optimizer, range(3, 6))
    buffer.seek(0)
    weights, state = torch.load(buffer)
    other = network(1)
    resumed = PerpGrad(BASES[name](other.parameters()), project=project)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    assert same_weights(model, other)


def test_checkpoints_are_the_bases() -> None:
    model = network()
    base = BASES["AdamW"](model.parameters())
    optimizer = PerpGrad(base)
    backward(model, optimizer)
    optimizer.step()
    assert str(optimizer.state_dict()) == str(base.state_dict())
    bare = BASES["AdamW"](network().parameters())
    bare.load_state_dict(optimizer.state_dict())
    PerpGrad(BASES["AdamW"](network().parameters())).load_state_dict(bare.state_dict())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str) -> None:
    model = network()
    optimizer = PerpGrad(BASES["SGD"](model.parameters()), rescale=False, per="row")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a function into the instance
    backward(model, optimizer)
    optimizer.step()
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert (other.rescale, other.per) == (False, "row")
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, o, 1)
        o.step()
    assert same_weights(model, twin)


def test_repr_names_options_and_base() -> None:
    text = repr(PerpGrad(BASES["AdamW"](network().parameters()), per="row"))
    assert text.startswith("PerpGrad(") and "per='row'" in text and "AdamW" in text
    assert "betas: (0.8, 0.9)" in text


def test_zero_grad() -> None:
    model = network()
    optimizer = PerpGrad(BASES["SGD"](model.parameters()))
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks() -> None:
    model = network()
    optimizer = PerpGrad(BASES["SGD"](model.parameters()))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(f"pre {type(o).__name__}"))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(f"post {type(o).__name__}"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("state"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("load"))
    backward(model, optimizer)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre PerpGrad", "post PerpGrad", "state", "load"]


def test_groups_filters_and_missing_gradients() -> None:
    torch.manual_seed(0)
    projected, off, filtered, unused = (nn.Parameter(torch.randn(3, 4)) for _ in range(4))
    filtered.data = filtered.data[0]
    base = torch.optim.SGD([{"params": [projected, filtered]}], lr=1.0)
    optimizer = PerpGrad(base, params=lambda p: p.ndim > 1)
    optimizer.add_param_group({"params": [off], "perp_grad": False})
    optimizer.add_param_group({"params": [unused]})
    assert len(base.param_groups) == 3
    grads = {p: torch.randn_like(p) for p in (projected, off, filtered)}
    for p, g in grads.items():
        p.grad = g.clone()
    start = projected.detach().clone()
    optimizer.step()
    assert torch.equal(off.grad, grads[off]) and torch.equal(filtered.grad, grads[filtered])
    assert unused.grad is None
    assert error(projected.grad, exact(start, grads[projected])) < 1e-6


def test_tied_parameters_are_projected_once() -> None:
    """With rescaling a second projection would show nothing, so what it would count is looked at."""
    shared = nn.Parameter(randn(4, 4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = torch.optim.SGD([shared, shared], lr=0.1)
    optimizer = PerpGrad(base)
    shared.grad = 2 * shared.detach()
    optimizer.step()
    assert optimizer.last_degenerate == 1

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.0))
    model(randn(3, 4)).square().sum().backward()
    expected = exact(model[0].weight.detach(), model[0].weight.grad)
    optimizer.step()
    assert error(model[0].weight.grad, expected) < 1e-6


def test_last_degenerate() -> None:
    p, q = nn.Parameter(randn(5)), nn.Parameter(randn(5, seed=1).double())
    optimizer = PerpGrad(torch.optim.SGD([p, q], lr=0.1))
    assert optimizer.last_degenerate == 0
    p.grad, q.grad = 3 * p.detach(), randn(5, seed=2).double()
    optimizer.step()
    assert optimizer.last_degenerate == 1
    p.grad, q.grad = randn(5, seed=3), randn(5, seed=4).double()
    optimizer.step()
    assert optimizer.last_degenerate == 0


def test_coupled_weight_decay_survives() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = PerpGrad(torch.optim.SGD([p], lr=0.1, weight_decay=0.5))
    p.grad = torch.zeros(2)
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([0.95, 0.95]))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_grad_scaler_skips_non_finite(value: float) -> None:
    model = network()
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def run(spoil: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if spoil:
            model[0].weight.grad[1, 2] = value
        scaler.step(optimizer)
        scaler.update()

    start = copy.deepcopy(model)
    run(spoil=True)
    assert same_weights(model, start) and scaler.get_scale() == 4.0
    run(spoil=False)
    by_hand(start, torch.optim.SGD(start.parameters(), lr=0.1), 1)
    assert same_weights(model, start, 1e-6)


def test_non_finite_gradients_stay_non_finite() -> None:
    p = nn.Parameter(randn(6))
    p.grad = randn(6, seed=1)
    p.grad[2] = math.inf
    PerpGrad(torch.optim.SGD([p], lr=0.1)).step()
    assert p.grad.isnan().all()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"dense, got layout torch.sparse_coo .* \(5, 3\)"):
        PerpGrad(torch.optim.SparseAdam(table.parameters())).step()
    groups = [{"params": list(table.parameters()), "perp_grad": False}]
    PerpGrad(torch.optim.SparseAdam(groups)).step()


def test_complex_parameters() -> None:
    p = nn.Parameter(torch.complex(randn(5, seed=1), randn(5, seed=2)))
    p.grad = torch.complex(randn(5, seed=3), randn(5, seed=4))
    PerpGrad(torch.optim.Adam([p], lr=0.1)).step()
    w, g = torch.view_as_real(p.detach()), torch.view_as_real(p.grad)
    assert w.isfinite().all() and g.isfinite().all()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("with_closure", [False, True])
def test_update_is_orthogonal(name: str, with_closure: bool) -> None:
    """What momentum and preconditioning bring along the weights is gone too, and norms are kept."""
    model, free = network(), network()
    optimizer = PerpGrad(BASES[name](model.parameters()), project="update")
    base = BASES[name](free.parameters())
    for step in range(4):
        start = [p.detach().clone() for p in model.parameters()]
        free.load_state_dict(model.state_dict())
        backward(free, base, step)
        base.step()
        if with_closure:
            optimizer.step(lambda step=step: backward(model, optimizer, step))
        else:
            backward(model, optimizer, step)
            optimizer.step()
        decay = 1 - 0.01 * 0.01 if name == "AdamW" else 1.0
        for w, new, plain in zip(start, model.parameters(), free.parameters(), strict=True):
            update = (new.detach() - decay * w).double()
            assert abs(cosine(update, w)) < 1e-4
            expected = exact(w, plain.detach().double() - decay * w.double())
            assert error(update, expected) < 1e-4


def test_update_keeps_decoupled_decay() -> None:
    p = nn.Parameter(torch.tensor([2.0, 2.0]))
    optimizer = PerpGrad(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5), project="update")
    p.grad = torch.zeros(2)
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([1.9, 1.9]))


def test_attributes_of_the_base_are_found() -> None:
    class Switching(torch.optim.SGD):
        def eval(self) -> str:
            return "eval"

    optimizer = PerpGrad(Switching(network().parameters()))
    assert optimizer.eval() == "eval"
    with pytest.raises(AttributeError):
        _ = optimizer.nothing_of_the_kind


@pytest.mark.parametrize(
    ("options", "error_type", "match"),
    [
        ({"per": "column"}, ValueError, "per must be"),
        ({"project": "weights"}, ValueError, "project must be"),
        ({"tau": -1.0}, ValueError, "tau must be"),
        ({"tau": "small"}, TypeError, "tau must be"),
    ],
)
def test_bad_options(options: dict, error_type: type[Exception], match: str) -> None:
    with pytest.raises(error_type, match=match):
        PerpGrad(BASES["SGD"](network().parameters()), **options)


def test_base_must_be_an_instance() -> None:
    with pytest.raises(TypeError, match="base_optimizer must be an instance"):
        PerpGrad(torch.optim.SGD)
    with pytest.raises(TypeError, match="base_optimizer must be an instance"):
        PerpGrad(network().parameters())


SHARDED = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
import fusee
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
w, g = torch.randn(6, 4), torch.randn(6, 4)
p = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
p.grad = distribute_tensor(g, mesh, [Shard(0)])
optimizer = fusee.optim.PerpGrad(torch.optim.SGD([p], lr=0.1))
optimizer.step()
fusee.optim.perp_grad_(w, g)
torch.testing.assert_close(p.grad.full_tensor(), g)
assert optimizer.last_degenerate == 0
"""


@pytest.mark.skipif(EMULATED, reason="sharded tensors do not reach the engine")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
def test_sharded_parameters_are_projected_as_a_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_in_two_processes(SHARDED, tmp_path)
