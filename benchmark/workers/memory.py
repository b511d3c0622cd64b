"""How much memory is free, and returning unused memory to the system."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path
from typing import Any


def free_memory(device: Any, workers: int) -> int | None:
    """Bytes that one of `workers` may still allocate on a torch.device; None if unknown."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    known = [free for free in (_free_of_machine(), _free_of_group()) if free is not None]
    return min(known) // max(1, workers) if known else None


def _free_of_machine() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _free_of_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left in the control group of this process (a container, a cluster job) and in those above it; None = no limit.

    Beyond such a limit no allocation fails: the kernel kills the process.
    """
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, names = root, ("memory.max", "memory.current", "inactive_file ")
            elif "memory" in controllers.split(","):
                base = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            else:
                continue
            here = base / path.strip("/")
            for folder in (here, *here.parents):
                if folder.is_relative_to(base):
                    left = _left_in(folder, *names)
                    free += [] if left is None else [left]
    return min(free, default=None)


def _left_in(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        now = int((folder / used).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such folder, no such controller, or "max"
        return None
    given_back = next((int(line.split()[1]) for line in stat if line.startswith(cached)), 0)  # files the kernel may drop
    return max(0, most - now + given_back)


def free_unused() -> None:
    """Free garbage, cached GPU blocks and unused heap memory."""
    from sparse_attention_hub.models.heap import trim_heap

    gc.collect()
    trim_heap()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
