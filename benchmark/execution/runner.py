"""Phase 2: every configuration of a (model, task) on every sample, on all devices; nothing that was answered is ever
lost.

    outcome = run_benchmarks(units, settings, config_run="run_20240315_143022", notes=[])
    print(closing_table(outcome.summary))

Workers answer blocks of samples and journal each sample at once; this process plans, watches, scores and writes. A
worker that dies is replaced and its block goes on; a block that kills its worker three times without getting on is
recorded as failed. Started again after whatever end, a run goes on from its journals.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.execution.jobs import BenchmarkUnit, UnitRun, make_blocks
from benchmark.execution.messages import Block, Options, failure
from benchmark.execution.output import make_summary, write_unit
from benchmark.execution.scheduler import Schedule, Work
from benchmark.execution.worker import BlockJob, forget_model
from benchmark.progress import Progress
from benchmark.report.table import closing_table
from benchmark.settings import Settings
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import fingerprint, write_json
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

__all__ = ["BenchmarkOutcome", "BenchmarkUnit", "closing_table", "run_benchmarks"]

logger = logging.getLogger("benchmark.phase2")

_TICK = 0.2


@dataclass
class BenchmarkOutcome:
    """summary: what benchmark_summary.json holds. failures: its failure records. interrupted: stopped by a signal
    before all was answered; starting the same command again goes on."""

    summary: dict[str, Any]
    failures: list[dict[str, Any]]
    interrupted: bool


def run_benchmarks(
    units: list[BenchmarkUnit],
    settings: Settings,
    *,
    config_run: str | None = None,
    notes: Sequence[str] = (),
    failures: Sequence[dict[str, Any]] = (),
    in_process: bool | None = None,
) -> BenchmarkOutcome:
    """Run what is not yet answered, then write every result file and the summary.

    failures: records of what failed in the search before, for the summary. in_process: answer in this process, without
    workers; None = only where pebble is not installed. Raises UserError, before anything is written, for a model without
    a tokenizer, an unknown task, another run in the same results folder, or --rescore without any recorded answer.
    """
    if not units and not failures:
        raise UserError("nothing to benchmark: no (model, task) has a configuration to run; run Phase 1 first")
    twice = [unit for i, unit in enumerate(units) if any((o.model, o.task) == (unit.model, unit.task) for o in units[:i])]
    if twice:
        raise UserError(f"{twice[0].task} on {twice[0].model} is listed twice")
    tokenizers = _load_tokenizers(units, settings)
    run = _Run(units, settings, tokenizers, config_run, list(notes), list(failures), in_process)
    if settings.rescore:
        run.check_recorded()
    with results_lock(settings.benchmark_results_dir):
        return run.go()


def _load_tokenizers(units: list[BenchmarkUnit], settings: Settings) -> dict[str, Any]:
    from sparse_attention_hub.models import load_tokenizer

    return {
        model: load_tokenizer(model, trust_remote_code=settings.trust_remote_code)
        for model in dict.fromkeys(unit.model for unit in units)
    }


@dataclass
class _InWork:
    work: Work
    future: Future[int]
    status: Path
    overdue: float | None = None  # when the worker should have been killed at the latest


class _Run:
    def __init__(
        self,
        units: list[BenchmarkUnit],
        settings: Settings,
        tokenizers: dict[str, Any],
        config_run: str | None,
        notes: list[str],
        failures: list[dict[str, Any]],
        in_process: bool | None,
    ) -> None:
        self.earlier_failures = failures
        self.settings, self.tokenizers, self.config_run, self.notes = settings, tokenizers, config_run, notes
        self.in_process = in_process if in_process is not None else not has_pebble() and settings.ray_address is None
        self.base = settings.benchmark_results_dir
        self.scratch = self.base / ".run"
        self.slots = [] if settings.ray_address else plan_slots(settings.device, settings.max_concurrent_benchmarks)
        on_gpu = any(slot.device.startswith(("cuda", "sharded")) for slot in self.slots)
        self.place = "cuda" if on_gpu or settings.device.startswith(("cuda", "sharded")) else "cpu"
        by_model = sorted(units, key=lambda unit: list(tokenizers).index(unit.model))
        self.runs: list[UnitRun] = []
        self.units = by_model
        self.to_prepare: deque[UnitRun] = deque()
        self.schedule = Schedule(settings.benchmark_timeout, self._say)
        self.in_work: dict[int, _InWork] = {}
        self.results: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
        self.forced: ForcedRun | None = None
        self.todo: dict[str, int] = {}
        self.interrupts = Interrupts(lambda: (self.scratch / "stop").touch(), self._worker_pids)
        self.pool: Pool | None = None
        self.progress: Progress | None = None
        self.log: Path | None = None

    # -- the whole of it ---------------------------------------------------------------------------------------------

    def check_recorded(self) -> None:
        """UserError if no unit has an answer that --rescore could score. Nothing is written."""
        problems = []
        for unit in self.units:
            try:
                UnitRun(unit, self.settings, self.place).prepare(self.tokenizers[unit.model])
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
                workers = len(self.pool.slots) if self.pool is not None else 1
                with Progress("Phase 2", workers) as self.progress:
                    for note in self.notes:
                        logger.info("%s", note)
                    try:
                        self._loop()
                    finally:
                        self._stop_workers()
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
        """Make the pool: the runs depend on what kind of device it has."""
        if self.settings.rescore:
            pass
        elif self.settings.ray_address:
            ray_pool = RayPool(self.settings.ray_address, self.settings.device, self.settings.max_concurrent_benchmarks)
            self.place = "cuda" if any(s.device.startswith(("cuda", "sharded")) for s in ray_pool.slots) else self.place
            self.pool = ray_pool
        elif self.in_process:
            slot = self.slots[0] if self.slots else Slot("worker-0", self.settings.device, 1)
            self.pool = InProcessPool(slot, self._watch, forget_model)
        else:
            self.pool = ProcessPools(self.slots, self.log)
        self.schedule.workers = len(self.pool.slots) if self.pool is not None else 1
        self.runs = [UnitRun(unit, self.settings, self.place) for unit in self.units]
        if self.settings.force_benchmark and not self.settings.rescore:
            asked = [[run.shared, sorted(run.keys.items()), self.settings.max_requests] for run in self.runs]
            self.forced = ForcedRun(self.base, "--force-benchmark", fingerprint(asked))
            self.notes += self.forced.begin()
            for run in self.runs:
                run.forced = self.forced
        self.to_prepare = deque(self.runs)

    def _loop(self) -> None:
        while True:
            self._feed()
            self._submit()
            if not self.in_work and not self.schedule.queue and not self.to_prepare:
                return
            if self.interrupted and not self.in_work:
                return
            wait([entry.future for entry in self.in_work.values()], timeout=_TICK, return_when=FIRST_COMPLETED)
            for slot, entry in list(self.in_work.items()):
                if entry.future.done():
                    del self.in_work[slot]
                    self._settle(slot, entry)
                elif entry.overdue is not None and time.monotonic() > entry.overdue:
                    del self.in_work[slot]
                    self._renew(slot)
                    self.schedule.timed_out(entry.work)
            self._watch()
            self._finish_done()

    def _feed(self) -> None:
        """Make samples of the next units while few blocks wait; only a few units' samples are in memory at a time."""
        workers = self.schedule.workers
        while self.to_prepare and not self.interrupted and (self.pool is None or len(self.schedule.queue) < 2 * workers):
            run = self.to_prepare.popleft()
            try:
                notes = run.prepare(self.tokenizers[run.unit.model])
            except Exception as error:
                run.error = failure(error)["error_message"]
                logger.warning("%s cannot be run: %s", run.name, run.error)
                self._say(f"{run.name} cannot be run: {run.error}")
                continue
            self._note(notes)
            if self.settings.rescore:
                continue
            requests = run.missing()
            self.todo[run.name] = len(requests)
            logger.info("%s: %d samples, %d to answer", run.name, len(run.samples), len(requests))
            self.schedule.queue.extend(Work(run, block) for block in make_blocks(requests, workers))
            self._finish_done()

    def _submit(self) -> None:
        if self.pool is None:
            return
        for slot in range(len(self.pool.slots)):
            while slot not in self.in_work and not self.interrupted and (found := self.schedule.next()) is not None:
                self._begin(slot, *found)

    def _begin(self, slot: int, work: Work, left: float) -> None:
        assert self.pool is not None
        run, place = work.run, self.pool.slots[slot]
        status = self.scratch / f"{place.name}.json"
        status.unlink(missing_ok=True)
        block = Block(
            model=run.unit.model,
            task=run.unit.task,
            use_chat_template=run.task.use_chat_template,
            configs=run.configs,
            requests=work.requests,
            options=self._options(place),
            journal=run.folder / f"{place.name}.jsonl",
            status=status,
            stop=self.scratch / "stop",
            most=work.most,
        )
        self.in_work[slot] = _InWork(work, Future(), status, overdue=time.monotonic() + left + 15.0)
        try:
            future = self.pool.submit(slot, BlockJob(block), left)
        except RuntimeError as error:  # the pool broke while idle
            logger.warning("%s: %s", place.name, error)
            self._renew(slot)
            future = self.pool.submit(slot, BlockJob(block), left)
        if slot in self.in_work:
            self.in_work[slot].future = future

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

    def _settle(self, slot: int, entry: _InWork) -> None:
        """Hand a block that came back to the schedule, which knows what becomes of it."""
        work, run = entry.work, entry.work.run
        error = entry.future.exception()
        run.store.poll()
        if isinstance(error, TimeoutError | WorkerDied):
            self._renew(slot)
        if error is None:
            self.schedule.came_back(work, stopped=self.interrupted)
        elif isinstance(error, TimeoutError):
            self.schedule.timed_out(work)
        elif isinstance(error, WorkerDied):
            state = _read_status(entry.status)
            logger.warning("%s: its worker ended %s while %s", run.name, error, state.get("state", "starting"))
            if not self.interrupted:
                self.schedule.died(work, str(error), state)
        else:
            logger.error("%s: %s", run.name, failure(error)["error_message"])
            self.schedule.failed(work, error)

    def _renew(self, slot: int) -> None:
        if self.pool is not None:
            self.pool.renew(slot)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read what the workers journalled since the last look, and show it."""
        for run in {id(entry.work.run): entry.work.run for entry in self.in_work.values()}.values():
            run.store.poll()
        self._show()

    def _show(self) -> None:
        if self.progress is None:
            return
        total = sum(self.todo.get(run.name, 0 if run.error or self.settings.rescore else run.expected()) for run in self.runs)
        left = sum(len(run.remaining(work.requests)) for run, work in self._open_work())
        open_todo = total - left - sum(run.expected() for run in self.to_prepare if not self.settings.rescore)
        lines = [self._worker_line(slot) for slot in range(len(self.pool.slots))] if self.pool is not None else []
        self.progress.update(max(0, open_todo), total, lines)

    def _open_work(self) -> Iterator[tuple[UnitRun, Work]]:
        for work in self.schedule.queue:
            yield work.run, work
        for entry in self.in_work.values():
            yield entry.work.run, entry.work

    def _worker_line(self, slot: int) -> str:
        assert self.pool is not None
        entry = self.in_work.get(slot)
        if entry is None:
            return ""
        state = _read_status(entry.status)
        name = self.pool.slots[slot].name
        what = state.get("sample") or f"{entry.work.run.unit.task} ({state.get('state', 'starting')})"
        return f"{name}: {what}"

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
        busy = {id(run) for run, _ in self._open_work()}
        for run in self.runs:
            if run.prepared and not run.finished and id(run) not in busy:
                self._finish(run)

    def _finish(self, run: UnitRun) -> None:
        """Score a unit, write its files, and let its samples go."""
        if run.finished or not run.prepared:
            return
        run.store.poll()
        try:
            results, failures, notes = write_unit(run, self.config_run)
        except Exception as error:  # its answers are journalled, and the others' files are still to be written
            run.error = f"its files cannot be written: {failure(error)['error_message']}"
            logger.error("%s: %s", run.name, run.error, exc_info=error)
            self._say(f"{run.name}: {run.error}")
            results, failures, notes = [], [], []
        for result in results:
            found = run.unit.provenance.get(result["configuration"], {})
            result["meets_budget"] = found.get("meets_budget")
            result["provenance"] = found
            result.pop("failures")
        self.results[run.name] = (results, failures)
        self._note(notes)
        run.finished = True
        run.release()
        write_json(self.base / "benchmark_summary.json", self._summary())

    def _summary(self) -> dict[str, Any]:
        return make_summary(
            self.runs, self.results, self.settings, self.config_run, self.notes, self.interrupted, self.earlier_failures
        )

    def _outcome(self) -> BenchmarkOutcome:
        summary = self._summary()
        write_json(self.base / "benchmark_summary.json", summary)
        if self.forced is not None and not self.interrupted:
            self.forced.end()
        if self.interrupted:
            print(
                f"\nStopped. What is answered is kept in {self.base}; the same command goes on from there.",
                file=sys.stderr,
            )
        return BenchmarkOutcome(summary, summary["failures"], self.interrupted)

    @property
    def interrupted(self) -> bool:
        return self.interrupts.seen

    def _worker_pids(self) -> list[int]:
        return self.pool.pids() if isinstance(self.pool, ProcessPools) else []

    def _stop_workers(self) -> None:
        if self.pool is not None:
            self.pool.kill()


def _read_status(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
