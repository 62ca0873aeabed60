"""Runs everything: ``python tests/run.py``, which is what ``make test`` calls.

The suite runs once per CPU engine that was built and that the processor has, each in its own
process: whole on the best, numbers alone on the others and on the emulated CUDA kernels. Then the
engines' results are compared, and the remaining parts run. At the end stands a table of what
passed, failed, was skipped, and was compiled but not run. The exit status is not zero if anything
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "test"
NUMBERS = ["tests/harness", "tests/losses", "tests/reparam", "tests/prox", "tests/transport"]
NUMBERS += ["tests/structured", "tests/bounds"]
COUNTED = ("passed", "failed", "error", "skipped")


@dataclass
class Part:
    """One process of pytest, and what came of it."""

    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failed: bool = False
    seconds: float = 0.0

    def run(self) -> Part:
        """Runs it; prints its output if it fails."""
        path = OUT / f"{self.name.replace(' ', '-')}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--durations=15"]
        command += self.arguments
        if self.counts_itself:
            command += ["--counts", str(path)]
        # What a compiler has cached may be of operators as they were.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(OUT / "inductor")}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **cache, **self.environment}
        print(f"[{self.name}] {' '.join(command[2:])}", flush=True)
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        self.seconds = time.monotonic() - start
        (OUT / f"{self.name.replace(' ', '-')}.log").write_text(done.stdout + done.stderr)
        self.counts = json.loads(path.read_text()) if path.exists() else {}
        self.failed = done.returncode != 0
        self.report(done)
        return self

    @property
    def counts_itself(self) -> bool:
        """Whether the process knows ``--counts``: bench has a conftest of its own."""
        return not self.arguments[0].startswith("bench")

    def report(self, done: subprocess.CompletedProcess[str]) -> None:
        lines = done.stdout.splitlines()
        shown = lines if self.failed or "-s" in self.arguments else lines[-1:]
        text = "\n".join(f"[{self.name}] {line}" for line in shown)
        if self.failed:
            text += f"\n[{self.name}] FAILED with status {done.returncode}\n{done.stderr[-4000:]}"
        print(text, flush=True)


def cpu_engines() -> list[str]:
    """The CPU engines that were built and that this processor has, best first."""
    from fusee._library import CPU_ENGINES, built_engines, processor_has

    return [name for name in CPU_ENGINES if name in built_engines() and processor_has(name)]


def built() -> list[str]:
    from fusee._library import built_engines

    return built_engines()


def paths() -> list[str]:
    return [path for path in NUMBERS if (ROOT / path).exists()]


def engine_part(engine: str, marks: str, devices: str, *more: str) -> Part:
    """The suite on one engine, saving its results."""
    arguments = [*paths(), "--devices", devices, "--save-outputs", str(OUT / f"{engine}.pt"), *more]
    if marks:
        arguments += ["-m", marks]
    wanted = {"FUSEE_ENGINE": engine, "FUSEE_REQUIRE_ENGINE": engine}
    return Part(engine, arguments, wanted)


def again_part(engine: str) -> Part:
    """The saved results once more, from another process."""
    part = engine_part(engine, "", "cpu", "-k", "outputs_for_comparison")
    where = part.arguments.index("--save-outputs") + 1
    part.arguments[where] = str(OUT / f"{engine}.again.pt")
    part.name = f"{engine} again"
    return part


def first_parts() -> list[Part]:
    """The engines, slowest first; two run at a time."""
    best, *others = cpu_engines()
    parts = [engine_part(best, "not emulated_only", "cpu,cuda")]
    if "emulated" in built():
        parts.append(
            engine_part(
                "emulated", "not (tracing or rules or threads or large or processes)", "cpu"
            )
        )
        parts[-1].arguments.insert(0, "tests/test_counters.py")
        parts.append(again_part("emulated"))
    numerics = "not (tracing or rules or large or processes or emulated_only)"
    parts += [engine_part(engine, numerics, "cpu") for engine in others]
    return parts + [again_part(engine) for engine in (best, *others)]


def last_parts(bench: bool) -> list[Part]:
    """What needs the engines' results, and what is not about an engine."""
    parts = [
        Part("engines agree", ["tests/test_engines.py", "--outputs", str(OUT)]),
        Part(
            "import and build",
            ["tests/test_import.py", "tests/test_cuda_build.py", "tests/test_run.py"],
        ),
    ]
    if list((ROOT / "tests" / "emulator").glob("test_*.py")):
        parts.append(Part("emulator", ["tests/emulator"]))
    if bench:
        parts.append(Part("bench", ["bench", "--quick"]))
    return parts


def table(parts: list[Part], compiled: list[str]) -> str:
    """The summary; a part whose process died without counts is shown as failed."""
    lines = [f"{'':18}" + "".join(f"{name:>9}" for name in COUNTED) + f"{'seconds':>9}"]
    for part in parts:
        known = part.counts or part.counts_itself
        cells = [f"{part.counts.get(name, 0) if known else '-':>9}" for name in COUNTED]
        state = "FAILED" if part.failed else "ok"
        lines.append(f"{part.name:18}" + "".join(cells) + f"{part.seconds:9.0f}  {state}")
    lines += [f"{name:18}  compiled, not run" for name in compiled]
    return "\n".join(lines)


def compiled_only() -> list[str]:
    """Engines that are built, and that this machine cannot run."""
    import torch

    runs = [*cpu_engines(), "emulated"]
    if torch.cuda.is_available():
        runs.append("cuda")
    return [name for name in built() if name not in runs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmarks out")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.pt"):
        old.unlink()
    shutil.rmtree(OUT / "inductor", ignore_errors=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        parts = list(pool.map(Part.run, first_parts()))
        parts += pool.map(Part.run, last_parts(not options.no_bench))
    print("\n" + table(parts, compiled_only()))
    return int(any(part.failed for part in parts))


if __name__ == "__main__":
    sys.exit(main())
