"""StableMax cross entropy against torch's cross entropy, and where torch's arithmetic gives out."""

from __future__ import annotations

import math
from typing import Any

import fusee
import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.measure import same_bits, ulps
from tests.harness.spec import ALL_DTYPES
from tests.losses.record_stablemax import symlog

loss_of = fusee.stablemax_cross_entropy
EPS = torch.finfo(torch.float32).eps


def loss_and_grad(input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    loss = loss_of(leaf, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


# --- torch's interface ----------------------------------------------------------------------------

SHAPES = [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2), (0, 5)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "ignoring", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_cross_entropy(
    shape: tuple[int, ...], kind: str, weighted: bool, smoothing: float, reduction: str
) -> None:
    """Equal to F.cross_entropy of the transformed logits, over all its options, gradients
    included."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    dim = 0 if len(shape) == 1 else 1
    rest = shape[:dim] + shape[dim + 1 :]
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if kind == "probabilities":
        target = torch.rand(shape, dtype=torch.float64, generator=generator)
    else:
        target = torch.randint(0, 5, rest, generator=generator)
        options["ignore_index"] = 2 if kind == "ignoring" else -100
    weight = torch.rand(5, dtype=torch.float64, generator=generator) if weighted else None
    actual = loss_of(x, target, weight, **options)
    expected = F.cross_entropy(symlog(x), target, weight, **options)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    if expected.isfinite().all():
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("soft", [False, True])
def test_dim(dim: int, soft: bool) -> None:
    """The classes in any dimension, the result in the order of the others."""
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    target = torch.rand(3, 4, 5, dtype=torch.float64) if soft else None
    moved = x.movedim(dim, 1)
    if target is None:
        target = torch.randint(0, x.shape[dim], (moved.shape[0], *moved.shape[2:]))
        moved_target = target
    else:
        moved_target = target.movedim(dim, 1)
    actual = loss_of(x, target, dim=dim, reduction="none")
    torch.testing.assert_close(
        actual, F.cross_entropy(symlog(moved), moved_target, reduction="none")
    )


def test_one_dimension_ignores_dim() -> None:
    x = torch.randn(5)
    target = torch.tensor(2)
    assert torch.equal(loss_of(x, target), loss_of(x, target, dim=-1))
    assert loss_of(x, target).shape == ()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.int8])
def test_integer_targets(dtype: torch.dtype) -> None:
    x, target = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    assert same_bits(loss_of(x, target.to(dtype)), loss_of(x, target))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_dtype_of_the_loss(dtype: torch.dtype) -> None:
    """float64 for float64 logits, float32 for all others, and right to float32."""
    x = torch.randn(6, 9, dtype=dtype)
    target = torch.randint(0, 9, (6,))
    loss, grad = loss_and_grad(x, target)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wanted
    assert grad.dtype == dtype
    exact = F.cross_entropy(symlog(x.double()), target)
    assert ulps(loss, exact.to(wanted)) <= 4


def test_z_loss_is_its_formula() -> None:
    """z (log S)^2 is added to each row, before the mean and its weights; ignored rows have none."""
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2, 1, 1])
    weight = torch.rand(5, dtype=torch.float64)
    s = torch.where(x >= 0, 1 + x.clamp(min=0), 1 / (1 - x.clamp(max=0)))
    squares = s.sum(1).log().square() * (target >= 0)
    divisor = weight[target.clamp(min=0)][target >= 0].sum()
    for reduction, extra in (
        ("none", squares),
        ("sum", squares.sum()),
        ("mean", squares.sum() / divisor),
    ):
        with_z = loss_of(x, target, weight, z_loss=0.3, reduction=reduction)
        without = loss_of(x, target, weight, reduction=reduction)
        torch.testing.assert_close(with_z - without, 0.3 * extra)
        both = torch.autograd.grad(with_z.sum() - without.sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(
            both, torch.autograd.grad(0.3 * extra.sum(), x, retain_graph=True)[0]
        )


def test_gradient_in_probabilities() -> None:
    """d loss / d q_j = -(1 - eps) w_j log p_j, and unnormalised targets are taken as they are."""
    x = torch.randn(3, 4, dtype=torch.float64)
    q = (3 * torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(4, dtype=torch.float64)
    loss = loss_of(x, q, weight, label_smoothing=0.2, reduction="sum")
    (grad,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(grad, -0.8 * weight * symlog(x).log_softmax(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_ignored_and_empty(smoothing: float) -> None:
    """As torch: a mean of nothing is NaN, a sum of nothing is zero, and ignored rows are zero."""
    x, target = torch.randn(3, 5), torch.full((3,), -100)
    options: dict[str, Any] = {"label_smoothing": smoothing}
    assert loss_of(x, target, **options).isnan()
    assert loss_of(x, target, reduction="sum", **options) == 0
    none, grad = loss_and_grad(x, target, reduction="none", **options)
    assert not none.any()
    assert not grad.any()
    empty = (torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))
    assert loss_of(*empty, **options).isnan()
    assert loss_of(*empty, reduction="sum", **options) == 0
    assert loss_of(*empty, reduction="none", **options).shape == (0,)


def test_zero_weights() -> None:
    """Rows of weight zero have no loss; a mean over them alone is NaN."""
    x, target = torch.randn(2, 3), torch.tensor([0, 0])
    weight = torch.tensor([0.0, 1.0, 1.0])
    assert loss_of(x, target, weight).isnan()
    loss, grad = loss_and_grad(x, target, weight, reduction="sum")
    assert loss == 0
    assert not grad.any()


def test_one_class() -> None:
    loss, grad = loss_and_grad(
        torch.randn(4, 1), torch.zeros(4, dtype=torch.int64), reduction="none"
    )
    assert not loss.any()
    assert not grad.any()


def test_ignored_rows_may_hold_anything() -> None:
    """NaN and infinities in an ignored row touch neither the loss nor its gradient."""
    x = torch.randn(3, 4)
    x[1] = torch.tensor([math.nan, math.inf, -math.inf, 0])
    target = torch.tensor([1, -100, 2])
    loss, grad = loss_and_grad(x, target)
    wanted, wanted_grad = loss_and_grad(x[[0, 2]], target[[0, 2]])
    assert ulps(loss, wanted) <= 1
    assert ulps(grad[[0, 2]], wanted_grad) <= 1
    assert not grad[1].any()


def test_grad_of_each_row() -> None:
    """Incoming gradients per row, zero and negative ones included, scale each row's gradient."""
    x, target = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 5, 2, 2])
    factors = torch.tensor([0.0, -2.0, 1e-3, 1.0])
    loss = loss_of(x, target, reduction="none")
    (one,) = torch.autograd.grad(loss, x, torch.ones(4), retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, factors)
    assert ulps(grad, one * factors[:, None]) <= 4


