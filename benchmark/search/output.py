"""The three files that Phase 1 writes for every level: the best configuration, all trials, and all trials as CSV."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from benchmark.search.trial import RUNGS, objective_value, plain_params
from benchmark.settings import Settings, hyperparameters
from benchmark.storage.fingerprints import weights_stamp
from benchmark.storage.records import AttentionRecord, EvenBudgets, shared_fields, write_record
from benchmark.storage.results import environment, result_key, write_text
from benchmark.storage.search_records import (
    Best,
    BestConfig,
    Confirmation,
    SearchProvenance,
    Trial,
    TrialRow,
    TrialsFile,
)
from benchmark.storage.tables import table_text

if TYPE_CHECKING:
    from benchmark.search.evaluator import TraceEvaluator
    from benchmark.search.spec import StudyWork
    from benchmark.search.study import Study

#: Of a level's files. The last one is written last: where it exists, the level is complete.
SUFFIXES = ("_trials.json", "_analysis.csv", ".json")


def write_level_files(work: StudyWork, study: Study, evaluator: TraceEvaluator, seconds: float) -> None:
    """Write the three files of every level that has a best trial. seconds: how long the search took."""
    spec, settings, identity = work.study, work.settings, work.identity
    rows = [_trial_row(trial, study, identity) for trial in study.trials]
    for best in study.best():
        stem = result_key(spec.model, spec.task, best.level)
        trials = TrialsFile(
            model=spec.model,
            task=spec.task,
            masker_name=best.level,
            budget=best.budget,
            objective_function=settings.objective,
            best_trial_id=trial_id(identity, best.trial),
            rungs=list(RUNGS),
            analysis_dataframe_path=f"{stem}_analysis.csv",
            trials=rows,
        )
        write_record(work.results / f"{stem}_trials.json", trials)
        write_text(work.results / f"{stem}_analysis.csv", _analysis_csv(study, settings, identity))
        write_record(work.results / f"{stem}.json", _best_config(best, work, study, evaluator, seconds))


def trial_id(identity: str, number: int) -> str:
    return f"{identity[:8]}_{number:05d}"


def _best_config(best: Best, work: StudyWork, study: Study, evaluator: TraceEvaluator, seconds: float) -> BestConfig:
    spec, settings = work.study, work.settings
    trial = study.trials[best.trial]
    config = study.config_of(trial)
    even = study.best_even().get(best.level)
    forced, generated = trial.rungs.get(2), trial.rungs.get(3)
    measured_on = RUNGS[max(rung for rung in trial.rungs if rung <= 2)]
    confirmation = Confirmation(
        confirmed=best.confirmed,
        error_from=measured_on,
        density_from=measured_on,
        score_from=RUNGS[3] if generated is not None else None,
        samples=len(evaluator.samples),
        sample_scores=None if generated is None else generated.sample_scores,
        answers_reproduced=None if forced is None else forced.reproduced,
        dense_answer_nll=None if forced is None else forced.reference_nll,
        replay_error=trial.at_most(1).error,
    )
    measured = {
        "identity": work.identity,
        "dtype": str(evaluator.lm.dtype),
        "device": str(evaluator.lm.device),
        "dense_backend": evaluator.lm.dense_backend,
        "weights": weights_stamp(spec.model),
        "max_context_length": settings.search_max_context_length,
        "max_new_tokens": settings.search_max_new_tokens,
        "samples": [entry.sample.sample_id for entry in evaluator.samples],
        "truncated_samples": sum(entry.prompt.truncated_tokens > 0 for entry in evaluator.samples),
        "traces": [trace.key for trace in evaluator.traces],
        "layers": evaluator.layers,
        "versions": environment(),
    }
    return BestConfig(
        model=spec.model,
        task=spec.task,
        masker_name=best.level,
        sparse_config=AttentionRecord.model_validate(plain_params(config.to_dict())),
        masker_classes=[type(masker).__name__ for masker in config.masker_configs],
        hyperparams=trial.params,
        budget=best.budget,
        budget_on=settings.budget_on,
        meets_budget=best.meets_budget,
        **_figures(trial),
        even_budgets=None
        if even is None
        else EvenBudgets(trial_id=trial_id(work.identity, even.trial), **_figures(study.trials[even.trial])),
        objective=objective_value(settings.objective, trial.last.error, study.ranking.spent(trial.last)),
        search_time=seconds,
        num_trials=len(study.trials),
        failed_trials=sum(trial.status != "completed" for trial in study.trials),
        transient_failures=sum(trial.transient for trial in study.trials),
        best_trial_id=trial_id(work.identity, best.trial),
        confirmation=confirmation,
        provenance=SearchProvenance(**shared_fields(SearchProvenance, settings) | measured),
    )


def _figures(trial: Trial) -> dict[str, Any]:
    """Error, density and KV bytes on the highest rung up to the forced forward, and the score of generation; None = not measured."""
    last = trial.last if trial.rungs else None
    figures = {name: getattr(last, name, None) for name in ("error", "density", "kv_fraction")}
    return figures | {"score": trial.rungs[3].score if 3 in trial.rungs else None}


def _trial_row(trial: Trial, study: Study, identity: str) -> TrialRow:
    return TrialRow(
        trial_id=trial_id(identity, trial.number),
        config=trial.params,
        hyperparams=None if trial.status == "failed" else plain_params(hyperparameters(study.config_of(trial))),
        table=trial.table,
        status=trial.status,
        error_message=trial.error_message,
        rung=trial.reached,
        pruned_at=trial.pruned_at,
        **_figures(trial),
        figures=trial.rungs,
        seconds=trial.seconds,
    )


def _analysis_csv(study: Study, settings: Settings, identity: str) -> str:
    """One row per trial, with Ray Tune's columns; an iteration is a rung."""
    rows: list[dict[str, object]] = []
    for trial in study.trials:
        last = trial.last if trial.rungs else None
        iterations = None if trial.reached is None else trial.reached + 1
        finished = None if trial.finished is None else datetime.fromtimestamp(trial.finished)
        rows.append(
            {
                "trial_id": trial_id(identity, trial.number),
                "training_iteration": iterations,
                "combined_score": last and objective_value(settings.objective, last.error, study.ranking.spent(last)),
                **_figures(trial),
                "rung": trial.reached,
                "pruned_at": trial.pruned_at,
                "head_budgets": trial.table and trial.table.by,
                "status": trial.status,
                "time_this_iter_s": None if trial.reached is None else trial.rungs[trial.reached].seconds,
                "time_total_s": trial.seconds,
                "timestamp": trial.finished and int(trial.finished),
                "date": finished and finished.strftime("%Y-%m-%d_%H-%M-%S"),
                "done": "True",
                "iterations_since_restore": iterations,
                "time_since_restore": trial.seconds,
                **{f"config/{name}": value for name, value in sorted(trial.params.items())},
            }
        )
    return table_text(list(rows[0]), [list(row.values()) for row in rows])
