"""Where jobs run with --ray-address: in the actors of a Ray cluster.

Actors send their records back and this process journals them, so the machines need no shared file system.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

from benchmark.workers.errors import BrokenDeviceError
from benchmark.workers.pools import Job, Slot, WorkerDied, usable_cores
from benchmark.workers.ray_start import start_ray

#: Seconds after which a Ray actor that has not started counts as crashed.
ACTOR_START_SECONDS = 600
#: Seconds between two checks of whether to stop.
_TICK = 0.5


class RayActor:
    """A worker on a Ray cluster."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        torch.set_num_threads(threads)

    def pid(self) -> int:
        return os.getpid()

    def records(self, job: Job) -> Any:
        yield from job.records()


class RayPool:
    """One actor per GPU of the cluster, or one for every two of its CPUs.

    address: as for ray.init; "local" starts a cluster on this machine. limit: actors at most on GPUs; on CPUs their number.
    """

    def __init__(self, address: str, device: str, limit: int | None) -> None:
        self._owns = start_ray(address, max(usable_cores(), limit or 1))
        import ray

        self._ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.slots, self._share = plan_actors(nodes, device, limit)
        self._actors: dict[int, Any] = {}
        self._stopping = threading.Event()

    def submit(self, slot: int, job: Job, timeout: float | None) -> Future[int]:
        future: Future[int] = Future()
        deadline = None if timeout is None else time.monotonic() + timeout
        threading.Thread(target=self._drive, args=(slot, job, deadline, future), daemon=True).start()
        return future

    def renew(self, slot: int) -> None:
        actor = self._actors.get(slot)
        if actor is not None:
            self._drop(slot, actor)

    def kill(self) -> None:
        self._stopping.set()
        for slot in list(self._actors):
            self.renew(slot)
        if self._owns:
            self._ray.shutdown()

    def _drive(self, slot: int, job: Job, deadline: float | None, future: Future[int]) -> None:
        errors, actor = self._ray.exceptions, None
        try:
            actor = self._actor(slot, deadline)
            future.set_result(self._collect(actor, job, deadline))
        except TimeoutError as error:
            self._drop(slot, actor)
            future.set_exception(error)
        except errors.RayTaskError as error:
            if isinstance(error.cause, BrokenDeviceError):  # its process cannot be used any more
                self._drop(slot, actor)
                future.set_exception(WorkerDied(f"with a device error: {_short(error.cause)}"))
            else:
                future.set_exception(error.cause if isinstance(error.cause, Exception) else error)
        except (WorkerDied, errors.RayError) as error:  # the actor, its node or a record is lost
            self._drop(slot, actor)
            future.set_exception(WorkerDied(_short(error)))
        except Exception as error:
            future.set_exception(error)

    def _actor(self, slot: int, deadline: float | None) -> Any:
        """The slot's actor, a new one if there is none.

        A growing cluster may take minutes to start an actor; TimeoutError or WorkerDied for one that does not start.
        """
        if slot in self._actors:
            return self._actors[slot]
        options: Any = self._ray.remote(RayActor).options(max_restarts=0, **self._share)
        actor = self._actors[slot] = options.remote(self.slots[slot].threads)
        alive, until = actor.pid.remote(), time.monotonic() + ACTOR_START_SECONDS
        try:
            while not self._stopping.is_set() and not self._ray.wait([alive], timeout=_TICK)[0]:
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                if time.monotonic() > until:
                    raise WorkerDied(
                        f"its Ray actor did not start within {ACTOR_START_SECONDS} s; has the cluster free resources?"
                    )
            if not self._stopping.is_set():
                self._ray.get(alive)
        except BaseException:
            self._drop(slot, actor)
            raise
        return actor

    def _collect(self, actor: Any, job: Job, deadline: float | None) -> int:
        """Journal what the actor sends until the job must stop. Returns the number of parts."""
        job.begin(None)
        stream = actor.records.options(num_returns="streaming").remote(job.portable())
        if (loaded := self._next(stream, deadline)) is None:
            return 0
        self._ray.get(loaded)
        for part in range(job.parts):
            if job.stopped():
                return part
            job.begin(part)
            if (record := self._next(stream, deadline)) is None:
                return part
            job.keep(self._ray.get(record))
        return job.parts

    def _next(self, stream: Any, deadline: float | None) -> Any:
        """A reference to the next thing that the actor sends; None at its end, or if the pool is being stopped."""
        while not self._stopping.is_set():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            ready, _ = self._ray.wait([stream], timeout=_TICK)
            if ready:
                return next(stream, None)
        return None

    def _drop(self, slot: int, actor: Any) -> None:
        """End an actor; the slot may have a new one already."""
        if actor is None:
            return
        if self._actors.get(slot) is actor:
            del self._actors[slot]
        with contextlib.suppress(Exception):
            self._ray.kill(actor)


def plan_actors(nodes: list[dict[str, float]], device: str, limit: int | None) -> tuple[list[Slot], dict[str, int]]:
    """(one slot per actor, the resources that Ray reserves for each), so that every actor fits on one of the nodes.

    nodes: the resources of each, as Ray counts them ("CPU", "GPU").
    """
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if device == "sharded":
        most, cores = max(zip(gpus, cpus, strict=True), default=(0, 1))
        return [Slot("actor-0", "sharded", max(1, cores))], {"num_gpus": most}
    if sum(gpus) and device != "cpu":
        count, cores = min(sum(gpus), limit or sum(gpus)), max(1, sum(cpus) // sum(gpus))
        return [Slot(f"actor-{i}", "cuda", cores) for i in range(count)], {"num_gpus": 1}
    count = min(max(1, sum(cpus)), limit or max(1, sum(c // 2 for c in cpus)))
    share = max(1, sum(cpus) // count)
    while share > 1 and sum(c // share for c in cpus) < count:  # a node's CPUs may not divide evenly
        share -= 1
    return [Slot(f"actor-{i}", device, share) for i in range(count)], {"num_cpus": share}


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