def test_modules() -> None:
    """The module calls the function, keeps its weight as a buffer, and shows its options."""
    x, target = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    weight = torch.rand(5)
    module = fusee.nn.StableMaxCrossEntropyLoss(weight, reduction="sum", label_smoothing=0.1)
    assert torch.equal(
        module(x, target), loss_of(x, target, weight, reduction="sum", label_smoothing=0.1)
    )
    assert list(module.state_dict()) == ["weight"]
    assert "reduction='sum'" in repr(module)
    other = fusee.nn.StableMaxCrossEntropyLoss(torch.ones(5), reduction="sum", label_smoothing=0.1)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, target), module(x, target))
    assert not fusee.nn.StableMaxCrossEntropyLoss().state_dict()
    with pytest.raises(ValueError, match="reduction"):
        fusee.nn.StableMaxCrossEntropyLoss(reduction="avg")


# --- where float32, and float64, give out ---------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "loss", "slope"),
    [
        (1e3, 1.117701e-4, -1.116522e-7),
        (1e4, 1.11978e-6, -1.11966e-10),
        (4e4, 6.99965e-8, -1.74987e-12),
        (1e8, 1.12e-14, -1.12e-22),
    ],
)
def test_confident_rows(size: float, loss: float, slope: float) -> None:
    """The table of spec 1.3: target X, 112 others -X, in float32."""
    x = torch.full((1, 113), -size)
    x[0, 7] = size
    value, grad = loss_and_grad(x, torch.tensor([7]))
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert grad[0, 7].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("power", range(3, 31, 3))
def test_separated_rows(power: int) -> None:
    """Perfectly separated rows, R / s_y from 1e-3 to 1e-30: loss and gradient to 4 units of the
    last place against fifty exact digits, and not zero unless that is the nearest float32."""
    size = math.sqrt(112 * 10.0**power) - 1
    x = torch.full((1, 113), -size)
    x[0, 7] = size
    value, grad = loss_and_grad(x, torch.tensor([7]))
    with mpmath.workdps(50):
        magnitude = mpmath.mpf(x[0, 7].item())
        s, rest = 1 + magnitude, 112 / (1 + magnitude)
        exact = mpmath.log1p(rest / s)
        slope = -rest / (rest + s) / s
        assert value.item() > 0
        assert abs(value.item() - exact) <= 4 * EPS * exact
        tiniest = mpmath.mpf(2) ** -149
        assert grad[0, 7].item() < 0 or abs(slope) < tiniest
        assert abs(grad[0, 7].item() - slope) <= max(4 * EPS * abs(slope), tiniest)
        other = 1 / (s + rest) / s**2
        assert abs(grad[0, 0].item() - other) <= max(4 * EPS * other, tiniest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_gradient_at_the_kinks(dtype: torch.dtype, value: float) -> None:
    """No NaN at x = 1, and a head of zeros learns: its gradient is p_j - c_j."""
    x = torch.full((2, 4), value, dtype=dtype)
    _, grad = loss_and_grad(x, torch.tensor([1, 3]), reduction="sum")
    r = 1 / (1 + value)
    expected = torch.full((2, 4), 0.25 * r)
    expected[0, 1] = expected[1, 3] = -0.75 * r
    torch.testing.assert_close(grad.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float16, 70_000), (torch.bfloat16, 131_072)])
