"""Actors of a Ray cluster without the cluster: where they fit, and what each way of failing counts as."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

import benchmark.workers.ray_pool as ray_pool
from benchmark.execution.messages import Request
from benchmark.execution.worker import Batch
from benchmark.settings import Settings
from benchmark.storage.benchmark_records import SampleLine
from benchmark.storage.results import Journal
from benchmark.tasks.base import Sample, UserError
from benchmark.workers.errors import BrokenDeviceError
from benchmark.workers.pools import Slot, WorkerDied
from benchmark.workers.ray_pool import RayPool, plan_actors


@pytest.mark.parametrize(
    ("nodes", "device", "limit", "count", "share"),
    [
        ([{"CPU": 8.0}], "auto", None, 4, {"num_cpus": 2}),
        ([{"CPU": 4.0}] * 3, "cpu", 2, 2, {"num_cpus": 4}),  # never more than a node has
        ([{"CPU": 4.0}, {"CPU": 1.0}], "cpu", 3, 3, {"num_cpus": 1}),
        ([{"CPU": 1.0}], "cpu", None, 1, {"num_cpus": 1}),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "auto", None, 16, {"num_gpus": 1}),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "cuda", 4, 4, {"num_gpus": 1}),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "sharded", None, 1, {"num_gpus": 8}),
        ([{"CPU": 16.0, "GPU": 8.0}], "cpu", 2, 2, {"num_cpus": 8}),
    ],
)
def test_every_actor_fits_a_node(
    nodes: list[dict[str, float]], device: str, limit: int | None, count: int, share: dict[str, int]
) -> None:
    slots, found = plan_actors(nodes, device, limit)
    assert (len(slots), found) == (count, share)
    assert all(slot.threads >= 1 for slot in slots)


class FakeRay:
    """Ray as far as a pool sees it; an actor's stream is a list, an exception in it is raised when it is got."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.killed: list[Any] = []

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return refs, []

    def get(self, found: Any) -> Any:
        if isinstance(found, BaseException):
            raise found
        return found

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


class FakeActor:
    def __init__(self, stream: list[Any]) -> None:
        self.stream, self.records = stream, self

    def options(self, **_: Any) -> FakeActor:
        return self

    def remote(self, job: Batch) -> Any:
        return iter(self.stream)


class Starting(FakeActor):
    """An actor that never starts."""

    def __init__(self) -> None:
        super().__init__([])
        self.pid = self

    def remote(self, *_: Any) -> Any:
        return self


def line(number: int) -> SampleLine:
    return SampleLine(kind="sample", sample_id=f"s{number}", sample_hash="h", limit=2, answers={})


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    samples = [Sample(f"s{i}", "t", "c", "q", "", ["r"], 2) for i in range(3)]
    requests = tuple(Request(sample, "h", 0, 2, ("dense",)) for sample in samples)
    files = {"journal": tmp_path / "j", "status": tmp_path / "status", "stop": tmp_path / "stop"}
    return Batch("m", "t", False, {"dense": None}, requests, Settings((), ()), "cpu", **files)


def drive(stream: list[Any], batch: Batch, deadline: float | None = None) -> tuple[RayPool, FakeRay, Future[int]]:
    pool = RayPool.__new__(RayPool)
    pool._ray, pool.slots, pool._stopping = FakeRay(), [Slot("actor-0", "cpu", 1)], ray_pool.threading.Event()
    pool._actors = {0: FakeActor(stream)}
    future: Future[int] = Future()
    pool._drive(0, batch, deadline, future)
    return pool, pool._ray, future


def answering(batch: Batch) -> str | None:
    assert batch.status is not None
    sample: str | None = json.loads(batch.status.read_text())["sample"]
    return sample


def records(batch: Batch) -> list[Any]:
    assert batch.journal is not None
    return Journal(batch.journal).read()


def test_records_are_journalled_here(batch: Batch) -> None:
    pool, _, future = drive(["loaded", line(0), line(1), line(2)], batch)
    assert future.result() == 3 and [record["sample_id"] for record in records(batch)] == ["s0", "s1", "s2"]
    assert 0 in pool._actors, "it takes the next batch"


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_crash_counts_against_the_current_sample(batch: Batch, done: int) -> None:
    pool, fake, future = drive(["loaded", *(line(i) for i in range(done)), ray.exceptions.ActorDiedError()], batch)
    assert isinstance(future.exception(), WorkerDied) and len(records(batch)) == done
    assert answering(batch) == f"s{done}"
    assert pool._actors == {} and len(fake.killed) == 1


def test_a_crash_while_loading_counts_against_no_sample(batch: Batch) -> None:
    _, _, future = drive([ray.exceptions.ActorDiedError()], batch)
    assert isinstance(future.exception(), WorkerDied) and answering(batch) is None


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError("a node was low on memory"),
        ray.exceptions.RaySystemError(OSError("gone")),
        ray.exceptions.NodeDiedError("its node died"),
        ray.exceptions.ObjectLostError("ref", None, ""),
        ray.exceptions.RayTaskError("answer", "trace", BrokenDeviceError("CUDA error: illegal memory access")),
    ],
)
def test_errors_of_the_cluster_and_its_devices_are_crashes(batch: Batch, error: Exception) -> None:
    pool, fake, future = drive(["loaded", line(0), error], batch)
    assert isinstance(future.exception(), WorkerDied) and pool._actors == {} and len(fake.killed) == 1


def test_a_batchs_own_error_leaves_the_actor(batch: Batch) -> None:
    pool, _, future = drive([ray.exceptions.RayTaskError("answer", "trace", UserError("no such model"))], batch)
    assert isinstance(future.exception(), UserError) and 0 in pool._actors


def test_time_runs_from_the_submission(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster without room for the actor: its start counts too."""
    pool, fake, _ = drive(["loaded"], batch)
    monkeypatch.setattr(fake, "wait", lambda refs, timeout: (time.sleep(0.01), ([], refs))[1])
    monkeypatch.setattr(fake, "remote", lambda kind: Starting(), raising=False)
    pool._actors, pool._share = {}, {}
    future = pool.submit(0, batch, 0.1)
    assert isinstance(future.exception(timeout=20), TimeoutError) and pool._actors == {} and len(fake.killed) == 1


def test_after_stop_only_the_current_sample_is_kept(batch: Batch) -> None:
    assert batch.stop is not None

    class Stopping(FakeActor):
        def remote(self, _: Batch) -> Any:
            assert batch.stop is not None
            yield "loaded"
            batch.stop.touch()  # while the first sample is in work
            yield line(0)
            yield line(1)

    pool = RayPool.__new__(RayPool)
    pool._ray, pool._stopping = FakeRay(), ray_pool.threading.Event()
    assert pool._collect(Stopping([]), batch, None) == 1
    assert pool._collect(Stopping([]), replace(batch, requests=()), None) == 0


def test_a_late_drop_does_not_end_the_slots_next_actor(batch: Batch) -> None:
    pool, fake, _ = drive(["loaded", line(0), line(1), line(2)], batch)
    old, new = pool._actors[0], FakeActor([])
    pool._actors[0] = new
    pool._drop(0, old)
    assert pool._actors == {0: new} and fake.killed == [old]
