"""Reading a search for Phase 2: the chosen run, its configurations, notes on missing ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.search_results import find_units, load_units
from benchmark.raytune.analyze_trials import choose_search
from benchmark.raytune.configurations import choose_configs
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.results import result_key
from benchmark.storage.runs import list_runs, mark_run
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.found import MARK
from tests.search.search_files import best_config

MODEL, TASK, NAME = "some/model", "infinite_bench/passkey", "sink_local_random_sampling_10pct"
RUN = "run_20240315_143022"
SAMPLER = {"type": "RandomSamplingMaskerConfig", "params": {"sampling_rate": 0.1}}
Write = Callable[..., Path]


def chosen(*names: str) -> list[SparseConfig]:
    return choose_configs(get_all_sparse_configs(), list(names))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(models=(MODEL,), tasks=(TASK,), optimal_configs_dir=tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the best settings of a configuration, with changes to the record; returns the file."""

    def written(name: str = NAME, run: str = RUN, **changes: Any) -> Path:
        (config,) = chosen(name)
        best = best_config(config=config.config, model=MODEL, task=TASK, masker_name=name, budget=config.budget)
        path = tmp_path / run / f"{result_key(MODEL, TASK, name)}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(best | changes))
        return path

    return written


def test_provenance_names_the_run_and_the_file(settings: Settings, write: Write) -> None:
    path = write()
    used, (unit,), notes = load_units([path.parent], settings, chosen("dense", NAME), [TASK])
    assert [config.name for config in unit.configs] == ["dense", NAME] and notes == [] and used == [RUN]
    found = unit.provenance[NAME]
    assert (found.config_run, found.config_file, found.identity) == (RUN, path.name, "abc")
    assert found.sparse_from == "question"


def test_budgets_on_density_and_on_kv_bytes_are_never_mixed(settings: Settings, write: Write) -> None:
    path = write(budget_on="kv")
    with pytest.raises(UserError, match="was searched with --budget-on kv, this benchmark is --budget-on density: give the"):
        load_units([path.parent], settings, chosen(NAME), [TASK])
    _, (unit,), _ = load_units([path.parent], replace(settings, budget_on="kv"), chosen(NAME), [TASK])
    assert unit.provenance[NAME].budget_on == "kv"


def test_head_budgets_reach_phase_2(settings: Settings, write: Write) -> None:
    (config,) = chosen(NAME)
    assert config.config is not None
    table = [[0.5, 2.0]] * 3
    even = {"trial_id": "abc_00001", "error": 0.2, "density": 0.1, "kv_fraction": 0.2, "score": 1.0}
    path = write(sparse_config=replace(config.config, head_budgets=table).to_dict(), even_budgets=even)
    _, (unit,), _ = load_units([path.parent], settings, chosen(NAME), [TASK])
    assert unit.configs[0].config is not None and unit.configs[0].config.head_budgets == table
    found = unit.provenance[NAME].even_budgets
    assert found is not None and found.error == 0.2


