"""Plugs the harness into pytest and pytest-benchmark; `pytest bench --help` shows its options."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ceilings, environment, report, runner
from bench.harness import Case

SESSION = pytest.StashKey["BenchSession"]()


class ReplayClock:
    """A timer that makes pytest-benchmark record durations that were measured elsewhere.

    pytest-benchmark times all rounds of one test before the next test starts, so it cannot
    interleave contenders. We time a case's contenders together, in `runner.interleave`, and give
    each contender's test its own rounds through pytest-benchmark's public interface: the marker's
    `timer` is this clock, and `benchmark.pedantic` reads it before and after each round of an empty
    target. Its statistics, JSON, storage and comparison then work on the interleaved times, and
    nothing private of it is touched.
    """

    def __init__(self) -> None:
        self._now: Iterator[float] = iter(())

    def load(self, durations: list[float]) -> None:
        """Queue durations; the next two readings differ by the first, and so on."""
        readings = itertools.chain.from_iterable((0.0, seconds) for seconds in durations)
        self._now = iter(list(readings))

    def __call__(self) -> float:
        """Return the next reading."""
        return next(self._now)


REPLAY = ReplayClock()


class BenchSession:
    """Measures each case once, hands its parts to the tests, and keeps all for the report."""

    def __init__(self, settings: runner.Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.results: dict[str, dict[str, Any]] = {}
        self.document: dict[str, Any] = {}
        self._clock: Any = None

    def start(self) -> None:
        """Measure the machine before the first case."""
        settings = self.settings
        torch.set_num_threads(settings.threads)
        self._clock = (
            runner.CudaClock() if settings.device == "cuda" else runner.CpuClock(settings.clock)
        )
        self.document = {
            "schema": 1,
            "machine": environment.describe(settings),
            "ceilings": ceilings.machine(settings.device, settings.threads, settings.quick),
        }

    def report_contender(self, benchmark: Any, case: Case, mode: str, contender: str) -> None:
        """Give pytest-benchmark one contender's rounds; measure its whole case if that is new."""
        if not self.document:
            self.start()
        key = f"{case.id}-{mode}"
        if key not in self.results:
            self.results[key] = runner.measure(case, mode, self.settings, self._clock)
        entry = self.results[key]["contenders"][contender]
        if entry["status"] == "absent":
            benchmark.skipped = True  # the report names it; pytest shows a skip with the reason
            pytest.skip(f"{contender}: {entry['why']}")
        if entry["status"] == "failed":
            benchmark.skipped = True
            pytest.fail(f"{contender}: {entry['why']}")
        benchmark.group = key
        work = case.work[mode]
        benchmark.extra_info.update(
            contender=contender, bytes=work.bytes, flops=work.flops, iterations=entry["iterations"]
        )
        durations = list(entry["times"].values())
        REPLAY.load(durations)
        benchmark.pedantic(lambda: None, rounds=len(durations))

    def finish(self) -> dict[str, Path]:
        """Measure the copy ceiling again, write JSON and HTML, and return where they are."""
        settings = self.settings
        again = ceilings.copy_rate(settings.device, settings.quick)
        first = self.document["ceilings"]["copy, output allocated"]["median"]
        self.document["drift"] = again["median"] / first - 1
        self.document["machine"]["load at end"] = environment.load()
        self.document["results"] = list(self.results.values())
        return report.write(self.document, self.folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusee bench")
    group.addoption(
        "--quick", action="store_true", help="tiny sizes, 2 rounds: proves that it works"
    )
    group.addoption("--threads", type=int, default=1, help="CPU threads (default 1)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    clock_help = "time on the wall, or of this process (steadier for one thread on a busy machine)"
    group.addoption("--clock", default="wall", choices=("wall", "cpu"), help=clock_help)
    group.addoption("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    group.addoption("--budget", type=float, default=10.0, help="seconds per contender (default 10)")
    group.addoption(
        "--results", default="build/bench", help="folder for results.json and report.html"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads `benchmark_quiet`
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    config.addinivalue_line("python_files", "bench_*.py")
    option.benchmark_quiet = not option.benchmark_verbose  # our table replaces its table
    settings = runner.Settings(
        device=option.device,
        threads=option.threads,
        rounds=2 if option.quick else option.rounds,
        budget=1.0 if option.quick else option.budget,
        quick=option.quick,
        clock=option.clock,
    )
    if settings.rounds < 1 or settings.threads < 1 or not math.isfinite(settings.budget):
        raise pytest.UsageError("--rounds and --threads must be at least 1 and --budget finite")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    config.stash[SESSION] = BenchSession(settings, Path(option.results))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not hasattr(metafunc.function, "full_cases"):
        return
    kind = "quick_cases" if metafunc.config.option.quick else "full_cases"
    jobs = [
        pytest.param(case, mode, name, id=f"{case.id}-{mode}-{name}".replace(" ", "_"))
        for case in getattr(metafunc.function, kind)
        for mode in case.work
        for name in case.contenders
    ]
    metafunc.parametrize(("case", "mode", "contender"), jobs)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(getattr(item, "function", None), "full_cases"):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture
def bench_session(request: pytest.FixtureRequest) -> BenchSession:
    """The measurements of this pytest session."""
    return request.config.stash[SESSION]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.results:
        return
    start = time.perf_counter()
    files = session.finish()
    terminalreporter.section("fusee bench")
    terminalreporter.write_line(report.text(session.document))
    for name, path in files.items():
        terminalreporter.write_line(f"{name}: {path}")
    terminalreporter.write_line(f"(report written in {time.perf_counter() - start:.1f} s)")
