"""Bounds on what a masker may do: a user's masker that never returns, takes all memory or makes wrong masks fails, and the search
continues."""

from __future__ import annotations

import faulthandler
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.search.trial import TrialTimeout
from benchmark.workers.memory import free_memory

if TYPE_CHECKING:
    import torch

    from sparse_attention_hub import AttentionInputs, Mask, Masker, ResearchAttention

GRACE = 60.0  # seconds between the exception and the end of the process
LONGEST = 1e9  # seconds; timers take no more
MEMORY_SHARE = 0.8


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, TrialTimeout is raised once `seconds` have passed, also in an endless loop.

    Code that no exception can stop (it does not return to Python, or catches everything) ends the process a minute later; Ray
    starts another. Outside the main thread, where Python handles no signals, there is no limit.
    """

    def stop(*_: Any) -> None:
        raise TrialTimeout(f"took longer than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if seconds <= 0:
        stop()
    seconds = min(seconds, LONGEST)
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Inside, an allocation beyond 80% of the memory that is free now fails with an exception. Without it the kernel would kill
    this process, or that of another study. GPU memory has such a limit anyway."""
    free = free_memory(device, workers=1)
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu" and free is not None and before == most == resource.RLIM_INFINITY:
        (held,) = re.findall(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(held) + int(MEMORY_SHARE * free), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def watch_masks(attention: ResearchAttention) -> None:
    """Make maskers from outside the package fail if they change the mask that they were given, which other configurations
    share, or give probabilities that are none, which attention would take for keys that are not chosen."""
    for masker in attention.maskers:
        if not type(masker).__module__.startswith("sparse_attention_hub."):
            masker.__dict__["select"] = _watched(masker)


def _watched(masker: Masker[Any]) -> Callable[[AttentionInputs, Mask], Mask]:
    def tensors(mask: Mask) -> list[torch.Tensor]:
        return [mask.chosen(), *(tensor for tensor in mask.lists() if tensor is not None)]

    choose = masker.select

    def select(inputs: AttentionInputs, mask: Mask) -> Mask:
        before = [tensor.clone() for tensor in tensors(mask)]
        chosen = choose(inputs, mask)
        if not all(tensor.equal(known) for tensor, known in zip(tensors(mask), before, strict=True)):
            raise ValueError(f"{type(masker).__name__}.select changed the mask it was given: return mask.union(...) instead")
        if not chosen.is_certain:
            probability = chosen.inclusion_probability()
            if not ((probability >= 0) & (probability <= 1)).all():
                raise ValueError(f"{type(masker).__name__}.select gives inclusion probabilities that are not in [0, 1]")
        return chosen

    return select
