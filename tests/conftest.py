"""Options, devices, and what a run says at its end: the capability table and the counts."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import fusee
import pytest
import torch

from tests.harness.spec import OpSpec
from tests.harness.table import RECORDS

MARKS = {
    "tracing": "says nothing about an engine's numbers; runs on one engine",
    "rules": "derivatives and batches by rules in Python, above the kernels; runs on one CPU engine",
    "threads": "about threads and sizes; not for the emulated engine",
    "large": "needs many GiB of memory",
    "emulated_only": "reads the counters of the emulated engine",
    "cuda_only": "has no meaning on the CPU",
    "processes": "starts Python anew; runs once",
}
SAVED = pytest.StashKey[dict[str, Any]]()
COUNTS = pytest.StashKey[dict[str, int]]()
CAPABILITIES = pytest.StashKey[dict[tuple[str, str], set[tuple[str, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusee")
    group.addoption("--devices", default="cpu,cuda", help="devices of the harness, by commas")
    group.addoption("--save-outputs", type=Path, help="where to save every sample's results")
    group.addoption("--outputs", type=Path, help="a folder of such files, to compare")
    group.addoption("--counts", type=Path, help="where to write the number of passed tests, ...")


def pytest_configure(config: pytest.Config) -> None:
    for mark, text in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {text}")
    config.stash[SAVED] = {}
    config.stash[COUNTS] = defaultdict(int)
    config.stash[CAPABILITIES] = defaultdict(set)
    required = os.environ.get("FUSEE_REQUIRE_ENGINE")
    if required and fusee.engine("cpu") != required:
        raise pytest.UsageError(
            f"FUSEE_REQUIRE_ENGINE={required}, but the CPU is served by {fusee.engine('cpu')}"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``spec`` runs for every record to which its check applies."""
    if "device" in metafunc.fixturenames:
        devices = metafunc.config.getoption("devices").split(",")
        if metafunc.definition.get_closest_marker("cuda_only"):
            devices = [name for name in devices if name == "cuda"]
        metafunc.parametrize("device", devices, indirect=True)
    if "spec" not in metafunc.fixturenames:
        return
    check = metafunc.function.__name__.removeprefix("test_")
    specs = [spec for spec in RECORDS if check not in spec.not_applicable]
    if "dtype" in metafunc.fixturenames:
        pairs = [
            pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}")
            for spec in specs
            for dtype in spec.dtypes
        ]
        metafunc.parametrize(("spec", "dtype"), pairs)
    else:
        metafunc.parametrize("spec", specs, ids=[spec.name for spec in specs])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test. A missing GPU skips, or fails where ``FUSEE_REQUIRE_CUDA=1``."""
    name: str = request.param
    if name == "cuda" and not (torch.cuda.is_available() and fusee.engine("cuda")):
        reason = "no CUDA: torch sees no GPU, or fusee has no CUDA engine"
        if os.environ.get("FUSEE_REQUIRE_CUDA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def _clean() -> Any:
    """Compiled functions, settings and random numbers of one test do not reach the next."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def _outcome(report: Any) -> str | None:
    if report.failed:
        return "failed" if report.when == "call" else "error"
    if report.skipped:
        return "skipped"
    return "passed" if report.when == "call" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    outcome = _outcome(report)
    if outcome is not None:
        item.config.stash[COUNTS][outcome] += 1
        spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")
        if isinstance(spec, OpSpec):
            check = item.function.__name__.removeprefix("test_")  # type: ignore[attr-defined]
            device = item.callspec.params.get("device", "cpu")
            item.config.stash[CAPABILITIES][check, spec.name].add((device, outcome))
    return report


def _cell(outcomes: set[tuple[str, str]]) -> str:
    """What a run shows of one check of one operator: where it passed, or that it failed. A device
    whose tests were skipped is not among them."""
    if any(outcome in ("failed", "error") for _, outcome in outcomes):
        return "FAIL"
    ran = sorted({device for device, outcome in outcomes if outcome == "passed"})
    return "+".join(ran) if ran else "not run"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The capability table: where each check of each operator passed in this run."""
    seen = config.stash[CAPABILITIES]
    checks = list(dict.fromkeys(check for check, _ in seen))
    if len(checks) < 2:
        return
    width = max(map(len, checks)) + 2
    terminalreporter.section(f"capabilities, CPU engine {fusee.engine('cpu')}")
    terminalreporter.write_line(" " * width + "  ".join(spec.name for spec in RECORDS))
    for check in checks:
        row = check.ljust(width)
        for spec in RECORDS:
            absent = check in spec.not_applicable
            cell = "n/a" if absent else _cell(seen.get((check, spec.name), set()))
            row += cell.ljust(len(spec.name) + 2)
        terminalreporter.write_line(row.rstrip())
    for spec in RECORDS:
        reasons: dict[str, list[str]] = defaultdict(list)
        for check, reason in spec.not_applicable.items():
            reasons[reason].append(check)
        for reason, absent_checks in reasons.items():
            terminalreporter.write_line(f"n/a: {spec.name}: {reason}: {', '.join(absent_checks)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("save_outputs")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"engine": fusee.engine("cpu"), "results": session.config.stash[SAVED]}, path)
    path = session.config.getoption("counts")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(session.config.stash[COUNTS]))
