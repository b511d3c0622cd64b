"""Ray Tune's part of Phase 1: a Trainable that runs one study per Ray Tune trial, and the driver's progress callback."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray import tune

from benchmark.plugins import load_plugins
from benchmark.search.output import write_level_files
from benchmark.search.spec import Report, StudySpec, StudyWork
from benchmark.search.study import Study
from benchmark.search.trial import Progress
from benchmark.storage.results import Journal
from benchmark.workers.errors import BROKEN_DEVICE, BrokenDeviceError
from benchmark.workers.limits import memory_limit
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.base import masker_class

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from sparse_attention_hub.models import LanguageModel


class StudyTrainable(tune.Trainable):
    """Runs the study that config["study"] names in `work`. A step records one trace or evaluates one batch."""

    def setup(self, config: dict[str, str], work: dict[str, StudyWork]) -> None:  # type: ignore[override]
        self._work = work
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, str]) -> bool:
        self._steps = self._run(self._work[new_config["study"]])
        self._last = Progress("loading")
        self._problem: str | None = None
        return True

    def step(self) -> dict[str, object]:
        progress = next(self._steps, None)
        self._last = progress or self._last
        finished = progress is None
        return {"finished": finished, "progress": self._last, "problem": self._problem, tune.result.DONE: finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: a step's evaluations are in the journal before it returns, and a new start reads them."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: the study resumes from its journal."""

    def _run(self, work: StudyWork) -> Iterator[Progress]:
        """Run a study and write its files. A UserError is the study's failure; a broken device ends the process."""
        spec, settings = work.study, work.settings
        started = time.time()
        shutil.rmtree(work.results, ignore_errors=True)
        try:
            yield self._last
            load_plugins(settings.plugin)
            evaluator = _evaluator(work)
            if not evaluator.traces:
                size = f"{len(evaluator.samples)} traces, at most {evaluator.trace_bytes / 1e6:.0f} MB"
                yield Progress(f"{size}: recording those that do not exist yet", announce=True)
                for line in evaluator.record(_observed(spec)):
                    yield Progress(line)
            study = Study(
                spec.space(),
                list(spec.levels),
                evaluator,
                Journal(work.journal),
                num_samples=settings.num_samples,
                timeout=settings.search_timeout,
                seed=settings.seed,
                objective=settings.objective,
                budget_on=settings.budget_on,
                head_budgets=settings.head_budgets,
            )
            with memory_limit(evaluator.lm.device):
                yield from study.run()
        except UserError as error:
            self._problem = str(error)
            return
        except BrokenDeviceError as error:
            print(f"{error}; this worker exits and a new one resumes the study", file=sys.stderr, flush=True)
            os._exit(BROKEN_DEVICE)  # after an exception Ray would reuse this process for the next study
        write_level_files(work, study, evaluator, time.time() - started + study.known_seconds)
        self._problem = study.problem()


def _observed(spec: StudySpec) -> frozenset[str]:
    """What the study's configurations choose by, of the contexts' queries."""
    configs = [config for level in spec.levels for config in level.template.masker_configs]
    return frozenset(part for config in configs for part in masker_class(config).observes)


class SearchProgress(tune.Callback):
    """Reports the progress of studies and collects each one as soon as it finishes.

    collect: takes a finished study's work and the problem that its worker met, and returns why the study failed, or None.
    finished: names of studies whose worker ended. errors: name -> problem of those whose worker failed. interrupted: whether
    a signal stopped the run.
    """

    def __init__(
        self, work: dict[str, StudyWork], report: Report, collect: Callable[[StudyWork, str | None], str | None]
    ) -> None:
        self._work, self._report, self._collect = work, report, collect
        self.finished: set[str] = set()
        self.errors: dict[str, str] = {}
        self.interrupted = False

    def setup(self, *args: Any, **info: Any) -> None:
        """Note Ctrl-C before Tune's own handler, whose flag Tune no longer reads once the last study has ended."""
        stop_tune = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            if callable(stop_tune):
                stop_tune(number, frame)

        signal.signal(signal.SIGINT, on_interrupt)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        work, progress = self._work[trial.config["study"]], result["progress"]
        self._report.progress(work.study, progress)
        if result["finished"]:
            self.finished.add(trial.config["study"])
            problem = self._collect(work, result["problem"])
            if problem is None:
                self._report.finished(work.study, progress)
            else:
                self._report.failed(work.study, problem)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["study"]
        self.errors[name] = _last_line(trial.error_file) or "its worker died"
        self._report.failed(self._work[name].study, self.errors[name])


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
