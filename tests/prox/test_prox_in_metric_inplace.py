"""The operator in place in a metric of elements: against float64, by certificate, in odd memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fusee
import pytest
import torch
from fusee.prox.metric import prox_in_metric
from fusee.prox.prox_in_metric_inplace import _reference, prox_in_metric_, prox_of_elements
from fusee.prox.scopes import Placed, place_by_dims
from torch import Tensor

from tests.harness.measure import same_bits
from tests.harness.spec import ALL_DTYPES
from tests.prox.certificate import KINDS, gap, values
from tests.prox.test_prox_metric import HARD, hard
from tests.test_counters import Counters

EMULATED = fusee.engine() == "emulated"
DOUBLE = torch.float64
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Of the norm: rounding for the half types."""
# Groups that are rows, short rows, columns, columns of blocks, and in several pieces; see kLongRow.
SHAPES = [(1, 9, 70), (1, 33, 2), (7, 30, 1), (5, 12, 9), (3, 6, 130), (1, 2, 1100)]
if not EMULATED:
    SHAPES += [(200, 600, 1), (1, 3, 40_000), (300, 5, 63)]


def numbers(*values_: float) -> Tensor:
    return torch.tensor(values_, dtype=DOUBLE)


def elements(seed: int, *shape: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """v and a metric like that of Adam."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, dtype=DOUBLE, generator=generator)
    H = torch.randn(shape, dtype=DOUBLE, generator=generator).abs() + 0.05
    return v.to(dtype), H.to(dtype)


def solve(
    tensors: Sequence[Tensor],
    metric: Sequence[Tensor],
    places: Sequence[Placed],
    k: Tensor,
    lam: Tensor,
    *,
    weights: Tensor | None = None,
    form: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """The result on copies, in the order of their memory."""
    copies = [torch.empty_like(t).copy_(t) for t in tensors]
    layout = [number for place in places for number in place]
    return copies, prox_in_metric_(copies, list(metric), layout, weights, k, lam, form)


def check(
    tensors: Sequence[Tensor],
    metric: Sequence[Tensor],
    places: Sequence[Placed],
    k: Tensor,
    lam: Tensor,
    *,
    weights: Tensor | None = None,
    form: int = 0,
    rounded: float = 1.0,
) -> list[Tensor]:
    """The result, which is that of the reference in float64."""
    actual, left = solve(tensors, metric, places, k, lam, weights=weights, form=form)
    expected = [torch.empty_like(t, dtype=DOUBLE).copy_(t) for t in tensors]
    layout = [number for place in places for number in place]
    wanted = _reference(expected, [H.double() for H in metric], layout, weights, k, lam, form)
    assert torch.equal(left, wanted)
    for a, b in zip(actual, expected, strict=True):
        error = float((a.double() - b).norm())
        assert error <= rounded * TOLERANCE[a.dtype] * float(b.norm())
    return actual


# --- against the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    v, H = elements(0, *shape, dtype=dtype)
    place = [Placed(0, 0, *shape)]
    for k in (0.6, shape[1] / 3):
        for lam in (1e-3, 2.0) if EMULATED else (1e-6, 1e-3, 0.3, 2.0, 30.0):
            check([v], [H], place, numbers(k), numbers(lam))
    check([v], [H], place, numbers(shape[1] / 3), numbers(0.04), form=1)


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_ends(form: int, dtype: torch.dtype) -> None:
    """No penalty, all of it, no group and every group; weights of zero and groups of zeros."""
    v, H = elements(0, 9, 4, dtype=dtype)
    v[4] = 0
    d = 0.2 + torch.arange(9, dtype=DOUBLE) / 3
    d[2] = 0
    place = [Placed(0, 0, 1, 9, 4)]
    for lam in (0.0, 0.01, 5.0, math.inf):
        for k in (0.0, 0.4, 3.0, 8.0, 20.0):
            for weights in (None, d):
                options = {"weights": weights, "form": form}
                (x,) = check([v], [H], place, numbers(k), numbers(lam), **options)
                if weights is not None or (lam == 0 and form < 2):
                    assert same_bits(x[2], v[2])
                if lam == 0 and form < 2:
                    assert same_bits(x, v)
                elif form == 0 and (k == 0 or lam == math.inf):
                    assert int((x != 0).any(1).sum()) == (weights is not None)


def test_first_of_equals() -> None:
    v, H = torch.ones(6, 3), torch.full((6, 3), 2.0)
    (x,), left = solve([v], [H], [Placed(0, 0, 1, 6, 3)], numbers(2.5), numbers(1), form=2)
    assert torch.equal(x.any(1), torch.arange(6) < 2) and left.tolist() == [2]
    x = check([v], [H], [Placed(0, 0, 1, 6, 3)], numbers(2.5), numbers(1))[0]
    assert same_bits(x, x[:1].expand(6, 3))


def test_whole_groups_of_the_debiased_form_keep_their_bits() -> None:
    v, H = elements(0, 40, 70, dtype=torch.float32)
    v[::5] *= 100
    (x,), left = solve([v], [H], [Placed(0, 0, 1, 40, 70)], numbers(12), numbers(0.04), form=1)
    whole = [same_bits(a, b) for a, b in zip(x, v, strict=True)]
    assert whole == [j % 5 == 0 for j in range(40)] and int(left) > 8


# --- by certificate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [0, 1])
def test_certificate(kind: str, form: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(6 if EMULATED else 60):
        m, size = 1 + case % 23, 2 + case % 4
        v = values(kind, generator, m, size)
        d = 10 ** (4 * torch.rand(m, dtype=DOUBLE, generator=generator) - 2)
        H = 10 ** (4 * torch.rand(m, size, dtype=DOUBLE, generator=generator) - 2)
        lam = 10 ** (4 * torch.rand((), generator=generator).item() - 2)
        if form == 1:
            lam = (0.02 + 0.93 * lam / (1 + lam)) / float((d[:, None] / H).max())
        k = (0.3, 1.0, 1.7, m / 2, float(m), m + 2.5)[case % 6]
        place = [Placed(0, 0, 1, m, size)]
        (x,), _ = solve([v], [H], place, numbers(k), numbers(lam), weights=d, form=form)
        difference, scale = gap(v, x, k, lam, d, H, form == 1)
        assert difference >= -1e-14 * scale
        assert lam * difference <= 1e-13 * float((H * v * v).sum()), f"{case=}"


@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs(kind: str) -> None:
    """The certificate in float64, and float32 against it, also for groups of thirty decades."""
    generator = torch.Generator().manual_seed(0)
    for case in range(6 if EMULATED else 60):
        m, size = (2, 5, 23)[case % 3], (2, 7, 90)[case // 3 % 3]
        v, H, d = hard(kind, generator, m, size)
        if case % 2:
            v = v * 10 ** (-30 * torch.rand(m, 1, dtype=DOUBLE, generator=generator))
        k = (0.3, 1.0, 1.7, m / 2, m - 0.5)[case % 5]
        lam = 10 ** (9 * torch.rand((), dtype=DOUBLE, generator=generator).item() - 6)
        place, options = [Placed(0, 0, 1, m, size)], (numbers(k), numbers(lam))
        (x,), _ = solve([v], [H], place, *options, weights=d)
        difference, scale = gap(v, x, k, lam, d, H)
        assert difference >= -1e-14 * scale
        assert lam * difference <= 1e-13 * float((H * v * v).sum()), f"{case=}"
        v, H = v.float(), H.float()
        (x,), _ = solve([v], [H], place, *options, weights=d)
        (exact,), _ = solve([v.double()], [H.double()], place, *options, weights=d)
        assert float((x - exact).norm()) <= 2e-6 * float(exact.norm()), f"{case=}"


@pytest.mark.parametrize("factor", [2.0**500, 2.0**-500, 2.0**60, 2.0**-60])
def test_extremes(factor: float) -> None:
    v, H = elements(0, 8, 3)
    place = [Placed(0, 0, 1, 8, 3)]
    (expected,), _ = solve([v], [H], place, numbers(3), numbers(0.5))
    (x,), _ = solve([v * factor], [H], place, numbers(3), numbers(0.5))
    torch.testing.assert_close(x, expected * factor, rtol=1e-12, atol=0)
    if factor == 2.0**60 or factor == 2.0**-60:
        (x,), _ = solve([v.float() * factor], [H.float()], place, numbers(3), numbers(0.5))
        torch.testing.assert_close(x.double(), expected * factor, rtol=1e-5, atol=0)


# --- many tensors -----------------------------------------------------------------------------------


def coupled(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Placed]]:
    """Units that own rows of a weight and of a bias, and columns of the next weight."""
    shapes = [(6, 5), (6,), (3, 6), (4, 6, 3, 3)]
    both = [elements(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    places = [
        Placed(0, 0, 1, 6, 5),
        Placed(0, 0, 1, 6, 1),
        Placed(0, 0, 3, 6, 1),
        Placed(0, 0, 4, 6, 9),
    ]
    return [v for v, _ in both], [H for _, H in both], places


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("form", [0, 1])
def test_coupled(dtype: torch.dtype, form: int) -> None:
    tensors, metric, places = coupled(dtype)
    d = torch.linspace(0.3, 2, 6, dtype=DOUBLE)
    lam = numbers(0.02 if form else 0.4)
    # Rounding is that of the whole scope, whose smallest tensor has one element a group.
    check(tensors, metric, places, numbers(2.3), lam, weights=d, form=form, rounded=3)


def test_coupled_is_one_problem() -> None:
    tensors, metric, places = coupled(DOUBLE)
    actual = check(tensors, metric, places, numbers(2.3), numbers(0.4))

    def rows(parts: Sequence[Tensor]) -> Tensor:
        weight, bias, following, conv = parts
        moved = weight, bias[:, None], following.T, conv.movedim(1, 0).flatten(1)
        return torch.cat(moved, 1)

    difference, scale = gap(rows(tensors), rows(actual), 2.3, 0.4, None, rows(metric))
    assert abs(difference) <= 1e-13 * scale


def test_mixed_dtypes_in_a_scope() -> None:
    tensors, metric, places = coupled(DOUBLE)
    tensors[1], metric[1] = tensors[1].float(), metric[1].float()
    tensors[2], metric[2] = tensors[2].bfloat16(), metric[2].float()
    check(tensors, metric, places, numbers(2.3), numbers(0.4))


def several(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Placed]]:
    shapes = [(0, 1, 5, 3), (0, 2, 4, 1), (2, 1, 7, 80), (3, 3, 20, 1)]
    both = [elements(i, *shape[1:], dtype=dtype) for i, shape in enumerate(shapes)]
    places = [
        Placed(0, 0, 1, 5, 3),
        Placed(0, 5, 2, 4, 1),
        *(Placed(s[0], 0, *s[1:]) for s in shapes[2:]),
    ]
    return [v for v, _ in both], [H for _, H in both], places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_scopes(dtype: torch.dtype) -> None:
    """Each with its k and lam; one is empty."""
    tensors, metric, places = several(dtype)
    k, lam = numbers(4.5, 1, 2.2, 7), numbers(0.3, 1, 0.01, 2)
    check(tensors, metric, places, k, lam)
    d = torch.linspace(0.1, 2, 9 + 7 + 20, dtype=DOUBLE)
    together = check(tensors, metric, places, k, lam, weights=d)
    begin = 9
    for i, scope in ((2, 2), (3, 3)):
        place = places[i]._replace(scope=0)
        of_scope = d[begin : begin + place.groups]
        begin += place.groups
        alone, _ = solve(
            tensors[i : i + 1],
            metric[i : i + 1],
            [place],
            k[scope : scope + 1],
            lam[scope : scope + 1],
            weights=of_scope,
        )
        assert same_bits(alone[0], together[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["input", "metric", "k", "lam", "weights"])
def test_nan_stays_in_its_scope(bad: float, where: str) -> None:
    tensors, metric, places = several(torch.float32)
    k, lam = numbers(4.5, 1, 2.2, 7), numbers(0.3, 1, 0.01, 2)
    d = torch.ones(36, dtype=DOUBLE)
    expected, _ = solve(tensors, metric, places, k, lam, weights=d)
    spoilt = {
        "input": tensors[2],
        "metric": metric[2],
        "k": k[2:3],
        "lam": lam[2:3],
        "weights": d[9:],
    }
    if bad == math.inf and where in ("k", "lam", "weights"):
        return  # no error
    spoilt[where].view(-1)[5 if spoilt[where].numel() > 5 else 0] = bad
    actual, _ = solve(tensors, metric, places, k, lam, weights=d)
    for i in (0, 1, 3):
        assert same_bits(actual[i], expected[i])
    assert actual[2].isnan().all()


def test_more_tensors_than_a_launch_takes() -> None:
    count, together = 376, 47
    both = [elements(i, 3, 2, dtype=torch.float32) for i in range(count)]
    tensors, metric = [v for v, _ in both], [H for _, H in both]
    places = [Placed(i // together, 3 * (i % together), 1, 3, 2) for i in range(count)]
    k, lam = (torch.full((count // together,), x, dtype=DOUBLE) for x in (20.5, 0.3))
    check(tensors, metric, places, k, lam, rounded=30)  # small beside others of their scopes
    if EMULATED:  # one scope must fit
        places = [Placed(0, 3 * i, 1, 3, 2) for i in range(count)]
        with pytest.raises(RuntimeError, match="a scope may have at most 370 tensors, got 376"):
            solve(tensors, metric, places, numbers(9), numbers(0.1))


# --- memory -----------------------------------------------------------------------------------------


def test_channels_last() -> None:
    v, H = elements(0, 6, 5, 3, 3, dtype=torch.float32)
    last = v.to(memory_format=torch.channels_last)
    for dim in (0, 1):
        place = place_by_dims(last, dim, 0, 0)
        assert place is not None
        for given in (H, H.to(memory_format=torch.channels_last)):
            (x,), _ = solve([last], [given], [place], numbers(2), numbers(0.5))
            plain = place_by_dims(v, dim, 0, 0)
            assert plain is not None and (place != plain) == (dim == 1)
            (expected,), _ = solve([v], [H], [plain], numbers(2), numbers(0.5))
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_metric_of_other_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """float32 is read as it is, in any order; others are brought to the tensor's dtype."""
    v, H = elements(0, *shape, dtype=dtype)
    args = [Placed(0, 0, *shape)], numbers(2), numbers(0.5)
    (expected,), _ = solve([v], [H], *args)
    (x,), _ = solve([v], [H.float()], *args)
    if dtype != DOUBLE:
        assert torch.allclose(x.double(), expected.double(), rtol=1e-5)
        fine = H.float() * (1 + 1e-3 * torch.rand(shape))
        (x,), _ = solve([v], [fine.mT.contiguous().mT], *args)
        (expected,), _ = solve([v], [fine], *args)
    else:
        (expected,), _ = solve([v], [H.float().double()], *args)
    assert same_bits(x, expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_views_that_start_within_a_vector(dtype: torch.dtype, offset: int) -> None:
    v, H = elements(0, 3, 131, dtype=dtype)
    args = [Placed(0, 0, 1, 3, 131)], numbers(1.2), numbers(0.5)
    flat = torch.zeros(offset + v.numel(), dtype=dtype)
    view = flat[offset:].view(3, 131)
    view.copy_(v)
    layout = list(args[0][0])
    left = prox_in_metric_([view], [H], layout, None, *args[1:], 0)
    (expected,), wanted = solve([v], [H], *args)
    torch.testing.assert_close(view, expected)
    assert not flat[:offset].any() and torch.equal(left, wanted)


def test_empty() -> None:
    assert prox_in_metric_([], [], [], None, numbers(), numbers(), 0).shape == (0,)
    v = torch.ones(0, 3)
    left = prox_in_metric_([v], [v.clone()], [0, 0, 1, 0, 3], None, numbers(1), numbers(1), 0)
    assert left.tolist() == [0]


# --- the operator -----------------------------------------------------------------------------------


@pytest.mark.skipif(EMULATED, reason="the emulator has no threads of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    shapes = [(1, 60, 3000), (80, 900, 1), (64, 40, 9), *[(1, 20, 30)] * 8]
    both = [elements(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    places = [Placed(i, 0, *shape) for i, shape in enumerate(shapes)]
    k = torch.tensor([shape[1] / 3 for shape in shapes], dtype=DOUBLE)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        args = [v for v, _ in both], [H for _, H in both], places
        results.append(solve(*args, k, torch.full_like(k, 0.3)))
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert same_bits(a, b)


@pytest.mark.emulated_only
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_launches(dtype: torch.dtype) -> None:
    """As many for all scopes as for one. What a search that has ended is launched for reads nothing of
    the tensors."""
    if not EMULATED:
        pytest.skip("needs FUSEE_ENGINE=emulated")
    counters = Counters()
    # Two for the first values, and for those at the ends; two for every step; one that scales; and two
    # for the scales of float64.
    launches = 2 + 2 + 2 * 16 + 1 if dtype == torch.float32 else 2 + 2 + 2 + 2 * 20 + 1
    moved = []
    for scopes in (1, 3):
        both = [elements(i, 40, 600, dtype=dtype) for i in range(scopes)]
        places = [Placed(i, 0, 1, 40, 600) for i in range(scopes)]
        k, lam = (torch.full((scopes,), x, dtype=DOUBLE) for x in (9.5, 0.3))
        counters.reset()
        solve([v for v, _ in both], [H for _, H in both], places, k, lam)
        totals = counters.read()["totals"]
        assert totals["launches"] == launches
        moved.append(totals["global_load"]["bytes"] / scopes)
    passes = moved[0] / (2 * 40 * 600 * dtype.itemsize)
    # Both ends, two or three steps over the groups between, and the scaling; and a pass for the scales.
    assert 3 <= passes <= 8, passes
    assert moved[1] <= 1.3 * moved[0]


@pytest.mark.skipif(EMULATED, reason="the tracing of an operator does not depend on its engine")
def test_opcheck() -> None:
    tensors, metric, places = several(torch.float32)
    layout = [number for place in places for number in place]
    args = (tensors, metric, layout, None, numbers(4.5, 1, 2.2, 7), numbers(0.3, 1, 0.01, 2), 0)
    torch.library.opcheck(torch.ops.fusee.prox_group_envelope_metric_, args)


def test_of_elements() -> None:
    """A copy by the operator, and plain torch operators where there are derivatives or transforms."""
    v, H = elements(0, 1, 5, 12, 3)
    before, d = v.clone(), torch.linspace(0.5, 2, 12, dtype=DOUBLE)
    args = d, numbers(3.5), numbers(0.4), 0
    expected = prox_in_metric(v, H, *args)
    for layout in (v, v.mT.contiguous().mT):
        x = prox_of_elements(layout, H, *args)
        assert x.is_contiguous() and x.grad_fn is None
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)
    assert same_bits(v, before)
    half = prox_of_elements(v.bfloat16(), H.bfloat16(), d.float(), *args[1:])
    assert half.dtype == torch.bfloat16
    wanted = prox_of_elements(v.clone().requires_grad_(), H, *args)
    assert wanted.grad_fn is not None
    lam = numbers(0.4).requires_grad_()
    assert prox_of_elements(v, H, d, args[1], lam, 0).grad_fn is not None
    tangent = torch.func.jvp(lambda v: prox_of_elements(v, H, *args), (v,), (v,))[1]
    assert float(tangent.norm()) > 0
    batched = torch.func.vmap(lambda v: prox_of_elements(v, H, *args))(torch.stack([v, 2 * v]))
    torch.testing.assert_close(batched[0], expected, rtol=1e-12, atol=1e-14)


def test_autograd_knows_of_the_write() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    y = x * 1
    loss = (y * y).sum()
    args = [0, 0, 1, 4, 3], None, numbers(1), numbers(0.1), 0
    prox_in_metric_([y.detach()], [torch.ones(4, 3)], *args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors() -> None:
    v, H = torch.ones(4, 3), torch.ones(4, 3)
    place = [Placed(0, 0, 1, 4, 3)]
    for metric, match in (
        ([], "metric must have a tensor"),
        ([H[:2]], "metric must have the shapes"),
    ):
        with pytest.raises(RuntimeError, match=match):
            solve([v], metric, place, numbers(1), numbers(1))
    with pytest.raises(RuntimeError, match="form must be"):
        solve([v], [H], place, numbers(1), numbers(1), form=3)
