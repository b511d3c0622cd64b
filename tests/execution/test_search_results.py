"""Reading a search for Phase 2: the chosen run, its configurations, notes on missing ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.search_results import find_run, find_units, load_units
from benchmark.raytune.plan import choose_configs
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.results import result_key
from sparse_attention_hub.errors import UserError
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

    def written(name: str = NAME, **changes: Any) -> Path:
        (config,) = chosen(name)
        best = best_config(config=config.config, model=MODEL, task=TASK, masker_name=name, budget=config.budget)
        path = tmp_path / RUN / f"{result_key(MODEL, TASK, name)}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(best | changes))
        return path

    return written


def test_provenance_names_the_run_and_the_file(settings: Settings, write: Write) -> None:
    path = write()
    ((unit,), notes) = load_units(path.parent, settings, chosen("dense", NAME), [TASK])
    assert [config.name for config in unit.configs] == ["dense", NAME] and notes == []
    found = unit.provenance[NAME]
    assert (found.config_run, found.config_file, found.identity) == (RUN, path.name, "abc")
    assert found.sparse_from == "question"


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
        load_units(path.parent, settings, chosen(NAME), [TASK])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_settings_of_another_protocol_are_not_run(settings: Settings, write: Write) -> None:
    path = write(provenance=best_config()["provenance"] | {"sparse_from": "decode"})
    with pytest.raises(UserError, match="--sparse-from decode.*--sparse-from question"):
        load_units(path.parent, settings, chosen(NAME), [TASK])


def test_missing_configurations_are_noted(settings: Settings, write: Write) -> None:
    write()
    pair = chosen(NAME, "sink_local_10pct")
    run, units, notes = find_units(settings, pair, [TASK], frozenset())  # asked for by a pattern
    assert run is not None and [config.name for config in units[0].configs] == [NAME]
    assert notes == [f"not run: sink_local_10pct: run {RUN} has no settings for them"]
    _, _, notes = find_units(settings, pair, [TASK, "ruler/1024/fwe"], frozenset({NAME}))
    assert f"{NAME} (ruler/1024/fwe on {MODEL})" in notes[0] and len(notes) == 1


def test_configurations_asked_for_by_name_must_exist(settings: Settings, write: Write) -> None:
    write()
    with pytest.raises(UserError, match=r"no sink_local_10pct tuned.*--phase 1.*--config-run"):
        find_units(settings, chosen("dense", NAME, "sink_local_10pct"), [TASK], frozenset({"dense", "sink_local_10pct"}))
    with pytest.raises(UserError, match="no configuration tuned"):
        find_units(settings, chosen("dense", "sink_local_10pct"), [TASK], frozenset())


def test_a_run_is_given_by_name_not_by_path(settings: Settings, write: Write, tmp_path: Path) -> None:
    from dataclasses import replace

    assert find_run(replace(settings, config_run=write().parent.name)) == tmp_path / RUN
    for name in (".", "..", f"{RUN}/", "/tmp", str(tmp_path), "run_19990101_000000"):
        with pytest.raises(UserError, match=f"no such run.*{RUN}"):
            find_run(replace(settings, config_run=name))
