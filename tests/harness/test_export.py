"""``torch.export``, and packages that AOTInductor compiles ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from tests.harness.helpers import chosen, naming
from tests.harness.measure import ulps
from tests.harness.spec import Arguments, OpSpec

pytestmark = pytest.mark.tracing


class _Module(torch.nn.Module):
    """A call as a module whose inputs are the tensors."""

    def __init__(self, spec: OpSpec, arguments: Arguments) -> None:
        super().__init__()
        self.function = spec.function
        self.constants = {k: v for k, v in arguments.items() if not isinstance(v, Tensor)}

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.function(**tensors, **self.constants)


def _export(spec: OpSpec, arguments: Arguments, **options: Any) -> ExportedProgram:
    return export(_Module(spec, arguments), (spec.tensors(arguments),), **options)


def _check(spec: OpSpec, program: Any, arguments: Arguments) -> None:
    output = program(spec.tensors(arguments))
    expected = spec.function(**arguments)
    assert output.dtype == expected.dtype
    assert ulps(output, expected, spec.least_scale) <= 4 * spec.ulps(expected.dtype)


@pytest.mark.parametrize("strict", [True, False])
def test_export(spec: OpSpec, device: str, strict: bool) -> None:
    """Every option exports, strictly and not, keeping the operator whole in its graph."""
    for sample in chosen(spec, torch.float32, device, tiny=True):
        with naming(sample.name):
            program = _export(spec, sample.arguments, strict=strict)
            graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
            called = {str(node.target) for graph in graphs for node in graph.nodes}
            assert any("fusee." in target for target in called)
            _check(spec, program.module(), sample.arguments)


def _dynamic(spec: OpSpec, arguments: Arguments) -> Any:
    batch = Dim("batch", min=2, max=4096)
    shapes = {
        name: {spec.batch_dims[name]: batch} if name in spec.batch_dims else None
        for name in spec.tensors(arguments)
    }
    return (shapes,)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(spec: OpSpec, device: str, strict: bool) -> None:
    """One exported program serves every size of the batch."""
    make = spec.make(torch.float32, device)
    arguments = spec.sized(make, 12)
    shapes = _dynamic(spec, arguments)
    program = _export(spec, arguments, dynamic_shapes=shapes, strict=strict)
    for n in (2, 12, 31):
        _check(spec, program.module(), spec.sized(make, n))


def test_aotinductor_package(spec: OpSpec, device: str, tmp_path: Path) -> None:
    """Compiled ahead of time, saved, loaded again, and run at other sizes."""
    make = spec.make(torch.float32, device)
    arguments = spec.sized(make, 12)
    program = _export(spec, arguments, dynamic_shapes=_dynamic(spec, arguments))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "package.pt2")
    )
    loaded = torch._inductor.aoti_load_package(path)
    for n in (2, 12, 31):
        _check(spec, loaded, spec.sized(make, n))


def test_saved_program(spec: OpSpec, device: str, tmp_path: Path) -> None:
    """An exported program survives saving and loading."""
    arguments = spec.sized(spec.make(torch.float32, device), 6)
    torch.export.save(_export(spec, arguments), tmp_path / "program.pt2")
    _check(spec, torch.export.load(tmp_path / "program.pt2").module(), arguments)
