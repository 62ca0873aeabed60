"""Tests of the benchmark harness itself: its arithmetic, its order and its report."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, runner, summary
from bench.harness import COPY, READY, Absent, Case, Peer, Work, build_run

MIB = 1 << 20
SETTINGS = runner.Settings(rounds=5, budget=2.0)


class VirtualClock(runner.CpuClock):
    """A clock that moves only when a contender says so: known costs on any machine."""

    now = 0.0

    def __call__(self, run: Any, iterations: int) -> float:
        start = VirtualClock.now
        for _ in range(iterations):
            run()
        return (VirtualClock.now - start) / iterations


def busy(milliseconds: float) -> Peer:
    """A contender of known cost in virtual time."""

    def run(x: torch.Tensor) -> torch.Tensor:
        VirtualClock.now += milliseconds / 1e3
        return x

    return Peer(lambda: run)


def broken() -> Any:
    """A contender that cannot work."""
    raise RuntimeError("planted fault")


def tiny_case(**changes: Any) -> Case:
    """A case of known costs with an absent and a broken contender."""
    values: dict[str, Any] = {
        "name": "known",
        "label": "1 x 1000",
        "setup": lambda device: {"x": torch.ones(1000, device=device)},
        "ceiling": "none",
        "work": {
            "forward": Work(
                bytes=8000, written=4000, bars={"three times": 2.0, "as fast": 1.5, "missing": 1.0}
            )
        },
        "contenders": {
            "subject": busy(6),
            "three times": busy(18),
            "as fast": busy(6),
            "missing": Peer(lambda: lambda x: x, requires="no_such_package_here"),
            "broken": Peer(broken),
        },
    }
    return Case(**(values | changes))


def document_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Wrap results as a session would, with made-up figures of a machine."""
    rate = summary.spread([10.0, 12.0, 11.0]) | {"unit": "GB/s"}
    return {
        "schema": 1,
        "machine": {"processor": "Imaginary 9000", "threads": 1, "fusee": "engine: imaginary"},
        "ceilings": {
            "copy, output allocated": rate,
            "multiply-add loop": {"absent": "no compiler"},
        },
        "drift": 0.012,
        "results": results,
    }


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """The measured result of `tiny_case`."""
    return runner.measure(tiny_case(), "forward", SETTINGS, VirtualClock())


def test_spread_of_known_values() -> None:
    found = summary.spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "n": 5}
    assert summary.spread([7.0])["q1"] == summary.spread([7.0])["q3"] == 7.0
    with pytest.raises(ValueError, match="no values"):
        summary.spread([])


def test_ratio_is_taken_within_rounds_so_drift_cancels() -> None:
    drift = {"0": 1.0, "1": 10.0, "2": 3.0, "3": 0.5}
    subject = {r: 2.0 * d for r, d in drift.items()}
    peer = {r: 3.0 * d for r, d in drift.items()}
    found = summary.ratio(peer, subject)
    assert found is not None
    assert (found["median"], found["q1"], found["q3"]) == pytest.approx((1.5, 1.5, 1.5))


def test_ratio_uses_only_common_rounds() -> None:
    found = summary.ratio({"1": 8.0, "9": 1.0}, {"0": 1.0, "1": 2.0})
    assert found is not None
    assert (found["median"], found["n"]) == (4.0, 1)
    assert summary.ratio({"1": 8.0}, {"0": 1.0}) is None


def test_contenders_are_interleaved() -> None:
    order: list[str] = []
    runners = {
        name: runner.Runner(functools.partial(order.append, name), count=3) for name in "ABC"
    }
    runner.interleave(runners, 3, runner.CpuClock())
    assert "".join(order) == "ABCABCABC"
    assert all(list(r.times) == ["0", "1", "2"] for r in runners.values())


def test_slow_contenders_run_in_fewer_evenly_spread_rounds() -> None:
    assert runner.rounds_of(3, 15) == {4, 9, 14}
    assert runner.rounds_of(20, 4) == {0, 1, 2, 3}
    order: list[str] = []
    runners = {
        "slow": runner.Runner(lambda: order.append("S"), count=2),
        "fast": runner.Runner(lambda: order.append("f"), count=4),
    }
    runner.interleave(runners, 4, runner.CpuClock())
    assert "".join(order) == "fSffSf"
    assert list(runners["slow"].times) == ["1", "3"]


