"""Lists of weights through the compander at once: the same as one by one, however they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap

from tests.harness.layouts import LAYOUTS
from tests.harness.measure import same_bits, ulps
from tests.harness.spec import ALL_DTYPES, Maker, map_tensors
from tests.reparam.curves import KINDS
from tests.reparam.record_compand import channels_last

EMULATED = fusee.engine() == "emulated"
SHAPES = [(6, 4, 3, 3), (6,), (10, 33), (), (0, 5), (5, 0), (1,), (3, 1100), (2, 3, 4), (1, 40)]
SHAPES += [(2, 20_000), (40_000,)]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def mixed_list() -> tuple[list[Tensor], list[Any], list[Any]]:
    """Weights of every dtype, shape and layout; parameters as numbers, of one element, of channels."""
    inputs, a, b = [], [], []
    shapes = SHAPES[:-2] if EMULATED else SHAPES
    for i, shape in enumerate(shapes * len(ALL_DTYPES)):
        dtype = ALL_DTYPES[i // len(shapes)]
        input = torch.randn(shape, dtype=dtype)
        if input.dim() == 4:
            input = channels_last(input)
        elif i % 3 == 1:
            input = LAYOUTS[("transposed", "padded", "sliced", "offset")[i % 4]](input)
        channels = shape[0] if shape else 1
        inputs.append(input)
        a.append(
            [1.5, torch.tensor([1.25], dtype=dtype), torch.linspace(0.5, 2.0, channels)][i % 3]
        )
        b.append([torch.linspace(2.0, 0.5, channels), 0.75, torch.tensor(0.5)][i // 2 % 3])
    return inputs, a, b


def leaves_of(values: list[Any]) -> list[Any]:
    return [v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in values]


def one_by_one(inputs: list[Tensor], a: Any, b: Any, kind: str = "arctan") -> tuple[Tensor, ...]:
    every = [p if isinstance(p, (list, tuple)) else [p] * len(inputs) for p in (a, b)]
    return tuple(fusee.compand(*item, kind) for item in zip(inputs, *every, strict=True))


def results_and_gradients(
    function: Callable[..., Any], inputs: list[Tensor], a: Any, b: Any, kind: str
) -> list[Tensor]:
    """All results, and the gradients of all tensors that are given."""
    many = [isinstance(p, list) for p in (a, b)]
    a, b = (leaves_of(p if isinstance(p, list) else [p]) for p in (a, b))
    inputs = leaves_of(inputs)
    outputs = function(inputs, a if many[0] else a[0], b if many[1] else b[0], kind)
    leaves = [t for t in (*inputs, *a, *b) if isinstance(t, Tensor)]
    sent = [torch.linspace(0.5, 1.5, w.numel()).to(w.dtype).reshape(w.shape) for w in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, sent)]


# --- as one by one --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_list(kind: str) -> None:
    """Every dtype, shape and layout in one call: the bits and strides of single calls, forward and
    backward."""
    given = mixed_list()
    together = results_and_gradients(fusee.compand_foreach, *given, kind)
    alone = results_and_gradients(one_by_one, *given, kind)
    for one, other in zip(together, alone, strict=True):
        assert same_bits(one, other)
        assert one.stride() == other.stride()


def test_more_tensors_than_a_launch_takes() -> None:
    count = 200 if EMULATED else 900
    inputs = [torch.randn(1 + i % 7, 3) for i in range(count)]
    a, b = [1.0 + i / count for i in range(count)], [torch.tensor([0.5])] * count
    together = results_and_gradients(fusee.compand_foreach, inputs, a, b, "tanh")
    alone = results_and_gradients(one_by_one, inputs, a, b, "tanh")
    assert all(map(same_bits, together, alone))


def test_two_hundred_tensors_share_their_parameters() -> None:
    """One a and one b for all, whose gradients are the sums over all tensors."""
    inputs = [torch.randn(5, i % 9 + 1, dtype=torch.float64) for i in range(200)]
    a, b = torch.tensor(1.5, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    together = results_and_gradients(fusee.compand_foreach, inputs, a, b, "asinh")
    alone = results_and_gradients(one_by_one, inputs, a, b, "asinh")
    assert all(map(same_bits, together[:-2], alone[:-2]))
    torch.testing.assert_close(together[-2:], alone[-2:])
    whole = torch.cat([t.reshape(-1) for t in inputs])
    joined = results_and_gradients(lambda i, *p: [fusee.compand(i[0], *p)], [whole], a, b, "asinh")
    assert joined[-1].shape == b.shape and joined[-2].shape == a.shape


def test_ways_to_give_the_parameters() -> None:
    """A number, a tensor of one element, of channels, a list of these, a tuple, a generator."""
    inputs = [torch.randn(4, 3), torch.randn(4)]
    expected = fusee.compand_foreach(inputs, 1.5, 0.5)
    four = torch.full((4,), 1.5)
    for a in (
        torch.tensor(1.5),
        four,
        [1.5, four],
        (torch.tensor([1.5]), 1.5),
        [four.double(), 1.5],
    ):
        for given in (inputs, tuple(inputs), iter(inputs)):
            actual = fusee.compand_foreach(given, a, 0.5)
            assert isinstance(actual, tuple) and all(map(same_bits, actual, expected))
    actual = fusee.compand_foreach(inputs, 1.5, (b for b in (0.5, 0.5)))
    assert all(map(same_bits, actual, expected))


def test_a_tensor_twice_in_the_list() -> None:
    v = torch.randn(5, requires_grad=True)
    first, second = fusee.compand_foreach([v, v], [1.0, 2.0], 0.5)
    (both,) = torch.autograd.grad(first.sum() + second.sum(), v)
    single = [torch.autograd.grad(fusee.compand(v, a, 0.5).sum(), v)[0] for a in (1.0, 2.0)]
    torch.testing.assert_close(both, sum(single))


def test_empty_list() -> None:
    assert fusee.compand_foreach([], 1.0, 1.0) == ()
    assert fusee.compand_foreach([], [], []) == ()
    with pytest.raises(ValueError, match="kind must be"):
        fusee.compand_foreach([], 1.0, 1.0, "sigmoid")


@pytest.mark.parametrize(
    ("inputs", "a", "error", "match"),
    [
        (torch.ones(3), 1.0, TypeError, "inputs must be a sequence of Tensors, got Tensor"),
        (3, 1.0, TypeError, "inputs must be a sequence of Tensors"),
        (None, 1.0, TypeError, "inputs must be a sequence of Tensors"),
        ([torch.ones(3), 1.0], 1.0, TypeError, r"inputs\[1\] must be a Tensor, got float"),
        ([torch.ones(3)], "x", TypeError, r"a\[0\] must be a number or a Tensor, got str"),
        ([torch.ones(3)], [None], TypeError, r"a\[0\] must be a number or a Tensor, got NoneType"),
    ],
)
def test_errors(inputs: Any, a: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fusee.compand_foreach(inputs, a, 1.0)


# --- derivatives ----------------------------------------------------------------------------------


def doubles() -> tuple[list[Tensor], list[Tensor], Tensor]:
    inputs = [torch.rand(3, 2).double() + 0.25, torch.rand(4).double() + 0.25]
    return (
        inputs,
        [torch.rand(3).double() + 0.5, torch.rand(1).double() + 0.5],
        torch.tensor(0.75).double(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    """Double backward through the list, against single calls."""
    inputs, a, b = doubles()

    def second(function: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (*inputs, *a, b)]
        outputs = function(leaves[:2], leaves[2:4], leaves[4], kind)
        value = sum(w.square().sum() for w in outputs)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    torch.testing.assert_close(
        second(fusee.compand_foreach), second(one_by_one), rtol=1e-12, atol=1e-13
    )


def test_unused_results() -> None:
    """Results that nothing depends on have no part in the gradients, and get none."""
    inputs, a, b = doubles()
    leaves = [t.requires_grad_() for t in (*inputs, *a, b)]
    first, _ = fusee.compand_foreach(leaves[:2], leaves[2:4], leaves[4])
    actual = torch.autograd.grad(first.sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(
        fusee.compand(leaves[0], leaves[2], leaves[4]).sum(), (leaves[0], leaves[2], leaves[4])
    )
    for one, other in zip((actual[0], actual[2], actual[4]), expected, strict=True):
        torch.testing.assert_close(one, other)
    for unused in (actual[1], actual[3]):
        assert unused is None or not unused.any()


def test_inputs_without_gradients() -> None:
    """Frozen weights among the others; nothing at all to differentiate; only the parameters."""
    inputs = [torch.randn(4, 3), torch.randn(5)]
    assert not any(w.requires_grad for w in fusee.compand_foreach(inputs, 1.5, 0.5))
    a = torch.tensor(1.5, requires_grad=True)
    sum(w.sum() for w in fusee.compand_foreach(inputs, a, 0.5)).backward()
    expected = sum(fusee.compand(v, 1.0, 0.5).double().sum() for v in inputs)
    torch.testing.assert_close(a.grad.double(), expected, rtol=1e-5, atol=1e-5)
    inputs[1].requires_grad_()
    (gradient,) = torch.autograd.grad(
        sum(w.sum() for w in fusee.compand_foreach(inputs, 1.5, 0.5)), inputs[1]
    )
    (alone,) = torch.autograd.grad(fusee.compand(inputs[1], 1.5, 0.5).sum(), inputs[1])
    assert same_bits(gradient, alone)


def test_batched_gradients() -> None:
    """Jacobians that send a batch of gradients back through one graph."""
    inputs, a, b = doubles()
    leaf = inputs[0].requires_grad_()
    output = fusee.compand_foreach([leaf, inputs[1]], a, b)[0].reshape(-1)
    rows = torch.eye(output.numel(), dtype=torch.float64)
    (actual,) = torch.autograd.grad(output, leaf, rows, is_grads_batched=True, retain_graph=True)
    expected = torch.stack(
        [torch.autograd.grad(output, leaf, row, retain_graph=True)[0] for row in rows]
    )
    torch.testing.assert_close(actual, expected)


def test_transforms() -> None:
    """``torch.func`` through the list, in weights and parameters, against single calls."""
    inputs, a, b = doubles()
    given = (*inputs, *a, b)

    def results(function: Any) -> Any:
        return lambda *t: function(list(t[:2]), list(t[2:4]), t[4], "symlog")

    def total(function: Any) -> Any:
        return lambda *t: sum(w.square().sum() for w in results(function)(*t))

    every, tangents = tuple(range(5)), tuple(torch.randn_like(t) for t in given)
    batches = tuple(torch.stack([t, t * 1.5]) for t in given)
    for transform in (
        lambda f: grad(total(f), every)(*given),
        lambda f: jvp(results(f), given, tangents),
        lambda f: jacrev(results(f), every)(*given),
        lambda f: hessian(total(f), (0, 2))(*given),
        lambda f: vmap(results(f))(*batches),
        lambda f: vmap(grad(total(f), every))(*batches),
        lambda f: torch.autograd.functional.jvp(total(f), given, tangents),
    ):
        torch.testing.assert_close(transform(fusee.compand_foreach), transform(one_by_one))


# --- as a neighbour of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast: torch.dtype) -> None:
    """Computed in the dtypes of the weights."""
    inputs = [torch.randn(5, dtype=dtype) for dtype in ALL_DTYPES]
    expected = results_and_gradients(fusee.compand_foreach, inputs, torch.tensor(1.5), 0.5, "tanh")
    with torch.autocast("cpu", cast):
        actual = results_and_gradients(
            fusee.compand_foreach, inputs, torch.tensor(1.5), 0.5, "tanh"
        )
    assert all(map(same_bits, actual, expected))


def test_inputs_unwritten() -> None:
    inputs, a, b = mixed_list()
    before = [t.clone() for t in inputs]
    results = results_and_gradients(fusee.compand_foreach, inputs, a, b, "mu_law")
    assert all(map(same_bits, inputs, before))
    storages = {t.untyped_storage().data_ptr() for t in (*inputs, *a, *b) if isinstance(t, Tensor)}
    assert not storages & {
        t.untyped_storage().data_ptr() for t in results[: len(inputs)] if t.numel()
    }


def raw_arguments(layout: str = "") -> Iterator[tuple[Tensor, ...]]:
    """Arguments of the operator for each of a few weights: a gradient, the weight, a and b."""
    make = Maker(torch.float32)
    for shape in ((6, 4, 3, 3), (9,), (), (0, 5), (3, 20), (2, 17_000)):
        channels = shape[0] if shape else 1
        v, sent = make.normal(*shape), make.normal(*shape)
        a = make.uniform(channels, low=0.5, high=2.0)
        item = (sent, v, a, a.flip(0))
        yield tuple(LAYOUTS[layout](t) for t in item) if layout else item


@pytest.mark.parametrize("layout", ["", "transposed", "padded"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_reference_agrees(kind: int, layout: str) -> None:
    """The plain form of the operators over lists computes what the kernels compute."""
    from fusee.reparam.compand_foreach import _foreach_backward_reference, _foreach_reference

    for dtype in (torch.float32, torch.float64):
        lists = [[t.to(dtype) for t in part] for part in zip(*raw_arguments(layout), strict=True)]
        sent, *given = lists
        pairs = (
            (torch.ops.fusee.compand_foreach(*given, kind), _foreach_reference(*given, kind)),
            (
                torch.ops.fusee.compand_foreach_backward(sent, *given, kind),
                _foreach_backward_reference(sent, *given, kind),
            ),
        )
        for actual, expected in pairs:
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == other.dtype
                # Sums of 17000 in the plain form are off by as much.
                assert ulps(one, other, 1.0) <= 64


@pytest.mark.tracing
@pytest.mark.parametrize("layout", ["", "padded"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout: str, requires_grad: bool) -> None:
    sent, *given = [list(part) for part in zip(*raw_arguments(layout), strict=True)]
    for part in given:
        for tensor in part:
            tensor.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fusee.compand_foreach, (*given, 0))
    backward = [[t.detach() for t in part] for part in (sent, *given)]
    torch.library.opcheck(torch.ops.fusee.compand_foreach_backward, (*backward, 0))


@pytest.mark.tracing
def test_strides_of_fake_results() -> None:
    inputs, a, b = mixed_list()
    real = fusee.compand_foreach(inputs, a, b)
    with FakeTensorMode() as mode:
        every = [map_tensors(dict(enumerate(part)), mode.from_tensor) for part in (inputs, a, b)]  # type: ignore[arg-type]
        fake = fusee.compand_foreach(*(list(part.values()) for part in every))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.tracing
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """Lists compile to one graph that calls the operator once, with its backward."""
    inputs = [torch.randn(6, 4, 3, 3), torch.randn(9), channels_last(torch.randn(6, 2, 3, 3))]
    a, b = [torch.linspace(0.5, 2.0, 6), torch.tensor([1.5]), 1.25], torch.tensor([0.5])

    def scaled(*given: Any) -> tuple[Tensor, ...]:
        return tuple(2 * w for w in fusee.compand_foreach(*given))

    compiled = torch.compile(scaled, fullgraph=True, backend=backend)
    actual = results_and_gradients(compiled, inputs, a, b, "arctan")
    expected = results_and_gradients(scaled, inputs, a, b, "arctan")
    for one, other in zip(actual, expected, strict=True):
        assert ulps(one, other) <= 4
        assert one.stride() == other.stride()


@pytest.mark.tracing
def test_second_derivatives_of_compiled_code() -> None:
    """The right result or an exception, never zeros."""
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def second(function: Any) -> Tensor:
        (first,) = torch.autograd.grad(
            function([v], 1.5, 0.5)[0].square().sum(), v, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), v)[0]

    try:
        actual = second(torch.compile(fusee.compand_foreach, backend="aot_eager"))
    except RuntimeError:
        return
    torch.testing.assert_close(actual, second(fusee.compand_foreach))


@pytest.mark.threads
def test_same_bits_whatever_the_threads() -> None:
    inputs = [torch.randn(*s) for s in ((500, 400), (70_000,), (64,), (16_385,), (300, 3, 3, 3))]
    inputs += [torch.randn(50) for _ in range(40)]
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(
            results_and_gradients(fusee.compand_foreach, inputs, torch.tensor(1.5), 0.5, "tanh")
        )
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))
