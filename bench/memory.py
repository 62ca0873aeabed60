"""Peak extra memory of one call, beyond what lived before it and what it returns.

CPU: the kernel's own high-water mark of resident memory. Writing "5" to /proc/self/clear_refs
resets VmHWM to the present VmRSS (Linux, see proc(5)), so the peak of a single call can be read in
this process. Unlike a hook in torch's allocator it sees whatever the call touches: a kernel's own
scratch, BLAS workspaces, buffers of compiled code. `malloc_trim` first hands free heap back, so
that memory which the allocator kept from an earlier call is counted again. Resolution is about
1 MiB; pages never touched are not counted.

CUDA: `torch.cuda.max_memory_allocated`, the caching allocator's count.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if not match:
        raise OSError(f"{key} is not in /proc/self/status")
    return int(match[1]) * 1024


def _trim_heap() -> None:
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def tensor_bytes(outputs: Any) -> int:
    """Return the bytes of all distinct storages in a tensor or (nested) sequence of them."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(outputs)
    return sum(sizes.values())


def peak_extra_bytes(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Return the peak of `run()` beyond memory in use before it and beyond its outputs, or None.

    None means that this system cannot tell (no /proc, or clear_refs refused).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            _trim_heap()
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            outputs = run()
            peak = _status("VmHWM")
        except OSError:
            return None
    return max(0, peak - before - tensor_bytes(outputs))
