"""Phase 2: answer every sample of every (model, task) under every configuration, on all devices.

    summary = run_benchmarks(units, settings, config_run="run_20240315_143022", notes=[])
    print(closing_table(summary))

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
from benchmark.execution.messages import error_message
from benchmark.execution.output import UnitResults, make_summary, result_folder, write_unit
from benchmark.execution.scheduler import QueuedBatch, Schedule
from benchmark.execution.worker import Batch, forget_model
from benchmark.progress import Progress
from benchmark.settings import Settings
from benchmark.storage.benchmark_records import Summary, WorkerStatus
from benchmark.storage.records import Failure, parse_record, to_json, write_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import StorageError, fingerprint
from benchmark.workers.pools import InProcessPool, Pool, ProcessPools, Slot, WorkerDied, add_log_file, has_pebble, plan_slots
from benchmark.workers.ray_pool import RayPool
from benchmark.workers.signals import Interrupts, results_lock
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models.prompts import set_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BenchmarkUnit", "run_benchmarks"]

logger = logging.getLogger("benchmark.phase2")

_TICK = 0.2


def run_benchmarks(
    units: list[BenchmarkUnit],
    settings: Settings,
    *,
    config_run: str | None = None,
    notes: Sequence[str] = (),
    failures: Sequence[Failure] = (),
    in_process: bool | None = None,
    tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
) -> Summary:
    """Answer what is not yet answered, then write every result file and benchmark_summary.json. Returns the latter's content.

    Parameters
    ----------
    units: one per (model, task), each at most once.
    config_run: name of the search run that found the configurations, for the records.
    notes, failures: of the search, for the summary.
    in_process: answer in this process, without workers. Default: only if pebble is not installed.
    tokenizers: of all models in units, if they are loaded already.

    Raises UserError, before anything is written, for a model without a tokenizer, an unknown task, another run in the same
    results folder, two units or configurations that would write the same files, or --rescore without any recorded answer.
    """
    if not units and not failures:
        raise UserError("nothing to benchmark: no (model, task) has a configuration to run; run Phase 1 first")
    _check_folders(units)
    if tokenizers is None:
        from sparse_attention_hub.models import load_tokenizer

        names = dict.fromkeys(unit.model for unit in units)
        tokenizers = {name: load_tokenizer(name, trust_remote_code=settings.trust_remote_code) for name in names}
    for tokenizer in tokenizers.values():
        set_thinking(tokenizer, settings.thinking)
    if in_process is None:
        in_process = not has_pebble() and settings.ray_address is None
    run = _Run(units, settings, tokenizers, config_run, list(notes), list(failures), in_process)
    if settings.rescore:
        run.check_recorded()
    with results_lock(settings.benchmark_results_dir):
        return run.go()


def _check_folders(units: list[BenchmarkUnit]) -> None:
    """UserError if two results would have the same folder."""
    owners: dict[Path, str] = {}
    for unit in units:
        for config in unit.configs:
            name = f"{config.name} for {unit.task} on {unit.model}"
            folder = result_folder(Path(), unit, config)
            if folder in owners:
                same = "is listed twice" if owners[folder] == name else f"and {owners[folder]} would write the same files"
                raise UserError(f"{name} {same}: rename one, or run them one at a time, each with folders of its own")
            owners[folder] = name


@dataclass
class _RunningBatch:
    batch: QueuedBatch
    future: Future[int]
    status: Path
    overdue: float  # time.monotonic() by which the pool should have killed the worker


@dataclass
class _Run:
    units: list[BenchmarkUnit]
    settings: Settings
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    config_run: str | None
    notes: list[str]
    search_failures: list[Failure]
    in_process: bool

    def __post_init__(self) -> None:
        settings = self.settings
        self.base = settings.benchmark_results_dir
        self.scratch = self.base / ".run"
        self.slots = [] if settings.ray_address else plan_slots(settings.device, settings.max_concurrent_benchmarks)
        first = self.slots[0] if self.slots else Slot("worker-0", settings.device, 1)
        self.pool: Pool = InProcessPool(first, self._watch, forget_model)
        self.units = sorted(self.units, key=lambda unit: list(self.tokenizers).index(unit.model))
        self.runs: list[UnitRun] = []
        self.to_prepare: deque[UnitRun] = deque()
        self.schedule = Schedule(settings.benchmark_timeout, self._say)
        self.running: dict[int, _RunningBatch] = {}  # slot -> its batch
        self.results: dict[str, UnitResults] = {}
        self.forced: ForcedRun | None = None
        self.interrupts = Interrupts(lambda: (self.scratch / "stop").touch(), self._worker_pids)
        self.progress: Progress | None = None
        self.log: Path | None = None

    # -- the run as a whole ------------------------------------------------------------------------------------------

    def check_recorded(self) -> None:
        """UserError if no unit has an answer that --rescore could score. Nothing is written."""
        problems = []
        for unit in self.units:
            try:
                self._unit_run(unit).prepare(self.tokenizers[unit.model])
                return
            except UserError as error:
                problems.append(str(error))
        raise UserError(problems[0])

    def go(self) -> Summary:
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
                        self.pool.kill()
                    for run in self.runs:
                        self._finish(run)
                    self._show()
            return self._end()
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            if handler is not None:
                logging.getLogger("benchmark").removeHandler(handler)
                handler.close()

    def _start(self) -> None:
        """Make the pool, then the units' runs, which depend on its kind of device."""
        settings = self.settings
        if settings.ray_address and not settings.rescore:
            self.pool = RayPool(settings.ray_address, settings.device, settings.max_concurrent_benchmarks)
        elif not self.in_process and not settings.rescore:
            self.pool = ProcessPools(self.slots, self.log)
        self.schedule.workers = len(self.pool.slots)
        self.runs = [self._unit_run(unit) for unit in self.units]
        asked = [[to_json(run.shared), sorted(run.keys.items()), settings.max_requests] for run in self.runs]
        self.marker = ForcedRun(self.base, "--force-benchmark", fingerprint(asked))
        if settings.force_benchmark and not settings.rescore:
            self.forced = self.marker
            self.notes += self.forced.begin()
            for run in self.runs:
                run.forced = self.forced
        self.to_prepare = deque(self.runs)

    def _unit_run(self, unit: BenchmarkUnit) -> UnitRun:
        """With --rescore and --device auto, of the other kind of device where only that one has answered."""
        run = UnitRun(unit, self.settings, self.device_kind)
        if self.settings.rescore and self.settings.device == "auto" and not run.folder.exists():
            other = UnitRun(unit, self.settings, "cpu" if self.device_kind == "cuda" else "cuda")
            return other if other.folder.exists() else run
        return run

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
                    self.pool.renew(slot)
                    self.schedule.timed_out(entry.batch)
            self._watch()
            self._finish_done()

    def _feed(self) -> None:
        """Make the next units' samples while few batches wait, so that only a few units' samples are in memory."""
        workers = self.schedule.workers
        while self.to_prepare and not self.interrupted and len(self.schedule.queue) < 2 * workers:
            run = self.to_prepare.popleft()
            try:
                notes = run.prepare(self.tokenizers[run.unit.model])
            except Exception as error:
                run.error, run.todo = error_message(error), 0
                logger.warning("%s cannot be run: %s", run.name, run.error)
                self._say(f"{run.name} cannot be run: {run.error}")
                continue
            self._note(notes)
            requests = run.missing()
            run.todo = len(requests)
            logger.info("%s: %d samples, %d to answer", run.name, len(run.samples), len(requests))
            self.schedule.queue.extend(QueuedBatch(run, batch) for batch in make_batches(requests, workers))
            self._finish_done()

    def _submit(self) -> None:
        for slot in range(len(self.pool.slots)):
            while slot not in self.running and not self.interrupted and (found := self.schedule.next()) is not None:
                self._begin(slot, *found)

    def _begin(self, slot: int, queued: QueuedBatch, left: float) -> None:
        run, worker = queued.run, self.pool.slots[slot]
        status = self.scratch / f"{worker.name}.json"
        status.unlink(missing_ok=True)
        batch = Batch(
            model=run.unit.model,
            task=run.unit.task,
            use_chat_template=run.task.use_chat_template,
            configs=run.configs,
            requests=queued.requests,
            settings=self.settings,
            device=worker.device,
            workers=self.schedule.workers,
            most=queued.most,
            journal=run.folder / f"{worker.name}.jsonl",
            status=status,
            stop=self.scratch / "stop",
        )
        # In this process `submit` answers the batch before it returns, and `_watch` looks at what is running meanwhile.
        entry = self.running[slot] = _RunningBatch(queued, Future(), status, overdue=time.monotonic() + left + 15.0)
        entry.future = self.pool.submit(slot, batch, left)

    # -- what comes back ---------------------------------------------------------------------------------------------

    def _settle(self, slot: int, entry: _RunningBatch) -> None:
        """Hand a batch that came back to the schedule, which decides what happens to it."""
        queued, run = entry.batch, entry.batch.run
        error = entry.future.exception()
        run.store.poll()
        if isinstance(error, TimeoutError | WorkerDied):
            self.pool.renew(slot)
        if error is None:
            self.schedule.came_back(queued, stopped=self.interrupted)
        elif isinstance(error, TimeoutError):
            self.schedule.timed_out(queued)
        elif isinstance(error, WorkerDied):
            status = _read_status(entry.status)
            logger.warning("%s: its worker ended %s while %s", run.name, error, _doing(status))
            if not self.interrupted:
                self.schedule.crashed(queued, str(error), status)
        elif isinstance(error, StorageError):
            raise error  # the samples did not fail: nothing can be recorded
        else:
            logger.error("%s: %s", run.name, error_message(error))
            self.schedule.failed(queued, error)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read what the workers have journalled, and show the progress."""
        for run in {id(entry.batch.run): entry.batch.run for entry in self.running.values()}.values():
            run.store.poll()
        self._show()

    def _show(self) -> None:
        if self.progress is None:
            return
        total = sum(run.todo for run in self.runs)
        left = sum(len(batch.run.remaining(batch.requests)) for batch in self._open_batches())
        left += sum(run.todo for run in self.to_prepare)
        lines = [self._worker_line(slot, entry) for slot, entry in sorted(self.running.items())]
        self.progress.update(max(0, total - left), total, lines)

    def _open_batches(self) -> list[QueuedBatch]:
        return [*self.schedule.queue, *(entry.batch for entry in self.running.values())]

    def _worker_line(self, slot: int, entry: _RunningBatch) -> str:
        status = _read_status(entry.status)
        answering = status.sample if status else None
        return f"{self.pool.slots[slot].name}: {answering or f'{entry.batch.run.unit.task} ({_doing(status)})'}"

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

    def _end(self) -> Summary:
        if not self.interrupted and not self.settings.rescore:  # also where the flag was given to an earlier start alone
            self.marker.end()
        if self.interrupted:
            print(f"\nStopped. Answers so far are kept in {self.base}; the same command resumes.", file=sys.stderr)
        return self._write_summary()

    @property
    def device_kind(self) -> str:
        devices = [self.settings.device, *(slot.device for slot in self.slots), *(slot.device for slot in self.pool.slots)]
        return "cuda" if any(device.startswith(("cuda", "sharded")) for device in devices) else "cpu"

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


def _doing(status: WorkerStatus | None) -> str:
    return "starting" if status is None else "loading" if status.sample is None else f"answering {status.sample}"
