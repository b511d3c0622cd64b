"""Phase 1: one Ray Tune trial = one study over one (model, task, masker combination).

`run_search` copies the studies that an earlier run finished, runs the others under one Tuner, and writes three files per level
as soon as its study has finished. Workers journal every evaluation, so an interrupted search resumes when it is started again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from benchmark.search.output import SUFFIXES
from benchmark.search.spec import Report, StudySpec, StudyWork, study_id
from benchmark.settings import Settings
from benchmark.storage.records import read_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import fingerprint, write_text
from benchmark.storage.runs import list_runs, mark_run
from benchmark.storage.search_records import BestConfig
from benchmark.workers.pools import visible_gpus
from benchmark.workers.ray_start import start_ray
from benchmark.workers.signals import ends_within, results_lock
from sparse_attention_hub.errors import UserError

#: (model, task) -> a hash of its tuning samples
SampleKeys = dict[tuple[str, str], str]
#: Free bytes below which a search that broke off is said to have found the disk full.
LEAST_FREE = 2**20
#: Seconds from a SIGTERM to the end of the program, at most.
SIGTERM_SECONDS = 30.0
#: What Ray Tune and its workers read at their start. Waiting threads sleep instead of spinning, which took up to ten times the
#: CPU time of the work on a shared machine.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


@dataclass
class SearchOutcome:
    """run_dir: the folder with every level's files. levels: their best configurations. failures: study -> problem.
    failed_trials: study -> how many of its trials failed or timed out, where any did. interrupted: the user stopped the
    search; unfinished: its studies that another start resumes. forced: marker to be ended when the whole run has."""

    run_dir: Path
    levels: list[BestConfig] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    failed_trials: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    unfinished: list[str] = field(default_factory=list)
    forced: ForcedRun | None = None


def run_search(
    studies: list[StudySpec], settings: Settings, samples: SampleKeys, *, run_name: str, report: Report
) -> SearchOutcome:
    """Search the studies that no earlier run finished, and write the run's folder.

    samples: `samples.samples_key` of every (model, task). UserError, and nothing is written, if the Ray cluster cannot be
    reached or another search uses --ray-results-dir.
    """
    work = {study_id(study): _work(study, settings, samples[study.model, study.task]) for study in studies}
    forced: ForcedRun | None = None
    if settings.force_search:
        run = fingerprint(sorted((name, entry.identity) for name, entry in work.items()))
        forced = ForcedRun(settings.ray_results_dir, "--force-search", run)
    found = {
        name: find_finished(entry.study, settings.optimal_configs_dir, entry.identity, forced) for name, entry in work.items()
    }
    waiting = {name: entry for name, entry in work.items() if found[name] is None}
    with ExitStack() as held:
        if waiting:
            held.enter_context(ends_within(SIGTERM_SECONDS))
            held.enter_context(_ray(settings))
            held.enter_context(results_lock(settings.ray_results_dir, "--ray-results-dir"))
        for note in forced.begin() if forced is not None else []:
            report.note(note)
        outcome = SearchOutcome(_make_run_folder(settings.optimal_configs_dir, run_name), forced=forced)
        for name, source in found.items():
            if source is not None:
                _copy_levels(work[name].study, source, outcome)
                report.reused(work[name].study, source.name)
        if waiting:
            _search(waiting, settings, outcome, report)
    return outcome


def _work(study: StudySpec, settings: Settings, samples: str) -> StudyWork:
    folder = settings.ray_results_dir.resolve()
    journal, identity = study.journal_identity(settings, samples), study.identity(settings, samples)
    # A worker sees only the GPU that Ray assigns to it.
    at_worker = replace(settings, device="cuda") if settings.device.startswith("cuda:") else settings
    return StudyWork(
        study,
        at_worker,
        identity,
        journal=folder / "journals" / f"{study_id(study)}-{journal}.jsonl",
        results=folder / "results" / identity,
        traces=folder / "traces",
    )


def find_finished(study: StudySpec, folder: Path, identity: str, forced: ForcedRun | None = None) -> Path | None:
    """The newest run folder in which every level of this study is finished under this identity, without transient failures.
    forced: of a --force-search run, which reuses only files that it wrote itself before it was interrupted."""
    stems = study.stems()
    for run in list_runs(folder):
        complete = all((run / f"{stem}{suffix}").is_file() for stem in stems for suffix in SUFFIXES)
        if complete and (forced is None or all(forced.is_own(run / f"{stem}.json") for stem in stems)):
            try:
                levels = [read_record(run / f"{stem}.json", BestConfig, "search again") for stem in stems]
            except UserError:
                continue
            if all(level.provenance.identity == identity and not level.transient_failures for level in levels):
                return run
    return None


def _copy_levels(study: StudySpec, source: Path, outcome: SearchOutcome) -> int:
    """Copy the files of the study's levels into the run's folder. Returns the number of levels found."""
    stems = [stem for stem in study.stems() if (source / f"{stem}.json").exists()]
    for stem in stems:
        for suffix in SUFFIXES:
            copied, found = outcome.run_dir / f"{stem}{suffix}", source / f"{stem}{suffix}"
            write_text(copied, found.read_text(encoding="utf-8"))
            # Keeps the time of the search: an interrupted --force-search must not take the copy for its own.
            os.utime(copied, (found.stat().st_atime, found.stat().st_mtime))
        best = read_record(outcome.run_dir / f"{stem}.json", BestConfig, "search again")
        outcome.levels.append(best)
        if best.failed_trials:
            outcome.failed_trials[study_id(study)] = best.failed_trials
    return len(stems)


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """Ray runs inside; it is shut down afterwards if it was started here. A local Ray sees only the GPU of --device."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if settings.ray_address in (None, "local") and settings.device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[int(settings.device.removeprefix("cuda:"))]
    try:
        started = start_ray(settings.ray_address)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def _search(work: dict[str, StudyWork], settings: Settings, outcome: SearchOutcome, report: Report) -> None:
    import ray
    from ray import tune

    from benchmark.search.trainable import SearchProgress, StudyTrainable

    for name in ("ray.tune", "ray.train", "ray.air"):  # they print tracebacks of what `callback` records, one line each
        logging.getLogger(name).setLevel(logging.CRITICAL)
    have = ray.cluster_resources()
    report.note(f"Ray {ray.__version__}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")
    folder = settings.ray_results_dir.resolve()
    _put_aside(folder / "search_runs")
    for entry in work.values():
        if outcome.forced is not None and not outcome.forced.is_own(entry.journal):
            entry.journal.unlink(missing_ok=True)
    cpus, gpus = _resources(settings)

    callback = SearchProgress(work, report, partial(_collect, outcome))
    trainable = tune.with_resources(tune.with_parameters(StudyTrainable, work=work), {"cpu": cpus, "gpu": gpus})
    tuner = tune.Tuner(
        trainable,
        param_space={"study": tune.grid_search(list(work))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            num_samples=1,
            trial_name_creator=lambda trial: f"search_{trial.config['study']}",
            trial_dirname_creator=lambda trial: f"search_{trial.config['study']}",
        ),
        run_config=tune.RunConfig(
            name="search_runs",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=1),
            callbacks=[callback],
            verbose=0,
        ),
    )

    def stop(*_: object) -> None:
        callback.interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, stop)
    try:
        tuner.fit()
    except KeyboardInterrupt:
        outcome.interrupted = True
    except Exception:
        if shutil.disk_usage(folder).free < LEAST_FREE:  # Ray cannot write its own files, and fails in many ways
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before[0])  # Tune leaves a handler that stops nothing
        signal.signal(signal.SIGTERM, before[1])
    outcome.failures |= callback.errors
    # On Ctrl-C, `fit` may also return normally.
    outcome.unfinished = [name for name in work if name not in callback.finished | callback.errors.keys()]
    outcome.interrupted |= callback.interrupted or bool(outcome.unfinished)


