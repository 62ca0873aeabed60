"""The record of an operator: what the harness needs to know to run every check on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
"""All arguments of a call, by name."""

ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Maker:
    """Makes the tensors of samples: seeded, so that every process makes the same ones."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers; drawn in float64 on the CPU, so that dtypes and devices agree."""
        drawn = torch.randn(shape, dtype=torch.float64, generator=self._generator) * scale
        return drawn.to(self.device, dtype or self.dtype)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Uniform numbers in [low, high)."""
        drawn = torch.rand(shape, dtype=torch.float64, generator=self._generator)
        return (low + (high - low) * drawn).to(self.device, dtype or self.dtype)

    def integers(
        self, high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Integers in [low, high)."""
        drawn = torch.randint(low, high, shape, generator=self._generator)
        return drawn.to(self.device, dtype)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of given values."""
        return torch.tensor(values, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class Sample:
    """One valid call."""

    name: str
    arguments: Arguments
    tiny: bool = False
    """A handful of elements: for gradcheck, for Hessians, for compiling."""
    emulated: bool = True
    """False where the emulated engine would take seconds: it runs about a thousand blocks a
    second."""
    smooth: bool = True
    """False where numbers are infinite or derivatives jump, which finite differences cannot see."""

    def with_arguments(self, arguments: Arguments) -> Sample:
        return replace(self, arguments=arguments)


@dataclass(frozen=True)
class ErrorInput:
    """One call that must raise."""

    name: str
    arguments: Arguments
    error: type[Exception]
    match: str
    """A regular expression for the message; it names the argument."""
    values: bool = False
    """Whether only the values show the error, so that compiled code may give NaN instead."""


@dataclass(frozen=True)
class NanSample:
    """A call with NaN in an input, and where its output must be NaN (everywhere else it must
    not)."""

    arguments: Arguments
    expected: Tensor


@dataclass(frozen=True)
class Traffic:
    """What an operator must move at least, in a forward pass and in a backward pass."""

    name: str
    arguments: Callable[[Maker], Arguments]
    launches: tuple[int, int]
    minimum_bytes: Callable[[Arguments], tuple[int, int]]


@dataclass(frozen=True)
class CudaKernel:
    """A kernel bound by memory, which must load 16 bytes at a time, and store likewise."""

    name: str
    """A regular expression over names without namespaces, ``run_rows<BlockRow<...``."""
    stores: bool = True
    tensor_cores: str = r"\A\Z"
    """A regular expression over the names of those that multiply on tensor cores; none by default."""


@dataclass(frozen=True)
class OpSpec:
    """All that the harness knows of a public function.

    Only the first group must be given. What does not apply to an operator is named in
    ``not_applicable`` with a reason; the capability table at the end of a run prints it.
    """

    name: str
    function: Callable[..., Tensor]
    samples: Callable[[Maker], Iterable[Sample]]
    error_inputs: Callable[[Maker], Iterable[ErrorInput]]
    oracle: Callable[..., Tensor]
    """The mathematics in plain torch operators, in the dtype of what it is given."""
    sized: Callable[[Maker, int], Arguments]
    """A call with a batch of n, and the same otherwise."""
    batch_dims: dict[str, int]
    """The dimension of the batch in the tensors of ``sized``."""
    differentiable: tuple[str, ...]
    """The arguments with gradients, where they are floating-point tensors."""
    raw: dict[str, tuple[int, ...]]
    """The operators ``torch.ops.fusee.*`` beneath, and which of their arguments have gradients."""

    straightforward: Callable[..., Tensor] | None = None
    """What a user would write in the dtype of the input. Default: the oracle in the accumulation
    dtype, rounded to the dtype of the result, as torch's own softmax computes."""
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    output_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    autocast_dtype: Callable[[torch.dtype, torch.dtype], torch.dtype] = lambda dtype, cast: (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    """The dtype of the output, from that of the input and that of autocast."""
    properties: dict[str, Callable[[Sample, Tensor], None]] = field(default_factory=dict)
    """Assertions about every result, by name."""
    nan_samples: Callable[[Maker], Iterable[NanSample]] | None = None
    large: Callable[[Maker], Iterable[Sample]] | None = None
    """Calls big enough that several threads share the work."""
    not_batched: tuple[str, ...] = ()
    """Tensors over which vmap is refused."""
    engine_ulps: float = 4.0
    """How far two engines may differ, in units of the last place of the largest element; four times
    as much in float64, whose sums have no wider type."""
    half_inside: bool = False
    """Whether results of half types pass through numbers of that type, as those of a matrix product
    do, so that the reference may differ by their rounding."""
    least_scale: float = 0.0
    """The size of the numbers that a result is computed from, where it cancels to less: 1 for the
    logarithm of a probability near one, or gradients that cancel between classes."""
    traffic: tuple[Traffic, ...] = ()
    cuda_kernels: tuple[CudaKernel, ...] = ()
    not_applicable: dict[str, str] = field(default_factory=dict)
    """Check -> why it has no meaning for this operator."""

    def make(self, dtype: torch.dtype, device: str = "cpu") -> Maker:
        seed = sum(map(ord, self.name))
        return Maker(dtype, device, seed)

    def ulps(self, dtype: torch.dtype) -> float:
        """How far two orders of computation may differ; see ``engine_ulps``."""
        return self.engine_ulps * (4 if dtype == torch.float64 else 1)

    def tensors(self, arguments: Arguments) -> dict[str, Tensor]:
        return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}

    def has_gradient(self, arguments: Arguments) -> list[str]:
        """The names of the arguments of this call that have gradients."""
        return [
            name
            for name in self.differentiable
            if isinstance(arguments.get(name), Tensor) and arguments[name].is_floating_point()
        ]


def as_function(
    function: Callable[..., Tensor], arguments: Arguments, names: Iterable[str]
) -> Callable[..., Tensor]:
    """``function`` of the named arguments alone, the others fixed."""
    names = list(names)

    def partial(*values: Any) -> Tensor:
        return function(**{**arguments, **dict(zip(names, values, strict=True))})

    return partial


def map_tensors(arguments: Arguments, change: Callable[[Tensor], Any]) -> Arguments:
    """The same arguments with every tensor changed."""
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def detached(arguments: Arguments, names: Iterable[str] = ()) -> Arguments:
    """Fresh leaves over the same storage, of which those named require gradients."""
    wanted = set(names)
    return {
        k: v.detach().requires_grad_(k in wanted) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }


def of_floats(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same arguments with every floating-point tensor in ``dtype``."""
    return map_tensors(arguments, lambda t: t.to(dtype) if t.is_floating_point() else t)


def select(
    samples: Iterable[Sample], *, tiny: bool, smooth: bool = False, emulated: bool = False
) -> Iterator[Sample]:
    """The samples that a check wants, on the emulated engine or another."""
    for sample in samples:
        if (
            (sample.tiny or not tiny)
            and (sample.smooth or not smooth)
            and (sample.emulated or not emulated)
        ):
            yield sample
