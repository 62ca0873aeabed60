"""Scripts that run in two processes of ``torch.distributed``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BEGIN = """
import os, sys
import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
"""
# Threads of gloo may outlive their group, and abort a process that ends in the usual way.
_END = """
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def run_in_two_processes(script: str, folder: Path, *options: str) -> None:
    """Runs ``script``, which finds its ``rank`` and a gloo group, twice at a time; both must succeed.

    ``options`` are for the interpreter.
    """
    command = [sys.executable, *options, "-c", _BEGIN + script + _END]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()[-4000:]
    finally:
        for process in ranks:
            process.kill()