def _collect(outcome: SearchOutcome, work: StudyWork, problem: str | None) -> str | None:
    """Take over the files of a finished study. problem: why it failed, as its worker knows. Returns that or another one."""
    try:
        found = _copy_levels(work.study, work.results, outcome)
        if not found and problem is None:
            problem = f"{work.results} has no result of its worker: all machines must see --ray-results-dir"
    except (OSError, UserError) as error:
        problem = f"result of its worker: {error}"
    if problem is not None:
        outcome.failures[study_id(work.study)] = problem
    return problem


def _resources(settings: Settings) -> tuple[float, float]:
    """(CPUs, GPUs) of one study. A GPU is requested only where one exists, since Ray would wait for it indefinitely."""
    import ray

    have = ray.cluster_resources()
    if settings.device != "cpu" and have.get("GPU", 0) >= 1:
        return 1.0, 1.0
    # Concurrent studies on one thread each use a CPU best; at most four per machine, since each one loads the model.
    largest = max((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    return max(1.0, largest // 4), 0.0


def _put_aside(folder: Path) -> None:
    """Rename the folder of an earlier run's Ray artefacts: two runs must not mix in it."""
    if folder.exists():
        stamp = datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y%m%d_%H%M%S_%f")
        folder.rename(folder.with_name(f"{folder.name}_{stamp}"))


def _make_run_folder(folder: Path, name: str) -> Path:
    """A new folder of this name, or of a later one if another run has created it meanwhile."""
    try:
        (folder / name).mkdir(parents=True)
    except FileExistsError:
        return _make_run_folder(folder, new_run_name(folder))
    mark_run(folder / name)
    return folder / name


def new_run_name(folder: Path) -> str:
    """run_YYYYMMDD_HHMMSS of a folder that does not exist yet."""
    while (folder / (name := datetime.now().strftime("run_%Y%m%d_%H%M%S"))).exists():
        time.sleep(1.0)
    return name
