"""The files of a small search: what Phase 1 writes for a level, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.search.trial import RUNGS
from benchmark.storage.records import parse_record, write_record
from benchmark.storage.results import result_key
from benchmark.storage.search_records import BestConfig, TrialsFile
from sparse_attention_hub import OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig

TEMPLATE = ResearchAttentionConfig([SinkMaskerConfig(0.01), OracleTopKConfig(0.05)])


def best_config(**changes: Any) -> dict[str, Any]:
    """The content of {key}.json. confirmation, provenance: changes to their fields."""
    confirmation = {
        "confirmed": True,
        "error_from": RUNGS[2],
        "density_from": RUNGS[2],
        "score_from": RUNGS[3],
        "samples": 2,
        "sample_scores": [1.0, 0.5],
        "answers_reproduced": 1.0,
        "dense_answer_nll": 0.5,
        "replay_error": 0.2,
    }
    provenance = {
        "identity": "abc",
        "seed": 0,
        "sparse_from": "question",
        "objective": "default",
        "dtype": "torch.float32",
        "device": "cpu",
        "attention_backend": "auto",
        "dense_backend": "sdpa",
        "weights": [["model.safetensors", 10, 20]],
        "max_context_length": 1024,
        "max_new_tokens": 20,
        "num_samples": 10,
        "samples": ["a", "b"],
        "truncated_samples": 0,
        "traces": ["t"],
        "layers": [0, 3],
        "versions": {"torch": "2", "commit": None},
    }
    config = changes.pop("config", TEMPLATE)
    record = {
        "model": "some/model",
        "task": "infinite_bench/passkey",
        "masker_name": "sink_oracle_top_k_10pct",
        "sparse_config": config.to_dict(),
        "masker_classes": [type(masker).__name__ for masker in config.masker_configs],
        "hyperparams": {"oracletopk_heavy_size": 0.05},
        "budget": 0.1,
        "meets_budget": True,
        "error": 0.1,
        "density": 0.1,
        "kv_fraction": 0.5,
        "score": 0.75,
        "objective": 0.11,
        "search_time": 20.0,
        "num_trials": 10,
        "failed_trials": 0,
        "transient_failures": 0,
        "best_trial_id": "abc_00000",
        "confirmation": confirmation | changes.pop("confirmation", {}),
        "provenance": provenance | changes.pop("provenance", {}),
    }
    return record | changes


def figures(error: float | None, density: float, **more: Any) -> dict[str, Any]:
    """The figures of a rung."""
    return {"error": error, "density": density, "seconds": 0.5, "kv_fraction": None, "score": None, **more}


def trial(trial_id: str, params: dict[str, Any], rungs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A trial of {key}_trials.json."""
    last = next((rungs[rung] for rung in ("2", "1", "0") if rung in rungs), {})
    return {
        "trial_id": trial_id,
        "config": params,
        "hyperparams": params,
        "status": "completed",
        "error_message": None,
        "rung": max(map(int, rungs), default=None),
        "pruned_at": None,
        **{name: last.get(name) for name in ("error", "density", "kv_fraction")},
        "score": rungs.get("3", {}).get("score"),
        "figures": rungs,
        "seconds": 0.5 * len(rungs),
        **changes,
    }


def trials_file(best: dict[str, Any], trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of {key}_trials.json."""
    return {
        **{name: best[name] for name in ("model", "task", "masker_name", "budget", "best_trial_id")},
        "objective_function": "default",
        "rungs": list(RUNGS),
        "analysis_dataframe_path": "x_analysis.csv",
        "trials": trials,
    }


def write_level(run: Path, best: dict[str, Any], trials: list[dict[str, Any]] | None = None) -> Path:
    """Write the three files of a level; the path of {key}.json."""
    stem = result_key(best["model"], best["task"], best["masker_name"])
    if trials is not None:
        write_record(run / f"{stem}_trials.json", parse_record(json.dumps(trials_file(best, trials)), TrialsFile))
        (run / f"{stem}_analysis.csv").write_text("trial_id\n")
    write_record(run / f"{stem}.json", parse_record(json.dumps(best), BestConfig))
    return run / f"{stem}.json"
