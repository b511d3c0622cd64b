"""Phase 1: one Ray Tune trial = one study over one (model, task, masker combination).

`run_search` copies the studies that an earlier run finished, runs the others under one Tuner, and writes three files per level
as soon as its study has finished. Workers journal every evaluation, so an interrupted search resumes when it is started again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.search.output import write_level_files
from benchmark.search.spec import Report, StudySpec, journal_path, outcome_path, study_id
from benchmark.settings import Settings
from benchmark.storage.records import BestConfig, StudyOutcome, read_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import fingerprint, result_key, write_text
from benchmark.workers.pools import visible_gpus
from benchmark.workers.ray_start import start_ray
from sparse_attention_hub.errors import UserError

#: (model, task) -> a hash of its tuning samples
SampleKeys = dict[tuple[str, str], str]


@dataclass
class SearchOutcome:
    """run_dir: the folder with every level's files. levels: their best configurations. failures: study -> problem.
    failed_trials: study -> how many of its trials failed or timed out, where any did. interrupted: stopped by the user.
    forced: to be ended when the whole run has."""

    run_dir: Path
    levels: list[BestConfig] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    failed_trials: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    forced: ForcedRun | None = None


def run_search(
    studies: list[StudySpec], settings: Settings, samples: SampleKeys, *, run_name: str, report: Report
) -> SearchOutcome:
    """Search the studies that no earlier run finished, and write the run's folder.

    samples: `evaluator.samples_key` of every (model, task). UserError, and nothing is written, if the Ray cluster cannot be
    reached or another search uses --ray-results-dir.
    """
    identities = {study_id(s): s.identity(settings, samples[s.model, s.task]) for s in studies}
    forced: ForcedRun | None = None
    if settings.force_search:
        forced = ForcedRun(settings.ray_results_dir, "--force-search", fingerprint(sorted(identities.items())))
    found: dict[str, Path] = {}
    for study in studies:
        folder = find_finished(study, settings.optimal_configs_dir, identities[study_id(study)], forced)
        if folder is not None:
            found[study_id(study)] = folder
    waiting = [study for study in studies if study_id(study) not in found]
    with ExitStack() as held:
        if waiting:
            held.enter_context(_ray(settings))
            held.enter_context(_alone(settings.ray_results_dir))
        for note in forced.begin() if forced is not None else []:
            report.note(note)
        outcome = SearchOutcome(_make_run_folder(settings.optimal_configs_dir, run_name), forced=forced)
        for study in studies:
            if study_id(study) in found:
                _copy_levels(study, found[study_id(study)], outcome)
                report.reused(study, found[study_id(study)].name)
        if waiting:
            _search(waiting, settings, samples, identities, forced, outcome, report)
    return outcome


def find_finished(study: StudySpec, folder: Path, identity: str, forced: ForcedRun | None = None) -> Path | None:
    """The newest run folder in which every level of this study is finished under this identity, without transient failures.
    forced: of a --force-search run, which reuses only files that it wrote itself before it was interrupted."""
    stems = [result_key(study.model, study.task, level.name) for level in study.levels]
    for run in sorted(folder.glob("run_*"), reverse=True):
        complete = all((run / f"{stem}{suffix}").is_file() for stem in stems for suffix in ("_trials.json", "_analysis.csv"))
        if complete and (forced is None or all(forced.is_own(run / f"{stem}.json") for stem in stems)):
            try:
                levels = [read_record(run / f"{stem}.json", BestConfig, "search again") for stem in stems]
            except UserError:
                continue
            if all(level.provenance.identity == identity and not level.passing_failures for level in levels):
                return run
    return None


def _copy_levels(study: StudySpec, source: Path, outcome: SearchOutcome) -> None:
    for level in study.levels:
        stem = result_key(study.model, study.task, level.name)
        for suffix in ("_trials.json", "_analysis.csv", ".json"):  # the last one marks the level as complete
            copied, found = outcome.run_dir / f"{stem}{suffix}", source / f"{stem}{suffix}"
            write_text(copied, found.read_text(encoding="utf-8"))
            # Keeps the time of the search: an interrupted --force-search must not take the copy for its own.
            os.utime(copied, (found.stat().st_atime, found.stat().st_mtime))
        best = read_record(outcome.run_dir / f"{stem}.json", BestConfig, "search again")
        outcome.levels.append(best)
        if best.failed_trials:
            outcome.failed_trials[study_id(study)] = best.failed_trials


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """Ray runs inside; it is shut down afterwards if it was started here. A local Ray sees only the GPU of --device."""
    _prepare_tune()
    local = settings.ray_address in (None, "local")
    with _visible(settings.device if local else "auto"):
        started = start_ray(settings.ray_address)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


@contextmanager
def _visible(device: str) -> Iterator[None]:
    """Inside, child processes see only the GPU that "cuda:N" names, or all of them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[int(device.removeprefix("cuda:"))]
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif device.startswith("cuda:"):
            del os.environ["CUDA_VISIBLE_DEVICES"]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder: two searches in it would rename each other's artefacts and write the same journals."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--ray-results-dir {folder}: another search is running in it; wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _prepare_tune() -> None:
    """Set the environment variables that Ray Tune and its workers read at their start."""
    # Waiting threads sleep instead of spinning, which took up to ten times the CPU time of the work on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def _search(
    studies: list[StudySpec],
    settings: Settings,
    samples: SampleKeys,
    identities: dict[str, str],
    forced: ForcedRun | None,
    outcome: SearchOutcome,
    report: Report,
) -> None:
    import ray
    from ray import tune

    from benchmark.search.trainable import SearchProgress, StudyTrainable, StudyWork

    have = ray.cluster_resources()
    report.note(f"Ray {ray.__version__}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")
    folder = settings.ray_results_dir.resolve()
    _put_aside(folder / "search_runs")
    by_name = {study_id(study): study for study in studies}
    # A worker sees only the GPU that Ray assigns to it.
    at_worker = replace(settings, device="cuda") if settings.device.startswith("cuda:") else settings
    work = {
        name: StudyWork(
            study,
            at_worker,
            journal=journal_path(folder, study, study.journal_identity(settings, samples[study.model, study.task])),
            outcome=outcome_path(folder, study, identities[name]),
            traces=folder / "traces",
        )
        for name, study in by_name.items()
    }
    if forced is not None:
        for entry in work.values():
            if not forced.is_own(entry.journal):
                entry.journal.unlink(missing_ok=True)
    cpus, gpus = _resources(settings)

    def collect(study: StudySpec) -> str | None:
        name = study_id(study)
        return _collect(study, work[name].outcome, settings, identities[name], outcome)

    callback = SearchProgress(by_name, report, collect)
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
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        tuner.fit()
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    for name in by_name:
        if name not in callback.finished:
            outcome.failures[name] = callback.errors.get(name, "was not finished")
    # On Ctrl-C, `fit` may also return normally.
    outcome.interrupted = outcome.interrupted or callback.interrupted()