def test_repeats_and_scale_give_the_time_of_one_whole_call() -> None:
    calls: list[int] = []
    job = runner.Runner(lambda: calls.append(1), scale=10.0, iterations=4, count=1)
    seconds = iter((0.0, 2.0))

    class Clock(runner.CpuClock):
        def __call__(self, run: Any, iterations: int) -> float:
            start = next(seconds)
            for _ in range(iterations):
                run()
            return (next(seconds) - start) / iterations

    runner.interleave({"job": job}, 1, Clock())
    assert len(calls) == 4
    assert job.times == {"0": pytest.approx(5.0)}  # 2 s / 4 calls * scale 10


def test_collector_is_off_while_timing_and_back_afterwards() -> None:
    seen: list[bool] = []
    runner.interleave(
        {"a": runner.Runner(lambda: seen.append(gc.isenabled()))}, 1, runner.CpuClock()
    )
    assert seen == [False]
    assert gc.isenabled()


def test_known_costs_are_measured(known: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in summary.rows(known)}
    assert rows["subject"]["time"]["median"] == pytest.approx(6e-3)
    assert rows["three times"]["ratio"]["median"] == pytest.approx(3.0)
    assert rows["as fast"]["ratio"]["q3"] == pytest.approx(1.0)
    assert rows["subject"]["gbps"] == pytest.approx(8000 / 6e-3 / 1e9)
    assert known["contenders"]["subject"]["iterations"] == 2  # a round lasts at least MIN_ROUND
    assert rows["three times"]["time"]["n"] == SETTINGS.rounds


def test_wall_clock_measures_a_known_sleep() -> None:
    clock = runner.CpuClock()
    assert min(clock(lambda: time.sleep(0.006), 2) for _ in range(5)) >= 0.006
    assert min(clock(lambda: None, 1) for _ in range(50)) < 0.001


def test_processor_clock_leaves_out_waiting() -> None:
    assert runner.CpuClock("cpu")(lambda: time.sleep(0.05), 1) < 0.04


def test_one_round_is_never_called_firm(known: dict[str, Any]) -> None:
    one = {name: dict(entry) for name, entry in known["contenders"].items()}
    one["three times"]["times"] = {"0": known["contenders"]["three times"]["times"]["0"]}
    page = report.text(document_of([known | {"contenders": one}]))
    assert "3.00x [1 round]" in page
    assert "met (1 round)" in page


def test_share_is_the_time_of_the_ceiling_over_the_time_of_the_contender() -> None:
    measured = {"status": "measured", "iterations": 1}
    result = {
        "subject": "us",
        "bytes": 2_000_000_000,
        "flops": 0,
        "contenders": {"us": measured | {"times": {"0": 1.25, "1": 2.5}}},
        "ceilings": {COPY: measured | {"times": {"0": 1.0, "1": 2.0}}},
    }
    us, ceiling = summary.rows(result)
    assert us["share"]["median"] == pytest.approx(0.8)
    assert us["gbps"] == pytest.approx(2 / 1.875)
    assert ceiling["ratio"]["median"] == pytest.approx(0.8)


def test_untimed_call_before_a_round_is_not_in_its_time() -> None:
    costs = iter((7.0, 1.0, 8.0, 2.0))  # an untimed call, a timed one, twice

    def run() -> None:
        VirtualClock.now += next(costs)

    job = runner.Runner(run, count=2, rewarm=True)
    runner.interleave({"job": job}, 2, VirtualClock())
    assert list(job.times.values()) == pytest.approx([1.0, 2.0])


def test_absent_and_broken_contenders_are_named_and_hide_nobody(known: dict[str, Any]) -> None:
    document = document_of([known])
    for page in (report.text(document), report.html(document)):
        assert "absent: no_such_package_here is not installed" in page
        assert "failed: RuntimeError: planted fault" in page
        assert "three times" in page


def test_absent_means_not_installed_and_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import a_dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError):
        Peer(lambda: len, requires="half_installed").build()
    with pytest.raises(Absent, match="is not installed"):
        Peer(lambda: len, requires="wholly_missing").build()


def test_bars_are_judged(known: dict[str, Any]) -> None:
    rows = {row["against"]: row for row in summary.bars(known)}
    assert rows["three times"]["met"] is True
    assert rows["as fast"]["met"] is False
    assert rows["missing"]["met"] is None
    assert "not installed" in rows["missing"]["why"]
    page = report.html(document_of([known]))
    assert "1 met, 1 missed, 1 not judged" in page
    assert "MISSED" in page


@pytest.mark.parametrize(("limit", "met"), [(10 * MIB, True), (MIB, False)])
def test_memory_bar_is_judged(known: dict[str, Any], limit: int, met: bool) -> None:
    subject = known["contenders"]["subject"] | {"peak_extra_bytes": 5 * MIB}
    result = known | {
        "contenders": {"subject": subject},
        "bars": {},
        "memory_limit": limit,
    }
    assert [row["met"] for row in summary.bars(result)] == [met]


