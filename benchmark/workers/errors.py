"""Classifies device, memory and transient I/O errors."""

from __future__ import annotations

#: Exit code of a worker whose device cannot be used any more.
BROKEN_DEVICE = 70
#: What errors of torch and of CUDA's libraries say when an allocation failed.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


class BrokenDeviceError(RuntimeError):
    """This process cannot use its device any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _OUT_OF_MEMORY)


def is_passing(error: BaseException) -> bool:
    """A transient failure (memory, a full or missing disk): the same work may succeed later or on another machine."""
    return is_out_of_memory(error) or isinstance(error, OSError)


def check_device(error: BaseException) -> None:
    """Raise BrokenDeviceError for an error of the device itself: every later call of this process would fail too, so the work
    continues in a fresh process. Out of memory is no such error, whatever its type."""
    if is_out_of_memory(error):
        return
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        raise BrokenDeviceError(f"{type(error).__name__}: {error}") from error
