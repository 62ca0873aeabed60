"""Tables of groups: how they are made, what they refuse, their norms and scales."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fusee import GroupTable
from torch import Tensor, nn

from tests.harness.measure import same_bits
from tests.prox.tables import DOUBLE, coupled


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def places(table: GroupTable, group: int) -> set[tuple[int, ...]]:
    """The elements of a group, as (tensor, *index)."""
    return {
        (number, *index)
        for number, ids in enumerate(table.ids)
        for index in (ids == group).nonzero().tolist()
    }


def by_loop(table: GroupTable, tensors: Sequence[Tensor]) -> Tensor:
    """The norms, an element at a time."""
    squares = [0.0] * len(table)
    for ids, tensor in zip(table.ids, tensors, strict=True):
        flat = tensor.detach().double().flatten().tolist()
        for group, value in zip(ids.flatten().tolist(), flat, strict=True):
            if group >= 0:
                squares[group] += value**2
    return torch.tensor(squares, dtype=DOUBLE).sqrt()


def test_from_numbers() -> None:
    """Elements, sizes and shapes; the table keeps its own copy."""
    ids = [torch.tensor([[0, 1], [-1, 1]], dtype=torch.int32), torch.tensor(0)]
    table = GroupTable(ids)
    assert (table.groups, len(table), table.shapes) == (2, 2, [(2, 2), ()])
    assert table.sizes.tolist() == [2, 2] and table.sizes.dtype == torch.int64
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in table.ids)
    ids[0].zero_()
    assert places(table, 1) == {(0, 0, 1), (0, 1, 1)}
    assert repr(table) == "GroupTable(groups=2, shapes=[(2, 2), ()])"
    assert len(GroupTable([torch.full((3,), -1)])) == 0
    assert len(GroupTable([torch.empty(0, 2, dtype=torch.int64)], 0)) == 0


def test_copies() -> None:
    """Pickled, copied and moved, it is the same table."""
    table, _ = coupled()
    for again in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert repr(again) == repr(table)
        assert all(torch.equal(a, b) for a, b in zip(again.ids, table.ids, strict=True))
        assert torch.equal(again.sizes, table.sizes)
    assert table.to("cpu") is table
    moved = table.to("meta")
    assert moved.device.type == "meta" and len(moved) == len(table) and moved.shapes == table.shapes


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.tensor([0]),), TypeError, "ids must be a sequence of tensors, got Tensor"),
        (([],), ValueError, "ids must have at least one tensor"),
        (([[0, 1]],), TypeError, r"ids\[0\] must be a Tensor"),
        (([torch.zeros(2)],), TypeError, r"ids\[0\] must be of integers, got torch.float32"),
        (([torch.tensor([True])],), TypeError, r"ids\[0\] must be of integers, got torch.bool"),
        (([torch.tensor([0, -2])],), ValueError, "ids must not be less than -1, got -2"),
        (([torch.tensor([0, 1])], 1), ValueError, "ids must be less than the 1 groups, got 1"),
        (([torch.tensor([0, 2])],), ValueError, "groups must not be empty, .* of group 1"),
        (([torch.tensor([0, 1])], 3), ValueError, "groups must not be empty, .* of group 2"),
        (([torch.tensor([0])], 1.0), TypeError, "groups must be an int, got float"),
        (
            ([torch.tensor([0]), torch.zeros(1, dtype=torch.int64, device="meta")],),
            ValueError,
            "ids must be on one device",
        ),
    ],
)
def test_bad_numbers(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GroupTable(*arguments)


def test_from_slices() -> None:
    """Ints, slices, sequences, tensors and whole tensors."""
    tensors = [torch.empty(3, 4), torch.empty(2), torch.empty(())]
    groups = [
        [(0, 1, 0), (1, None, None), (2, None, None)],
        [(0, -1, slice(1, 4, 2))],
        [(0, 1, torch.tensor([2]))],
    ]
    table = GroupTable.from_slices(tensors, groups)
    assert places(table, 0) == {(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0), (1, 1), (2,)}
    assert places(table, 1) == {(0, i, j) for i in range(3) for j in (1, 3)}
    assert places(table, 2) == {(0, i, 2) for i in range(3)}
    whole = GroupTable.from_slices(tensors, [[(0, 0, None)], [(2, 0, 0)]])
    assert whole.sizes.tolist() == [12, 1]
    # Pieces of one group may cross only where no element is twice.
    with pytest.raises(
        ValueError, match="overlap: an element of tensor 0 is in the groups 0 and 0"
    ):
        GroupTable.from_slices(tensors, [[(0, 0, 0), (0, 1, 0)]])


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ([[(0, 0, 1)], [(0, 1, 0)]], ValueError, "overlap: .* tensor 0 is in the groups 0 and 1"),
        ([[(1, None, None)], [(1, 0, 1)]], ValueError, "overlap: .* tensor 1"),
        ([[(0, 0, [1, 2, 1])]], ValueError, "must not repeat an element: group 0"),
        ([[(0, 0, 0)], []], ValueError, "groups must not be empty, got no elements of group 1"),
        ([[(0, 0, [])]], ValueError, "groups must not be empty"),
        ([[(2, 0, 0)]], IndexError, "must number tensors below 2, got 2"),
        ([[(-1, 0, 0)]], IndexError, "must number tensors below 2, got -1"),
        ([[(0, 2, 0)]], IndexError, "dim must be in"),
        ([[(0, 0, 3)]], IndexError, r"must have indices in \[0, 2\], got 3"),
        ([[(0, 0, [-1])]], IndexError, r"must have indices in \[0, 2\], got -1"),
        ([[(0, 0)]], TypeError, "must have pieces"),
        ([[("0", 0, 0)]], TypeError, "must number tensors by ints, got str"),
        ([[(0, None, 1)]], TypeError, "must have a dimension"),
        ([[(0, 0, [0.5])]], TypeError, "must have indices that are ints"),
        ([[(0, 0, torch.tensor([0.5]))]], TypeError, "must have indices that are integers"),
    ],
)
def test_bad_slices(groups: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GroupTable.from_slices([torch.empty(3, 4), torch.empty(2)], groups)


def test_attention_heads() -> None:
    """A head owns rows of q, k, v and their biases, and columns of the output; zeroed, it is gone."""
    attention = nn.MultiheadAttention(8, 4, batch_first=True, dtype=DOUBLE)
    q, k, v = attention.in_proj_weight.detach().chunk(3)
    bq, bk, bv = attention.in_proj_bias.detach().chunk(3)
    out = attention.out_proj.weight.detach()
    table = GroupTable.attention_heads(q, k, v, out, 4, biases=[bq, bk, bv])
    assert len(table) == 4 and table.sizes.tolist() == [64 + 6] * 4
    assert places(table, 1) >= {(0, 2, 0), (0, 3, 7), (5, 3), (6, 0, 2), (6, 7, 3)}
    scales = torch.tensor([1.0, 0.0, 1.0, 1.0])
    *rows, columns = table.scale([q, k, v, bq, bk, bv, out], scales)
    assert not rows[0][2:4].any() and not columns[:, 2:4].any()
    x = torch.randn(2, 5, 8, dtype=DOUBLE)
    with torch.no_grad():
        before = attention(x, x, x, need_weights=False)[0]
        attention.out_proj.weight.copy_(columns)
        without = attention(x, x, x, need_weights=False)[0]
        attention.in_proj_weight.copy_(torch.cat(rows[:3]))
        attention.in_proj_bias.copy_(torch.cat(rows[3:]))
        both = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(both, without)
    assert not torch.allclose(before, both)


def test_hidden_units() -> None:
    first, second = nn.Linear(3, 6), nn.Linear(6, 2)
    table = GroupTable.hidden_units(first.weight, second.weight, rows=[first.bias])
    for unit in range(6):
        rows = {(0, unit, i) for i in range(3)} | {(1, unit)}
        assert places(table, unit) == rows | {(2, i, unit) for i in range(2)}


def test_filters() -> None:
    """With bias and batch normalisation, before a convolution and a linear layer behind a flattening."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    following, head = nn.Conv2d(4, 5, 1), nn.Linear(4 * 9, 2)
    tensors = [conv.weight, conv.bias, norm.weight, norm.bias, following.weight, head.weight]
    table = GroupTable.filters(tensors[0], rows=tensors[1:4], consumers=tensors[4:])
    assert len(table) == 4 and table.shapes == [tuple(t.shape) for t in tensors]
    assert table.sizes.tolist() == [27 + 3 + 5 + 18] * 4
    assert (table.ids[5][0] == torch.arange(36) // 9).all()
    conv_, bias, scale, shift, *_ = table.scale(tensors, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    x = torch.randn(2, 3, 5, 5)
    made = nn.functional.conv2d(x, conv_, bias)
    made = nn.functional.batch_norm(made, None, None, scale, shift, training=True)
    assert not made[:, 0].any() and made[:, 1:].any()


def test_blocks() -> None:
    w = torch.randn(5, 8)
    table = GroupTable.blocks(w, (2, 4))
    assert len(table) == 6 and table.sizes.tolist() == [8] * 4 + [4] * 2
    assert (table.ids[0] == torch.arange(5)[:, None] // 2 * 2 + torch.arange(8) // 4).all()
    runs = GroupTable.blocks(w, (4,))
    assert (
        len(runs) == 10 and (runs.ids[0] == torch.arange(10).repeat_interleave(4).view(5, 8)).all()
    )
    assert len(GroupTable.blocks(torch.tensor(1.0), ())) == 1
    for shape in ((1, 1, 1), (0,)):
        with pytest.raises(ValueError, match="shape must be of positive extents"):
            GroupTable.blocks(w, shape)


@pytest.mark.parametrize("units", [0, 3, -1])
def test_units_must_divide(units: int) -> None:
    with pytest.raises(ValueError, match="units must"):
        GroupTable.units([torch.empty(4, 2)], [], units)
    with pytest.raises(ValueError, match="units must divide dimension 1 of tensor 1"):
        GroupTable.units([torch.empty(4, 2)], [torch.empty(4)], 2)
    with pytest.raises(TypeError, match="units must be an int"):
        GroupTable.units([torch.empty(4, 2)], [], 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_and_scales(dtype: torch.dtype) -> None:
    """Against loops, from any strides; what is in no group keeps its bits, NaN too."""
    table, tensors = coupled()
    tensors = [t.to(dtype).transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    tensors[1][3] = torch.nan
    torch.testing.assert_close(table.norms(tensors), by_loop(table, tensors), rtol=1e-14, atol=0)
    assert table.norms(tensors).dtype == DOUBLE and table.norms(tensors)[2] == 0
    scales = torch.tensor([0.3, 0.0, 1.0, 2.0], dtype=DOUBLE)
    for ids, before, after in zip(table.ids, tensors, table.scale(tensors, scales), strict=True):
        wide = torch.float64 if dtype == DOUBLE else torch.float32
        each = torch.where(ids < 0, 1.0, scales[ids.clamp(min=0)]).to(wide)
        assert after.dtype == dtype
        torch.testing.assert_close(after, (before.to(wide) * each).to(dtype), equal_nan=True)
        assert same_bits(after[ids < 0], before[ids < 0])
    with pytest.raises(ValueError, match=r"scales must have shape \(4,\)"):
        table.scale(tensors, scales[:3])


def test_examples_of_the_constructors() -> None:
    """The examples of the methods give what they show."""
    tests = doctest.DocTestFinder().find(GroupTable, "GroupTable", globs={})
    assert len([test for test in tests if test.examples]) >= 7
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
