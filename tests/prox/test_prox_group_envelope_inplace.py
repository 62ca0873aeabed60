"""``fusee.optim.prox_group_envelope_`` on lists of tensors: scopes, tables, layouts, launches."""

from __future__ import annotations

from typing import Any

import fusee
import numpy as np
import pytest
import torch
from fusee import GroupTable
from fusee.optim import prox_group_envelope_
from fusee.prox.prox_group_envelope_inplace import _reference
from fusee.prox.scope_plan import ScopePlan
from fusee.prox.scopes import Scope
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.prox.tables import coupled
from tests.test_counters import EXCESS, SECTOR_EFFICIENCY, Counters, moved_bytes, sector_bytes

EMULATED = fusee.engine() == "emulated"
DOUBLE = torch.float64


def close(actual: Tensor, expected: Tensor) -> None:
    """To the rounding of the input, normal numbers: small results are what is left of a difference."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=16 * eps)
    assert torch.equal(actual == 0, expected == 0)


@pytest.fixture
def layers() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (8, 6, 3, 3), (5, 72), (8,), (3, 200)]
    return [torch.randn(shape, dtype=DOUBLE) for shape in shapes]


@pytest.mark.parametrize("debiased", [False, True])
def test_each_tensor_is_a_scope(layers: list[Tensor], debiased: bool) -> None:
    k, lam = [2, 3.5, 1, 4, 2], [0.5, 0.25, 0.75, 0.1, 2.0]
    expected = [
        fusee.prox_group_envelope(x, k=a, lam=b, debiased=debiased)
        for x, a, b in zip(layers, k, lam, strict=True)
    ]
    left = prox_group_envelope_(layers, k, lam, debiased=debiased)
    for x, y in zip(layers, expected, strict=True):
        close(x, y)
    counts = [int((y.flatten(1) if y.dim() > 1 else y[:, None]).any(1).sum()) for y in expected]
    assert left.tolist() == counts
    assert left.dtype == torch.int64


@pytest.mark.parametrize("weights", [None, "size", "inverse_size"])
def test_all_tensors_share_k(layers: list[Tensor], weights: Any) -> None:
    lam = {None: 5.0, "size": 0.1, "inverse_size": 200.0}[weights]
    sizes = [x[0].numel() for x in layers]
    counts = [x.shape[0] for x in layers]
    ids = list(torch.arange(sum(counts)).split(counts))
    table = GroupTable(
        [
            i.reshape(-1, *(1,) * (x.dim() - 1)).expand(x.shape).contiguous()
            for i, x in zip(ids, layers, strict=True)
        ]
    )
    assert table.sizes.tolist() == [s for s, c in zip(sizes, counts, strict=True) for _ in range(c)]
    expected = fusee.prox_group_envelope(layers, 7, lam, groups=table, weights=weights)
    left = prox_group_envelope_(layers, 7, lam, scope="all", weights=weights)
    for x, y in zip(layers, expected, strict=True):
        close(x, y)
    norms = table.norms(layers)
    assert left.tolist() == [int((norms > 0).sum())]
    assert left.item() < sum(counts)


def test_weights_of_a_scope(layers: list[Tensor]) -> None:
    d = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5, 0.25])
    expected = fusee.prox_group_envelope(layers[0], 2, 0.5, weights=d.double())
    left = prox_group_envelope_(layers[0], 2, 0.5, weights=d)
    close(layers[0], expected)
    kept = expected.flatten(1).any(1) & (d > 0)
    assert left.tolist() == [int(kept.sum())]


def unit_table(units: int, rows: list[Tensor], columns: list[Tensor]) -> GroupTable:
    return GroupTable.units(rows, columns, units)


def test_coupled_groups_are_scopes(layers: list[Tensor]) -> None:
    conv, following, linear = layers[:3]
    bias = torch.randn(6, dtype=DOUBLE)
    first = GroupTable.filters(conv, rows=[bias], consumers=[following])
    # Nine columns for each of eight channels.
    second = GroupTable.units([torch.empty(8, dtype=DOUBLE)], [linear], 8)
    tensors = [conv, bias, following, layers[3], linear]
    expected = [
        *fusee.prox_group_envelope(tensors[:3], 2, 0.5, groups=first),
        *fusee.prox_group_envelope(tensors[3:], 3, 0.25, groups=second),
    ]
    plan = ScopePlan([Scope(tuple(tensors[:3]), 0, first), Scope(tuple(tensors[3:]), 0, second)])
    assert plan._others == []  # all of it by the compiled operator
    left = prox_group_envelope_(tensors, [2, 3], [0.5, 0.25], groups=[first, second])
    for x, y in zip(tensors, expected, strict=True):
        close(x, y)
    norms = (first.norms(tensors[:3]), second.norms(tensors[3:]))
    assert left.tolist() == [int((n > 0).sum()) for n in norms]


@pytest.mark.parametrize("debiased", [False, True])
def test_tables_that_are_no_slices(debiased: bool) -> None:
    torch.manual_seed(1)
    table, tensors = coupled()
    expected = fusee.prox_group_envelope(tensors, 1.5, 0.5, groups=table, debiased=debiased)
    assert ScopePlan([Scope(tuple(tensors), 0, table)])._others == [0]
    left = prox_group_envelope_(tensors, 1.5, 0.5, groups=table, debiased=debiased)
    for x, y in zip(tensors, expected, strict=True):
        close(x, y)
    assert left.tolist() == [int((table.norms(tensors) > 0).sum())]


def test_blocks_and_whole_layers(layers: list[Tensor]) -> None:
    blocks = GroupTable.blocks(layers[4], (1, 8))
    layer = GroupTable([torch.full(x.shape, i) for i, x in enumerate(layers[:3])])
    expected = [
        *fusee.prox_group_envelope(layers[:3], 1, 0.75, groups=layer, weights="inverse_size"),
        *fusee.prox_group_envelope([layers[4]], 20, 0.75, groups=blocks),
    ]
    tensors = [*layers[:3], layers[4]]
    prox_group_envelope_(tensors[:3], 1, 0.75, groups=layer, weights="inverse_size")
    prox_group_envelope_(tensors[3:], 20, 0.75, groups=blocks)
    for x, y in zip(tensors, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize("dim", [0, 1, (0, 1), (2, 3), (0, 2), (1, 2, 3), (), (0, 1, 2, 3)])
def test_layouts(dim: Any) -> None:
    torch.manual_seed(2)
    for change in (
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(3)[:, ::2],
        lambda x: x[1:, :, 1:],
    ):
        x = change(torch.randn(6, 4, 3, 5, dtype=DOUBLE))
        expected = fusee.prox_group_envelope(x, 1.5, 0.5, dim=dim)
        strides = x.stride()
        prox_group_envelope_(x, 1.5, 0.5, dim=dim)
        close(x, expected)
        assert x.stride() == strides


def test_dtypes_in_one_scope() -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(6, 40), torch.randn(6).double(), torch.randn(6, 9).bfloat16()]
    tensors.append(torch.randn(6, 5).half())
    table = GroupTable.units(tensors, [], 6)
    expected = fusee.prox_group_envelope(tensors, 2, 0.5, groups=table)
    prox_group_envelope_(tensors, 2, 0.5, groups=table)
    for x, y in zip(tensors, expected, strict=True):
        assert x.dtype == y.dtype
        close(x, y)


def test_many_tensors() -> None:
    """More than one table of scopes, and more tensors in a scope than a table has."""
    torch.manual_seed(4)
    tensors = [torch.randn(3 + i % 3, 2 + i % 4, dtype=DOUBLE) for i in range(500)]
    copies = [x.clone() for x in tensors]
    expected = [fusee.prox_group_envelope(x, 1, 0.5) for x in tensors]
    left = prox_group_envelope_(tensors, 1, 0.5)
    for x, y in zip(tensors, expected, strict=True):
        close(x, y)
    assert left.tolist() == [int(y.any(1).sum()) for y in expected]
    prox_group_envelope_(copies, 300, 0.5, scope="all", debiased=True)
    norms = torch.cat([x.norm(dim=1) for x in copies])
    assert 300 <= int((norms > 0).sum()) < len(norms)


def test_without_end(layers: list[Tensor]) -> None:
    prox_group_envelope_(layers[:2], [2, 9], float("inf"))
    assert not any(bool(x.any()) for x in layers[:2])
    prox_group_envelope_(layers[2:], 1, float("inf"), debiased=True)
    assert [int(x.reshape(len(x), -1).any(1).sum()) for x in layers[2:]] == [1, 1, 1]


def test_nan_stays_in_its_scope(layers: list[Tensor]) -> None:
    expected = fusee.prox_group_envelope(layers[1], 3, 0.5)
    layers[0][2, 1] = torch.nan
    left = prox_group_envelope_(layers[:2], 3, 0.5)
    assert bool(layers[0].isnan().all())
    close(layers[1], expected)
    assert left[0].item() == len(layers[0])


def test_strides_that_change() -> None:
    torch.manual_seed(5)
    x = torch.randn(6, 4, 3, 3, dtype=DOUBLE)
    plan = ScopePlan([Scope((x,), 1)])
    numbers = (torch.tensor([1.5], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE))
    expected = fusee.prox_group_envelope(x, 1.5, 0.5, dim=1)
    x.data = x.contiguous(memory_format=torch.channels_last)
    plan.prox_(*numbers)
    close(x, expected)


def test_autograd_notices() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="tensors must not require gradients"):
        prox_group_envelope_(x, 2, 0.5)
    loss = x.square().sum()
    with torch.no_grad():
        prox_group_envelope_(x, 2, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_memory() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        prox_group_envelope_(torch.randn(4, 1).expand(4, 3), 2, 0.5)


def test_reference_agrees(layers: list[Tensor]) -> None:
    copies = [x.clone() for x in layers]
    plan = ScopePlan([Scope((x,)) for x in layers])
    reference = ScopePlan([Scope((x,)) for x in copies])
    k, lam = torch.full((5,), 2.5, dtype=DOUBLE), torch.full((5,), 0.3, dtype=DOUBLE)
    left = plan.prox_(k, lam)
    assert _reference(copies, reference._layout, None, k, lam, 0).tolist() == left.tolist()
    for x, y in zip(layers, copies, strict=True):
        close(x, y)


@pytest.mark.tracing
def test_opcheck(layers: list[Tensor]) -> None:
    layout = ScopePlan([Scope((x,)) for x in layers])._layout
    k = torch.full((5,), 2.0, dtype=DOUBLE)
    arguments = (layers, layout, None, k, k / 4, 0)
    torch.library.opcheck(
        torch.ops.fusee.prox_group_envelope_.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.tracing
def test_compile(layers: list[Tensor]) -> None:
    expected = [fusee.prox_group_envelope(x, 2, 0.3) for x in layers]
    compiled: Any = torch.compile(prox_group_envelope_, fullgraph=True)
    left = compiled(layers, 2, 0.3)
    for x, y in zip(layers, expected, strict=True):
        close(x, y)
    assert left.shape == (5,)


@pytest.mark.emulated_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_launches_for_all_layers(dtype: torch.dtype) -> None:
    if not EMULATED:
        pytest.skip("needs FUSEE_ENGINE=emulated")
    counters = Counters()
    torch.manual_seed(6)
    shapes = [(8, 64, 3, 3), (16, 2048), (4, 20000), (5, 960)]
    for copies in (1, 4):
        layers = [torch.randn(shape).to(dtype) for shape in shapes * copies]
        size = sum(x.numel() * x.element_size() for x in layers)
        counters.reset()
        prox_group_envelope_(layers, 2, 1.0, weights="inverse_size")
        counted = counters.read()
        assert counted["totals"]["launches"] == 3
        assert 0.9 * 3 * size <= moved_bytes(counted) <= EXCESS * 3 * size
        assert moved_bytes(counted) >= SECTOR_EFFICIENCY * sector_bytes(counted)


def test_shared_memory() -> None:
    """Refused where a tensor begins within another; parts that lie between each other are not."""
    x = torch.randn(4, 6)
    for others in ([x.detach()], [x.view(-1)], [x[1:]], [x[:, 2:]], [x[2:, :3]], [x[:0], x[3]]):
        for tensors in ([x, *others], [*others, x]):
            before = x.clone()
            with pytest.raises(ValueError, match=r"tensors must not share memory, got tensors"):
                prox_group_envelope_(tensors, 1, 0.5)
            assert torch.equal(x, before)
    parts = [x[:, :3], x[:, 3:]]
    expected = [fusee.prox_group_envelope(part, 1, 0.5) for part in parts]
    prox_group_envelope_(parts, 1, 0.5)
    for part, y in zip(parts, expected, strict=True):
        close(part, y)
    rows = [x[:2], x[2:], torch.empty(0, 6)]
    expected = [fusee.prox_group_envelope(part, 1, 0.5) for part in rows]
    prox_group_envelope_(rows, 1, 0.5)
    for part, y in zip(rows, expected, strict=True):
        close(part, y)


def test_nothing_is_copied_to_the_device_in_each_call() -> None:
    """Where some scopes are placed and some not: what a step needs is made once."""
    torch.manual_seed(7)
    table, tensors = coupled()
    x = torch.randn(4, 3, dtype=DOUBLE)
    plan = ScopePlan([Scope(tuple(tensors), 0, table), Scope((x,))])
    assert plan._fused == [1] and plan._others == [0]
    k, lam = torch.full((2,), 1.5, dtype=DOUBLE), torch.full((2,), 0.3, dtype=DOUBLE)
    plan.prox_(k, lam)

    class Made(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
                made.append(func.__name__)
            return func(*args, **(kwargs or {}))

    made: list[str] = []
    with Made():
        left = plan.prox_(k, lam)
    assert made == []
    assert left.tolist() == [int((table.norms(tensors) > 0).sum()), int(x.any(1).sum())]


def test_numbers_of_other_libraries() -> None:
    """Numpy's are taken as Python's, and integers past the floats as infinite."""
    x = torch.randn(6, 3, dtype=DOUBLE)
    expected = fusee.prox_group_envelope(x, 2, 0.5, dim=1)
    k, lam, dim = np.int64(2), np.float32(0.5), np.int32(1)
    for y in (
        fusee.prox_group_envelope(x, k, lam, dim=dim),
        fusee.prox_group_envelope(x, k, lam, dim=(dim,)),
    ):
        assert torch.equal(y, expected)
    for numbers in ((k, lam), ([k], [lam])):
        y = x.clone()
        prox_group_envelope_(y, *numbers, dim=dim)
        close(y, expected)
    value = fusee.group_envelope(x, k, dim=dim)
    assert torch.equal(value, fusee.group_envelope(x, 2, dim=1))
    many = 10**400
    for debiased in (False, True):
        options = {"debiased": debiased}
        ridge = fusee.prox_group_envelope(x, 9, 0.5, **options)
        assert torch.equal(fusee.prox_group_envelope(x, many, 0.5, **options), ridge)
        y = x.clone()
        prox_group_envelope_(y, many, 0.5, **options)
        close(y, ridge)
    assert not fusee.prox_group_envelope(x, -many, 0.5).any()
    assert not fusee.prox_group_envelope(x, 2, many).any()
    for bad in (np.bool_(True), np.float32("nan")):
        with pytest.raises((TypeError, ValueError), match="k must"):
            fusee.prox_group_envelope(x, bad, 0.5)
        with pytest.raises((TypeError, ValueError), match="k must"):
            prox_group_envelope_(x, bad, 0.5)


@pytest.mark.parametrize("dim", [1, -2, 7, (1,)])
def test_dimensions_of_a_number(dim: Any) -> None:
    """As in torch, a tensor without dimensions has the dimensions 0 and -1."""
    x = torch.tensor(2.0)
    for call in (
        lambda: fusee.group_envelope(x, 1, dim=dim),
        lambda: fusee.prox_group_envelope(x, 1, 0.5, dim=dim),
        lambda: prox_group_envelope_(x, 1, 0.5, dim=dim),
    ):
        with pytest.raises(IndexError, match="dim must be in"):
            call()
    assert fusee.group_envelope(x, 1, dim=-1) == fusee.group_envelope(x, 1, dim=0) == 2


def test_weights_are_checked_as_they_are_used() -> None:
    """What is finite in float64 but not in float32."""
    x = torch.randn(3, 4)
    weights = torch.tensor([1.0, 1e60, 1.0], dtype=DOUBLE)
    message = "weights must be finite and not negative in torch.float32, got inf"
    for call in (
        lambda: fusee.prox_group_envelope(x, 1, 0.5, weights=weights),
        lambda: fusee.group_envelope(x, 1, weights=weights),
        lambda: fusee.project_top_k_groups(x, 1, weights=weights),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    prox_group_envelope_(x, 1, 0.5, weights=weights)  # in float64
    assert x.isfinite().all()
