"""What the machine can do, measured in the same run and with the same thread count as the cases.

Two uses. `machine()` gives the figures that head a report. `for_work()` gives, for one case, jobs
that move the same bytes or do the same FLOPs; they are timed interleaved with its contenders, so
the drift of a shared machine hits both. A copy that allocates its output is the fair ceiling for an
op that returns a new tensor: on CPU, first touching fresh pages costs more than moving the bytes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import COPY, FMA, GEMM, READY, STREAM, Absent, Work
from bench.summary import spread

MIB = 1 << 20

# Independent accumulators hide the latency of the multiply-add (4 to 5 cycles, two pipes); the
# width and number fit the registers of each instruction set. 2 FLOPs a lane and step.
_FMA_SOURCE = """
#if defined(__AVX512F__)
enum { BYTES = 64, CHAINS = 20 };
#elif defined(__AVX__)
enum { BYTES = 32, CHAINS = 12 };
#else
enum { BYTES = 16, CHAINS = 12 };
#endif
typedef float lanes __attribute__((vector_size(BYTES)));
extern "C" double fma_flops_per_step() { return 2.0 * CHAINS * (BYTES / sizeof(float)); }
extern "C" void fma_run(long steps, float m, float c, float* out) {
  lanes a[CHAINS], mm = m - (lanes){}, cc = c - (lanes){};
  for (int k = 0; k < CHAINS; ++k) a[k] = cc * (float)k;
  for (long i = 0; i < steps; ++i)
#pragma GCC unroll 32
    for (int k = 0; k < CHAINS; ++k) a[k] = a[k] * mm + cc;
  lanes sum = a[0];
  for (int k = 1; k < CHAINS; ++k) sum += a[k];
  for (unsigned j = 0; j < BYTES / sizeof(float); ++j) out[j] = sum[j];
}
"""


@dataclass(frozen=True)
class Job:
    """A ceiling's job: the time of `run`, which may do less than the case, times `scale`."""

    run: Callable[[], Any]
    scale: float = 1.0


