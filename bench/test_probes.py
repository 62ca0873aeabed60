"""Tests of what the harness measures beside time: peak memory, and the ceilings of the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bench import ceilings, memory
from bench.harness import FMA, Absent, Work

MIB = 1 << 20

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux /proc"
)


@needs_proc
@pytest.mark.parametrize("size", [64 * MIB, 8 * MIB])  # one by mmap, one from the heap
def test_memory_probe_sees_a_temporary(size: int) -> None:
    def run() -> torch.Tensor:
        return torch.ones(size // 4).sum()

    run()
    found = memory.peak_extra_bytes(run)
    assert found == pytest.approx(size, abs=2 * MIB)


@needs_proc
def test_memory_probe_leaves_out_what_the_call_returns() -> None:
    def run() -> list[torch.Tensor]:
        kept = torch.ones(16 * MIB)  # 64 MiB, returned twice: one storage
        return [kept, kept[1:]]

    assert memory.tensor_bytes(run()) == 64 * MIB
    found = memory.peak_extra_bytes(run)
    assert found is not None
    assert found < 2 * MIB


def test_copy_ceilings_do_the_stated_work() -> None:
    work = Work(bytes=12 * MIB, written=4 * MIB)
    copied = ceilings.copy_job(work, "cpu")
    assert copied.scale == 1.0
    assert 2 * memory.tensor_bytes(copied.run()) == work.bytes
    _, cloned = ceilings.stream_job(work, "cpu").run()
    assert memory.tensor_bytes(cloned) == work.written
    assert ceilings.stream_job(Work(bytes=8 * MIB), "cpu").run().item() == 2 * MIB


def test_ceilings_scale_to_the_flops_of_the_case() -> None:
    job = ceilings.gemm_job(2 * 128**3 * 50, "cpu", limit=128)
    assert job.scale == pytest.approx(50)
    with pytest.raises(Absent, match="no FLOPs"):
        ceilings.for_work(FMA, Work(bytes=8), "cpu", 1)


def test_multiply_add_loop_runs_or_names_the_missing_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        short, long = (ceilings.fma_job(flops, "cpu", 1) for flops in (1e8, 1e9))
    except Absent as why:
        pytest.skip(str(why))
    assert short.scale == pytest.approx(1.0, rel=1e-3)
    times = []
    for job in (short, long):
        samples = []
        for _ in range(5):
            start = time.thread_time()  # time of this thread, so that a busy machine does no harm
            job.run()
            samples.append(time.thread_time() - start)
        times.append(min(samples))
    assert times[1] / times[0] == pytest.approx(10, rel=0.5)  # the loop is not optimised away
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    ceilings._fma_library.cache_clear()
    with pytest.raises(Absent, match=r"no C\+\+ compiler"):
        ceilings.fma_job(1e8, "cpu", 1)
    ceilings._fma_library.cache_clear()
