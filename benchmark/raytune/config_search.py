"""Phase 1: one Ray Tune trial = one study over one (model, task, masker combination).

`run_search` reuses what finished before, runs the rest under one Tuner and writes three files a level. Workers journal every
evaluation, so a killed search goes on where it was when started again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.ray_start import start_ray
from benchmark.results import result_key
from benchmark.settings import Settings

from .search_files import write_level_files
from .study_spec import StudySpec, journal_path, outcome_path, study_id


@dataclass
class SearchOutcome:
    """run_dir holds every level's files; failures: study -> why; interrupted: stopped by the user."""

    run_dir: Path
    levels: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_search(studies: list[StudySpec], settings: Settings, *, run_name: str, report: Any) -> SearchOutcome:
    """Search what was not found before, and write the run's folder. `report(event, study, progress)` shows progress."""
    run_dir = settings.optimal_configs_dir / run_name
    outcome = SearchOutcome(run_dir)
    run_dir.mkdir(parents=True, exist_ok=False)
    waiting: list[StudySpec] = []
    for study in studies:
        found = None if settings.force_search else find_finished(study, settings, exclude=run_dir)
        if found is None:
            waiting.append(study)
            continue
        for level in study.levels:
            stem = result_key(study.model, study.task, level.name)
            for suffix in (".json", "_trials.json", "_analysis.csv"):
                shutil.copy2(found / f"{stem}{suffix}", run_dir / f"{stem}{suffix}")
            outcome.levels.append(json.loads((run_dir / f"{stem}.json").read_text()))
        report("reused", study, {"from": found.name})
    if waiting:
        _search(waiting, settings, outcome, report)
    return outcome


def find_finished(study: StudySpec, settings: Settings, exclude: Path) -> Path | None:
    """The newest run folder in which every level of this study is finished under the same identity."""
    identity = study.identity(settings)
    stems = [result_key(study.model, study.task, level.name) for level in study.levels]
    runs = sorted(settings.optimal_configs_dir.glob("run_*"), reverse=True)
    for run in runs:
        if run == exclude:
            continue
        try:
            records = [json.loads((run / f"{stem}.json").read_text()) for stem in stems]
            whole = all((run / f"{stem}{suffix}").exists() for stem in stems for suffix in ("_trials.json", "_analysis.csv"))
        except (OSError, ValueError):
            continue
        if whole and all(isinstance(r, dict) and r.get("provenance", {}).get("identity") == identity for r in records):
            return run
    return None


def _prepare_tune() -> None:
    """Settings that Ray Tune and its workers read when they start."""
    # Threads that wait do not spin: on a machine shared with others, spinning costs a worker ten times its work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def _search(studies: list[StudySpec], settings: Settings, outcome: SearchOutcome, report: Any) -> None:
    _prepare_tune()
    start_ray(settings.ray_address)
    import ray
    from ray import tune

    from .search_worker import SearchProgress, StudyTrainable

    have = ray.cluster_resources()
    report("note", None, {"text": f"Ray {ray.__version__}: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"})
    folder = settings.ray_results_dir.resolve()
    _put_aside(folder / "search_runs")
    work = {
        study_id(study): {
            "study": study,
            "settings": settings,
            "identity": study.identity(settings),
            "journals": str(folder / "journals"),
            "traces": str(folder / "traces"),
        }
        for study in studies
    }
    if settings.force_search:
        for entry in work.values():
            journal_path(Path(entry["journals"]), entry["study"], entry["identity"]).unlink(missing_ok=True)
    cpus, gpus = _resources(settings)
    callback = SearchProgress({study_id(study): study for study in studies}, report)
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
        ray.shutdown()
    for study in studies:
        _collect(study, work[study_id(study)], settings, outcome, callback)
    # Ray answers Ctrl-C by returning normally with what there is.
    outcome.interrupted = outcome.interrupted or callback.interrupted()


def _stop(number: int, frame: Any) -> None:
    """SIGTERM stops a search as Ctrl-C does."""
    raise KeyboardInterrupt


def _collect(study: StudySpec, work: dict[str, Any], settings: Settings, outcome: SearchOutcome, callback: Any) -> None:
    """Write the files of a finished study, or say why there are none."""
    path = outcome_path(Path(work["journals"]), study, work["identity"])
    name = study_id(study)
    if name not in callback.finished or not path.exists():
        outcome.failures[name] = callback.errors.get(name, "was not finished")
        return
    record = json.loads(path.read_text())
    if record.get("error"):
        outcome.failures[name] = record["error"]
        return
    levels = write_level_files(outcome.run_dir, study, record, settings, work["identity"])
    found = {level["masker_name"] for level in levels}
    missing = [level.name for level in study.levels if level.name not in found]
    if missing:
        first = next((t["error_message"] for t in record["trials"] if t["error_message"]), "no trial was evaluated")
        outcome.failures[name] = f"nothing found for {', '.join(missing)}: {first}"
    outcome.levels.extend(levels)


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


def new_run_name(folder: Path) -> str:
    """run_YYYYMMDD_HHMMSS, not taken yet."""
    while True:
        name = datetime.now().strftime("run_%Y%m%d_%H%M%S")
        if not (folder / name).exists():
            return name
        time.sleep(1.0)
