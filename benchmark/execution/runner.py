"""Phase 2: answer every sample of every (model, task) under every configuration, on all devices.

    outcome = run_benchmarks(units, settings, config_run="run_20240315_143022", notes=[])
    print(closing_table(outcome.summary))

Workers answer batches of samples and journal each sample at once; this process plans, watches, scores and writes. A worker
that crashes is replaced, and its batch is queued again; a sample that crashes its worker three times is recorded as failed.
Interrupted runs resume from their journals.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.execution.jobs import BenchmarkUnit, UnitRun, make_batches
from benchmark.execution.messages import Batch, Options, error_message
from benchmark.execution.output import UnitResults, make_summary, write_unit
from benchmark.execution.scheduler import QueuedBatch, Schedule
from benchmark.execution.worker import BatchJob, forget_model
from benchmark.progress import Progress
from benchmark.settings import Settings
from benchmark.storage.records import Failure, Summary, WorkerStatus, parse_record, to_json, write_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import fingerprint
from benchmark.workers.pools import (
    InProcessPool,
    Pool,
    ProcessPools,
    Slot,
    WorkerDied,
    add_log_file,
    has_pebble,
    plan_slots,
)
from benchmark.workers.ray_pool import RayPool
from benchmark.workers.signals import Interrupts, results_lock
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BenchmarkOutcome", "BenchmarkUnit", "run_benchmarks"]

logger = logging.getLogger("benchmark.phase2")

_TICK = 0.2


@dataclass
class BenchmarkOutcome:
    """summary: the content of benchmark_summary.json."""

    summary: Summary

    @property
    def failures(self) -> list[Failure]:
        return self.summary.failures

    @property
    def interrupted(self) -> bool:
        """Stopped by a signal before all samples were answered; the same command resumes."""
        return self.summary.interrupted


def run_benchmarks(
    units: list[BenchmarkUnit],
    settings: Settings,
    *,
    config_run: str | None = None,
    notes: Sequence[str] = (),
    failures: Sequence[Failure] = (),
    in_process: bool | None = None,
    tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
) -> BenchmarkOutcome:
    """Answer what is not yet answered, then write every result file and the summary.

    Parameters
    ----------
    units: one per (model, task), each at most once.
    config_run: name of the search run that found the configurations, for the records.
    notes, failures: notes and failures of the search, for the summary.
    in_process: answer in this process, without workers. Default: only where pebble is not installed.
    tokenizers: of all models in units, where they are loaded already.

    Raises UserError, before anything is written, for a model without a tokenizer, an unknown task, another run in the same
    results folder, or --rescore without any recorded answer.
    """
    if not units and not failures:
        raise UserError("nothing to benchmark: no (model, task) has a configuration to run; run Phase 1 first")
    twice = [unit for i, unit in enumerate(units) if any((o.model, o.task) == (unit.model, unit.task) for o in units[:i])]
    if twice:
        raise UserError(f"{twice[0].task} on {twice[0].model} is listed twice")
    loaded = dict(tokenizers) if tokenizers is not None else _load_tokenizers(units, settings)
    run = _Run(units, settings, loaded, config_run, list(notes), list(failures), in_process)
    if settings.rescore:
        run.check_recorded()
    with results_lock(settings.benchmark_results_dir):
        return run.go()


def _load_tokenizers(units: list[BenchmarkUnit], settings: Settings) -> dict[str, PreTrainedTokenizerBase]:
    from sparse_attention_hub.models import load_tokenizer

    return {
        model: load_tokenizer(model, trust_remote_code=settings.trust_remote_code)
        for model in dict.fromkeys(unit.model for unit in units)
    }


@dataclass
class _RunningBatch:
    batch: QueuedBatch
    future: Future[int]
    status: Path
    overdue: float  # time.monotonic() by which the pool should have killed the worker


class _Run:
    def __init__(
        self,
        units: list[BenchmarkUnit],
        settings: Settings,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        config_run: str | None,
        notes: list[str],
        failures: list[Failure],
        in_process: bool | None,
    ) -> None:
        self.search_failures = failures
        self.settings, self.tokenizers, self.config_run, self.notes = settings, tokenizers, config_run, notes
        self.in_process = in_process if in_process is not None else not has_pebble() and settings.ray_address is None
        self.base = settings.benchmark_results_dir
        self.scratch = self.base / ".run"
        self.slots = [] if settings.ray_address else plan_slots(settings.device, settings.max_concurrent_benchmarks)
        on_gpu = any(slot.device.startswith(("cuda", "sharded")) for slot in self.slots)
        self.device_kind = "cuda" if on_gpu or settings.device.startswith(("cuda", "sharded")) else "cpu"
        self.units = sorted(units, key=lambda unit: list(tokenizers).index(unit.model))
        self.runs: list[UnitRun] = []
        self.to_prepare: deque[UnitRun] = deque()
        self.schedule = Schedule(settings.benchmark_timeout, self._say)
        self.running: dict[int, _RunningBatch] = {}  # slot -> its batch
        self.results: dict[str, UnitResults] = {}
        self.forced: ForcedRun | None = None
        self.todo: dict[str, int] = {}
        self.interrupts = Interrupts(lambda: (self.scratch / "stop").touch(), self._worker_pids)
        self.pool: Pool | None = None
        self.progress: Progress | None = None
        self.log: Path | None = None

    # -- the run as a whole ------------------------------------------------------------------------------------------

    def check_recorded(self) -> None:
        """UserError if no unit has an answer that --rescore could score. Nothing is written."""
        problems = []
        for unit in self.units:
            try:
                UnitRun(unit, self.settings, self.device_kind).prepare(self.tokenizers[unit.model])
                return
            except UserError as error:
                problems.append(str(error))
        raise UserError(problems[0])

    def go(self) -> BenchmarkOutcome:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.log = self.base / ".logs" / f"phase2_{datetime.now():%Y%m%d_%H%M%S}.log"
        self.log.parent.mkdir(exist_ok=True)
        handler = add_log_file(self.log)
        try:
            with self.interrupts:
                self._start()
                with Progress("Phase 2", self.schedule.workers) as self.progress:
                    for note in self.notes:
                        logger.info("%s", note)
                    try:
                        self._loop()
                    finally:
                        if self.pool is not None:
                            self.pool.kill()
                    for run in self.runs:
                        self._finish(run)
                    self._show()
            return self._outcome()
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            if handler is not None:
                logging.getLogger("benchmark").removeHandler(handler)
                handler.close()

    def _start(self) -> None:
        """Make the pool, then the runs, which depend on the pool's kind of device."""
        if self.settings.rescore:
            pass
        elif self.settings.ray_address:
            self.pool = RayPool(self.settings.ray_address, self.settings.device, self.settings.max_concurrent_benchmarks)
            if any(slot.device.startswith(("cuda", "sharded")) for slot in self.pool.slots):
                self.device_kind = "cuda"
        elif self.in_process:
            slot = self.slots[0] if self.slots else Slot("worker-0", self.settings.device, 1)
            self.pool = InProcessPool(slot, self._watch, forget_model)
        else:
            self.pool = ProcessPools(self.slots, self.log)
        self.schedule.workers = len(self.pool.slots) if self.pool is not None else 1
        self.runs = [UnitRun(unit, self.settings, self.device_kind) for unit in self.units]
        if self.settings.force_benchmark and not self.settings.rescore:
            asked = [[to_json(run.shared), sorted(run.keys.items()), self.settings.max_requests] for run in self.runs]
            self.forced = ForcedRun(self.base, "--force-benchmark", fingerprint(asked))
            self.notes += self.forced.begin()
            for run in self.runs:
                run.forced = self.forced
        self.to_prepare = deque(self.runs)

    def _loop(self) -> None:
        while True:
            self._feed()
            self._submit()
            if not self.running and not self.schedule.queue and not self.to_prepare:
                return
            if self.interrupted and not self.running:
                return
            wait([entry.future for entry in self.running.values()], timeout=_TICK, return_when=FIRST_COMPLETED)
            for slot, entry in list(self.running.items()):
                if entry.future.done():
                    del self.running[slot]
                    self._settle(slot, entry)
                elif time.monotonic() > entry.overdue:
                    del self.running[slot]
                    self._renew(slot)
                    self.schedule.timed_out(entry.batch)
            self._watch()
            self._finish_done()

    def _feed(self) -> None:
        """Make the next units' samples while few batches wait, so that only a few units' samples are in memory."""
        workers = self.schedule.workers
        while self.to_prepare and not self.interrupted and (self.pool is None or len(self.schedule.queue) < 2 * workers):
            run = self.to_prepare.popleft()
            try:
                notes = run.prepare(self.tokenizers[run.unit.model])
            except Exception as error:
                run.error = error_message(error)
                logger.warning("%s cannot be run: %s", run.name, run.error)
                self._say(f"{run.name} cannot be run: {run.error}")
                continue
            self._note(notes)
            if self.settings.rescore:
                continue
            requests = run.missing()
            self.todo[run.name] = len(requests)
            logger.info("%s: %d samples, %d to answer", run.name, len(run.samples), len(requests))
            self.schedule.queue.extend(QueuedBatch(run, batch) for batch in make_batches(requests, workers))
            self._finish_done()

    def _submit(self) -> None:
        if self.pool is None:
            return
        for slot in range(len(self.pool.slots)):
            while slot not in self.running and not self.interrupted and (found := self.schedule.next()) is not None:
                self._begin(self.pool, slot, *found)

    def _begin(self, pool: Pool, slot: int, queued: QueuedBatch, left: float) -> None:
        run, worker = queued.run, pool.slots[slot]
        status = self.scratch / f"{worker.name}.json"
        status.unlink(missing_ok=True)
        batch = Batch(
            model=run.unit.model,
            task=run.unit.task,
            use_chat_template=run.task.use_chat_template,
            configs=run.configs,
            requests=queued.requests,
            options=self._options(worker),
            journal=run.folder / f"{worker.name}.jsonl",
            status=status,
            stop=self.scratch / "stop",
            most=queued.most,
        )
        # In this process `submit` answers the batch before it returns, and `_watch` looks at what is running meanwhile.
        entry = self.running[slot] = _RunningBatch(queued, Future(), status, overdue=time.monotonic() + left + 15.0)
        try:
            entry.future = pool.submit(slot, BatchJob(batch), left)
        except RuntimeError as error:  # the pool broke while idle
            logger.warning("%s: %s", worker.name, error)
            self._renew(slot)
            entry.future = pool.submit(slot, BatchJob(batch), left)

    def _options(self, slot: Slot) -> Options:
        settings = self.settings
        return Options(
            device=slot.device,
            dtype=settings.dtype,
            dense_backend=settings.dense_backend,
            attention_backend=settings.attention_backend,
            trust_remote_code=settings.trust_remote_code,
            max_context_length=settings.max_context_length,
            sparse_from=settings.sparse_from,
            micro_metrics=settings.micro_metrics,
            workers=self.schedule.workers,
        )

    # -- what comes back ---------------------------------------------------------------------------------------------

    def _settle(self, slot: int, entry: _RunningBatch) -> None:
        """Hand a batch that came back to the schedule, which decides what happens to it."""
        queued, run = entry.batch, entry.batch.run
        error = entry.future.exception()
        run.store.poll()
        if isinstance(error, TimeoutError | WorkerDied):
            self._renew(slot)
        if error is None:
            self.schedule.came_back(queued, stopped=self.interrupted)
        elif isinstance(error, TimeoutError):
            self.schedule.timed_out(queued)
        elif isinstance(error, WorkerDied):
            status = _read_status(entry.status)
            logger.warning("%s: its worker ended %s while %s", run.name, error, status.state if status else "starting")
            if not self.interrupted:
                self.schedule.crashed(queued, str(error), status)
        else:
            logger.error("%s: %s", run.name, error_message(error))
            self.schedule.failed(queued, error)

    def _renew(self, slot: int) -> None:
        if self.pool is not None:
            self.pool.renew(slot)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read what the workers have journalled, and show the progress."""
        for run in {id(entry.batch.run): entry.batch.run for entry in self.running.values()}.values():
            run.store.poll()
        self._show()

    def _show(self) -> None:
        if self.progress is None:
            return
        total = sum(self.todo.get(run.name, 0 if run.error or self.settings.rescore else run.expected()) for run in self.runs)
        left = sum(len(batch.run.remaining(batch.requests)) for batch in self._open_batches())
        left += sum(run.expected() for run in self.to_prepare if not self.settings.rescore)
        lines = [self._worker_line(slot, entry) for slot, entry in sorted(self.running.items())]
        self.progress.update(max(0, total - left), total, lines)

    def _open_batches(self) -> list[QueuedBatch]:
        return [*self.schedule.queue, *(entry.batch for entry in self.running.values())]

    def _worker_line(self, slot: int, entry: _RunningBatch) -> str:
        assert self.pool is not None
        status = _read_status(entry.status)
        starting = f"{entry.batch.run.unit.task} ({status.state if status else 'starting'})"
        return f"{self.pool.slots[slot].name}: {status.sample if status and status.sample else starting}"

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def _note(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.notes.append(note)
            self._say(note)
            logger.info("%s", note)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _finish_done(self) -> None:
        busy = {id(batch.run) for batch in self._open_batches()}
        for run in self.runs:
            if id(run) not in busy:
                self._finish(run)

    def _finish(self, run: UnitRun) -> None:
        """Score a unit, write its files, and free its samples."""
        if run.finished or not run.prepared:
            return
        run.store.poll()
        try:
            written = write_unit(run, self.config_run)
        except Exception as error:  # its answers are journalled, and the files of other units can still be written
            run.error = f"its files cannot be written: {error_message(error)}"
            logger.error("%s: %s", run.name, run.error, exc_info=error)
            self._say(f"{run.name}: {run.error}")
            written = UnitResults()
        self.results[run.name] = written
        self._note(written.notes)
        run.finished = True
        run.release()
        self._write_summary()

    def _write_summary(self) -> Summary:
        summary = make_summary(
            self.runs, self.results, self.settings, self.config_run, self.notes, self.interrupted, self.search_failures
        )
        write_record(self.base / "benchmark_summary.json", summary)
        return summary

    def _outcome(self) -> BenchmarkOutcome:
        outcome = BenchmarkOutcome(self._write_summary())
        if self.forced is not None and not self.interrupted:
            self.forced.end()
        if self.interrupted:
            print(f"\nStopped. Answers so far are kept in {self.base}; the same command resumes.", file=sys.stderr)
        return outcome

    @property
    def interrupted(self) -> bool:
        return self.interrupts.seen

    def _worker_pids(self) -> list[int]:
        return self.pool.pids() if isinstance(self.pool, ProcessPools) else []


def _read_status(path: Path) -> WorkerStatus | None:
    try:
        return parse_record(path.read_bytes(), WorkerStatus)
    except (OSError, ValueError):
        return None
