"""The sides of Phase 1 that are Ray Tune's: a Trainable that runs one study a trial, and the driver's progress callback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune

from benchmark.search.spec import StudySpec, run_study, write_outcome
from benchmark.settings import Settings
from benchmark.workers.errors import BROKEN_DEVICE, BrokenDeviceError
from sparse_attention_hub.errors import UserError

#: One model and one evaluator a process: studies come ordered by model and task.
_HELD: dict[str, Any] = {}


class StudyTrainable(tune.Trainable):
    """config["study"] names an entry of `work`, the arguments of `_run`. A step is one trace recorded or one batch evaluated."""

    def setup(self, config: dict[str, Any], work: dict[str, dict[str, Any]]) -> None:
        self._work = work
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        entry = self._work[config["study"]]
        self._steps = self._run(**entry)

    def step(self) -> dict[str, Any]:
        progress = next(self._steps, None)
        if progress is None:
            return {"finished": True, "progress": self._last, tune.result.DONE: True}
        self._last = progress
        return {"finished": False, "progress": progress}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the journal is written before a step returns, and a fresh run of the study reads it."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The study starts from its journal."""

    _last: dict[str, Any] = {}

    def _run(
        self, study: StudySpec, settings: Settings, journal: Path, outcome: Path, traces: Path
    ) -> Iterator[dict[str, Any]]:
        started = time.time()
        outcome.unlink(missing_ok=True)
        evaluator = search = None
        try:
            yield {"stage": "loading"}
            evaluator = _evaluator(study, settings, traces)
            if not evaluator.traces:
                size = evaluator.trace_bytes / 1e6
                stage = f"{len(evaluator.samples)} traces, {size:.0f} MB at most: recording what is not there yet"
                yield {"stage": stage, "tell": True}
                for line in evaluator.record():
                    yield {"stage": line}
            search = run_study(study, settings, evaluator, journal)
            yield from search.run()
            write_outcome(outcome, study, search, evaluator, time.time() - started, None)
        except UserError as error:
            write_outcome(outcome, study, search, evaluator, time.time() - started, str(error))
        except BrokenDeviceError as error:
            print(f"{error}; this worker ends and a fresh one goes on", file=sys.stderr, flush=True)
            os._exit(BROKEN_DEVICE)  # an error would leave the process to the next study


class SearchProgress(tune.Callback):
    """Passes on what studies report, has the files of each written as soon as it is finished (`collect`, which says what failed
    in it as a whole), and keeps which of them ended how."""

    def __init__(
        self,
        studies: dict[str, StudySpec],
        report: Callable[[str, StudySpec | None, dict[str, Any]], None],
        collect: Callable[[str], str | None],
    ) -> None:
        self._studies, self._report, self._collect = studies, report, collect
        self.finished: set[str] = set()
        self.errors: dict[str, str] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.config["study"]
        progress = result.get("progress") or {}
        self._report("progress", self._studies[name], progress)
        if result.get("finished"):
            self.finished.add(name)
            problem = self._collect(name)
            if problem is None:
                self._report("finished", self._studies[name], progress)
            else:
                self._report("failed", self._studies[name], {"error": problem})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["study"]
        self.errors[name] = _last_line(trial.error_file) or "its worker died"
        self._report("failed", self._studies[name], {"error": self.errors[name]})

    def interrupted(self) -> bool:
        """True if the run ended with studies that neither finished nor failed."""
        return len(self.finished | self.errors.keys()) < len(self._studies)


def _last_line(path: str | None) -> str | None:
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()] if path else []
    except OSError:
        return None
    return lines[-1].strip() if lines else None


def _evaluator(spec: StudySpec, settings: Settings, traces: Path) -> Any:
    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import load_model

    if _HELD.get("model_id") != spec.model:
        _HELD.clear()
        _HELD["model"] = load_model(
            spec.model,
            device=settings.device,
            dtype=settings.dtype,
            dense_backend=settings.dense_backend,
            trust_remote_code=settings.trust_remote_code,
        )
        _HELD["model_id"] = spec.model
    if _HELD.get("task") != spec.task:
        _HELD.pop("evaluator", None)
        _HELD["evaluator"] = TraceEvaluator(_HELD["model"], spec.task, settings, traces)
        _HELD["task"] = spec.task
    return _HELD["evaluator"]