def test_wide_half_rows(dtype: torch.dtype, classes: int) -> None:
    """Row sums past the range of float16 and the precision of bfloat16."""
    loss, grad = loss_and_grad(torch.zeros(1, classes, dtype=dtype), torch.tensor([3]))
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-6)
    assert grad[0, 3].item() == pytest.approx(-1, rel=1e-2)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_for_backward(double: bool, reduction: str) -> None:
    """Beside its arguments it keeps 8 bytes a row (16 in float64), and nothing of the logits'
    size."""
    rows, classes = 256, 50
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(x, target, reduction=reduction)
    assert loss.requires_grad
    for argument in (x, target):
        kept.pop(argument.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 16 * rows + 64


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_largest_numbers(dtype: torch.dtype) -> None:
    """At the largest finite numbers the loss and its gradient are finite; eager code has
    infinity."""
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, -top, 0.0], [-top, top, 0.0], [-top] * 3, [top] * 3], dtype=dtype)
    loss, grad = loss_and_grad(x, torch.zeros(4, dtype=torch.int64), reduction="none")
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())
    assert loss[0] >= 0
    # Twice the logarithm of the largest number, from one probability to the other.
    assert loss[1].item() == pytest.approx(2 * math.log(top), rel=1e-2)
    assert loss[2].item() == pytest.approx(math.log(3), rel=1e-2)
    assert loss[3].item() == pytest.approx(math.log(3), rel=1e-2)


def test_infinite_logits() -> None:
    """A target at +inf costs nothing or is unknown; one at -inf costs infinitely much; none but a
    row of infinities is NaN, and -inf elsewhere is a mask."""
    inf = math.inf
    x = torch.tensor([[inf, 0.0, 1.0], [-inf, 0.0, 1.0], [0.0, -inf, 1.0], [-inf] * 3, [inf] * 3])
    loss, grad = loss_and_grad(x, torch.zeros(5, dtype=torch.int64), reduction="none")
    assert loss[0] == 0
    assert loss[1] == inf
    assert loss[2].item() == pytest.approx(math.log(3), rel=1e-6)
    assert loss[3].isnan()
    assert loss[4].isnan()
    assert bool(grad[:3].isfinite().all())
    assert grad[2, 1] == 0


def test_not_convex() -> None:
    """The Hessian at (1, 2, 0.5) has the negative eigenvalue that the spec has measured."""
    x = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    hessian = torch.func.hessian(lambda v: loss_of(v, torch.tensor(0)))(x)
    assert torch.linalg.eigvalsh(hessian)[0].item() == pytest.approx(-0.051, abs=5e-4)


@pytest.mark.threads
@pytest.mark.parametrize("classes", [50_257, 128_256, 151_936, 262_144])
def test_vocabularies(classes: int) -> None:
    """The sizes of real vocabularies, none a multiple of everything."""
    x, target = torch.randn(3, classes), torch.randint(0, classes, (3,))
    loss, grad = loss_and_grad(x, target)
    double = x.double().requires_grad_()
    exact = F.cross_entropy(symlog(double), target)
    assert ulps(loss, exact.float()) <= 4
    assert ulps(grad, torch.autograd.grad(exact, double)[0].float()) <= 8


@pytest.mark.threads
def test_many_narrow_rows() -> None:
    """A million rows of eleven classes, the shape of HRM and TRM."""
    x, target = torch.randn(1_000_000, 11), torch.randint(0, 11, (1_000_000,))
    loss, grad = loss_and_grad(x, target)
    exact = F.cross_entropy(symlog(x.double()), target)
    assert ulps(loss, exact.float()) <= 4
    assert abs(grad.double().sum().item()) < 1


def available_gib() -> float:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.large
@pytest.mark.parametrize("inner", [False, True], ids=["rows", "inner"])
def test_more_than_2_31_elements(inner: bool) -> None:
    """Offsets past 32 bits, forward and backward; the last rows are as if they stood alone."""
    if available_gib() < 11:
        pytest.skip(f"needs 11 GiB of free memory, {available_gib():.1f} are free")
    rows, classes = 2**15 + 1, 2**16
    x = torch.zeros(rows, classes, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, classes, dtype=torch.bfloat16)
    target = torch.zeros(rows, dtype=torch.int64)
    target[-2:] = torch.tensor([5, classes - 1])
    if inner:  # One block of columns, whose last ones lie past 2^31.
        x = x.view(1, rows, classes)
        target = torch.full((1, classes), rows - 1)
    leaf = x.requires_grad_()
    loss = loss_of(leaf, target, reduction="none")
    assert loss.numel() == target.numel()
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    if inner:
        sample = slice(classes - 3, classes)
        part, part_grad = loss_and_grad(
            x.detach()[..., sample], target[:, sample], reduction="none"
        )
        assert ulps(loss[:, sample], part) <= 4
        assert ulps(grad[..., sample], part_grad) <= 4
    else:
        part, part_grad = loss_and_grad(x.detach()[-2:], target[-2:], reduction="none")
        assert ulps(loss[-2:], part) <= 4
        assert ulps(grad[-2:], part_grad) <= 4
