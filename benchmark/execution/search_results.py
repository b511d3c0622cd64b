"""Reads the results of Phase 1 for Phase 2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.settings import DENSE, Settings, SparseConfig
from benchmark.storage.benchmark_records import FoundBy
from benchmark.storage.records import read_record, shared_fields, to_json
from benchmark.storage.results import result_key, valid_text
from benchmark.storage.runs import find_run, list_runs
from benchmark.storage.search_records import BestConfig
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

_ADVICE = "remove the file or search again"
#: A note lists this many configurations and counts the others.
_NAMED = 8


def find_units(
    settings: Settings, configs: list[SparseConfig], tasks: list[str], named: frozenset[str]
) -> tuple[list[str], list[BenchmarkUnit], list[str]]:
    """(names of the runs that settings come from, units, notes) for Phase 2 without Phase 1.

    named: configurations that the user listed by name. UserError as find_run and load_units, and if the runs contain none of
    the configurations, or not all that are named.
    """
    sparse = [config.name for config in configs if config.config is not None]
    runs = _chosen_runs(settings) if sparse else []
    used, units, notes = load_units(runs, settings, configs, tasks)
    held = {config.name for unit in units for config in unit.configs}
    absent = [name for name in sparse if name not in held]
    asked = [name for name in absent if name in named]
    if asked or (absent and absent == sparse):
        where = f"run {runs[0].name} has" if settings.config_run else f"the runs in {settings.optimal_configs_dir} have"
        raise UserError(
            f"{where} no {', '.join(asked) or 'configuration'} tuned for these models, tasks and --configs: "
            f"search with --phase 1, or choose others or another --config-run (found: {_pairs(runs)})"
        )
    return used, units, notes


def _chosen_runs(settings: Settings) -> list[Path]:
    """--config-run, else all runs, newest first. UserError if there is none with finished configurations."""
    folder = settings.optimal_configs_dir
    if settings.config_run is not None:
        return [find_run(folder, settings.config_run, "--config-run")]
    runs = [run for run in list_runs(folder) if any(_files(run))]
    if not runs:
        raise UserError(
            f"no search with finished configurations in {folder}: run --phase 1 first, or give --optimal-configs-dir"
        )
    return runs


def load_units(
    runs: Sequence[Path], settings: Settings, configs: list[SparseConfig], tasks: list[str]
) -> tuple[list[str], list[BenchmarkUnit], list[str]]:
    """What Phase 2 runs: for every (model, task), dense attention and the configurations tuned for this pair, each with the
    settings of the newest of `runs` that has it. Returns (names of the runs used, units, notes on what is missing and on what
    came from which run).

    UserError for a file that is damaged or was searched with another --sparse-from.
    """
    wanted = {config.name: config for config in configs if config.config is not None}
    units = []
    missing: dict[str, list[str]] = {name: [] for name in wanted}
    origins: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # run -> configuration -> pairs
    for model in settings.models:
        for task in tasks:
            pair = f"{task} on {model}"
            chosen: list[SparseConfig] = []
            provenance: dict[str, FoundBy] = {}
            for name, template in wanted.items():
                found = _newest(runs, model, task, name, settings)
                if found is None:
                    missing[name].append(pair)
                    continue
                path, best = found
                chosen.append(_config(path, best, settings, template))
                provenance[name] = _found_by(path, best)
                origins[path.parent.name][name].append(pair)
            chosen.sort(key=lambda c: (c.family, c.budget or 0.0, c.name))
            chosen[:0] = [config for config in configs if config.name == DENSE]
            if chosen:
                units.append(BenchmarkUnit(model, task, tuple(chosen), provenance))
    pairs = len(settings.models) * len(tasks)
    notes = []
    if absent := _listed(missing, pairs):
        why = "no run has" if len(runs) > 1 else f"run {runs[0].name} has no" if runs else "no search found"
        notes.append(f"not run: {absent}: {why} settings for them")
    used = [run.name for run in runs if run.name in origins]
    if len(used) > 1:
        notes += [f"settings from {run}: {_listed(origins[run], pairs)}" for run in used]
    return used, units, notes


def _newest(runs: Sequence[Path], model: str, task: str, name: str, settings: Settings) -> tuple[Path, BestConfig] | None:
    """The settings of a configuration in the newest run that has them, with their file. UserError if they were only searched
    with another --sparse-from (density and error would not apply) or --budget-on (the budget means something else)."""
    other = None
    for run in runs:
        path = run / f"{result_key(model, task, name)}.json"
        if path.is_file():
            best = _read(path, model, task, name)
            checks: list[tuple[str, str, str]] = [("--sparse-from", best.provenance.sparse_from, settings.sparse_from)]
            if best.budget is not None:
                checks.append(("--budget-on", best.budget_on, settings.budget_on))
            differing = [check for check in checks if check[1] != check[2]]
            if not differing:
                return path, best
            flag, searched, asked = differing[0]
            other = other or (
                f"run {run.name} was searched with {flag} {searched}, this benchmark is {flag} {asked}: give the search's, or "
                f"choose another --config-run ({path.name})"
            )
    if other is not None:
        raise UserError(other)
    return None


def _read(path: Path, model: str, task: str, name: str) -> BestConfig:
    """The best settings in a file. UserError if Phase 1 did not write it, or for something else."""
    best = read_record(path, BestConfig, _ADVICE)
    if (best.model, best.task, best.masker_name) != (valid_text(model), task, name):
        raise UserError(
            f"{path}: contains {best.masker_name!r} for {best.task} on {best.model}, which its name does not say; "
            "remove the file"
        )
    return best


def _listed(names: dict[str, list[str]], pairs: int) -> str:
    """Configurations, with the (model, task) pairs that each concerns unless it concerns all."""
    texts = [name if len(where) == pairs else f"{name} ({', '.join(where)})" for name, where in names.items() if where]
    return ", ".join(texts[:_NAMED]) + (f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else "")


def _files(run: Path) -> list[Path]:
    """The files of a run's finished configurations."""
    return [path for path in sorted(run.glob("[!.]*.json")) if not path.name.endswith("_trials.json")]


def _pairs(runs: Sequence[Path]) -> str:
    """The (model, task) pairs of runs, for a message."""
    pairs = set()
    for path in (path for run in runs for path in _files(run)):
        best = read_record(path, BestConfig, _ADVICE)
        pairs.add(f"{best.task} on {best.model}")
    return ", ".join(sorted(pairs)[:4]) + (", ..." if len(pairs) > 4 else "") if pairs else "nothing"


def _found_by(path: Path, best: BestConfig) -> FoundBy:
    own = {"config_run": path.parent.name, "config_file": path.name}
    searched = {"identity": best.provenance.identity, "sparse_from": best.provenance.sparse_from}
    return FoundBy(**shared_fields(FoundBy, best) | own | searched)


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
