"""Bounds on what a masker may do: a user's masker that never returns, takes all memory or makes wrong masks fails alone, in a
search and in a benchmark."""

from __future__ import annotations

import faulthandler
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.workers.memory import free_memory

if TYPE_CHECKING:
    import torch

    from sparse_attention_hub import AttentionInputs, Mask, Masker, ResearchAttention

GRACE = 60.0  # seconds between the exception and the end of the process
LONGEST = 1e9  # seconds; timers take no more
MEMORY_SHARE = 0.8


class TimeLimitError(Exception):
    """Work took longer than its limit."""


@contextmanager
def time_limit(seconds: float, end_process: bool = True) -> Iterator[None]:
    """Inside, TimeLimitError is raised once `seconds` have passed, also in an endless loop.

    Code that no exception can stop (it does not return to Python, or catches everything) ends the process a minute later, with
    `end_process`; Ray starts another. Outside the main thread, where Python handles no signals, there is no limit.
    """

    def stop(*_: Any) -> None:
        raise TimeLimitError(f"took longer than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if seconds <= 0:
        stop()
    seconds = min(seconds, LONGEST)
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    if end_process:  # starts a thread, which takes 0.1 ms
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
    try:
        yield
    finally:
        if end_process:
            faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def memory_limit(device: torch.device, workers: int = 1) -> Iterator[None]:
    """Inside, an allocation beyond 80% of the memory that is free now fails with an exception. Without it the kernel would kill
    this process or another one. GPU memory has such a limit anyway. workers: how many share the memory."""
    import resource  # not on Windows

    free = free_memory(device, workers)
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu" and free is not None and before == most == resource.RLIM_INFINITY:
        (held,) = re.findall(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(held) + int(MEMORY_SHARE * free), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def foreign_maskers(attention: ResearchAttention | None) -> list[Masker[Any]]:
    """The maskers from outside the package."""
    maskers = [] if attention is None else attention.maskers
    return [masker for masker in maskers if not type(masker).__module__.startswith("sparse_attention_hub.")]


def watch_masks(attention: ResearchAttention, seconds: float | None = None, flag: str = "") -> None:
    """Make maskers from outside the package fail if they change the mask that they were given, which other configurations
    share, or give probabilities that are none, which attention would take for keys that are not chosen.

    seconds: the longest call of `select`, None = no limit; flag: where it comes from. Later calls of a masker that took longer
    fail at once.
    """
    for masker in foreign_maskers(attention):
        masker.__dict__["select"] = _watched(masker, seconds, flag)


def _watched(masker: Masker[Any], seconds: float | None, flag: str) -> Callable[[AttentionInputs, Mask], Mask]:
    def tensors(mask: Mask) -> list[torch.Tensor]:
        return [mask.chosen(), *(tensor for tensor in mask.lists() if tensor is not None)]

    choose, name, late = masker.select, f"{type(masker).__name__}.select", False

    def within_time(inputs: AttentionInputs, mask: Mask) -> Mask:
        nonlocal late
        if seconds is None:
            return choose(inputs, mask)
        with suppress(TimeLimitError):
            if not late:
                with time_limit(seconds, end_process=False):
                    return choose(inputs, mask)
        late = True
        raise TimeLimitError(f"{name} took longer than {seconds:g} s ({flag})")

    def select(inputs: AttentionInputs, mask: Mask) -> Mask:
        before = [tensor.clone() for tensor in tensors(mask)]
        chosen = within_time(inputs, mask)
        if not all(tensor.equal(known) for tensor, known in zip(tensors(mask), before, strict=True)):
            raise ValueError(f"{name} changed the mask it was given: return mask.union(...) instead")
        if not chosen.is_certain:
            probability = chosen.inclusion_probability()
            if not ((probability >= 0) & (probability <= 1)).all():
                raise ValueError(f"{name} gives inclusion probabilities that are not in [0, 1]")
        return chosen

    return select
