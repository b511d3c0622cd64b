"""The lock of a results folder, and the signals that stop a run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from sparse_attention_hub.errors import UserError

logger = logging.getLogger("benchmark.phase2")

#: Exit code of a run that was interrupted.
INTERRUPTED = 130


@contextmanager
def results_lock(folder: Path, flag: str = "--benchmark-results-dir") -> Iterator[None]:
    """Allow one run at a time in a folder, which `flag` names: UserError if there is another. The lock ends with the process
    that holds it, even if that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run writes to {folder}: wait for it, or choose another {flag}") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): start no other run there", folder, error.strerror)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Inside, a SIGTERM ends the program after so many seconds at the latest, with exit code 130, even where it waits in code that
    runs no signal handler: a SIGTERM to the process group ends Ray's own processes too, for which Ray waits a minute."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    ended = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and not ended.wait(seconds):
                os._exit(INTERRUPTED)
        os.close(read)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(write)


class Interrupts:
    """The first Ctrl-C or SIGTERM calls `stop_soon` and sets `seen`; the second kills the workers and exits at once.

    Use it in a `with`. Outside the main thread, where Python cannot handle signals, it does nothing.
    """

    def __init__(self, stop_soon: Callable[[], None], worker_pids: Callable[[], list[int]]) -> None:
        self.seen = False
        self._stop_soon, self._worker_pids = stop_soon, worker_pids
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            for pid in self._worker_pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(INTERRUPTED)
        self.seen = True
        with contextlib.suppress(OSError):
            self._stop_soon()
        with contextlib.suppress(OSError):  # no buffered stream in a signal handler
            os.write(2, b"\nStopping after the samples in progress; press Ctrl-C again to stop now.\n")
