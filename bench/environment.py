"""Describes the machine and the build under test, so that a number can be placed years later."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# What changes kernels' speed; a report shows those that the processor has.
_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "asimd", "sve")
_VARIABLES = (
    "FUSEE_ENGINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD",
    "MALLOC_CONF", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES",
)  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    """Return the value of the first `name : value` line."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def load() -> str:
    """Return the load averages, which tell a noisy machine from a quiet one."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg())


def fusee_diagnosis() -> str:
    """Return what `python -m fusee` prints (engines built and chosen), or why it cannot."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fusee"],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"python -m fusee failed: {error}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"absent: {lines[-1].replace(sys.executable, 'python')}"
    return done.stdout.strip()


def describe(settings: Any) -> dict[str, Any]:
    """Return processor, software, thread count, date, load and the engine of fusee."""
    cpuinfo, meminfo = _read("/proc/cpuinfo"), _read("/proc/meminfo")
    flags = _field(cpuinfo, "flags", "Features").split()
    pages = _read("/sys/kernel/mm/transparent_hugepage/enabled").strip()
    card = torch.cuda.get_device_name() if settings.device == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": card or "cpu",
        "processor": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "family/model": f"{_field(cpuinfo, 'cpu family')}/{_field(cpuinfo, 'model')}",
        "instruction sets": " ".join(flag for flag in _FLAGS if flag in flags),
        "logical cores": os.cpu_count(),
        "memory": _field(meminfo, "MemTotal"),
        "huge pages": pages,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "clock": settings.clock if settings.device == "cpu" else "events of the card",
        "quick": settings.quick,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "load at start": load(),
        "fusee": fusee_diagnosis(),
    }
