"""Finding the best configuration in the files of a search."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import UserError, quoted

#: The file that records when a run was made: its name has the local time, which is no order across time zones.
MARK = ".run.json"


def best_config(
    run: str | Path,
    *,
    model: str,
    task: str,
    budget: float,
    masker: str | None = None,
    oracles: bool = False,
    sparse_from: str = "question",
    budget_on: str = "density",
) -> Path:
    """The file of the configuration with the smallest error within a budget.

    run: a folder optimal_configs/run_..., or one that holds runs: then the newest file of each configuration counts, and a folder
    `sample` only while there is no other run. model, task: as they were searched. budget: the largest share, 0.10 = 10% of the keys,
    or of the KV bytes with budget_on="kv". sparse_from, budget_on: as in the search; errors under other protocols are no measure of
    each other, and budgets on other things are no such budgets. Where the model's files changed between searches, those of the
    newest one count. masker: a combination, such as "sink_local_quest_top_k". oracles:
    also maskers that read every key to choose, which save nothing and are ceilings only. Confirmed configurations come first.
    UserError if there is none; it names what there is.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such folder; give a run of a search, such as optimal_configs/run_20260131_120000")
    found: list[tuple[bool, float, Path, Any]] = []
    searched: set[str] = set()
    paths = [path for path in sorted(Path(run).rglob("*.json")) if not path.name.endswith(("_trials.json", MARK))]
    own = [path for path in paths if path.relative_to(run).parts[0] != "sample"] or paths
    created = {folder: run_created(folder) for folder in {path.parent for path in own}}
    for path in {path.name: path for path in sorted(own, key=lambda path: created[path.parent])}.values():
        record = read_json(path)
        if not isinstance(record.get("sparse_config"), dict):
            continue
        searched.add(f"{record.get('model')} on {record.get('task')}")
        name = str(record.get("masker_name"))
        level = record.get("budget")
        provenance = record.get("provenance") or {}
        alike = (provenance.get("sparse_from"), record.get("budget_on", "density")) == (sparse_from, budget_on)
        fits = alike and record.get("meets_budget") is True and isinstance(level, int | float) and level <= budget * (1 + 1e-9)
        wanted = masker is None or name == masker or name.rpartition("_")[0] == masker
        if record.get("model") == model and record.get("task") == task and fits and wanted and (oracles or not _oracle(record)):
            confirmed = bool((record.get("confirmation") or {}).get("confirmed"))
            found.append((not confirmed, float(record["error"]), path, provenance.get("weights")))
    if not found:
        there = ", ".join(sorted(searched)) or "nothing"
        raise UserError(
            f"{run}: no configuration of {model!r} on {task!r} meets a budget of {budget:g}"
            f"{'' if masker is None else f' with {masker}'}{'' if oracles else ' (oracles apart: oracles=True)'}, sparse from {sparse_from}, "
            f"budgets on {budget_on}; searched: {there}"
        )
    newest = max(found, key=lambda entry: created[entry[2].parent])[3]
    return min((confirmed, error, path) for confirmed, error, path, weights in found if weights == newest)[2]


def run_created(run: Path) -> float:
    """When a run was made, in seconds since 1970; the time in its name, as UTC, if that is not recorded; 0 for other folders."""
    try:
        named = datetime.strptime(run.name, "run_%Y%m%d_%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0
    try:
        created = read_json(run / MARK).get("created")
    except UserError:
        return named
    return float(created) if isinstance(created, int | float) and 0 < created <= 1e15 else named


def _oracle(record: dict[str, Any]) -> bool:
    return any(str(entry.get("type")).startswith("Oracle") for entry in record["sparse_config"].get("masker_configs", []))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; UserError of one line otherwise."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {quoted(error)})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(record).__name__}")
    return record
