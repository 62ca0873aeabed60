"""What nvcc made of the CUDA kernels: registers, spills, and the width of their memory accesses.

Reads the CUDA engine of the package, or compiles ``csrc/*/*.cu`` where it is not installed. Needs
nvcc (and fails without it where ``FUSEE_REQUIRE_NVCC=1``) and cuobjdump, of the package
``nvidia-cuda-cuobjdump``.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from fusee._library import library_path

from tests.harness.spec import CudaKernel
from tests.harness.table import RECORDS

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
ARCHITECTURE = "sm_90"
SPILLS: dict[str, str] = {}
"""Kernels (regular expressions over their names) that may use local memory -> why."""
FLAGS = ["-std=c++20", f"-arch={ARCHITECTURE}", "-cubin", "--expt-relaxed-constexpr"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DFUSEE_ENGINE_NAMESPACE=engine_cuda"]


@dataclass
class Kernel:
    """A kernel in machine code."""

    name: str
    registers: int
    stack: int
    local: int
    memory: set[str] = field(default_factory=set)
    """Its instructions that reach global or local memory, such as LDG.E.128."""
    products: set[str] = field(default_factory=set)
    """Its instructions of tensor cores, such as HMMA.16816.F32.BF16."""

    @property
    def spills(self) -> bool:
        """Whether it keeps anything in local memory."""
        return (
            self.stack > 0
            or self.local > 0
            or any(op.startswith(("LDL", "STL")) for op in self.memory)
        )

    def has(self, operation: str) -> bool:
        """Whether it has 16-byte instructions of a kind: LDG, also past registers, or STG."""
        kinds = (f"{operation}.E", f"{operation}STS.E")
        return any(op.startswith(kinds) and ".128" in op for op in self.memory)


def missing(reason: str) -> None:
    if os.environ.get("FUSEE_REQUIRE_NVCC") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def tool(name: str) -> str:
    """A program of the CUDA toolkit: from the environment's packages, or on the path."""
    folders = [Path(folder) / "nvidia" for folder in (*site.getsitepackages(), *sys.path[-3:])]
    for folder in folders:
        for path in sorted(folder.glob(f"*/bin/{name}")):
            return str(path)
    found = shutil.which(name)
    if found is None:
        missing(f"needs {name}: pip install nvidia-cuda-{name}")
    return str(found)


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.cubin"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    command = ["nvcc", *FLAGS, *includes, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The CUDA engine, or what nvcc makes of each source."""
    if shutil.which("nvcc") is None:
        missing("needs nvcc")
    engine = library_path("fusee_cuda")
    if engine.exists():
        return [engine]
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    assert sources
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_compile, sources, [folder] * len(sources)))


def _read(binary: Path, *what: str) -> str:
    selected = ["-arch", ARCHITECTURE] if binary.suffix == ".so" else []
    done = subprocess.run(
        [tool("cuobjdump"), *selected, *what, str(binary)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def parse(resources: str, code: str) -> list[Kernel]:
    """The kernels in cuobjdump's two listings."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    kernels = {
        name: Kernel(name, *map(int, numbers)) for name, *numbers in re.findall(pattern, resources)
    }
    current: Kernel | None = None
    for line in code.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = kernels.get(function[1])
        elif current is not None and (found := re.search(r"\s((?:LD|ST)[GL][.\w]*)", line)):
            current.memory.add(found[1])
        elif current is not None and (found := re.search(r"\s(HMMA[.\w]*)", line)):
            current.products.add(found[1])
    return list(kernels.values())


def demangled(names: list[str]) -> list[str]:
    """Names without namespaces."""
    if shutil.which("c++filt") is None:
        missing("needs c++filt, of binutils")
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|\w+::", "", line).removeprefix("void ")
        for line in text.splitlines()
    ]


@pytest.fixture(scope="module")
def kernels(binaries: list[Path]) -> list[Kernel]:
    """Every kernel that was compiled."""
    found = [
        kernel
        for binary in binaries
        for kernel in parse(_read(binary, "--dump-resource-usage"), _read(binary, "-sass"))
    ]
    for kernel, name in zip(found, demangled([k.name for k in found]), strict=True):
        kernel.name = name
    assert found
    return found


def test_no_spills(kernels: list[Kernel]) -> None:
    """No kernel keeps registers or arrays in local memory, but those that may."""
    spilling = [
        k.name for k in kernels if k.spills and not any(re.search(p, k.name) for p in SPILLS)
    ]
    assert not spilling


def test_allowed_spills_are_needed(kernels: list[Kernel]) -> None:
    """The list of exceptions holds none that is no longer needed."""
    for pattern in SPILLS:
        assert any(k.spills and re.search(pattern, k.name) for k in kernels), pattern


def _expected() -> Iterator[tuple[str, CudaKernel]]:
    for spec in RECORDS:
        for kernel in spec.cuda_kernels:
            yield spec.name, kernel


@pytest.mark.parametrize(
    ("record", "expected"), [pytest.param(*e, id=f"{e[0]}-{e[1].name}") for e in _expected()]
)
def test_wide_accesses(record: str, expected: CudaKernel, kernels: list[Kernel]) -> None:
    """Kernels bound by memory load and store 16 bytes at a time."""
    matching = [k for k in kernels if re.search(expected.name, k.name)]
    assert matching, f"{record}: no kernel is called {expected.name}"
    for kernel in matching:
        assert kernel.has("LDG"), f"{kernel.name} has no LDG.E.128"
        if expected.stores:
            assert kernel.has("STG"), f"{kernel.name} has no STG.E.128"
        if re.search(expected.tensor_cores, kernel.name):
            assert kernel.products, f"{kernel.name} has no HMMA"


def test_every_record_names_its_kernels() -> None:
    for spec in RECORDS:
        assert spec.cuda_kernels or "cuda_kernels" in spec.not_applicable, spec.name


def test_the_reading_of_listings() -> None:
    """Spills and narrow accesses are seen in cuobjdump's listings."""
    resources = (
        " Function a:\n  REG:54 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:592 TEXTURE:0\n"
        " Function b:\n  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:592 TEXTURE:0\n"
    )
    code = (
        "\t\tFunction : a\n        /*0060*/                   LDG.E.128 R2, desc[UR6][R2.64] ;\n"
        "        /*0070*/                   STG.E.U16 desc[UR6][R2.64], R4 ;\n"
        "\t\tFunction : b\n        /*0060*/              @!P0 LDL R2, [R1] ;\n"
        "        /*0070*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR8][R6.64] ;\n"
        "        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n"
    )
    a, b = parse(resources, code)
    assert (a.registers, a.spills, a.has("LDG"), a.has("STG")) == (54, False, True, False)
    assert b.spills and b.has("LDG") and not b.has("STG")
    assert b.products == {"HMMA.16816.F32.BF16"} and not a.products
