"""The three files that Phase 1 writes for every level: the best configuration, all trials, and all trials as CSV."""

from __future__ import annotations

import csv
import io
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.search.trial import RUNGS, objective_value, plain_params
from benchmark.settings import Settings, hyperparameters
from benchmark.storage.fingerprints import weights_stamp
from benchmark.storage.records import (
    AttentionRecord,
    Best,
    BestConfig,
    Confirmation,
    SearchProvenance,
    StudyOutcome,
    Trial,
    TrialRow,
    TrialsFile,
    write_record,
)
from benchmark.storage.results import environment, result_key, write_text

if TYPE_CHECKING:
    from benchmark.search.spec import StudySpec


def write_level_files(
    run_dir: Path, study: StudySpec, outcome: StudyOutcome, settings: Settings, identity: str
) -> list[BestConfig]:
    """Write {key}.json, {key}_trials.json and {key}_analysis.csv of every level that has a best trial; returns the bests."""
    rows = [_trial_row(trial, study, identity) for trial in outcome.trials]
    analysis = _analysis_csv(outcome.trials, settings, identity)
    written = []
    for best in outcome.best:
        stem = result_key(study.model, study.task, best.level)
        record = _best_config(best, study, outcome, settings, identity)
        trials = TrialsFile(
            model=study.model,
            task=study.task,
            masker_name=best.level,
            budget=best.budget,
            objective_function=settings.objective,
            best_trial_id=trial_id(identity, best.trial),
            rungs=list(RUNGS),
            analysis_dataframe_path=f"{stem}_analysis.csv",
            trials=rows,
        )
        write_record(run_dir / f"{stem}_trials.json", trials)
        write_text(run_dir / f"{stem}_analysis.csv", analysis)
        write_record(run_dir / f"{stem}.json", record)  # last: where it exists, the level is complete
        written.append(record)
    return written


def trial_id(identity: str, number: int) -> str:
    return f"{identity[:8]}_{number:05d}"


def _best_config(best: Best, study: StudySpec, outcome: StudyOutcome, settings: Settings, identity: str) -> BestConfig:
    trial = next(trial for trial in outcome.trials if trial.number == best.trial)
    config = study.space().build(trial.params)
    forced, generated = trial.rungs.get(2), trial.rungs.get(3)
    measured_on = RUNGS[max(rung for rung in trial.rungs if rung <= 2)]
    confirmation = Confirmation(
        confirmed=best.confirmed,
        error_from=measured_on,
        density_from=measured_on,
        score_from=RUNGS[3] if generated is not None else None,
        samples=len(outcome.samples),
        sample_scores=None if generated is None else generated.sample_scores,
        answers_reproduced=None if forced is None else forced.reproduced,
        dense_answer_nll=None if forced is None else forced.reference_nll,
        replay_error=trial.at_most(1).error,
    )
    provenance = SearchProvenance(
        identity=identity,
        seed=settings.seed,
        sparse_from=settings.sparse_from,
        objective=settings.objective,
        dtype=outcome.model_dtype,
        device=outcome.device,
        attention_backend=settings.attention_backend,
        dense_backend=outcome.dense_backend,
        weights=weights_stamp(study.model),
        max_context_length=settings.search_max_context_length,
        max_new_tokens=settings.search_max_new_tokens,
        num_samples=settings.num_samples,
        samples=outcome.samples,
        truncated_samples=outcome.truncated_samples,
        traces=outcome.traces,
        layers=outcome.layers,
        versions=environment(),
    )
    error = trial.last.error
    assert error is not None
    return BestConfig(
        model=study.model,
        task=study.task,
        masker_name=best.level,
        sparse_config=AttentionRecord.model_validate(plain_params(config.to_dict())),
        masker_classes=[type(masker).__name__ for masker in config.masker_configs],
        hyperparams=trial.params,
        budget=best.budget,
        meets_budget=best.meets_budget,
        error=error,
        density=trial.last.density,
        kv_fraction=trial.last.kv_fraction,
        score=None if generated is None else generated.score,
        objective=objective_value(settings.objective, error, trial.last.density),
        search_time=outcome.seconds,
        num_trials=len(outcome.trials),
        failed_trials=sum(trial.status != "completed" for trial in outcome.trials),
        passing_failures=sum(trial.passing for trial in outcome.trials),
        best_trial_id=trial_id(identity, best.trial),
        confirmation=confirmation,
        provenance=provenance,
    )


def _trial_row(trial: Trial, study: StudySpec, identity: str) -> TrialRow:
    last = trial.last if trial.rungs else None
    return TrialRow(
        trial_id=trial_id(identity, trial.number),
        config=trial.params,
        hyperparams=None if trial.status == "failed" else plain_params(hyperparameters(study.space().build(trial.params))),
        status=trial.status,
        error_message=trial.error_message,
        rung=trial.reached,
        pruned_at=trial.pruned_at,
        error=None if last is None else last.error,
        density=None if last is None else last.density,
        kv_fraction=None if last is None else last.kv_fraction,
        score=trial.rungs[3].score if 3 in trial.rungs else None,
        figures=trial.rungs,
        seconds=trial.seconds,
    )


def _analysis_csv(trials: list[Trial], settings: Settings, identity: str) -> str:
    """One row per trial, with Ray Tune's columns; an iteration is a rung."""
    names = sorted({name for trial in trials for name in trial.params})
    columns = ["trial_id", "training_iteration", "combined_score", "error", "density", "score", "rung", "pruned_at", "status"]
    columns += ["time_this_iter_s", "time_total_s", "timestamp", "date", "done", "iterations_since_restore"]
    columns += ["time_since_restore", *(f"config/{name}" for name in names)]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        iterations = None if trial.reached is None else trial.reached + 1
        row: dict[str, Any] = {
            "trial_id": trial_id(identity, trial.number),
            "training_iteration": iterations,
            "rung": trial.reached,
            "pruned_at": trial.pruned_at,
            "status": trial.status,
            "time_total_s": trial.seconds,
            "done": True,
            "iterations_since_restore": iterations,
            "time_since_restore": trial.seconds,
        }
        if trial.reached is not None:
            figures = trial.last
            row |= {"error": figures.error, "density": figures.density, "time_this_iter_s": trial.rungs[trial.reached].seconds}
            row["combined_score"] = objective_value(settings.objective, figures.error, figures.density)
        if 3 in trial.rungs:
            row["score"] = trial.rungs[3].score
        if trial.finished is not None:
            row["timestamp"] = int(trial.finished)
            row["date"] = datetime.fromtimestamp(trial.finished).strftime("%Y-%m-%d_%H-%M-%S")
        writer.writerow(row | {f"config/{name}": value for name, value in trial.params.items()})
    return out.getvalue()
