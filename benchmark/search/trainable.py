"""Ray Tune's part of Phase 1: a Trainable that runs one study per Ray Tune trial, and the driver's progress callback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from benchmark.search.spec import Report, StudySpec, make_study, write_failure, write_outcome
from benchmark.search.trial import Progress
from benchmark.settings import Settings
from benchmark.workers.errors import BROKEN_DEVICE, BrokenDeviceError
from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import LanguageModel


@dataclass(frozen=True)
class StudyWork:
    """What a worker needs to run a study. journal, outcome: files that it writes. traces: a folder."""

    study: StudySpec
    settings: Settings
    journal: Path
    outcome: Path
    traces: Path


class StudyTrainable(tune.Trainable):
    """Runs the study that config["study"] names in `work`. A step records one trace or evaluates one batch."""

    def setup(self, config: dict[str, Any], work: dict[str, StudyWork]) -> None:  # type: ignore[override]
        self._work = work
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._steps = _run(self._work[config["study"]])
        self._last = Progress("loading")

    def step(self) -> dict[str, Any]:
        progress = next(self._steps, None)
        if progress is None:
            return {"finished": True, "progress": self._last, tune.result.DONE: True}
        self._last = progress
        return {"finished": False, "progress": progress}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: a step's evaluations are in the journal before it returns, and a new start reads them."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: the study resumes from its journal."""


def _run(work: StudyWork) -> Iterator[Progress]:
    """Run a study and write its outcome. A UserError is written as the study's failure; a broken device ends the process."""
    started = time.time()
    work.outcome.unlink(missing_ok=True)
    try:
        yield Progress("loading")
        evaluator = _evaluator(work)
        if not evaluator.traces:
            size = f"{len(evaluator.samples)} traces, at most {evaluator.trace_bytes / 1e6:.0f} MB"
            yield Progress(f"{size}: recording those that do not exist yet", announce=True)
            for line in evaluator.record():
                yield Progress(line)
        search = make_study(work.study, work.settings, evaluator, work.journal)
        yield from search.run()
        write_outcome(work.outcome, work.study, search, evaluator, time.time() - started)
    except UserError as error:
        write_failure(work.outcome, work.study, time.time() - started, str(error))
    except BrokenDeviceError as error:
        print(f"{error}; this worker exits and a new one resumes the study", file=sys.stderr, flush=True)
        os._exit(BROKEN_DEVICE)  # after an exception Ray would reuse this process for the next study


class SearchProgress(tune.Callback):
    """Reports the progress of studies and collects each one as soon as it finishes.

    collect: writes the files of a study; returns why it failed as a whole, or None. finished: names of studies whose worker
    ended. errors: name -> problem of those whose worker failed.
    """

    def __init__(self, studies: dict[str, StudySpec], report: Report, collect: Callable[[StudySpec], str | None]) -> None:
        self._studies, self._report, self._collect = studies, report, collect
        self.finished: set[str] = set()
        self.errors: dict[str, str] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name, progress = trial.config["study"], result["progress"]
        study = self._studies[name]
        self._report.progress(study, progress)
        if result["finished"]:
            self.finished.add(name)
            problem = self._collect(study)
            if problem is None:
                self._report.finished(study, progress)
            else:
                self._report.failed(study, problem)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["study"]
        self.errors[name] = _last_line(trial.error_file) or "its worker died"
        self._report.failed(self._studies[name], self.errors[name])

    def interrupted(self) -> bool:
        """Whether the run ended with studies that neither finished nor failed."""
        return len(self.finished | self.errors.keys()) < len(self._studies)


def _last_line(path: str | None) -> str | None:
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()] if path else []
    except OSError:
        return None
    return lines[-1].strip() if lines else None


#: The model and evaluator of this process, by what they are for. Studies are ordered by model and task, so one of each is kept.
_models: dict[str, LanguageModel] = {}
_evaluators: dict[tuple[str, str], TraceEvaluator] = {}


def _evaluator(work: StudyWork) -> TraceEvaluator:
    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import load_model

    study, settings = work.study, work.settings
    if (study.model, study.task) not in _evaluators:
        _evaluators.clear()  # frees its memory before the next one is made
        if study.model not in _models:
            _models.clear()
            _models[study.model] = load_model(
                study.model,
                device=settings.device,
                dtype=settings.dtype,
                dense_backend=settings.dense_backend,
                trust_remote_code=settings.trust_remote_code,
            )
        _evaluators[study.model, study.task] = TraceEvaluator(_models[study.model], study.task, settings, work.traces)
    return _evaluators[study.model, study.task]
