"""Importing fusee: which engine is chosen, what is said when there is none, and what the libraries
show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fusee
import pytest
from fusee._library import CPU_ENGINES, LIBRARY_DIR, built_engines, library_path, processor_has

pytestmark = pytest.mark.processes

PACKAGE = Path(fusee.__file__).parent
CALL = "import torch; x = fusee.stablemax(torch.zeros(1, 4)); assert x[0, 0] == 0.25, x"


def run(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``package`` as its fusee."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("FUSEE_")}
    variables.update(environment, PYTHONPATH=str(package.parent))
    return subprocess.run(
        [sys.executable, "-c", f"import fusee; {code}"],
        env=variables,
        capture_output=True,
        text=True,
        cwd=package.parent,
        timeout=300,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to take things away from."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fusee", ignore=ignore)
    return tmp_path / "fusee"


# --- the choice of an engine ----------------------------------------------------------------------


def test_the_best_engine_is_chosen() -> None:
    best = next(e for e in CPU_ENGINES if e in built_engines() and processor_has(e))
    done = run(f"assert fusee.engine() == {best!r}, fusee.engine(); {CALL}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", [e for e in built_engines() if e != "cuda"])
def test_an_engine_by_name(engine: str) -> None:
    """FUSEE_ENGINE chooses, where the processor has the instructions; else the call says so."""
    done = run(f"assert fusee.engine() == {engine!r}; {CALL}", FUSEE_ENGINE=engine)
    if engine == "emulated" or processor_has(engine):
        assert done.returncode == 0, done.stderr
    else:
        assert "needs instructions this processor lacks" in run(CALL, FUSEE_ENGINE=engine).stderr


def test_an_unknown_engine() -> None:
    """The import works; the call says what is wrong."""
    done = run("print(fusee.engine())", FUSEE_ENGINE="sse9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"
    done = run(CALL, FUSEE_ENGINE="sse9")
    assert re.search(
        r"RuntimeError: fusee has no CPU engine .*FUSEE_ENGINE='sse9' is not", done.stderr
    )


def test_an_engine_that_was_not_built(copy: Path) -> None:
    (copy / "lib" / library_path("fusee_baseline").name).unlink()
    done = run("print(fusee.engine())", copy, FUSEE_ENGINE="baseline")
    assert done.returncode == 0, done.stderr
    done = run(CALL, copy, FUSEE_ENGINE="baseline")
    assert re.search(
        r"RuntimeError: fusee has no CPU engine .*'baseline' was not built", done.stderr
    )


def test_an_engine_that_the_processor_lacks(copy: Path) -> None:
    """The chosen one is the next best; naming the other gives a clear error."""
    code = "fusee._library.processor_has = None"
    assert run(code, copy).returncode == 0
    library = copy / "_library.py"
    text = library.read_text()
    lacking = text.replace("return bool(schemas", 'return engine == "baseline" and bool(schemas')
    assert lacking != text
    library.write_text(lacking)
    done = run(f"assert fusee.engine() == 'baseline'; {CALL}", copy)
    assert done.returncode == 0, done.stderr
    assert "processor lacks" in run(CALL, copy, FUSEE_ENGINE="avx2").stderr


def test_no_engine_at_all(copy: Path) -> None:
    """Import, tracing and every other device still work."""
    for path in (copy / "lib").glob("libfusee_*"):
        path.unlink()
    fake = "import torch; assert fusee.stablemax(torch.zeros(1, 4, device='meta')).shape == (1, 4)"
    done = run(fake, copy)
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: fusee has no CPU engine" in run(CALL, copy).stderr


def test_a_broken_engine(copy: Path) -> None:
    """An engine that cannot be loaded breaks calls, not the import."""
    for path in (copy / "lib").glob("libfusee_*"):
        path.write_bytes(b"not a library")
    assert run("", copy).returncode == 0
    assert "loading the" in run(CALL, copy).stderr


def test_no_schemas(copy: Path) -> None:
    """Without the library of schemas the import says what to do."""
    (copy / "lib" / library_path("fusee").name).unlink()
    assert re.search("ImportError: .*is missing.*make build", run("", copy).stderr, re.DOTALL)


def test_without_diagnostics(copy: Path) -> None:
    """The operators do not need ``fusee._C``."""
    removed = list(copy.glob("_C*.so"))
    assert removed
    for path in removed:
        path.unlink()
    done = run(CALL, copy)
    assert done.returncode == 0, done.stderr


def test_the_import_is_quiet() -> None:
    done = run(CALL)
    assert (done.stdout, done.stderr) == ("", "")


def test_python_m_fusee() -> None:
    """The diagnosis names every engine that was built, and the one that serves."""
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    variables.pop("FUSEE_ENGINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "fusee"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for engine in built_engines():
        assert engine in done.stdout
    assert "stablemax_cross_entropy" in done.stdout


# --- symbols --------------------------------------------------------------------------------------

LIBRARIES = sorted(LIBRARY_DIR.glob("lib*.so"))
ALLOWED_EXPORTS = {
    "libfusee.so": {"fusee_processor_has"},
    "libfusee_emulated.so": {
        "fusee_emulator_reset",
        "fusee_emulator_counters",
        "fusee_emulator_set_seed",
        "fusee_emulator_set_initcheck",
    },
}
# What linkers define, and data (no code) that C++ wants to be one object in a process.
HARMLESS = re.compile(r"_edata|_end|__bss_start|_init|_fini|_ZT[ISV]S\w+|_ZZNSt\w+|_ZT[IS]N?St\w+")
STABLE = re.compile(r"(aoti_)?torch_\w+")


def symbols(path: Path, which: str) -> list[tuple[str, str]]:
    """(kind, name) of the dynamic symbols."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    text = subprocess.run(
        ["nm", "-D", f"--{which}-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in text.splitlines()]
    return [(row[-2], row[-1].split("@")[0]) for row in rows]


def leaks(exported: list[tuple[str, str]], allowed: set[str], *, tests: bool = False) -> list[str]:
    """The exported symbols that nobody should see. Code of the standard library is among them, for
    a template that one engine compiled could run in another; the emulator alone, which is for tests
    and for any processor, may show that."""
    return [
        name
        for kind, name in exported
        if name not in allowed
        and not HARMLESS.fullmatch(name)
        and not (tests and kind == "W" and re.match("_ZNK?St", name))
    ]


@pytest.mark.parametrize("path", LIBRARIES, ids=[path.stem for path in LIBRARIES])
def test_nothing_is_exported(path: Path) -> None:
    """No symbol of one engine can be found by another, or by anything else in the process."""
    allowed = ALLOWED_EXPORTS.get(path.name, set())
    leaked = leaks(symbols(path, "defined"), allowed, tests="emulated" in path.name)
    assert not leaked


def unstable(needed: list[tuple[str, str]]) -> list[str]:
    """The symbols of libtorch that are not of its stable ABI."""
    return [
        name
        for _, name in needed
        if re.search(r"torch|c10|2at\d|_ZN?K?2at|aten", name) and not STABLE.fullmatch(name)
    ]


@pytest.mark.parametrize("path", LIBRARIES, ids=[path.stem for path in LIBRARIES])
def test_only_the_stable_abi_is_needed(path: Path) -> None:
    """Nothing of torch but the C functions that it promises to keep."""
    assert not unstable(symbols(path, "undefined"))


def test_symbol_checks_can_fail() -> None:
    """The two checks see a leaked kernel and a C++ symbol of ATen."""
    assert leaks([("T", "_ZN5fusee4avx27forwardEv"), ("T", "fusee_processor_has")], set())
    assert leaks([("W", "_ZNSt6vectorIiE9push_backEi")], set())
    assert not leaks([("V", "_ZTVSt19bad_optional_access"), ("B", "_end")], set())
    assert unstable([("U", "_ZN2at4_ops3add4callERKNS_6TensorE")])
    assert unstable([("U", "_ZN3c106detail14torchCheckFailEPKcS2_jS2_")])
    assert not unstable([("U", "aoti_torch_get_dim"), ("U", "torch_parallel_for"), ("U", "malloc")])
