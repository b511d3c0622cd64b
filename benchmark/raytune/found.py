"""Reading what Phase 1 found, for Phase 2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmark.jobs import BenchmarkUnit
from benchmark.results import result_key
from benchmark.settings import DENSE, Settings, SparseConfig
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

_RUN = re.compile(r"^run_\d{8}_\d{6}$")


def find_run(settings: Settings, name: str | None) -> Path:
    """The folder of a search: the one named, else the newest with finished configurations. UserError if there is none."""
    folder = settings.optimal_configs_dir
    name = name or settings.config_run
    if name is not None:
        if not (folder / name).is_dir():
            known = [run.name for run in _runs(folder)]
            listed = f"there are {', '.join(known[:5])}" if known else "there is none yet, run --phase 1"
            raise UserError(f"--config-run {name}: no such run in {folder}; {listed}")
        return folder / name
    for run in _runs(folder):
        if _records(run):
            return run
    raise UserError(f"no search with finished configurations in {folder}: run --phase 1 first, or give --optimal-configs-dir")


def load_units(run: Path | None, settings: Settings, configs: list[SparseConfig], tasks: list[str]) -> list[BenchmarkUnit]:
    """What Phase 2 runs: for every (model, task) dense, and the chosen configurations that were tuned for that very pair.

    UserError for a file that cannot be read, or if nothing fits what was asked for.
    """
    wanted = {config.name for config in configs}
    records = {} if run is None else _records(run)
    units = []
    for model in settings.models:
        for task in tasks:
            chosen: list[SparseConfig] = []
            provenance: dict[str, dict[str, Any]] = {}
            if DENSE in wanted:
                chosen.append(SparseConfig(DENSE, None, None))
            for name, (path, record) in sorted(records.items()):
                if record.get("model") != model or record.get("task") != task or record.get("masker_name") not in wanted:
                    continue
                config = _config(path, record, settings)
                chosen.append(config)
                provenance[config.name] = {
                    "config_run": run.name if run else None,
                    "config_file": name,
                    **{key: record.get(key) for key in ("budget", "meets_budget", "error", "density", "score", "hyperparams")},
                    "identity": record.get("provenance", {}).get("identity"),
                }
            chosen.sort(key=lambda c: (c.config is not None, c.family, c.budget or 0.0, c.name))
            if chosen:
                units.append(BenchmarkUnit(model, task, tuple(chosen), provenance))
    if run is not None and not any(c.config is not None for unit in units for c in unit.configs):
        raise UserError(
            f"run {run.name} has no configuration tuned for these models, tasks and --configs: "
            f"search them with --phase 1, or choose others (it holds {_holds(records)})"
        )
    if not units:
        raise UserError("nothing to benchmark: no configuration is chosen")
    return units


def _runs(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("run_*") if path.is_dir() and _RUN.match(path.name)), reverse=True)


def _records(run: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The finished levels of a run by file name. UserError for a file that is not one of ours."""
    found = {}
    for path in sorted(run.glob("*.json")):
        if path.name.endswith("_trials.json"):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); remove the file or search again") from None
        needed = ("model", "task", "masker_name", "sparse_config")
        if not isinstance(record, dict) or not all(key in record for key in needed):
            raise UserError(f"{path}: is no search result (needs {', '.join(needed)}); remove the file")
        if path.stem != result_key(record["model"], record["task"], record["masker_name"]):
            raise UserError(
                f"{path}: holds {record['masker_name']!r} of another model or task than its name says; remove the file"
            )
        found[path.name] = (path, record)
    return found


def _config(path: Path, record: dict[str, Any], settings: Settings) -> SparseConfig:
    try:
        config = ResearchAttentionConfig.from_dict(record["sparse_config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its configuration cannot be built ({error}); search again") from None
    config.backend = settings.attention_backend
    return SparseConfig(record["masker_name"], config, tuple(type(masker) for masker in config.masker_configs))


def _holds(records: dict[str, tuple[Path, dict[str, Any]]]) -> str:
    pairs = sorted({f"{record['model']} on {record['task']}" for _, record in records.values()})
    return ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "") if pairs else "nothing"
