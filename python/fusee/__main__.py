"""``python -m fusee``: what was built, which engine serves each device and why, and every operator."""

from __future__ import annotations

import importlib
import pkgutil
import platform
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

import fusee
from fusee._library import CPU_ENGINES, LOADED, built_engines, processor_has


def compiled() -> ModuleType | None:
    """``fusee._C``, or None where it is missing or belongs to another Python."""
    try:
        return importlib.import_module("fusee._C")
    except ImportError:
        return None


def processor() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def facts() -> Iterator[tuple[str, str]]:
    """What the diagnosis says above the table of operators, as (name, value)."""
    c = compiled()
    yield "fusee", f"{fusee.__version__} in {Path(fusee.__file__).parent}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "torch", f"{torch.__version__}, {cuda}; Python {platform.python_version()}"
    yield "engines built", ", ".join(built_engines()) or "none"
    for device, loaded in LOADED.items():
        yield f"{device.upper()} is served by", f"{loaded.engine or 'nothing'}: {loaded.reason}"
    yield "GPU", _gpu()
    runs = [engine for engine in CPU_ENGINES if processor_has(engine)]
    yield "processor", f"{processor()}; can run {', '.join(runs)}"
    if c is None:
        yield "fusee._C", "missing, or built for another Python; operators do not need it"
        return
    yield "instruction sets", ", ".join(c.processor_features()) or "the baseline's"
    yield "compiler", c.compiler
    if c.cuda_architectures:
        architectures = ", ".join(f"sm_{a}" for a in c.cuda_architectures)
        yield "CUDA compiler", f"nvcc {c.cuda_compiler} for {architectures}"
    if c.version != fusee.__version__:
        yield "fusee._C", f"is of version {c.version}: build and install again"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees none"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(names)


def operators() -> list[str]:
    """The names of all operators, without the namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fusee::") for name in names if name.startswith("fusee::"))


def methods() -> dict[str, str]:
    """The modules ``<room>.<method>``, and the first line of what each says of itself."""
    found: dict[str, str] = {}
    for room in pkgutil.iter_modules(fusee.__path__):
        if not room.ispkg or room.name in ("nn", "optim"):
            continue
        package = importlib.import_module(f"fusee.{room.name}")
        for method in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"fusee.{room.name}.{method.name}")
            found[f"{room.name}.{method.name}"] = (module.__doc__ or "").partition("\n")[0]
    return found


def method_of(operator: str, names: list[str]) -> str:
    """The module that an operator belongs to: its name begins with the method's."""
    fitting = [name for name in names if operator.startswith(name.partition(".")[2])]
    return max(fitting, key=len, default="")


def served(operator: str) -> str:
    """What computes an operator, on each device."""
    parts = []
    for device, loaded in LOADED.items():
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fusee::{operator}", device.upper())
        kernel = loaded.engine or "nothing" if has else "reference"
        parts.append(f"{device.upper()}: {kernel}")
    return ", ".join(parts)


def table() -> Iterator[str]:
    """Every operator beneath its method: schema, and what serves it."""
    documented = methods()
    by_method: dict[str, list[str]] = {}
    for operator in operators():
        by_method.setdefault(method_of(operator, list(documented)), []).append(operator)
    for method, of_method in sorted(by_method.items()):
        yield ""
        yield f"{method or 'other'}: {documented.get(method, '')}".replace("``", "")
        for operator in of_method:
            schema = getattr(torch.ops.fusee, operator).default._schema
            yield from _indented(str(schema).removeprefix("fusee::"))
            yield f"      [{served(operator)}]"


def _indented(schema: str) -> list[str]:
    return textwrap.wrap(schema, 100, initial_indent="  ", subsequent_indent="      ")


def main() -> None:
    """Prints the diagnosis and the table."""
    rows = list(facts())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    print("\nOperators, torch.ops.fusee.*; other devices are served by the reference.")
    for line in table():
        print(line)


if __name__ == "__main__":
    main()
