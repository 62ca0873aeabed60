"""Times the contenders and ceilings of one case, interleaved: A B C A B C ..., never A A A B B B.

A shared or throttling machine drifts by tens of per cent within a minute. Interleaved, every
contender meets every state of the machine, and a ratio taken within a round cancels the drift.

Before each timed round a contender runs once untimed (unless a call takes a second or more). What
the previous contender left behind decides otherwise how much of the heap must be faulted in again:
the same function, entered twice, differed by a factor of two at 1024 x 1000 without that call.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import ceilings, memory
from bench.harness import CEILINGS, Absent, Case, Peer, build_run

SEED = 2026
REWARM = 1.0  # seconds; a faster call runs once untimed before each round
MIN_ROUND = 10e-3  # seconds; a faster call is repeated within a round, to drown the clock's noise
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any card so far


@dataclass(frozen=True)
class Settings:
    """How a session measures; `budget` is seconds per contender, which bounds its rounds."""

    device: str = "cpu"
    threads: int = 1
    rounds: int = 15
    budget: float = 10.0
    quick: bool = False
    clock: str = "wall"


class CpuClock:
    """Seconds of one call, averaged over `iterations`.

    Args:
        kind: "wall" for elapsed time, or "cpu" for the processor time of this process, which leaves
            out the time that other jobs took. For one thread on a busy machine "cpu" is steadier;
            for several threads it adds them up.
    """

    def __init__(self, kind: str = "wall") -> None:
        self._now = time.process_time if kind == "cpu" else time.perf_counter

    def repeats(self, seconds: float) -> int:
        """Return how many calls make a round long enough to time."""
        return min(1000, max(1, math.ceil(MIN_ROUND / max(seconds, 1e-9))))

    def __call__(self, run: Callable[[], Any], iterations: int) -> float:
        """Time one round. Its first output is freed after the clock stops, further ones before."""
        start = self._now()
        output = run()
        for _ in range(iterations - 1):
            run()
        seconds = (self._now() - start) / iterations
        del output
        return seconds


class CudaClock:
    """Seconds on the card between two events, with the L2 cache flushed before every call.

    The flush also keeps the queue busy while the host enqueues the call, so that a short kernel's
    launch hides behind it as it does in a training step. One call a round: a second one would find
    a warm cache.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def repeats(self, seconds: float) -> int:
        """Return 1: see the class."""
        return 1

    def __call__(self, run: Callable[[], Any], iterations: int) -> float:
        """Time one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        output = run()
        end.record()
        torch.cuda.synchronize()
        del output
        return start.elapsed_time(end) / 1e3


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage once, then keep the collector off."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rounds_of(count: int, rounds: int) -> set[int]:
    """Return `count` rounds out of `rounds`, evenly spread."""
    count = min(count, rounds)
    return {r for r in range(rounds) if (r + 1) * count // rounds > r * count // rounds}


@dataclass
class Runner:
    """One contender or ceiling, ready to be timed."""

    run: Callable[[], Any]
    scale: float = 1.0
    iterations: int = 1
    count: int = 1
    rewarm: bool = False
    times: dict[str, float] = field(default_factory=dict)


def interleave(runners: Mapping[str, Runner], rounds: int, clock: Any) -> None:
    """Fill each runner's `times`, keyed by round, going through all runners within a round."""
    chosen = {name: rounds_of(runner.count, rounds) for name, runner in runners.items()}
    with no_collection():
        for number in range(rounds):
            for name, runner in runners.items():
                if number in chosen[name]:
                    if runner.rewarm:
                        runner.run()
                    seconds = clock(runner.run, runner.iterations)
                    runner.times[str(number)] = seconds * runner.scale


def measure(case: Case, mode: str, settings: Settings, clock: Any) -> dict[str, Any]:
    """Time one mode of a case; return its result as plain data for JSON (see `bench.summary`)."""
    work = case.work[mode]
    torch.manual_seed(SEED)
    inputs = case.setup(settings.device)
    runners: dict[str, Runner] = {}
    contenders: dict[str, dict[str, Any]] = {}
    for name, peer in case.contenders.items():
        contenders[name] = _prepare(name, peer, case, mode, inputs, settings, runners, clock)
    limits: dict[str, dict[str, Any]] = {}
    for name in CEILINGS[case.ceiling]:
        limits[name] = _prepare_ceiling(name, case, mode, settings, runners, clock)
    interleave(runners, settings.rounds, clock)
    for name, runner in runners.items():
        entry = contenders.get(name) or limits[name]
        entry.update(times=runner.times, iterations=runner.iterations)
    return {
        "id": f"{case.id}-{mode}",
        "name": case.name,
        "label": case.label,
        "mode": mode,
        "note": case.note,
        "bytes": work.bytes,
        "written": work.written,
        "flops": work.flops,
        "subject": case.subject,
        "bars": {} if settings.quick else dict(work.bars),
        "memory_limit": None if settings.quick else work.memory_limit,
        "contenders": contenders,
        "ceilings": limits,
    }


def _prepare(
    name: str,
    peer: Peer,
    case: Case,
    mode: str,
    inputs: dict[str, Any],
    settings: Settings,
    runners: dict[str, Runner],
    clock: Any,
) -> dict[str, Any]:
    """Build and warm up a contender and probe its memory; return its entry and add its runner."""
    if settings.quick and peer.slow_start:
        return {"status": "absent", "why": "left out by --quick"}
    try:
        run = build_run(peer.build(), inputs, peer.grad or case.grad, mode)
        run()  # compiles, loads, starts thread pools
        start = time.perf_counter()
        extra = memory.peak_extra_bytes(run, settings.device)
        runners[name] = _calibrate(run, time.perf_counter() - start, settings, clock)
    except Absent as why:
        return {"status": "absent", "why": str(why)}
    except Exception as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    return {"status": "measured", "peak_extra_bytes": extra}


def _prepare_ceiling(
    name: str, case: Case, mode: str, settings: Settings, runners: dict[str, Runner], clock: Any
) -> dict[str, Any]:
    try:
        job = ceilings.for_work(name, case.work[mode], settings.device, settings.threads)
    except Absent as why:
        return {"status": "absent", "why": str(why)}
    job.run()
    start = time.perf_counter()
    job.run()
    runners[name] = _calibrate(job.run, time.perf_counter() - start, settings, clock, job.scale)
    return {"status": "measured"}


def _calibrate(
    run: Callable[[], Any], seconds: float, settings: Settings, clock: Any, scale: float = 1.0
) -> Runner:
    """Choose repeats within a round and the number of rounds for a call that takes about `seconds`.

    At least 3 rounds, unless a single call costs three times the budget: then 1, and its spread is
    unknown.
    """
    if seconds < REWARM:  # the estimate includes the memory probe; time all but slow calls again
        seconds = clock(run, 1)
    iterations = 1 if settings.quick else clock.repeats(seconds)
    affordable = int(settings.budget / max(seconds * (iterations + 1), 1e-9))
    least = 3 if seconds < 3 * settings.budget else 1
    count = min(settings.rounds, max(least, affordable))
    return Runner(run, scale, iterations, count, rewarm=seconds < REWARM)
