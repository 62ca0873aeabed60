"""The operators beneath: registered as PyTorch wants it, and equal to the reference that ships."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.helpers import chosen, contiguous, naming
from tests.harness.measure import accumulation, same_bits, ulps
from tests.harness.raw import (
    layout_variants,
    raw_calls,
    schema_names,
    shipped_ops,
    with_gradients,
)
from tests.harness.spec import OpSpec
from tests.harness.table import RECORDS

HALF = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = {name: places for spec in RECORDS for name, places in spec.raw.items()}


def _outputs(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _compare(actual: Tensor, expected: Tensor, spec: OpSpec, dtype: torch.dtype) -> None:
    """Equal within a few units of the accumulation dtype and one rounding of a half type: that of
    the result, or of what it is made from."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = 4 * spec.ulps(dtype) * torch.finfo(accumulation(dtype)).eps
    if dtype in HALF and (spec.half_inside or actual.dtype in HALF):
        bound += 2 * torch.finfo(dtype).eps if spec.half_inside else torch.finfo(dtype).eps
    assert ulps(actual, expected, spec.least_scale) * torch.finfo(actual.dtype).eps <= bound


def test_engine_kernels(spec: OpSpec, device: str) -> None:
    """The engine has a kernel of its own for every operator: without one, the reference would serve
    in its place, and every other check would pass."""
    key = device.upper()
    for name in spec.raw:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusee::{name}", key), name


def test_reference(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """The reference that ships computes what the kernels compute."""
    ops = shipped_ops()
    seen = set()
    for sample in chosen(spec, dtype, device, tiny=False):
        for name, args in raw_calls(spec, sample):
            seen.add(name)
            for layout, arguments in layout_variants(args):
                actual = _outputs(ops[name].overload(*arguments))
                expected = _outputs(ops[name].reference(*arguments))
                for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
                    with naming(f"{sample.name}, {name}, {layout}, output {place}"):
                        _compare(a, e, spec, dtype)
    assert seen >= set(spec.raw), f"no sample calls {set(spec.raw) - seen}"


def test_raw_inputs_unwritten(spec: OpSpec, dtype: torch.dtype, device: str) -> None:
    """No operator writes to an argument or returns one."""
    ops = shipped_ops()
    for sample in chosen(spec, dtype, device, tiny=True):
        for name, args in raw_calls(spec, sample):
            before = contiguous(dict(enumerate(args)))  # type: ignore[arg-type]
            outputs = _outputs(ops[name].overload(*args))
            storages = {o.untyped_storage().data_ptr() for o in outputs if o.numel()}
            for place, value in enumerate(args):
                if isinstance(value, Tensor):
                    with naming(f"{sample.name}, {name}, argument {place}"):
                        assert same_bits(value, before[place])  # type: ignore[index]
                        assert value.untyped_storage().data_ptr() not in storages


@pytest.mark.tracing
def test_opcheck(spec: OpSpec, device: str) -> None:
    """``torch.library.opcheck``: schema, fake kernel, autograd registration, AOT dispatch."""
    ops = shipped_ops()
    done = set()
    for sample in chosen(spec, torch.float32, device, tiny=True):
        for name, args in raw_calls(spec, sample):
            empty = any(isinstance(a, Tensor) and a.numel() == 0 for a in args)
            kinds = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in args)
            if (name, empty, kinds) in done:
                continue
            done.add((name, empty, kinds))
            for layout, arguments in layout_variants(args):
                with naming(f"{sample.name}, {name}, {layout}"):
                    torch.library.opcheck(ops[name].overload, arguments)
                with naming(f"{sample.name}, {name}, {layout}, with gradients"):
                    wanted = with_gradients(arguments, DIFFERENTIABLE[name])
                    torch.library.opcheck(ops[name].overload, wanted)


@pytest.mark.tracing
def test_the_table_is_complete() -> None:
    """Every operator of the library has a record, and no record names another."""
    recorded = {name for spec in RECORDS for name in spec.raw}
    assert schema_names() == recorded
    assert set(shipped_ops()) <= recorded
