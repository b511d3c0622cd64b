"""Where jobs run: in this process, or in one spawned process per device; ray_pool.py has the actors of a Ray cluster.

A pool has numbered slots with one worker each, and a slot runs one job at a time. If a worker crashes, the job's future
raises WorkerDied; if a job takes too long, its worker is killed and the future raises TimeoutError. The slot's next job then
gets a fresh worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmark.workers.errors import BROKEN_DEVICE, BrokenDeviceError
from sparse_attention_hub.errors import UserError

logger = logging.getLogger("benchmark.phase2")


class WorkerDied(Exception):
    """The worker's process ended during a job."""


@dataclass(frozen=True)
class Slot:
    """One worker's share of the machine. device goes to load_model; env is set before torch is imported."""

    name: str
    device: str
    threads: int
    env: dict[str, str] = field(default_factory=dict)


class Job(Protocol):
    """What a pool runs, pickled to a worker: some parts, each of which results in a record for a journal."""

    @property
    def parts(self) -> int: ...

    def run(self, after_each: Callable[[], None] | None = None) -> int:
        """Run the parts and write their records to the journal, until the job is stopped. Returns the number of parts run."""

    def records(self) -> Iterator[Any]:
        """Do the parts where the parent's files cannot be written: yields None once everything is loaded, then one picklable
        record per part."""

    def portable(self) -> Job:
        """The same job without paths of this machine, for `records` on another one."""

    def stopped(self) -> bool:
        """Whether it was told to stop after the current part."""

    def begin(self, part: int | None) -> None:
        """Note which part is in progress (None: loading)."""

    def keep(self, record: Any) -> None:
        """Journal one of the `records`."""


class Pool(Protocol):
    slots: list[Slot]

    def submit(self, slot: int, job: Job, timeout: float | None) -> Future[int]:
        """Run a job; the future's result is how many parts were done within `timeout` seconds."""

    def renew(self, slot: int) -> None:
        """End a slot's worker at once; the next job gets a fresh one."""

    def kill(self) -> None:
        """Stop every worker now and leave no process behind."""


# -- which devices there are -----------------------------------------------------------------------------------------