def _stop(number: int, frame: Any) -> None:
    """SIGTERM stops a search as Ctrl-C does."""
    raise KeyboardInterrupt


def _collect(study: StudySpec, path: Path, settings: Settings, identity: str, outcome: SearchOutcome) -> str | None:
    """Write the files of a finished study. Returns why it failed as a whole, or None."""
    name = study_id(study)
    try:
        result = read_record(path, StudyOutcome, "all machines must see --ray-results-dir")
    except UserError as error:
        outcome.failures[name] = f"result of its worker: {error}"
        return outcome.failures[name]
    if result.error:
        outcome.failures[name] = result.error
        return result.error
    levels = write_level_files(outcome.run_dir, study, result, settings, identity)
    outcome.levels.extend(levels)
    failed = [trial for trial in result.trials if trial.status != "completed"]
    if failed:
        outcome.failed_trials[name] = len(failed)
    missing = [level.name for level in study.levels if level.name not in {best.masker_name for best in levels}]
    if missing:
        first = next((trial.error_message for trial in failed), "no trial was evaluated")
        outcome.failures[name] = f"nothing found for {', '.join(missing)}: {first}"
    return outcome.failures.get(name)


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
    """Rename the folder of an earlier run's Ray artefacts."""
    if folder.exists():
        stamp = datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        target = folder.with_name(f"{folder.name}_{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = folder.with_name(f"{folder.name}_{stamp}_{number}")
        folder.rename(target)


def _make_run_folder(folder: Path, name: str) -> Path:
    """A new folder of this name, or of a later one if another run has created it meanwhile."""
    while True:
        try:
            (folder / name).mkdir(parents=True)
            return folder / name
        except FileExistsError:
            name = new_run_name(folder)


def new_run_name(folder: Path) -> str:
    """run_YYYYMMDD_HHMMSS of a folder that does not exist yet."""
    while True:
        name = datetime.now().strftime("run_%Y%m%d_%H%M%S")
        if not (folder / name).exists():
            return name
        time.sleep(1.0)
