"""Everything for a machine with a GPU: ``python tests/device.py --out FOLDER [step ...]``, which is
what ``make device`` calls.

It reaches no network and changes no environment. Steps, in order; all of them if none is named:

    build       compiles fusee for the card into build/device-site; without nvcc, or if that fails,
                unpacks the newest wheel of build/wheel (``make wheel`` elsewhere, and carry it)
    suite       tests/run.py: CUDA, and every CPU engine that the processor has
    sanitizer   compute-sanitizer's four tools over the values of every record in float32
    bench       the microbenchmarks on the card

A step that fails is reported and the rest still runs. Each writes FOLDER/<step>.log; summary.txt says
what the machine is and what came of each step. The exit status is not zero if anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "device-site"
WHEELS = ROOT / "build" / "wheel"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Steps:
    """The steps; each returns what is to be said of it, and raises ``RuntimeError`` if it failed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.environment = {**os.environ, "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}
        self.environment |= {"FUSEE_REQUIRE_CUDA": "1"}
        if shutil.which("nvcc"):
            self.environment["FUSEE_REQUIRE_NVCC"] = "1"

    def run(self, step: str, command: Sequence[str], **environment: str) -> None:
        """Runs a command, showing its output and adding it to the step's log."""
        with (self.out / f"{step}.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
        if process.returncode:
            raise RuntimeError(f"status {process.returncode} of {' '.join(command[:6])}")

    def build(self) -> str:
        """Compiles, or takes the wheel that was carried here."""
        if shutil.which("nvcc") is None:
            return f"no nvcc; {self._unpack()}"
        shutil.rmtree(SITE, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps"]
        architecture = "{}{}".format(*torch.cuda.get_device_capability())
        try:
            self.run(
                "build",
                [*pip, "--no-build-isolation", "--target", str(SITE), "."],
                FUSEE_BUILD_CUDA="ON",
                FUSEE_CUDA_ARCHITECTURES=architecture,
            )
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {self._unpack()}") from error
        return f"compiled for sm_{architecture}"

    def _unpack(self) -> str:
        wheels = sorted(WHEELS.glob("fusee-*.whl"), key=lambda path: path.stat().st_mtime)
        if not wheels:
            raise RuntimeError("there is no wheel in build/wheel")
        shutil.rmtree(SITE, ignore_errors=True)
        # Not pip: the engines load under any Python, and _C, which does not, is not needed.
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(SITE)
        return f"took {wheels[-1].name}"

    def suite(self) -> str:
        """The whole suite, with CUDA; avx512 is among its engines where the processor has it."""
        jobs = max(2, min(8, (os.cpu_count() or 2) // 2))
        self.run("suite", [sys.executable, "tests/run.py", "--no-bench", "--jobs", str(jobs)])
        return "passed"

    def sanitizer(self) -> str:
        """Each tool runs, even if another found something."""
        if shutil.which("compute-sanitizer") is None:
            return "not run: compute-sanitizer is not on PATH"
        test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--devices", "cuda"]
        test += [
            "tests/harness/test_values.py",
            "-k",
            "(test_values or test_gradients) and float32",
        ]
        failed = []
        for tool in TOOLS:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
            command += ["--target-processes", "all"]
            if tool != "initcheck":  # which has to see other kernels write what ours read
                command += ["--kernel-regex", "kns=fusee"]
            try:
                # Without torch's cache every tensor is an allocation of its own, with bounds.
                self.run("sanitizer", [*command, *test], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            except RuntimeError as error:
                failed.append(f"{tool}: {error}")
        if failed:
            raise RuntimeError("; ".join(failed))
        return f"{', '.join(TOOLS)} found nothing"

    def bench(self) -> str:
        """The report names the card and the date."""
        results = self.out / "bench"
        bench = [sys.executable, "-m", "pytest", "bench", "--device", "cuda"]
        self.run("bench", [*bench, "--results", str(results)])
        return f"see {results.name}/report.html"


def machine() -> str:
    """What the results were got on."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {', '.join(cards) or 'no GPU'}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def attempt(step: Callable[[], str]) -> tuple[bool, str]:
    """Whether a step passed, and what is to be said of it."""
    try:
        return True, step()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("build", "suite", "sanitizer", "bench")
    parser.add_argument("--out", type=Path, default=Path("build/device"))
    parser.add_argument("steps", nargs="*", metavar="step", help=", ".join(names))
    options = parser.parse_args()
    if unknown := set(options.steps) - set(names):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(out)
    lines, passed = [machine()], True
    for name in options.steps or names:
        (out / f"{name}.log").unlink(missing_ok=True)
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        good, text = attempt(getattr(steps, name))
        passed &= good
        seconds = time.monotonic() - start
        state = "FAILED" if not good else "absent" if text.startswith("not run") else "ok"
        lines.append(f"{name:10} {state:7}{seconds:6.0f} s  {text}")
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    attempt(lambda: steps.run("fusee", [sys.executable, "-m", "fusee"]) or "")
    print("\n" + "\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