def plan_slots(device: str, limit: int | None) -> list[Slot]:
    """One slot per GPU; on a CPU one for every two cores. No CUDA context is made in this process.

    device: "auto", "cpu", "cuda" (all GPUs), "cuda:N", or "sharded": one worker over all GPUs, for a model that does not
    fit on one. limit: slots at most on GPUs; on a CPU the number of slots.
    """
    cores = usable_cores()
    gpus = visible_gpus() if device == "auto" or device.startswith(("cuda", "sharded")) else []
    if device == "sharded" or device.startswith("cuda:"):
        return [Slot("worker-0", device, cores)]
    if gpus:
        chosen = gpus[:limit]
        threads = max(1, cores // len(chosen))
        return [Slot(f"worker-{i}", "cuda", threads, {"CUDA_VISIBLE_DEVICES": gpu}) for i, gpu in enumerate(chosen)]
    if device in ("auto", "cpu"):
        count = limit if limit is not None else max(1, cores // 2)
        return [Slot(f"worker-{i}", device, max(1, cores // count)) for i in range(count)]
    return [Slot("worker-0", device, cores)]


def visible_gpus() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES that give each worker one GPU."""
    import torch

    count = torch.cuda.device_count()
    listed = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return listed[:count] if listed else [str(i) for i in range(count)]


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_pebble() -> bool:
    return importlib.util.find_spec("pebble") is not None


# -- in this process -------------------------------------------------------------------------------------------------


class InProcessPool:
    """One worker: this process. The time limit is checked after each part; nothing can be killed. release: called at the end."""

    def __init__(self, slot: Slot, on_record: Callable[[], None], release: Callable[[], None]) -> None:
        self.slots = [slot]
        self._on_record, self._release = on_record, release

    def submit(self, slot: int, job: Job, timeout: float | None) -> Future[int]:
        future: Future[int] = Future()
        started = time.monotonic()

        def after_each() -> None:
            self._on_record()
            if timeout is not None and time.monotonic() - started > timeout:
                raise TimeoutError

        try:
            future.set_result(job.run(after_each))
        except Exception as error:
            future.set_exception(error)
        return future

    def renew(self, slot: int) -> None:
        """There is no other process to end."""

    def kill(self) -> None:
        self._release()


# -- one spawned process per device ----------------------------------------------------------------------------------


def start_worker(slot: Slot, parent: int, log: Path | None) -> None:
    """Set up a worker process, before torch is imported. parent: its process id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent handles it
    os.environ.update(slot.env)
    wanted = slot.threads
    with contextlib.suppress(KeyError, ValueError):
        wanted = max(1, min(wanted, int(os.environ["OMP_NUM_THREADS"])))
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    # Waiting threads sleep: on a shared machine, spinning makes a worker ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    die_with_parent(parent)
    add_log_file(log)


def die_with_parent(parent: int) -> None:
    """End this process as soon as its parent has ended, for whatever reason."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def add_log_file(log: Path | None) -> logging.Handler | None:
    if log is None:
        return None
    handler = logging.FileHandler(log)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: no traceback per line
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logging.getLogger("benchmark").addHandler(handler)
    logging.getLogger("benchmark").setLevel(logging.INFO)
    logging.getLogger("benchmark").propagate = False
    return handler


def run_job(job: Job, threads: int) -> int:
    """Run a job in a worker process."""
    import torch

    torch.set_num_threads(min(threads, int(os.environ.get("OMP_NUM_THREADS", threads))))
    try:
        return job.run()
    except BrokenDeviceError as error:
        logger.error("%s; this worker exits and a fresh one takes over", error)
        os._exit(BROKEN_DEVICE)


class ProcessPools:
    """One single-worker pebble pool per slot, so that a crash or a time limit affects no other worker."""

    def __init__(self, slots: list[Slot], log: Path | None) -> None:
        self.slots = slots
        self._log = log
        self._pools: dict[int, Any] = {}

    def submit(self, slot: int, job: Job, timeout: float | None) -> Future[int]:
        from pebble import ProcessExpired, ProcessPool

        if slot in self._pools and not self._pools[slot].active:  # it broke while idle
            self.renew(slot)
        if slot not in self._pools:
            context = multiprocessing.get_context("spawn")
            initargs = (self.slots[slot], os.getpid(), self._log)
            self._pools[slot] = ProcessPool(max_workers=1, initializer=start_worker, initargs=initargs, context=context)
        outer: Future[int] = Future()
        inner = self._pools[slot].schedule(run_job, args=(job, self.slots[slot].threads), timeout=timeout)

        def settle(done: Any) -> None:
            try:
                outer.set_result(done.result())
            except (TimeoutError, UserError) as error:
                outer.set_exception(error)
            except ProcessExpired as error:
                outer.set_exception(WorkerDied(_how(error.exitcode)))
            except (CancelledError, Exception) as error:
                # A broken pool has lost its process; errors of the job itself keep their type.
                broken = type(error).__name__ in ("BrokenProcessPool", "CancelledError")
                outer.set_exception(WorkerDied("while starting") if broken else error)

        inner.add_done_callback(settle)
        return outer

    def renew(self, slot: int) -> None:
        pool = self._pools.pop(slot, None)
        if pool is not None:
            pool.stop()
            pool.join()

    def kill(self) -> None:
        for slot in list(self._pools):
            self._pools[slot].stop()
        for slot in list(self._pools):
            self.renew(slot)

    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [pid for pool in self._pools.values() for pid in list(pool._pool_manager.worker_manager.workers)]


def _how(code: int | None) -> str:
    if code == BROKEN_DEVICE:
        return "with a device error"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"by signal {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"with exit code {code}"
