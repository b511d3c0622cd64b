"""Which batch is answered next, and what happens to one that came back unfinished: it is queued again, or recorded as failed.

A worker crash counts against the sample it was answering. Three crashes on one sample fail that sample only. Crashes while
loading count against the model, which is given up after many of them in a row.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from benchmark.execution.jobs import UnitRun
from benchmark.execution.messages import Request, error_message
from benchmark.storage.benchmark_records import WorkerStatus
from benchmark.workers.errors import BrokenDeviceError
from sparse_attention_hub.errors import UserError

logger = logging.getLogger("benchmark.phase2")

#: Crashes on one sample after which it is recorded as failed.
MAX_CRASHES = 3
#: Crashes in a row while starting or loading, after which a model counts as impossible to load.
MAX_LOADING_CRASHES = 6


@dataclass
class QueuedBatch:
    """crashes: workers lost on its first sample; most: configurations asked at once, None = as many as fit."""

    run: UnitRun
    requests: tuple[Request, ...]
    crashes: int = 0
    most: int | None = None


class Schedule:
    """The batches that wait. timeout: seconds per unit, counted from its first batch; say: prints a line for the user."""

    def __init__(self, timeout: float, say: Callable[[str], None]) -> None:
        self.queue: deque[QueuedBatch] = deque()
        self.workers = 1
        self._timeout, self._say = timeout, say
        self._loading_crashes: dict[str, int] = {}  # model -> in a row
        self._answered: set[str] = set()  # models of which a batch came back
        self._lost_models: dict[str, str] = {}  # model -> why it cannot be run

    def next(self) -> tuple[QueuedBatch, float] | None:
        """The next batch and the seconds left for it, or None. Batches that cannot be run are recorded as failed."""
        while self.queue:
            batch = self.queue.popleft()
            run = batch.run
            if run.unit.model in self._lost_models:
                run.record_failure(batch.requests, self._lost_models[run.unit.model], "failed")
                continue
            if run.deadline is None:
                run.deadline = time.monotonic() + self._timeout
            left = run.deadline - time.monotonic()
            if left > 0:
                return batch, left
            self.timed_out(batch)
        return None

    def came_back(self, batch: QueuedBatch, *, stopped: bool) -> None:
        """A worker returned a batch. Its unanswered samples are queued again, unless the run is being stopped."""
        self._loading_crashes.pop(batch.run.unit.model, None)
        self._answered.add(batch.run.unit.model)
        left = batch.run.remaining(batch.requests)
        if left and not stopped:
            self.queue.appendleft(QueuedBatch(batch.run, left))

    def failed(self, batch: QueuedBatch, error: BaseException) -> None:
        """The batch raised an error, which it would raise again."""
        message, model = error_message(error), batch.run.unit.model
        self._say(f"{batch.run.name}: {message}")
        if isinstance(error, UserError) and model in self._answered:  # others have loaded it: this worker cannot
            if left := batch.run.remaining(batch.requests):
                self._crashed_loading(QueuedBatch(batch.run, left), message)
            return
        # The model cannot be loaded, or this process has lost its device: no other batch of the model can be run either.
        if isinstance(error, UserError | BrokenDeviceError):
            self._lost_models[model] = message
        batch.run.record_failure(batch.run.remaining(batch.requests), message, "failed")

    def crashed(self, batch: QueuedBatch, how: str, status: WorkerStatus | None) -> None:
        """A worker ended in the middle of a batch. status: the last that it wrote."""
        run, left = batch.run, batch.run.remaining(batch.requests)
        if not left:
            return
        crashes = 0 if len(left) < len(batch.requests) else batch.crashes
        if status is None or status.sample is None:
            self._crashed_loading(QueuedBatch(run, left, crashes, batch.most if crashes else None), how)
            return
        self._loading_crashes.pop(run.unit.model, None)
        if status.sample != left[0].sample.sample_id:
            self.queue.appendleft(QueuedBatch(run, left))  # the crash was on a sample that is answered
            return
        crashes += 1
        first, rest = left[:1], left[1:]
        if rest:  # in front of other units: this one's time is running
            self.queue.appendleft(QueuedBatch(run, rest))
        if crashes >= MAX_CRASHES:
            message = f"the worker ended {crashes} times on this sample, at last {how}"
            self._say(f"{run.name}: {first[0].sample.sample_id}: {message}")
            run.record_failure(first, message, "failed")
        else:
            # Where memory is short, the kernel may kill instead of refusing: the last try asks one configuration at a time.
            self.queue.appendleft(QueuedBatch(run, first, crashes, most=1 if crashes == MAX_CRASHES - 1 else None))

    def _crashed_loading(self, batch: QueuedBatch, how: str) -> None:
        """No sample was being answered."""
        model = batch.run.unit.model
        crashes = self._loading_crashes[model] = self._loading_crashes.get(model, 0) + 1
        # All workers of a machine may crash together, which is not the model's fault.
        if crashes < max(MAX_LOADING_CRASHES, MAX_CRASHES * self.workers):
            self.queue.appendleft(batch)
            return
        message = f"{crashes} times in a row a worker failed while loading the model, at last {how}"
        self._lost_models[model] = message
        batch.run.record_failure(batch.requests, message, "failed")

    def timed_out(self, batch: QueuedBatch) -> None:
        """Record all unanswered samples of a unit as timed out, those of its queued batches included."""
        run = batch.run
        waiting = [other for other in self.queue if other.run is run]
        self.queue = deque(other for other in self.queue if other.run is not run)
        run.store.poll()
        requests = run.remaining(itertools.chain(batch.requests, *(other.requests for other in waiting)))
        if requests:
            message = f"timed out: --benchmark-timeout {self._timeout:g} s passed for {run.unit.task}"
            run.record_failure(requests, message, "timeout")
            self._say(f"{run.name}: {message}, {len(requests)} samples are not answered")
            logger.warning("%s: %s", run.name, message)
