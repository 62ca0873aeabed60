"""How the operators run: threads, autocast, deterministic mode, examples in their documentation."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import fusee
import pytest
import torch

from tests.harness.helpers import chosen, cotangent, everything, naming, value_and_grad
from tests.harness.measure import relative_error, same_bits
from tests.harness.spec import OpSpec, as_function, detached, of_floats


@pytest.mark.threads
def test_thread_count(spec: OpSpec, dtype: torch.dtype) -> None:
    """The same bits from one, two and three threads, at sizes that are split."""
    assert spec.large is not None, "declare large samples, or the check not applicable"
    for sample in spec.large(spec.make(dtype)):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(spec.function, sample.arguments, spec))
        for other in results[1:]:
            with naming(sample.name):
                assert all(map(same_bits, results[0], other))


@pytest.mark.threads
def test_called_from_threads(spec: OpSpec) -> None:
    """Python threads that call at once do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    assert spec.large is not None
    samples = list(spec.large(spec.make(torch.float32)))
    expected = [everything(spec.function, s.arguments, spec) for s in samples]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(everything, spec.function, s.arguments, spec) for s in samples * 3]
        for call, values in zip(calls, expected * 3, strict=True):
            assert all(map(same_bits, call.result(), values))


def test_deterministic_mode(spec: OpSpec, device: str) -> None:
    """``torch.use_deterministic_algorithms`` neither raises nor changes a bit."""
    arguments = spec.sized(spec.make(torch.float32, device), 6)
    expected = everything(spec.function, arguments, spec)
    torch.use_deterministic_algorithms(True)
    try:
        actual = everything(spec.function, arguments, spec)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(spec: OpSpec, dtype: torch.dtype, device: str, cast: torch.dtype) -> None:
    """Under autocast: the documented dtype, gradients in the dtype of their argument, right
    numbers."""
    for sample in chosen(spec, dtype, device, tiny=True, smooth=True):
        if "dtype" in sample.arguments or not spec.tensors(sample.arguments):
            continue
        names = spec.has_gradient(sample.arguments)
        with naming(sample.name):
            leaves = detached(sample.arguments, names)
            with torch.autocast(device, cast):
                output = spec.function(**leaves)
            assert output.dtype == spec.autocast_dtype(dtype, cast)
            exact_arguments = of_floats(sample.arguments, torch.float64)
            exact = spec.oracle(**exact_arguments)
            bound = 8 * torch.finfo(cast).eps
            assert relative_error(output, exact) <= bound
            if not names:
                continue
            tensors = [leaves[name] for name in names]
            grads = torch.autograd.grad(output, tensors, cotangent(output))
            _, expected = value_and_grad(
                spec.oracle,
                exact_arguments,
                names,
                lambda out, output=output: cotangent(output).to(out.dtype),
            )
            for name, grad in zip(names, grads, strict=True):
                assert grad.dtype == dtype
                assert relative_error(grad, expected[name]) <= bound


@pytest.mark.tracing
def test_autocast_in_compiled_code(spec: OpSpec, device: str) -> None:
    """Autocast within a compiled region gives the same dtype."""
    arguments = spec.sized(spec.make(torch.bfloat16, device), 4)

    def call(**values: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return spec.function(**values)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert (
        compiled(**arguments).dtype
        == call(**arguments).dtype
        == spec.autocast_dtype(torch.bfloat16, torch.bfloat16)
    )


@pytest.mark.cuda_only
def test_cuda_graph(spec: OpSpec, device: str) -> None:
    """On CUDA, forward and backward are captured in a graph: nothing waits for the device."""
    arguments = spec.sized(spec.make(torch.float32, device), 64)
    names = spec.has_gradient(arguments)
    function = as_function(spec.function, arguments, names)
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    graphed = torch.cuda.make_graphed_callables(function, tuple(leaves))
    assert relative_error(graphed(*leaves), function(*leaves)) == 0.0


def _documented() -> list[tuple[str, Callable[..., Any]]]:
    """The public functions, modules and optimisers."""
    places = [(fusee, fusee.__all__), (fusee.nn, fusee.nn.__all__)]
    places.append((fusee.optim, getattr(fusee.optim, "__all__", [])))
    found = [(f"{m.__name__}.{n}", getattr(m, n)) for m, names in places for n in names]
    return [(name, value) for name, value in found if not inspect.ismodule(value)]


@pytest.mark.parametrize(("name", "value"), _documented(), ids=[n for n, _ in _documented()])
def test_examples(name: str, value: Callable[..., Any]) -> None:
    """The examples of a docstring give what they show."""
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0


def test_documentation(spec: OpSpec) -> None:
    """A docstring says everything that DESIGN.md asks of it, and names every argument."""
    text = inspect.getdoc(spec.function) or ""
    wanted = ["Example:", ">>> "]
    if "are those of" not in text:
        wanted += ["Args:", "Returns:", "Raises:", "Source:", "eterministic"]
    missing = [part for part in wanted if part not in text]
    described = text[text.find("Args:") : text.find("Returns:")]
    if "Args:" in wanted:
        names = inspect.signature(spec.function).parameters
        missing += [name for name in names if not re.search(rf"\b{name}\b.*:", described)]
    assert not missing, f"{spec.name}'s docstring lacks {missing}"


WITHOUT_RECORD = {
    "center_radius": "two sums of torch's: tests/bounds/test_interval_linear.py, test_sound.py",
    "certify": "of whole networks: tests/bounds/test_certify.py",
    "interval_bounds": "of whole networks: tests/bounds/test_interval_model.py",
    "interval_warmup_penalty": "means of torch's: tests/bounds/test_warmup_penalty.py",
    "linear_tightness": "products of torch's: tests/bounds/test_propagation_tightness.py",
    "lower_upper": "two sums of torch's: tests/bounds/test_interval_linear.py, test_sound.py",
    "monarch_project": "factors with no derivative: tests/structured/test_monarch_project.py",
    "monarch_to_dense": "monarch_matmul of an identity: tests/structured/test_monarch_matmul.py",
    "pgd_attack": "gradient steps of torch's: tests/bounds/test_pgd_attack.py",
    "propagation_tightness": "of whole networks: tests/bounds/test_propagation_tightness.py",
    "robust_cross_entropy": "torch's logsumexp: tests/bounds/test_robust_cross_entropy.py",
    "small_boxes": "torch's clamp: tests/bounds/test_small_boxes.py",
}


def test_every_function_has_a_record() -> None:
    """No public function is without a record, but those that say where their tests are."""
    from tests.harness.table import RECORDS

    functions = {
        name.rpartition(".")[2]
        for name, value in _documented()
        if inspect.isfunction(value) and "Tensor" in str(inspect.signature(value))
    }
    recorded = {spec.name for spec in RECORDS}
    assert functions - recorded == set(WITHOUT_RECORD)
