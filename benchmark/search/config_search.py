"""Phase 1: one Ray Tune trial = one study over one (model, task, masker combination).

`run_search` reuses what finished before, runs the rest under one Tuner and writes three files a level as soon as its study is
finished. Workers journal every evaluation, so a killed search goes on where it was when started again.
"""

from __future__ import annotations

import json
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
from benchmark.search.spec import StudySpec, journal_path, outcome_path, study_id
from benchmark.settings import Settings
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import fingerprint, result_key, write_text
from benchmark.workers.pools import visible_gpus
from benchmark.workers.ray_start import start_ray
from sparse_attention_hub.errors import UserError


@dataclass
class SearchOutcome:
    """run_dir holds every level's files; failures: study -> why; failed_trials: study -> how many of its trials failed or timed
    out, where any did; interrupted: stopped by the user."""

    run_dir: Path
    levels: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    failed_trials: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    forced: ForcedRun | None = None  # to be ended when the whole run has


def run_search(studies: list[StudySpec], settings: Settings, *, run_name: str, report: Any) -> SearchOutcome:
    """Search what was not found before, and write the run's folder. `report(event, study, progress)` shows progress.

    UserError, and nothing is written, if the Ray cluster cannot be reached or another search uses --ray-results-dir.
    """
    samples = _sample_keys(studies, settings)
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
            report("note", None, {"text": note})
        outcome = SearchOutcome(_make_run_folder(settings.optimal_configs_dir, run_name), forced=forced)
        for study in studies:
            if study_id(study) in found:
                _copy_levels(study, found[study_id(study)], outcome)
                report("reused", study, {"from": found[study_id(study)].name})
        if waiting:
            _search(waiting, settings, samples, identities, forced, outcome, report)
    return outcome


def _sample_keys(studies: list[StudySpec], settings: Settings) -> dict[tuple[str, str], str]:
    """(model, task) -> what identifies its tuning samples. Needs the tokenizers, not the models."""
    from benchmark.search.evaluator import samples_key, tuning_samples
    from sparse_attention_hub.models import load_tokenizer

    tokenizers: dict[str, Any] = {}
    keys: dict[tuple[str, str], str] = {}
    for study in studies:
        if study.model not in tokenizers:
            tokenizers[study.model] = load_tokenizer(study.model, trust_remote_code=settings.trust_remote_code)
        if (study.model, study.task) not in keys:
            samples = tuning_samples(tokenizers[study.model], study.task, settings)
            keys[study.model, study.task] = samples_key(samples)
    return keys


def find_finished(study: StudySpec, folder: Path, identity: str, forced: ForcedRun | None = None) -> Path | None:
    """The newest run folder in which every level of this study is finished under this identity, and no trial failed by a fault
    that may have passed. A forced search takes only what it found itself, before it was interrupted."""
    stems = [result_key(study.model, study.task, level.name) for level in study.levels]
    for run in sorted(folder.glob("run_*"), reverse=True):
        try:
            whole = all((run / f"{stem}{suffix}").exists() for stem in stems for suffix in ("_trials.json", "_analysis.csv"))
            if whole and (forced is None or all(forced.is_own(run / f"{stem}.json") for stem in stems)):
                records = [json.loads((run / f"{stem}.json").read_text()) for stem in stems]
                if all(_identity(record) == identity and not record.get("passing_failures") for record in records):
                    return run
        except (OSError, ValueError, RecursionError):
            continue
    return None


