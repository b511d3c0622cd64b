"""Damaged files of a search: one line that names the file and the field, and never a traceback."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.search_results import load_units
from benchmark.raytune import analyze_trials
from benchmark.report.search_run import read_run
from benchmark.report.search_tables import hyperparameter_effects
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.records import read_record
from benchmark.storage.search_records import BestConfig, TrialsFile
from sparse_attention_hub.errors import UserError
from tests.search.search_files import TEMPLATE, best_config, figures, trial, trials_file, write_level

NAME = "sink_oracle_top_k_10pct"
RUN = "run_20240315_143022"
MISSING = object()
DEEP: Any = []
for _ in range(120):
    DEEP = [DEEP]
DAMAGE = {
    "missing": MISSING,
    "null": None,
    "text": "x",
    "number": -1,
    "list": ["x"],
    "object": {"x": 1},
    "huge": 1e308,
    "huge integer": 10**400,
    "NaN": float("nan"),
    "deep": DEEP,
}
TRIALS = [
    trial(
        f"abc_{number:05d}",
        {"heavy": 0.01 * (number + 1), "kind": "ab"[number % 2]},
        {
            "0": figures(0.5 / (number + 1), 0.01 * (number + 1)),
            "1": figures(0.5, 0.1, layer_errors=[0.3, 0.2], layer_densities=[0.1, 0.1]),
            "2": figures(0.4, 0.1, reproduced=1.0, reference_nll=0.5),
            "3": figures(None, 0.1, score=0.75, sample_scores=[1.0, 0.5]),
        },
    )
    for number in range(7)
]


def fields(record: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all values in a record; of lists only those in the first entry."""
    entries = record.items() if isinstance(record, dict) else enumerate(record[:1]) if isinstance(record, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from fields(value, (*path, key))


def damaged(record: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(record)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return changed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "optimal_configs" / RUN
    write_level(folder, best_config(), TRIALS)
    return folder


BEST, ALL_TRIALS = best_config(), trials_file(best_config(), TRIALS)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".json", "_trials.json"])
def test_a_damaged_field_is_named_or_legal(suffix: str, damage: str, tmp_path: Path) -> None:
    record, kind = (BEST, BestConfig) if suffix == ".json" else (ALL_TRIALS, TrialsFile)
    file = tmp_path / f"level{suffix}"
    refused = 0
    for path in fields(record):
        file.write_text(json.dumps(damaged(record, path, DAMAGE[damage])))
        try:
            assert isinstance(read_record(file, kind, "search again"), kind) and damage != "NaN", path
        except UserError as error:
            refused += 1
            message, name = str(error), ".".join(str(part) for part in path[:2])
            name = "trials" if "the parameters of" in message else name
            assert message.startswith(f"{file}: field {name}") and message.endswith("; search again"), message
            assert "\n" not in message and len(message) < 1000
    assert refused > 10


@pytest.mark.parametrize("suffix", [".json", "_trials.json"])
def test_tools_accept_what_is_legal_and_name_what_is_not(
    suffix: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phase 2 refuses a run with a damaged level; analyze_trials shows its other level."""
    monkeypatch.setattr("benchmark.report.search_plots.draw_all", lambda *_: [])
    monkeypatch.setattr("benchmark.report.search_tables.hyperparameter_effects", lambda _: [])
    write_level(run, best_config(masker_name="sink_oracle_top_k_25pct", budget=0.25), TRIALS[:1])
    settings = Settings(models=(BEST["model"],), tasks=(BEST["task"],))
    chosen = [SparseConfig(NAME, TEMPLATE, tuple(type(masker) for masker in TEMPLATE.masker_configs))]
    options = ["--optimal-configs-dir", str(run.parent), "--output-dir", str(tmp_path / "out")]
    record, kind = (BEST, BestConfig) if suffix == ".json" else (trials_file(BEST, TRIALS[:2]), TrialsFile)
    (file,) = run.glob(f"*_10pct{suffix}")
    for path, (damage, value) in itertools.product(fields(record), DAMAGE.items()):
        file.write_text(json.dumps(damaged(record, path, value)))
        try:
            read_record(file, kind, "search again")
        except UserError:
            if damage != "text":  # one kind of damage for each field is enough
                continue
        try:
            load_units([run], settings, chosen, list(settings.tasks))
        except UserError as error:
            assert "\n" not in str(error) and (str(file) in str(error) or "--sparse-from" in str(error)), path
        assert analyze_trials.main(options) == 0, path
        printed = capsys.readouterr()
        assert "sink_oracle_top_k_25pct" in printed.out
        assert printed.err == "" or (printed.err.startswith(f"left out: {file}: field") and printed.err.count("\n") == 1), path


@pytest.mark.parametrize("damage", ["null", "text", "number", "list", "object", "deep"])
def test_importances_of_parameters_of_any_type(damage: str, run: Path) -> None:
    (file,) = run.glob("*_trials.json")
    file.write_text(json.dumps(damaged(ALL_TRIALS, ("trials", 0, "config", "heavy"), DAMAGE[damage])))
    (study,) = read_run(run).studies
    assert {effect.name for effect in hyperparameter_effects(study)} == {"heavy", "kind"}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 5000, "\xff"])
def test_files_of_something_else(content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in run.glob("*.json"):
        whole = file.read_bytes()
        file.write_bytes(content.encode("latin-1"))
        options = ["--optimal-configs-dir", str(run.parent), "--output-dir", str(tmp_path / "out")]
        assert analyze_trials.main(options) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {file}: ") and printed.count("\n") == 1
        file.write_bytes(whole)
