"""Reading what Phase 1 found, for Phase 2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.settings import DENSE, Settings, SparseConfig
from benchmark.storage.results import result_key
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

_RUN = re.compile(r"^run_\d{8}_\d{6}$")
#: Configurations that a note names before it only counts them.
_NAMED = 8
#: What Phase 2 needs of a search result, and of what kind it is.
_FIELDS = {"model": str, "task": str, "masker_name": str, "sparse_config": dict, "masker_classes": list, "provenance": dict}


def find_units(
    settings: Settings, configs: list[SparseConfig], tasks: list[str], named: frozenset[str]
) -> tuple[Path | None, list[BenchmarkUnit], list[str]]:
    """(the run, then as load_units) for Phase 2 by itself. named: configurations that were asked for one by one.

    UserError as find_run and load_units, and if the run holds nothing of what was asked for, or nothing of a named one.
    """
    sparse = [config.name for config in configs if config.config is not None]
    run = find_run(settings) if sparse else None
    units, notes = load_units(run, settings, configs, tasks)
    if run is not None:
        held = {config.name for unit in units for config in unit.configs}
        absent = [name for name in sparse if name not in held]
        asked = [name for name in absent if name in named]
        if asked or absent == sparse:
            raise UserError(
                f"run {run.name} has no {', '.join(asked) or 'configuration'} tuned for these models, tasks and --configs: "
                f"search with --phase 1, or choose others or another --config-run (it holds {_holds(_records(run))})"
            )
    return run, units, notes


def find_run(settings: Settings) -> Path:
    """The folder of a search: --config-run, else the newest with finished configurations. UserError if there is none."""
    folder, name = settings.optimal_configs_dir, settings.config_run
    if name is not None:
        # The name of one of its folders: "." and "/tmp" are folders too, of somebody else's files.
        if name not in {path.name for path in folder.glob("*") if path.is_dir()}:
            known = [run.name for run in _runs(folder)]
            listed = f"there are {', '.join(known[:5])}" if known else "there is none yet, run --phase 1"
            raise UserError(f"--config-run {name}: no such run in {folder}; {listed}")
        return folder / name
    for run in _runs(folder):
        if _records(run):
            return run
    raise UserError(f"no search with finished configurations in {folder}: run --phase 1 first, or give --optimal-configs-dir")


def load_units(
    run: Path | None, settings: Settings, configs: list[SparseConfig], tasks: list[str]
) -> tuple[list[BenchmarkUnit], list[str]]:
    """What Phase 2 runs: for every (model, task) dense, and the chosen configurations that were tuned for that very pair;
    and a note on those that were not.

    UserError for a file that cannot be read or does not hold what it should, and for a search of another protocol.
    """
    wanted = {config.name: config for config in configs if config.config is not None}
    records = {} if run is None else _records(run)
    units = []
    missing: dict[str, list[str]] = {name: [] for name in wanted}
    for model in settings.models:
        for task in tasks:
            chosen: list[SparseConfig] = []
            provenance: dict[str, dict[str, Any]] = {}
            for name, (path, record) in sorted(records.items()):
                if record["model"] != model or record["task"] != task or record["masker_name"] not in wanted:
                    continue
                searched = record["provenance"]
                _check_protocol(path, searched.get("sparse_from"), settings)
                config = _config(path, record, settings, wanted[record["masker_name"]])
                chosen.append(config)
                provenance[config.name] = {
                    "config_run": path.parent.name,
                    "config_file": name,
                    **{key: record.get(key) for key in ("budget", "meets_budget", "error", "density", "score", "hyperparams")},
                    "identity": searched.get("identity"),
                    "sparse_from": searched["sparse_from"],
                }
            for name in wanted.keys() - provenance.keys():
                missing[name].append(f"{task} on {model}")
            chosen.sort(key=lambda c: (c.family, c.budget or 0.0, c.name))
            chosen[:0] = [config for config in configs if config.name == DENSE]
            if chosen:
                units.append(BenchmarkUnit(model, task, tuple(chosen), provenance))
    return units, _notes(run, missing, len(settings.models) * len(tasks))


def _notes(run: Path | None, missing: dict[str, list[str]], pairs: int) -> list[str]:
    """One line on the configurations that a run does not hold; where it holds them for some pairs, for which it does not."""
    absent = [name if len(where) == pairs else f"{name} ({', '.join(where)})" for name, where in missing.items() if len(where)]
    if not absent:
        return []
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    why = "not searched" if run is None else f"run {run.name} has no settings for them"
    return [f"not run: {', '.join(absent[:_NAMED])}{more}: {why}"]


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
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); remove the file or search again") from None
        fields = record if isinstance(record, dict) else {}
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            told = f"not as Phase 1 writes it: {', '.join(wrong)}"
            raise UserError(f"{path}: is no search result ({told}); remove the file or search again")
        if path.stem != result_key(record["model"], record["task"], record["masker_name"]):
            raise UserError(
                f"{path}: holds {record['masker_name']!r} of another model or task than its name says; remove the file"
            )
        found[path.name] = (path, record)
    return found


def _check_protocol(path: Path, searched: Any, settings: Settings) -> None:
    """What was tuned under one protocol says nothing about the other."""
    if searched != settings.sparse_from:
        raise UserError(
            f"run {path.parent.name} was searched with --sparse-from {searched}, this benchmark is --sparse-from "
            f"{settings.sparse_from}: give the search's, or choose another --config-run ({path.name})"
        )


def _config(path: Path, record: dict[str, Any], settings: Settings, template: SparseConfig) -> SparseConfig:
    """The settings found. They must be of the maskers that the configuration of this name has, which rules out a foreign
    or empty list as well as two that sample."""
    try:
        config = ResearchAttentionConfig.from_dict(record["sparse_config"])
    except Exception as error:  # whatever a masker makes of foreign parameters
        raise UserError(f"{path}: its configuration cannot be built ({' '.join(str(error).split())}); search again") from None
    made_of = [type(masker).__name__ for masker in config.masker_configs]
    expected = [entry.__name__ for entry in template.masker_classes or ()]
    if not made_of == record["masker_classes"] == expected:
        raise UserError(
            f"{path}: {template.name} is made of {', '.join(expected)}, got {', '.join(made_of) or 'no masker'} "
            f"(masker_classes: {', '.join(map(str, record['masker_classes'])) or 'none'}); remove the file or search again"
        )
    config.backend = settings.attention_backend
    return SparseConfig(template.name, config, tuple(type(masker) for masker in config.masker_configs))


def _holds(records: dict[str, tuple[Path, dict[str, Any]]]) -> str:
    pairs = sorted({f"{record['model']} on {record['task']}" for _, record in records.values()})
    return ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "") if pairs else "nothing"
