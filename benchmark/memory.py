"""How much memory is left, what it looks like when there is none, and giving back what is not used."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free_memory(device: Any, workers: int) -> int | None:
    """Bytes that one of `workers` may still take on a device; None if that is not known."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // max(1, workers)
    return None


def free_unused() -> None:
    """Give back what nothing uses any more: garbage, cached GPU blocks, and what `trim_heap` does."""
    gc.collect()
    trim_heap()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory: after a long context, as much as its whole KV cache."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone knows how
        ctypes.CDLL(None).malloc_trim(0)
