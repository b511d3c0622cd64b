"""Reads the results of Phase 1 for Phase 2."""

from __future__ import annotations

import re
from pathlib import Path

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.settings import DENSE, Settings, SparseConfig
from benchmark.storage.records import BestConfig, FoundBy, read_record, to_json
from benchmark.storage.results import result_key
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

_RUN = re.compile(r"^run_\d{8}_\d{6}$")
#: A note lists this many configurations and counts the others.
_NAMED = 8


def find_units(
    settings: Settings, configs: list[SparseConfig], tasks: list[str], named: frozenset[str]
) -> tuple[Path | None, list[BenchmarkUnit], list[str]]:
    """(the run, units, notes) for Phase 2 without Phase 1.

    named: configurations that the user listed by name. UserError as find_run and load_units, and if the run contains none of
    the configurations, or not all that are named.
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
                f"search with --phase 1, or choose others or another --config-run (this one is for {_pairs(_levels(run))})"
            )
    return run, units, notes


def find_run(settings: Settings) -> Path:
    """The folder of a search: --config-run, else the newest with finished configurations. UserError if there is none."""
    folder, name = settings.optimal_configs_dir, settings.config_run
    if name is not None:
        # A name only: a path such as "." or "/tmp" may contain other files.
        if name not in {path.name for path in folder.glob("*") if path.is_dir()}:
            known = [run.name for run in _runs(folder)]
            listed = f"there are {', '.join(known[:5])}" if known else "there is none yet, run --phase 1"
            raise UserError(f"--config-run {name}: no such run in {folder}; {listed}")
        return folder / name
    for run in _runs(folder):
        if _levels(run):
            return run
    raise UserError(f"no search with finished configurations in {folder}: run --phase 1 first, or give --optimal-configs-dir")


def load_units(
    run: Path | None, settings: Settings, configs: list[SparseConfig], tasks: list[str]
) -> tuple[list[BenchmarkUnit], list[str]]:
    """What Phase 2 runs: for every (model, task), dense attention and the configurations tuned for this pair; and notes on
    those that were not tuned for it.

    UserError for a file that is damaged or was searched with another --sparse-from.
    """
    wanted = {config.name: config for config in configs if config.config is not None}
    levels = {} if run is None else _levels(run)
    units = []
    missing: dict[str, list[str]] = {name: [] for name in wanted}
    for model in settings.models:
        for task in tasks:
            chosen: list[SparseConfig] = []
            provenance: dict[str, FoundBy] = {}
            for path, best in levels.items():
                if (best.model, best.task) != (model, task) or best.masker_name not in wanted:
                    continue
                _check_protocol(path, best.provenance.sparse_from, settings)
                config = _config(path, best, settings, wanted[best.masker_name])
                chosen.append(config)
                provenance[config.name] = _found_by(path, best)
            for name in wanted.keys() - provenance.keys():
                missing[name].append(f"{task} on {model}")
            chosen.sort(key=lambda c: (c.family, c.budget or 0.0, c.name))
            chosen[:0] = [config for config in configs if config.name == DENSE]
            if chosen:
                units.append(BenchmarkUnit(model, task, tuple(chosen), provenance))
    return units, _notes(run, missing, len(settings.models) * len(tasks))


def _notes(run: Path | None, missing: dict[str, list[str]], pairs: int) -> list[str]:
    """A line on the configurations that the run does not contain, with the pairs for which they are missing unless all are."""
    absent = [name if len(where) == pairs else f"{name} ({', '.join(where)})" for name, where in missing.items() if len(where)]
    if not absent:
        return []
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    why = "not searched" if run is None else f"run {run.name} has no settings for them"
    return [f"not run: {', '.join(absent[:_NAMED])}{more}: {why}"]


def _runs(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("run_*") if path.is_dir() and _RUN.match(path.name)), reverse=True)


def _levels(run: Path) -> dict[Path, BestConfig]:
    """The finished levels of a run, by file. UserError for a file that Phase 1 did not write."""
    found = {}
    for path in sorted(run.glob("*.json")):
        if path.name.endswith("_trials.json"):
            continue
        best = read_record(path, BestConfig, "remove the file or search again")
        if path.stem != result_key(best.model, best.task, best.masker_name):
            raise UserError(
                f"{path}: contains {best.masker_name!r} for {best.task} on {best.model}, which its name does not say; "
                "remove the file"
            )
        found[path] = best
    return found


def _found_by(path: Path, best: BestConfig) -> FoundBy:
    return FoundBy(
        config_run=path.parent.name,
        config_file=path.name,
        budget=best.budget,
        meets_budget=best.meets_budget,
        error=best.error,
        density=best.density,
        score=best.score,
        hyperparams=best.hyperparams,
        identity=best.provenance.identity,
        sparse_from=best.provenance.sparse_from,
    )


def _check_protocol(path: Path, searched: str, settings: Settings) -> None:
    """UserError if the configuration was tuned with another --sparse-from: its density and error would not apply."""
    if searched != settings.sparse_from:
        raise UserError(
            f"run {path.parent.name} was searched with --sparse-from {searched}, this benchmark is --sparse-from "
            f"{settings.sparse_from}: give the search's, or choose another --config-run ({path.name})"
        )


def _config(path: Path, best: BestConfig, settings: Settings, template: SparseConfig) -> SparseConfig:
    """The tuned configuration. UserError unless it has the maskers of the configuration with its name."""
    try:
        config = ResearchAttentionConfig.from_dict(to_json(best.sparse_config))
    except Exception as error:  # a masker may raise anything for wrong parameters
        raise UserError(f"{path}: its configuration cannot be built ({' '.join(str(error).split())}); search again") from None
    made_of = [type(masker).__name__ for masker in config.masker_configs]
    expected = [entry.__name__ for entry in template.masker_classes or ()]
    if not made_of == best.masker_classes == expected:
        raise UserError(
            f"{path}: {template.name} consists of {', '.join(expected)}, got {', '.join(made_of) or 'no masker'} "
            f"(masker_classes: {', '.join(best.masker_classes) or 'none'}); remove the file or search again"
        )
    config.backend = settings.attention_backend
    return SparseConfig(template.name, config, tuple(type(masker) for masker in config.masker_configs))


def _pairs(levels: dict[Path, BestConfig]) -> str:
    """The (model, task) pairs of a run, for a message."""
    pairs = sorted({f"{best.task} on {best.model}" for best in levels.values()})
    return ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "") if pairs else "nothing"
