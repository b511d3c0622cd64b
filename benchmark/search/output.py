"""The three files Phase 1 writes for every level: the best configuration, every trial, and one row a trial as CSV."""

from __future__ import annotations

import csv
import io
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.search.trial import RUNGS, Evaluation, objective_value
from benchmark.settings import Settings, hyperparameters
from benchmark.storage.fingerprints import weights_stamp
from benchmark.storage.results import environment, result_key, write_json, write_text

if TYPE_CHECKING:
    from benchmark.search.spec import StudySpec


def write_level_files(
    run_dir: Path, study: StudySpec, outcome: dict[str, Any], settings: Settings, identity: str
) -> list[dict[str, Any]]:
    """Write {key}.json, {key}_trials.json and {key}_analysis.csv of every level found; returns the first files' content."""
    space = study.space()
    trials = {trial["number"]: trial for trial in outcome["trials"]}
    written = []
    for best in outcome["best"]:
        trial = trials[best["trial"]]
        config = space.build(trial["params"])
        stem = result_key(study.model, study.task, best["level"])
        error_rung = max(rung for rung in (0, 1, 2) if str(rung) in trial["rungs"])
        figures = trial["rungs"][str(error_rung)]
        generated = trial["rungs"].get("3")
        record = {
            "model": study.model,
            "task": study.task,
            "masker_name": best["level"],
            "sparse_config": config.to_dict(),
            "masker_classes": [type(masker).__name__ for masker in config.masker_configs],
            "hyperparams": trial["params"],
            "budget": best["budget"],
            "meets_budget": best["meets_budget"],
            "error": figures["error"],
            "density": figures["density"],
            "kv_fraction": figures["kv_fraction"],
            "score": None if generated is None else generated["score"],
            "objective": objective_value(settings.objective, Evaluation(**figures)),
            "search_time": outcome["seconds"],
            "num_trials": len(outcome["trials"]),
            "failed_trials": sum(trial["status"] != "completed" for trial in outcome["trials"]),
            "passing_failures": sum(trial["passing"] for trial in outcome["trials"]),
            "best_trial_id": trial_id(identity, trial["number"]),
            "confirmation": {
                "confirmed": best["confirmed"],
                "error_from": RUNGS[error_rung],
                "density_from": RUNGS[error_rung],
                "score_from": RUNGS[3] if generated is not None else None,
                "samples": len(outcome["samples"]),
                "sample_scores": None if generated is None else generated["sample_scores"],
                "answers_reproduced": trial["rungs"].get("2", {}).get("reproduced"),
                "dense_answer_nll": trial["rungs"].get("2", {}).get("reference_nll"),
                "replay_error": trial["rungs"].get("1", trial["rungs"]["0"])["error"],
            },
            "provenance": {
                "identity": identity,
                "seed": settings.seed,
                "sparse_from": settings.sparse_from,
                "objective": settings.objective,
                "dtype": outcome["model_dtype"],
                "device": outcome["device"],
                "attention_backend": settings.attention_backend,
                "dense_backend": outcome["dense_backend"],
                "weights": weights_stamp(study.model),
                "max_context_length": settings.search_max_context_length,
                "max_new_tokens": settings.search_max_new_tokens,
                "num_samples": settings.num_samples,
                "samples": outcome["samples"],
                "truncated_samples": outcome["truncated_samples"],
                "traces": outcome["traces"],
                "layers": outcome["layers"],
                "versions": environment(),
            },
        }
        write_json(run_dir / f"{stem}_trials.json", _trials_record(study, best, outcome, settings, identity, stem))
        write_text(run_dir / f"{stem}_analysis.csv", _analysis_csv(outcome, settings, identity))
        write_json(run_dir / f"{stem}.json", record)  # last: its presence says that the level is whole
        written.append(record)
    return written


def trial_id(identity: str, number: int) -> str:
    return f"{identity[:8]}_{number:05d}"


def _trials_record(
    study: StudySpec, best: dict[str, Any], outcome: dict[str, Any], settings: Settings, identity: str, stem: str
) -> dict[str, Any]:
    space = study.space()
    return {
        "model": study.model,
        "task": study.task,
        "masker_name": best["level"],
        "budget": best["budget"],
        "objective_function": settings.objective,
        "best_trial_id": trial_id(identity, best["trial"]),
        "rungs": list(RUNGS),
        "analysis_dataframe_path": f"{stem}_analysis.csv",
        "trials": [
            {
                "trial_id": trial_id(identity, trial["number"]),
                "config": trial["params"],
                "hyperparams": hyperparameters(space.build(trial["params"])) if trial["status"] != "failed" else None,
                "status": trial["status"],
                "error_message": trial["error_message"],
                "rung": _reached(trial),
                "pruned_at": trial["pruned_at"],
                "error": _of(trial, "error"),
                "density": _of(trial, "density"),
                "kv_fraction": _of(trial, "kv_fraction"),
                "score": trial["rungs"].get("3", {}).get("score"),
                "figures": trial["rungs"],
                "seconds": sum(figures["seconds"] for figures in trial["rungs"].values()),
            }
            for trial in outcome["trials"]
        ],
    }


def _reached(trial: dict[str, Any]) -> int | None:
    return max((int(rung) for rung in trial["rungs"]), default=None)


def _of(trial: dict[str, Any], figure: str) -> float | None:
    """A figure of the highest rung that measures attention error on common inputs (generation goes ways of its own)."""
    rungs = [rung for rung in ("2", "1", "0") if rung in trial["rungs"]]
    return trial["rungs"][rungs[0]][figure] if rungs else None


def _analysis_csv(outcome: dict[str, Any], settings: Settings, identity: str) -> str:
    """One row a trial; a rung is an iteration in Ray Tune's sense."""
    names = sorted({name for trial in outcome["trials"] for name in trial["params"]})
    columns = ["trial_id", "training_iteration", "combined_score", "error", "density", "score", "rung", "pruned_at", "status"]
    columns += ["time_this_iter_s", "time_total_s", "timestamp", "date", "done", "iterations_since_restore"]
    columns += ["time_since_restore", *(f"config/{name}" for name in names)]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for trial in outcome["trials"]:
        error, density, reached = _of(trial, "error"), _of(trial, "density"), _reached(trial)
        seconds = [trial["rungs"][rung]["seconds"] for rung in sorted(trial["rungs"], key=int)]
        iterations = None if reached is None else reached + 1
        row = {
            "trial_id": trial_id(identity, trial["number"]),
            "training_iteration": iterations,
            "error": error,
            "density": density,
            "score": trial["rungs"].get("3", {}).get("score"),
            "rung": reached,
            "pruned_at": trial["pruned_at"],
            "status": trial["status"],
            "time_this_iter_s": seconds[-1] if seconds else None,
            "time_total_s": sum(seconds),
            "done": True,
            "iterations_since_restore": iterations,
            "time_since_restore": sum(seconds),
        }
        if error is not None and density is not None:
            row["combined_score"] = objective_value(settings.objective, Evaluation(error, density, 0.0))
        if trial["finished"] is not None:
            row["timestamp"] = int(trial["finished"])
            row["date"] = datetime.fromtimestamp(trial["finished"]).strftime("%Y-%m-%d_%H-%M-%S")
        writer.writerow(row | {f"config/{name}": value for name, value in trial["params"].items()})
    return out.getvalue()
