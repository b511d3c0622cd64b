"""Compiling loops: once for each machine, kept in the user's cache folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, event
from numba.extending import intrinsic, overload

from ..errors import UserError
from ..user_cache import cache_root

logger = logging.getLogger(__name__)

#: What the compiler may do to sums: reorder and contract them. Infinities and NaN keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator: compile a loop over arrays when it is first called, and keep the result on disk where a disk lets us."""
    settings: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    folder = _cache_folder()
    if folder is None:
        return numba.njit(**settings)(function)
    before = config.CACHE_DIR
    config.CACHE_DIR = before or folder
    try:
        return numba.njit(cache=True, **settings)(function)
    except (OSError, RuntimeError):  # Numba found no folder that it may write to
        return numba.njit(**settings)(function)
    finally:
        config.CACHE_DIR = before


@lru_cache
def _cache_folder() -> str | None:
    """The folder of compiled loops; None where there is no home or nothing can be written."""
    try:
        folder = cache_root() / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, UserError):
        return None


class _Notice(event.Listener):
    """Says once a process that loops are being compiled: it takes seconds in which nothing else happens."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and event.data["dispatcher"].py_func.__module__.startswith(__package__):
            self.said = True
            logger.warning("compiling CPU kernels (up to a minute; kept for later runs)")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Notice())


def in_threads(loop: Callable[..., None], units: int, threads: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) over all units, cut into one range a thread."""
    threads = max(1, min(threads, units))
    if threads == 1:
        loop(0, units, *arguments)
        return
    cuts = [units * i // threads for i in range(threads + 1)]
    done = [_pool(threads).submit(loop, a, b, *arguments) for a, b in zip(cuts[:-2], cuts[1:-1], strict=True)]
    loop(cuts[-2], cuts[-1], *arguments)
    for future in done:
        future.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="sparse-attention-loops")


@intrinsic
def _prefetch(typing, array, row, offset):
    """LLVM's prefetch of the cache line `offset` bytes into a row of a table."""

    def generate(context, builder, signature, arguments):
        table = context.make_array(signature.args[0])(context, builder, arguments[0])
        start = builder.mul(arguments[1], cgutils.unpack_tuple(builder, table.strides)[0])
        place = builder.gep(builder.bitcast(table.data, cgutils.voidptr_t), [builder.add(start, arguments[2])])
        flags = [cgutils.int32_t] * 3
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [place.type], ir.FunctionType(ir.VoidType(), [place.type, *flags])
        )
        builder.call(function, [place, *(flag(value) for flag, value in zip(flags, (0, 3, 1), strict=True))])
        return context.get_dummy_value()

    return numba.void(array, numba.int64, numba.int64), generate


@compiled
def prefetch(table: np.ndarray, row: int) -> None:
    """In a loop: start to read a row that is needed soon. Lists jump about in memory, which a CPU cannot foresee: 1.3x."""
    for offset in range(0, table.shape[1] * table.itemsize, 64):
        _prefetch(table, np.int64(row), np.int64(offset))


# -- numbers of 16 bits, which Numba does not know ---------------------------------------------------------------------


def as_bits(tensor: Any) -> np.ndarray:
    """A CPU tensor as an array without a copy; bfloat16 as its bits in uint16, float16 as its bits in int16: see `widen`."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def widen(x: Any) -> Any:
    """In a loop: the number that an entry of `as_bits` stands for, as float32 or wider."""
    raise TypeError("widen() works in compiled loops only")


@overload(widen)
def _widen(x):  # Numba compares parameters, annotations too
    if x == numba.uint16:
        return lambda x: np.uint32(np.uint32(x) << 16).view(np.float32)
    if x == numba.int16:

        def from_half(x):
            bits = np.uint32(np.uint16(x))
            size = np.uint32((bits & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
            return -size if bits & 0x8000 else size

        return from_half
    return lambda x: x