def test_html_holds_the_numbers_and_nothing_from_the_network(known: dict[str, Any]) -> None:
    page = report.html(document_of([known]))
    row = next(row for row in summary.rows(known) if row["name"] == "three times")
    for expected in (
        report.seconds(row["time"]["median"]),
        report.times_text(row["ratio"]),
        "Imaginary 9000",
        "engine: imaginary",
        "11.0 GB/s",
        "absent: no compiler",
        "data:image/svg+xml;base64,",
    ):
        assert expected in page
    for link in ("http:", "https:", "<script", "<link", "@import"):
        assert link not in page


def test_names_are_escaped_in_html() -> None:
    case = tiny_case(contenders={"a<b>&": busy(0.1)}, work={"forward": Work(bytes=8)})
    result = runner.measure(case, "forward", SETTINGS, VirtualClock())
    assert "a&lt;b&gt;&amp;" in report.html(document_of([result]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(26.2, "26.2 s"), (0.0718, "71.8 ms"), (3.3e-6, "3.3 us"), (4e-9, "4 ns"), (1234.0, "1234 s")],
)
def test_durations_are_readable(value: float, expected: str) -> None:
    assert report.seconds(value) == expected


def test_report_renders_again_from_json(
    known: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = report.write(document_of([known]), tmp_path / "new" / "folder")
    again = tmp_path / "again.html"
    report.main([str(files["results"]), "-o", str(again)])
    assert "three times" in capsys.readouterr().out
    assert "three times" in again.read_text()


def test_modes_compute_what_they_say() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])

    def square(x: torch.Tensor) -> torch.Tensor:
        return (x * x).sum()

    forward = build_run(square, {"x": x}, ["x"], "forward")()
    assert forward.item() == 14.0
    assert not forward.requires_grad
    backward = build_run(square, {"x": x}, ["x"], "backward")
    assert backward()[0].equal(2 * x)
    assert backward()[0].equal(2 * x)  # the graph is kept
    loss, gradient = build_run(square, {"x": x}, ["x"], "forward+backward")()
    assert loss.item() == 14.0
    assert gradient.equal(2 * x)
    assert not x.requires_grad


def test_inputs_and_outputs_may_be_lists() -> None:
    def scaled(xs: list[torch.Tensor], by: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(by * x for x in xs)

    xs, by = [torch.ones(3), torch.ones(2, 2)], torch.tensor(3.0)
    inputs = {"xs": xs, "by": by}
    assert [y.sum().item() for y in build_run(scaled, inputs, [], "forward")()] == [9, 12]
    one, two, of_one, of_two, of_by = build_run(scaled, inputs, ["xs", "by"], "forward+backward")()
    assert one.equal(3 * xs[0]) and two.equal(3 * xs[1]) and not one.requires_grad
    upstream = of_one / 3, of_two / 3
    assert of_by.item() == pytest.approx(sum(u.sum().item() for u in upstream), rel=1e-5)
    backward = build_run(scaled, inputs, ["xs", "by"], "backward")
    first, again = backward(), backward()
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not xs[0].requires_grad


def test_upstream_gradient_of_a_tensor_is_fixed() -> None:
    run = build_run(lambda x: 2 * x, {"x": torch.ones(5)}, ["x"], "forward+backward")
    assert run()[1].equal(run()[1])


def test_faulty_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        tiny_case(work={"sideways": Work()})
    with pytest.raises(ValueError, match="needs `grad`"):
        tiny_case(work={"backward": Work()})
    with pytest.raises(ValueError, match="nobody times"):
        tiny_case(work={"forward": Work(bars={"a stranger": 2.0})})


def test_whole_run_agrees_with_pytest_benchmark(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    theirs = tmp_path / "pytest-benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench/losses/bench_perp_grad.py", "-k", "eager"]
    command += [
        "-q",
        "-p",
        "no:cacheprovider",
        f"--results={tmp_path}",
        f"--benchmark-json={theirs}",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eager loop (reference)" in done.stdout
    assert READY in done.stdout
    ours = json.loads((tmp_path / "results.json").read_text())["results"][0]
    for bench in json.loads(theirs.read_text())["benchmarks"]:
        times = ours["contenders"][bench["extra_info"]["contender"]]["times"]
        assert bench["stats"]["data"] == pytest.approx(list(times.values()))
        assert bench["group"] == ours["id"]
    assert "perp_grad" in (tmp_path / "report.html").read_text()
