"""What a benchmark file declares: cases, the work that each does, and the contenders that do it.

Add a case by copying a file such as `bench/losses/bench_stablemax.py`:

    def case(rows: int, classes: int) -> Case:
        n = rows * classes
        return Case(
            name="stablemax",
            label=f"{rows} x {classes} float32",
            setup=lambda device: {"input": torch.randn(rows, classes, device=device)},
            grad=("input",),
            work={"forward+backward": Work(bytes=20 * n, written=8 * n, bars={"eager": 2.0})},
            contenders={
                "fusee": Peer(lambda: importlib.import_module("fusee").stablemax, requires="fusee"),
                "eager": Peer(lambda: eager_stablemax),
            },
        )

    test_stablemax = bench_cases([case(4096, 32000)], quick=[case(8, 64)])

The first contender is the subject: every ratio is "time of the peer / time of the subject", so
above one means that the subject is faster. The keys of `work` are the modes to time:

* "forward": one call under `no_grad`;
* "backward": `torch.autograd.grad` through a graph that was built once and is kept;
* "forward+backward": both, as a training step does them.

`bytes` is the least traffic that any implementation needs: each input read once, each output
written once, never what one implementation happens to move. It makes GB/s comparable and sets the
ceiling.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MODES = ("forward", "backward", "forward+backward")

# Names under which the machine's own ceilings are timed beside a case's contenders. `bars` may name
# them.
COPY = "copy: clone() of the same bytes"
STREAM = "copy: read and clone(), same reads and writes"
READY = "copy: copy_() of the same bytes into a ready buffer"
GEMM = "torch.mm of the same FLOPs"
FMA = "multiply-add loop of the same FLOPs"
CEILINGS = {"copy": (COPY, STREAM), "copy_": (READY,), "gemm": (GEMM,), "fma": (FMA,), "none": ()}


class Absent(Exception):
    """A contender or ceiling cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Peer:
    """One way to do the job of a case.

    Args:
        make: builds, once per case and mode, the function that is called with the case's inputs as
            keyword arguments. Import optional packages inside it.
        requires: the package that must be importable. When it is not, the report names this peer as
            absent.
        slow_start: left out, by name, of `--quick` (it compiles for many seconds).
        grad: names of the inputs that it differentiates, where these are not the case's.
    """

    make: Callable[[], Callable[..., Any]]
    requires: str = ""
    slow_start: bool = False
    grad: Sequence[str] = ()

    def build(self) -> Callable[..., Any]:
        """Return the function to time, or raise `Absent`."""
        if self.requires:
            try:
                importlib.import_module(self.requires)
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] != self.requires.split(".")[0]:
                    raise  # installed, but broken: that is a failure, not an absence
                raise Absent(f"{self.requires} is not installed") from error
        return self.make()


@dataclass(frozen=True)
class Work:
    """What one mode of a case has to do at least, and what we promise about it.

    Args:
        bytes: least traffic, reads and writes, in bytes.
        written: the part of `bytes` that goes to freshly allocated outputs. It is needed for the
            stricter copy ceiling, which reads what the op must read and clones what it must write.
        flops: floating-point operations, 0 where they do not matter.
        bars: least speedup of the subject over the named contender or ceiling.
        memory_limit: most bytes beyond inputs, outputs and gradients at the peak, or None.
    """

    bytes: int = 0
    written: int = 0
    flops: int = 0
    bars: Mapping[str, float] = field(default_factory=dict)
    memory_limit: int | None = None


@dataclass(frozen=True)
class Case:
    """One job at one size, with everyone who does it. See the head of this file.

    Args:
        name: the method.
        label: size and dtype, for people.
        setup: makes the inputs once, on the given device; seeded by the harness.
        work: mode -> `Work`.
        contenders: name -> `Peer`; the first is the subject.
        grad: names of the inputs that need a gradient.
        ceiling: which ceiling bounds this case: "copy" (output allocated, as an op does), "copy_"
            (into a ready buffer, for in-place work), "gemm", "fma" or "none".
        note: one sentence for the report.
    """

    name: str
    label: str
    setup: Callable[[str], dict[str, Any]]
    work: Mapping[str, Work]
    contenders: Mapping[str, Peer]
    grad: Sequence[str] = ()
    ceiling: str = "copy"
    note: str = ""

    def __post_init__(self) -> None:
        for mode, work in self.work.items():
            if mode not in MODES:
                raise ValueError(f"{self.name}: mode is {mode!r}, must be one of {MODES}")
            if "backward" in mode and not self.grad:
                raise ValueError(
                    f"{self.name}: mode {mode!r} needs `grad`, the inputs to differentiate"
                )
            unknown = set(work.bars) - set(self.contenders) - set(CEILINGS[self.ceiling])
            if unknown:
                raise ValueError(f"{self.name}: bars against {sorted(unknown)}, which nobody times")

    @property
    def id(self) -> str:
        """Name and size in a form that pytest's -k can select."""
        return f"{self.name}-{self.label}".replace(" ", "_")

    @property
    def subject(self) -> str:
        """The contender that all ratios refer to."""
        return next(iter(self.contenders))


def differentiable(inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return `inputs` with the named tensors, or lists of them, marked as needing a gradient."""

    def mark(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().requires_grad_()
        return [mark(item) for item in value]

    return {k: mark(v) if k in names else v for k, v in inputs.items()}


def _flat(values: Any) -> list[torch.Tensor]:
    """Return all tensors of a tensor, or of nested lists and tuples of them, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _flat(value)]


def build_run(
    function: Callable[..., Any], inputs: dict[str, Any], grad: Sequence[str], mode: str
) -> Callable[[], Any]:
    """Return a function of no arguments that does one `mode` of `function` and returns its outputs.

    Gradients come back as new tensors (`torch.autograd.grad`), so nothing accumulates between
    rounds. The upstream gradient of an output that is not a scalar is random, fixed, and made at
    the first call. An input and the output may be lists of tensors.
    """
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(**inputs)

        return forward

    inputs = differentiable(inputs, grad)
    leaves = _flat([inputs[name] for name in grad])
    upstream: list[torch.Tensor | None] = []

    def gradients(output: Any, keep: bool) -> tuple[torch.Tensor, ...]:
        outputs = _flat(output)
        if not upstream:
            upstream.extend(torch.randn_like(each) if each.dim() else None for each in outputs)
        return torch.autograd.grad(outputs, leaves, upstream, retain_graph=keep)

    if mode == "backward":
        kept = function(**inputs)
        return lambda: gradients(kept, keep=True)

    def forward_backward() -> Any:
        output = function(**inputs)
        return (*(each.detach() for each in _flat(output)), *gradients(output, keep=False))

    return forward_backward


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` for static shapes, from a clean slate.

    Without the reset, the second size of a function would be compiled for dynamic shapes, which is
    slower and would flatter us.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def bench_cases(cases: Sequence[Case], quick: Sequence[Case]) -> Callable[..., None]:
    """Return a pytest function with one item per case, mode and contender.

    `quick` holds the same jobs at sizes that take milliseconds: `--quick` runs those, to prove in
    the test suite that the benchmarks work.
    """

    def bench(benchmark: Any, bench_session: Any, case: Case, mode: str, contender: str) -> None:
        bench_session.report_contender(benchmark, case, mode, contender)

    bench.full_cases = list(cases)  # type: ignore[attr-defined]
    bench.quick_cases = list(quick)  # type: ignore[attr-defined]
    return bench