FOREIGN: dict[str, dict[str, Any]] = {
    "model": {"model": 1},
    "task": {"task": [1]},
    "no provenance": {"provenance": None},
    "no settings": {"sparse_config": None},
    "settings of text": {"sparse_config": "x"},
    "no maskers": {"sparse_config": {"masker_configs": []}, "masker_classes": []},
    "unknown masker": {"sparse_config": {"masker_configs": [{"type": "Nope", "params": {}}]}},
    "a masker of nothing": {"sparse_config": {"masker_configs": [None]}},
    "listed parameters": {"sparse_config": {"masker_configs": [{"type": "SinkMaskerConfig", "params": [1]}]}},
    "two samplers": {"sparse_config": {"masker_configs": [SAMPLER] * 2}, "masker_classes": [SAMPLER["type"]] * 2},
    "classes of another": {"masker_classes": ["SinkMaskerConfig"]},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_content_is_reported_with_its_file(case: str, settings: Settings, write: Write) -> None:
    path = write(**FOREIGN[case])
    with pytest.raises(UserError) as raised:
        load_units([path.parent], settings, chosen(NAME), [TASK])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_settings_of_another_protocol_are_not_run(settings: Settings, write: Write) -> None:
    path = write(provenance=best_config()["provenance"] | {"sparse_from": "decode"})
    with pytest.raises(UserError, match="--sparse-from decode.*--sparse-from question"):
        load_units([path.parent], settings, chosen(NAME), [TASK])


def test_missing_configurations_are_noted(settings: Settings, write: Write) -> None:
    write()
    pair = chosen(NAME, "sink_local_10pct")
    used, units, notes = find_units(settings, pair, [TASK], frozenset())  # asked for by a pattern
    assert used == [RUN] and [config.name for config in units[0].configs] == [NAME]
    assert notes == [f"not run: sink_local_10pct: run {RUN} has no settings for them"]
    _, _, notes = find_units(settings, pair, [TASK, "ruler/1024/fwe"], frozenset({NAME}))
    assert f"{NAME} (ruler/1024/fwe on {MODEL})" in notes[0] and len(notes) == 1


def test_configurations_asked_for_by_name_must_exist(settings: Settings, write: Write) -> None:
    write()
    with pytest.raises(UserError, match=rf"no sink_local_10pct tuned.*--phase 1.*--config-run.*{TASK} on {MODEL}"):
        find_units(settings, chosen("dense", NAME, "sink_local_10pct"), [TASK], frozenset({"dense", "sink_local_10pct"}))
    with pytest.raises(UserError, match="no configuration tuned"):
        find_units(settings, chosen("dense", "sink_local_10pct"), [TASK], frozenset())


def test_a_run_is_given_by_name_not_by_path(settings: Settings, write: Write, tmp_path: Path) -> None:
    write()
    write("sink_local_10pct", run="sample")
    for name in (".", "..", f"{RUN}/", "/tmp", str(tmp_path), "run_19990101_000000", "sample", "run_20240315_143022\n"):
        with pytest.raises(UserError, match=f"no such run.*{RUN}"):
            find_units(replace(settings, config_run=name), chosen(NAME), [TASK], frozenset())


def test_the_newest_settings_of_each_configuration_are_taken_from_all_runs(settings: Settings, write: Write) -> None:
    older, newer = "run_20240101_000000", "run_20240201_000000"
    write(run=older, error=0.5)
    write("sink_local_10pct", run=older, error=0.3)
    write(run=newer, error=0.25)
    both = chosen("dense", NAME, "sink_local_10pct")
    used, (unit,), notes = find_units(settings, both, [TASK], frozenset({NAME, "sink_local_10pct"}))
    assert {name: (found.config_run, found.error) for name, found in unit.provenance.items()} == {
        NAME: (newer, 0.25),
        "sink_local_10pct": (older, 0.3),
    }
    assert used == [newer, older]
    assert notes == [f"settings from {newer}: {NAME}", f"settings from {older}: sink_local_10pct"]
    _, (unit,), _ = find_units(replace(settings, config_run=older), both, [TASK], frozenset())
    assert {found.config_run for found in unit.provenance.values()} == {older}


def test_the_newest_run_is_not_that_of_the_latest_local_time(settings: Settings, write: Write, tmp_path: Path) -> None:
    """A search in Honolulu made after one in Tokyo has the earlier name."""
    tokyo, honolulu = "run_20240315_143022", "run_20240314_200000"
    for name, created in ((tokyo, 1000.0), (honolulu, 2000.0)):
        write(run=name, error=created)
        (tmp_path / name / MARK).write_text(json.dumps({"created": created}))
    assert [run.name for run in list_runs(tmp_path)] == [honolulu, tokyo]
    assert choose_search(tmp_path, tokyo) == tmp_path / tokyo
    (tmp_path / honolulu / "x_trials.json").touch()
    (tmp_path / tokyo / "x_trials.json").touch()
    assert choose_search(tmp_path, None) == tmp_path / honolulu
    used, (unit,), _ = find_units(settings, chosen(NAME), [TASK], frozenset())
    assert used == [honolulu] and unit.provenance[NAME].error == 2000.0
    mark_run(tmp_path / tokyo)
    (tmp_path / honolulu / MARK).write_text("damaged")  # its name counts
    (tmp_path / "run_99999999_999999").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == [tokyo, honolulu]


def test_older_settings_of_the_protocol_are_taken_before_newer_ones_of_another(settings: Settings, write: Write) -> None:
    write(run="run_20240101_000000")
    write(run="run_20240201_000000", provenance=best_config()["provenance"] | {"sparse_from": "decode"})
    used, _, _ = find_units(settings, chosen(NAME), [TASK], frozenset())
    assert used == ["run_20240101_000000"]