@functools.cache
def _fma_library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        raise Absent("no C++ compiler (c++, g++ or clang++) to build the multiply-add loop")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(_FMA_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        command = [*compiler.split(), *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise Absent(f"the multiply-add loop did not compile: {first}")
        loaded = ctypes.CDLL(str(library))
    loaded.fma_flops_per_step.restype = ctypes.c_double
    loaded.fma_run.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float, ctypes.c_void_p]
    return loaded


def fma_job(flops: float, device: str, threads: int) -> Job:
    """Return a register-only multiply-add loop of `flops` on `threads` threads (CPU only)."""
    if device != "cpu":
        raise Absent("the multiply-add loop is built for the CPU only")
    library = _fma_library()
    per_thread = max(1, round(flops / library.fma_flops_per_step() / threads))
    outputs = [(ctypes.c_float * 16)() for _ in range(threads)]

    def one(output: Any) -> None:
        library.fma_run(per_thread, 0.999999, 1e-6, output)  # ctypes releases the GIL

    def run() -> None:
        others = [threading.Thread(target=one, args=(o,)) for o in outputs[1:]]
        for thread in others:
            thread.start()
        one(outputs[0])
        for thread in others:
            thread.join()

    return Job(run, flops / (per_thread * threads * library.fma_flops_per_step()))


def _available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 8 << 30


def _floats(nbytes: float, device: str) -> tuple[torch.Tensor, float]:
    """Return about `nbytes` of float32, at most an eighth of free memory, and the shortfall."""
    size = max(1, int(min(nbytes, _available_bytes(device) // 8)) // 4)
    return torch.ones(size, device=device), max(1.0, nbytes / (4 * size))


def copy_job(work: Work, device: str) -> Job:
    """Return a clone that reads and writes `work.bytes` in total, output allocated by torch."""
    source, scale = _floats(work.bytes / 2, device)
    return Job(source.clone, scale)


def ready_job(work: Work, device: str) -> Job:
    """Return a copy of `work.bytes` in total into a buffer that exists and was touched."""
    source, scale = _floats(work.bytes / 2, device)
    target = source.clone()
    return Job(lambda: target.copy_(source), scale)


def stream_job(work: Work, device: str) -> Job:
    """Return a job with the same reads and allocated writes as `work`: the strictest copy ceiling.

    It reads what the op must read beyond what it writes (as a sum) and clones as much as it writes.
    """
    cloned, clone_scale = _floats(work.written, device)
    only_read, read_scale = _floats(max(4, work.bytes - 2 * work.written), device)
    if not work.written:
        return Job(only_read.sum, read_scale)
    if max(clone_scale, read_scale) > 1:
        raise Absent("not enough free memory to allocate the same outputs")
    return Job(lambda: (only_read.sum(), cloned.clone()))


def gemm_job(flops: float, device: str, limit: int = 2048) -> Job:
    """Return a float32 matrix product, `limit` cubed at most, standing for `flops`."""
    size = int(min(limit, max(64, (flops / 2) ** (1 / 3))))
    left, right = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    return Job(lambda: torch.mm(left, right), flops / (2 * size**3))


def for_work(name: str, work: Work, device: str, threads: int) -> Job:
    """Return the job behind ceiling `name` for one case's `work`, or raise `Absent`."""
    if name in (GEMM, FMA):
        if not work.flops:
            raise Absent("this mode states no FLOPs")
        return gemm_job(work.flops, device) if name == GEMM else _capped_fma(work, device, threads)
    if not work.bytes:
        raise Absent("this mode states no bytes")
    return {COPY: copy_job, STREAM: stream_job, READY: ready_job}[name](work, device)


def _capped_fma(work: Work, device: str, threads: int) -> Job:
    """Return a loop of at most 20 GFLOP (some tenths of a second), scaled to the case."""
    job = fma_job(min(work.flops, 20e9), device, threads)
    return Job(job.run, job.scale * work.flops / min(work.flops, 20e9))


def _best_rates(
    amount: float, run: Callable[[], Any], device: str, rounds: int
) -> dict[str, float]:
    """Return the spread of amount per second, in units of 1e9, after one warm-up."""
    run()
    rates = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(amount / (time.perf_counter() - start) / 1e9)
        del result
    return spread(rates)


def copy_rate(device: str, quick: bool) -> dict[str, float]:
    """Return GB/s (read plus written) of a large allocating clone; called at both ends of a run."""
    nbytes = 2 * (4 if quick else 512) * MIB
    return _best_rates(nbytes, copy_job(Work(bytes=nbytes), device).run, device, 3 if quick else 7)


def machine(device: str, threads: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Measure the headline ceilings: name -> spread with its unit, or the reason of its absence.

    The GEMM ceiling is the best of several sizes, since none is best on every machine.
    """
    rounds, found = (2, {}) if quick else (7, {})
    nbytes = 2 * (4 if quick else 512) * MIB
    ready = ready_job(Work(bytes=nbytes), device)
    found["copy, output allocated"] = copy_rate(device, quick) | {"unit": "GB/s"}
    found["copy, ready buffer"] = _best_rates(nbytes, ready.run, device, rounds) | {"unit": "GB/s"}
    sizes = (128,) if quick else (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192)
    products = {}
    for size in sizes:
        job = gemm_job(2 * size**3, device, limit=size)
        products[size] = _best_rates(2 * size**3, job.run, device, rounds)
    best = max(products, key=lambda size: products[size]["median"])
    found["torch.mm float32"] = products[best] | {"unit": "GFLOP/s", "detail": f"{best} cubed"}
    try:
        flops = 1e8 if quick else 1e10
        job = fma_job(flops, device, threads)
        rate = _best_rates(flops / job.scale, job.run, device, rounds)
        found["multiply-add loop float32"] = rate | {"unit": "GFLOP/s"}
    except Absent as why:
        found["multiply-add loop float32"] = {"absent": str(why)}
    return found