def _identity(record: Any) -> Any:
    """The identity in a level's record, None in JSON that is none."""
    for key in ("provenance", "identity"):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _copy_levels(study: StudySpec, source: Path, outcome: SearchOutcome) -> None:
    for level in study.levels:
        stem = result_key(study.model, study.task, level.name)
        for suffix in ("_trials.json", "_analysis.csv", ".json"):  # the last one says that the level is whole
            copied, found = outcome.run_dir / f"{stem}{suffix}", source / f"{stem}{suffix}"
            write_text(copied, found.read_text(encoding="utf-8"))
            os.utime(copied, (found.stat().st_atime, found.stat().st_mtime))  # when it was found, not when it was copied
        record = json.loads((outcome.run_dir / f"{stem}.json").read_text())
        outcome.levels.append(record)
        if record["failed_trials"]:
            outcome.failed_trials[study_id(study)] = record["failed_trials"]


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """Ray is there inside; ended afterwards if it was started here. Started here, it knows only the GPU that was asked for."""
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
    """Inside, this process's children see of the GPUs the one that "cuda:N" names, or all."""
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
    """No other search uses the folder inside: one would move the other's artefacts aside, and both write its journals."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--ray-results-dir {folder}: another search is running in it; wait for it, or give this one a folder of its own"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _prepare_tune() -> None:
    """Settings that Ray Tune and its workers read when they start."""
    # Threads that wait do not spin: on a machine shared with others, spinning costs a worker ten times its work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def _search(
    studies: list[StudySpec],
    settings: Settings,
    samples: dict[tuple[str, str], str],
    identities: dict[str, str],
    forced: ForcedRun | None,
    outcome: SearchOutcome,
    report: Any,
) -> None:
    import ray
    from ray import tune

    from benchmark.search.trainable import SearchProgress, StudyTrainable

    have = ray.cluster_resources()
    report("note", None, {"text": f"Ray {ray.__version__}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"})
    folder = settings.ray_results_dir.resolve()
    _put_aside(folder / "search_runs")
    by_name = {study_id(study): study for study in studies}
    # A worker sees the GPU that Ray gives it and no other.
    at_worker = replace(settings, device="cuda") if settings.device.startswith("cuda:") else settings
    work: dict[str, dict[str, Any]] = {
        name: {
            "study": study,
            "settings": at_worker,
            "journal": journal_path(folder, study, study.journal_identity(settings, samples[study.model, study.task])),
            "outcome": outcome_path(folder, study, identities[name]),
            "traces": folder / "traces",
        }
        for name, study in by_name.items()
    }
    if forced is not None:
        for entry in work.values():
            if not forced.is_own(entry["journal"]):
                entry["journal"].unlink(missing_ok=True)
    cpus, gpus = _resources(settings)

    def collect(name: str) -> str | None:
        return _collect(by_name[name], work[name]["outcome"], settings, identities[name], outcome)

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
    # Ray answers Ctrl-C by returning normally with what there is.
    outcome.interrupted = outcome.interrupted or callback.interrupted()


def _stop(number: int, frame: Any) -> None:
    """SIGTERM stops a search as Ctrl-C does."""
    raise KeyboardInterrupt


def _collect(study: StudySpec, path: Path, settings: Settings, identity: str, outcome: SearchOutcome) -> str | None:
    """Write the files of a finished study; what failed in it as a whole."""
    name = study_id(study)
    if not path.exists():
        problem = f"its worker left nothing in {path}: all machines must see --ray-results-dir"
        outcome.failures[name] = problem
        return problem
    record = json.loads(path.read_text())
    if record["error"]:
        outcome.failures[name] = record["error"]
        return str(record["error"])
    levels = write_level_files(outcome.run_dir, study, record, settings, identity)
    outcome.levels.extend(levels)
    failed = [trial for trial in record["trials"] if trial["status"] != "completed"]
    if failed:
        outcome.failed_trials[name] = len(failed)
    missing = [level.name for level in study.levels if level.name not in {found["masker_name"] for found in levels}]
    if missing:
        first = next((trial["error_message"] for trial in failed), "no trial was evaluated")
        outcome.failures[name] = f"nothing found for {', '.join(missing)}: {first}"
    return outcome.failures.get(name)


def _resources(settings: Settings) -> tuple[float, float]:
    """(CPUs, GPUs) of one study. A GPU is asked for only where there is one: Ray would wait for it for ever."""
    import ray

    have = ray.cluster_resources()
    if settings.device != "cpu" and have.get("GPU", 0) >= 1:
        return 1.0, 1.0
    # Side by side on one thread each, studies wait for nothing; more than four of them would hold as many models.
    largest = max((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]), default=1.0)
    return max(1.0, largest // 4), 0.0


def _put_aside(folder: Path) -> None:
    """An earlier run's Ray artefacts keep a folder of their own."""
    if folder.exists():
        stamp = datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
        target = folder.with_name(f"{folder.name}_{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = folder.with_name(f"{folder.name}_{stamp}_{number}")
        folder.rename(target)


def _make_run_folder(folder: Path, name: str) -> Path:
    """A new folder of this name, or of a later one if another run took it meanwhile."""
    while True:
        try:
            (folder / name).mkdir(parents=True)
            return folder / name
        except FileExistsError:
            name = new_run_name(folder)


def new_run_name(folder: Path) -> str:
    """run_YYYYMMDD_HHMMSS, not taken yet."""
    while True:
        name = datetime.now().strftime("run_%Y%m%d_%H%M%S")
        if not (folder / name).exists():
            return name
        time.sleep(1.0)
