"""Loads the compiled libraries: the operator schemas, and the one engine that serves each device."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).parent / "lib"
CPU_ENGINES = ("avx512", "avx2", "baseline")
"""The CPU engines, best first."""
ENGINES = (*CPU_ENGINES, "emulated", "cuda")


@dataclass(frozen=True)
class Loaded:
    """Which engine serves a device, or why none does."""

    engine: str | None
    reason: str


def library_path(name: str) -> Path:
    """The file of a library: ``fusee`` itself, or ``fusee_<engine>``."""
    return LIBRARY_DIR / f"lib{name}.so"


def built_engines() -> list[str]:
    """The engines whose library is installed."""
    return [name for name in ENGINES if library_path(f"fusee_{name}").exists()]


def processor_has(engine: str) -> bool:
    """Whether this processor can run the CPU engine of that name."""
    schemas = ctypes.CDLL(str(library_path("fusee")))
    return bool(schemas.fusee_processor_has(engine.encode()))


def _choose_cpu_engine() -> Loaded:
    asked = os.environ.get("FUSEE_ENGINE")
    built = built_engines()
    if asked:
        if asked not in (*CPU_ENGINES, "emulated"):
            return Loaded(
                None, f"FUSEE_ENGINE={asked!r} is not one of {(*CPU_ENGINES, 'emulated')}"
            )
        if asked not in built:
            return Loaded(None, f"FUSEE_ENGINE={asked!r} was not built; built are {built}")
        if asked in CPU_ENGINES and not processor_has(asked):
            return Loaded(None, f"FUSEE_ENGINE={asked!r} needs instructions this processor lacks")
        return Loaded(asked, "named by FUSEE_ENGINE")
    for name in CPU_ENGINES:
        if name in built and processor_has(name):
            return Loaded(name, "the best that was built and this processor has")
    return Loaded(None, f"no CPU engine was built for this processor; built are {built}")


def _choose_cuda_engine() -> Loaded:
    if not torch.backends.cuda.is_built():
        return Loaded(None, "this torch was built without CUDA")
    if "cuda" not in built_engines():
        return Loaded(None, "fusee was built without CUDA: install nvcc and build again")
    return Loaded("cuda", "torch has CUDA and the engine was built")


def _load(choice: Loaded) -> Loaded:
    if choice.engine is None:
        return choice
    try:
        torch.ops.load_library(str(library_path(f"fusee_{choice.engine}")))
    except OSError as error:
        return Loaded(None, f"loading the {choice.engine} engine failed: {error}")
    return choice


def _load_all() -> dict[str, Loaded]:
    schemas = library_path("fusee")
    if not schemas.exists():
        raise ImportError(
            f"fusee's compiled library {schemas.name} is missing from the installation; "
            "build it with `make build`, or `pip install --no-build-isolation .`"
        )
    torch.ops.load_library(str(schemas))
    return {"cpu": _load(_choose_cpu_engine()), "cuda": _load(_choose_cuda_engine())}


LOADED: dict[str, Loaded] = _load_all()
"""For ``"cpu"`` and ``"cuda"``: the engine that serves the device."""
