"""Large buffers beside short-lived activations: the C library's heap keeps the holes between them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch
from torch import Tensor


def own_pages(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of the type of another. On a CPU its pages are not the heap's: buffers of a few MB that stay, between
    activations that do not, would keep a fifth of a cache in holes of the heap."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, math.prod(shape) * like.itemsize, **private)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def trim_heap() -> None:
    """Return freed memory that the C library keeps: after a long context, up to a third of its KV cache. Takes milliseconds."""
    # malloc_trim is a function of glibc; Windows has no CDLL(None).
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
