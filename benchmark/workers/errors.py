"""Faults of the machine, told from faults of what is run on it."""

from __future__ import annotations

#: Exit code of a worker whose device is beyond use: a fresh process takes over.
BROKEN_DEVICE = 70
#: What errors of torch and of CUDA's libraries say when an allocation failed.
_SHORT = ("out of memory", "can't allocate memory", "alloc_failed")


class BrokenDeviceError(RuntimeError):
    """The device cannot be used any more by this process."""


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(told in text for told in _SHORT)


def is_passing(error: BaseException) -> bool:
    """Short memory, a disk that is full or gone: another time, or on another machine, the same may work."""
    return is_out_of_memory(error) or isinstance(error, OSError)


def check_device(error: BaseException) -> None:
    """A fault of the device itself spoils every later call of this process: BrokenDeviceError, so that a fresh one goes on.
    Short memory is none, whatever it is called."""
    if is_out_of_memory(error):
        return
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        raise BrokenDeviceError(f"{type(error).__name__}: {error}") from error
