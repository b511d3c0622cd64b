"""Phase 2 after a Phase 1 that found little or nothing: the rest is run, failures are reported, and the exit code is 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark.raytune import phases
from benchmark.raytune.run_full_benchmark import main
from benchmark.search.config_search import SearchOutcome
from benchmark.search.spec import StudySpec, study_id
from benchmark.search.trial import Level
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.records import read_record
from benchmark.storage.search_records import BestConfig
from tests.search.search_files import best_config, write_level

TASK, SPARSE = "infinite_bench/passkey", "sink_local_10pct"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama"))


@pytest.fixture
def run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The program on a tiny model, in this process and folder; its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.execution.runner.has_pebble", lambda: False)
    few = ["--search-max-requests", "1", "--search-max-context-length", "400", "--search-max-new-tokens", "2"]
    few += ["--max-requests", "2", "--max-context-length", "400", "--max-new-tokens", "2", "--device", "cpu"]
    return lambda *more: main(["--models", model, "--tasks", TASK, *few, *more])


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A Phase 1 that finds every level but those of the studies in `failures`."""

    def pretend(failures: dict[str, str] | None = None, failed_trials: dict[str, int] | None = None) -> None:
        def run_search(studies: list[StudySpec], settings: Any, samples: Any, *, run_name: str, report: Any) -> SearchOutcome:
            assert all((study.model, study.task) in samples for study in studies)
            outcome = SearchOutcome(settings.optimal_configs_dir / run_name)
            outcome.run_dir.mkdir(parents=True)
            outcome.failures = {study_id(s): failures[s.name] for s in studies if s.name in (failures or {})}  # type: ignore[index]
            outcome.failed_trials = {study_id(s): (failed_trials or {}).get(s.name, 0) for s in studies}
            for study in studies:
                if study_id(study) not in outcome.failures:
                    outcome.levels += [_write(outcome.run_dir, study, level, settings.sparse_from) for level in study.levels]
            return outcome

        monkeypatch.setattr(phases, "run_search", run_search)

    return pretend


def _write(run_dir: Path, study: StudySpec, level: Level, sparse_from: str) -> BestConfig:
    best = best_config(
        config=level.template,
        model=study.model,
        task=study.task,
        masker_name=level.name,
        budget=level.budget,
        provenance={"sparse_from": sparse_from},
    )
    return read_record(write_level(run_dir, best), BestConfig, "")


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("benchmark_results/benchmark_summary.json").read_text())
    return found


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_what_a_failed_search_leaves_is_run(run: Any, search: Any, capsys: pytest.CaptureFixture[str]) -> None:
    search(failures={"sink_local": "no trial was evaluated"})
    assert run("--configs", "dense", SPARSE, "sink_local_random_sampling_10pct") == 1
    found = summary()
    assert [entry["configuration"] for entry in found["results"]] == ["dense", "sink_local_random_sampling_10pct"]
    assert [entry["problem"] for entry in found["failures"]] == ["search of sink_local: no trial was evaluated"]
    assert found["failures"][0] | {"phase": 1, "task": TASK, "status": "failed"} == found["failures"][0]
    assert any(SPARSE in note for note in found["notes"])
    assert f"FAILED {TASK} on" in capsys.readouterr().out.split("files: benchmark_results")[0].split("Phase 2")[1]


def test_a_search_that_found_nothing_leaves_dense_or_a_summary(run: Any, search: Any) -> None:
    search(failures={"sink_local": "timed out"})
    assert run("--configs", "dense", SPARSE) == 1
    assert [entry["configuration"] for entry in summary()["results"]] == ["dense"]
    assert run("--configs", SPARSE) == 1
    assert summary()["results"] == [] and "timed out" in summary()["failures"][0]["problem"]


@pytest.mark.parametrize("phases", [[], ["--phase", "1"]])
def test_failed_trials_are_failures(phases: list[str], run: Any, search: Any, capsys: pytest.CaptureFixture[str]) -> None:
    search(failed_trials={"sink_local": 3})
    assert run("--configs", "dense", SPARSE, *phases) == 1
    assert "3 of its trials failed or timed out" in capsys.readouterr().out
    if not phases:
        assert len(summary()["results"]) == 2 and "3 of its trials" in summary()["failures"][0]["problem"]


def test_dense_alone_needs_no_search(run: Any, search: Any) -> None:
    search()
    assert run("--configs", "dense") == 0
    assert not Path("optimal_configs").exists() and summary()["config_run_used"] is None


def test_configurations_that_were_not_searched(run: Any, search: Any, capsys: pytest.CaptureFixture[str]) -> None:
    search()
    assert run("--configs", "dense", SPARSE) == 0
    before = contents("benchmark_results")
    capsys.readouterr()
    assert run("--phase", "2", "--configs", "dense", SPARSE, "sink_local_25pct") == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1 and "no sink_local_25pct tuned" in printed.err
    assert contents("benchmark_results") == before
    assert run("--phase", "2", "--configs", "dense", "sink_local_[12]*pct") == 0
    assert "not run: sink_local_25pct" in capsys.readouterr().err and "sink_local_25pct" in summary()["notes"][0]


def test_rescoring_what_was_never_answered_writes_nothing(run: Any, search: Any, capsys: pytest.CaptureFixture[str]) -> None:
    search()
    assert run("--configs", "dense", SPARSE) == 0
    before = contents("benchmark_results")
    for changed, told in ((["--seed", "5"], "seed: 0 -> 5"), (["--max-new-tokens", "1"], "these settings")):
        capsys.readouterr()
        assert run("--configs", "dense", SPARSE, "--phase", "2", "--rescore", *changed) == 2
        printed = capsys.readouterr().err.strip()
        assert len(printed.splitlines()) == 1 and "--rescore" in printed and told in printed
        assert contents("benchmark_results") == before
    assert run("--configs", "dense", SPARSE, "--phase", "2", "--rescore") == 0
