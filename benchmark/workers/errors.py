"""Classifies device, memory and transient I/O errors."""

from __future__ import annotations

#: Exit code of a worker whose device cannot be used any more.
BROKEN_DEVICE = 70
#: Messages of torch and of CUDA's libraries for an allocation that failed.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
#: Messages of torch, Triton and CUDA's libraries after which no call on the device works.
_BROKEN_DEVICE = (
    *("cuda error", "cuda driver error", "triton error [cuda]", "cublas_status", "cudnn error", "cudnn_status"),
    *("illegal memory access", "device-side assert", "unspecified launch failure"),
)


class BrokenDeviceError(RuntimeError):
    """This process cannot use its device any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _OUT_OF_MEMORY)


def is_transient(error: BaseException) -> bool:
    """Whether the same work may succeed later or on another machine: memory was short, a file could not be read."""
    return is_out_of_memory(error) or isinstance(error, OSError)


def check_device(error: BaseException) -> None:
    """Raise BrokenDeviceError for an error of the device itself: every later call of this process would fail too, so the work
    continues in a fresh process. Out of memory is no such error, whatever its type."""
    if is_out_of_memory(error):
        return
    text = str(error).lower()
    named = isinstance(error, RuntimeError) and any(phrase in text for phrase in _BROKEN_DEVICE)
    if named or type(error).__name__ == "AcceleratorError":
        raise BrokenDeviceError(f"{type(error).__name__}: {error}") from error
