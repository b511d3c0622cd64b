"""What is to be answered next, and what becomes of a block that came back unfinished: it goes on, or is recorded as failed.

A worker's death is laid to the sample in work, if there was one. Three deaths on one sample fail it and nobody else; deaths
before a sample was in work are laid to the model, which is given up after many of them in a row.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmark.execution.jobs import UnitRun
from benchmark.execution.messages import Request, failure
from benchmark.workers.errors import BrokenDeviceError
from sparse_attention_hub.errors import UserError

logger = logging.getLogger("benchmark.phase2")

#: Deaths of workers after which a sample that they never got past is recorded as failed.
MAX_DEATHS = 3
#: Deaths in a row while starting or loading, after which a model counts as impossible to load.
MAX_START_DEATHS = 6


@dataclass
class Work:
    """A block waiting or in work. deaths: workers lost on its first sample without getting past it; most: configurations asked
    at once, None = as many as fit."""

    run: UnitRun
    requests: tuple[Request, ...]
    deaths: int = 0
    most: int | None = None


class Schedule:
    """The blocks that wait. timeout: seconds a unit may take from its first block on; say: tells the user."""

    def __init__(self, timeout: float, say: Callable[[str], None]) -> None:
        self.queue: deque[Work] = deque()
        self.workers = 1
        self._timeout, self._say = timeout, say
        self._start_deaths: dict[str, int] = {}  # model -> in a row
        self._lost_models: dict[str, str] = {}  # model -> why nothing of it can be run

    def next(self) -> tuple[Work, float] | None:
        """The next block and the seconds left for it; None if there is none. What cannot be run is recorded on the way."""
        while self.queue:
            work = self.queue.popleft()
            run = work.run
            if run.unit.model in self._lost_models:
                run.record_failure(work.requests, self._lost_models[run.unit.model], "failed")
                continue
            if run.deadline is None:
                run.deadline = time.monotonic() + self._timeout
            left = run.deadline - time.monotonic()
            if left > 0:
                return work, left
            self.timed_out(work)
        return None

    def came_back(self, work: Work, *, stopped: bool) -> None:
        """A worker returned a block; what it left of it goes on, unless the run is being stopped."""
        self._start_deaths.pop(work.run.unit.model, None)
        left = work.run.remaining(work.requests)
        if left and not stopped:
            self.queue.appendleft(Work(work.run, left))

    def failed(self, work: Work, error: BaseException) -> None:
        """A block's own error: it would fail again."""
        message = failure(error)["error_message"]
        self._say(f"{work.run.name}: {message}")
        # The model cannot be loaded, or this very process has lost its device: no other block of it can be run either.
        if isinstance(error, UserError | BrokenDeviceError):
            self._lost_models[work.run.unit.model] = message
        work.run.record_failure(work.run.remaining(work.requests), message, "failed")

    def died(self, work: Work, how: str, state: dict[str, Any]) -> None:
        """A worker ended in the middle of a block. state: the last that it told, {"state": ..., "sample": ...}."""
        run, left = work.run, work.run.remaining(work.requests)
        if not left:
            return
        deaths = 0 if len(left) < len(work.requests) else work.deaths
        if state.get("state") != "answering":
            self._died_starting(Work(run, left, deaths, work.most if deaths else None), how)
            return
        self._start_deaths.pop(run.unit.model, None)
        if state.get("sample") != left[0].sample.sample_id:
            self.queue.appendleft(Work(run, left))  # it had got on: nothing is held against the sample now in work
            return
        deaths += 1
        first, rest = left[:1], left[1:]
        if deaths >= MAX_DEATHS:
            message = f"the worker ended {deaths} times on this sample, at last {how}"
            self._say(f"{run.name}: {first[0].sample.sample_id}: {message}")
            run.record_failure(first, message, "failed")
        else:
            # Where memory is short, a kernel may kill instead of refusing: the last try asks one by one.
            self.queue.appendleft(Work(run, first, deaths, most=1 if deaths == MAX_DEATHS - 1 else None))
        if rest:  # its neighbours go on without it
            self.queue.append(Work(run, rest))

    def _died_starting(self, work: Work, how: str) -> None:
        """The block had not begun: its samples are not to blame."""
        model = work.run.unit.model
        deaths = self._start_deaths[model] = self._start_deaths.get(model, 0) + 1
        # Workers that share a machine may die together: one such blow is not the model's fault.
        if deaths < max(MAX_START_DEATHS, MAX_DEATHS * self.workers):
            self.queue.appendleft(work)
            return
        message = f"the worker ended {deaths} times in a row while loading the model, at last {how}"
        self._lost_models[model] = message
        work.run.record_failure(work.requests, message, "failed")

    def timed_out(self, work: Work) -> None:
        """Record what a unit did not get done in its time, with everything of it that still waits."""
        run = work.run
        waiting = [other for other in self.queue if other.run is run]
        self.queue = deque(other for other in self.queue if other.run is not run)
        run.store.poll()
        requests = run.remaining(itertools.chain(work.requests, *(other.requests for other in waiting)))
        if requests:
            message = f"timed out: --benchmark-timeout {self._timeout:g} s passed for {run.unit.task}"
            run.record_failure(requests, message, "timeout")
            self._say(f"{run.name}: {message}, {len(requests)} samples are not answered")
            logger.warning("%s: %s", run.name, message)
