"""Around the studies: reuse of earlier runs, when files are written, and errors before anything is written."""

from __future__ import annotations

import csv
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from benchmark.search import config_search
from benchmark.search import output as search_files
from benchmark.search.config_search import SearchOutcome, find_finished, run_search
from benchmark.search.spec import StudySpec, outcome_path, write_outcome
from benchmark.search.study import Study
from benchmark.search.trial import Level, Progress
from benchmark.settings import Settings
from benchmark.storage.records import Evaluation, StudyOutcome, read_record, write_record
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import Journal, result_key, write_json
from sparse_attention_hub import LocalMaskerConfig, OracleTopKConfig, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.errors import UserError

TEMPLATE = ResearchAttentionConfig([SinkMaskerConfig(0.01), LocalMaskerConfig(0.01), OracleTopKConfig(0.05)])
STUDY = StudySpec("m", "t", "x", (Level("x_5pct", 0.05, TEMPLATE), Level("x_10pct", 0.10, TEMPLATE)))
SAMPLES = {("m", "t"): "s", ("m", "u"): "s"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        models=("m",),
        tasks=("t",),
        device="cpu",
        optimal_configs_dir=tmp_path / "configs",
        ray_results_dir=tmp_path / "ray",
    )


class Silent:
    """A Report that shows nothing."""

    def __getattr__(self, event: str) -> Any:
        return lambda *_: None


def search(studies: list[StudySpec], settings: Settings, run_name: str = "run_20240315_143022") -> SearchOutcome:
    return run_search(studies, settings, SAMPLES, run_name=run_name, report=Silent())


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", "{}", '{"provenance": null}', '{"provenance": [1]}', '{"provenance": {}}', "{", "\xff"]
)
def test_foreign_files_are_no_result(content: str, tmp_path: Path) -> None:
    run = tmp_path / "run_20240315_143022"
    run.mkdir()
    (tmp_path / "run_20240316_143022").write_text("a file")
    for level in STUDY.levels:
        for suffix in (".json", "_trials.json", "_analysis.csv"):
            (run / f"{result_key('m', 't', level.name)}{suffix}").write_bytes(content.encode("latin-1"))
    assert find_finished(STUDY, tmp_path, "identity") is None


def test_a_dead_ray_address_is_one_line_and_nothing_is_written(settings: Settings, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster") as told:
            search([STUDY], _with(settings, ray_address=address))
    assert time.monotonic() - started < 30 and "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_two_searches_in_one_ray_folder_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_search, "start_ray", lambda _: False)
    settings.ray_results_dir.mkdir()
    with FileLock(settings.ray_results_dir / ".search.lock"):
        with pytest.raises(UserError, match="--ray-results-dir .* another search"):
            search([STUDY], settings)
        assert not settings.optimal_configs_dir.exists()


def test_a_finished_study_is_copied_with_its_failed_trials(settings: Settings) -> None:
    _finish(settings, failing=True)
    outcome = search([STUDY], settings, "run_20240316_143022")
    old, new = sorted(settings.optimal_configs_dir.iterdir())
    assert {p.name: p.read_bytes() for p in old.iterdir()} == {p.name: p.read_bytes() for p in new.iterdir()}
    # A copy is as old as what was found: a forced search that was interrupted would take it for its own.
    assert {p.name: p.stat().st_mtime for p in old.iterdir()} == {p.name: p.stat().st_mtime for p in new.iterdir()}
    assert outcome.run_dir == new and len(outcome.levels) == 2
    assert outcome.failed_trials == {"m_t_x": outcome.levels[0].failed_trials}


def test_studies_with_transient_failures_are_searched_again(settings: Settings) -> None:
    identity = STUDY.identity(settings, "s")
    _finish(settings, failing=True)
    assert find_finished(STUDY, settings.optimal_configs_dir, identity) is not None
    for path in settings.optimal_configs_dir.glob("*/*pct.json"):
        write_json(path, {**json.loads(path.read_text()), "passing_failures": 1})
    assert find_finished(STUDY, settings.optimal_configs_dir, identity) is None


def test_a_forced_search_reuses_only_its_own_files(settings: Settings) -> None:
    identity = STUDY.identity(settings, "s")
    _finish(settings, failing=False)
    settings.ray_results_dir.mkdir(exist_ok=True)
    time.sleep(0.02)
    first = ForcedRun(settings.ray_results_dir, "--force-search", identity)
    assert first.since is None and first.begin() == []
    assert find_finished(STUDY, settings.optimal_configs_dir, identity, first) is None
    for path in settings.optimal_configs_dir.glob("*/*pct.json"):
        path.touch()  # found again since
    again = ForcedRun(settings.ray_results_dir, "--force-search", identity)
    (told,) = again.begin()
    assert "continues" in told and str(again.path) in told
    assert find_finished(STUDY, settings.optimal_configs_dir, identity, again) is not None
    assert ForcedRun(settings.ray_results_dir, "--force-search", "another").since is None
    ForcedRun(settings.ray_results_dir, "--force-search", "another").end()
    assert ForcedRun(settings.ray_results_dir, "--force-search", identity).since is not None
    again.end()
    assert ForcedRun(settings.ray_results_dir, "--force-search", identity).since is None


def test_files_are_written_as_soon_as_a_study_is_finished(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is stopped after the first of two studies: its files are there."""
    other = StudySpec("m", "u", "x", STUDY.levels)
    written: list[set[str]] = []

    class Tuner:
        """Ray's, as far as the callback sees it: one study finishes, then the user stops the run."""

        def __init__(self, *_: Any, run_config: Any, **__: Any) -> None:
            (self.callback,) = run_config.callbacks

        def fit(self) -> None:
            write_record(
                outcome_path(settings.ray_results_dir.resolve(), STUDY, STUDY.identity(settings, "s")), _outcome(False)
            )
            trial = type("Trial", (), {"config": {"study": "m_t_x"}})
            self.callback.on_trial_result(1, [], trial, {"finished": True, "progress": Progress("search")})
            (run,) = settings.optimal_configs_dir.iterdir()
            written.append({path.name for path in run.iterdir()})
            raise KeyboardInterrupt

    monkeypatch.setattr("ray.tune.Tuner", Tuner)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.nodes", lambda: [])
    monkeypatch.setattr(config_search, "start_ray", lambda _: False)
    outcome = search([STUDY, other], settings)
    assert len(written[0]) == 6 and outcome.interrupted and len(outcome.levels) == 2
    assert outcome.failures == {"m_u_x": "was not finished"} and outcome.failed_trials == {}


def test_a_missing_or_damaged_outcome_is_one_line(settings: Settings) -> None:
    identity = STUDY.identity(settings, "s")
    outcome = SearchOutcome(settings.optimal_configs_dir / "run_20240315_143022")
    path = outcome_path(settings.ray_results_dir, STUDY, identity)
    problem = config_search._collect(STUDY, path, settings, identity, outcome)
    assert problem is not None and str(path) in problem and "must see --ray-results-dir" in problem
    write_json(path, {"study": "m_t_x", "error": None, "seconds": "long"})
    problem = config_search._collect(STUDY, path, settings, identity, outcome)
    assert problem is not None and "field seconds" in problem and "got 'long'" in problem and "\n" not in problem
    assert outcome.failures == {"m_t_x": problem} and outcome.levels == []


def test_failed_trials_are_counted_and_rungs_named(settings: Settings) -> None:
    outcome = _finish(settings, failing=True)
    failed = outcome.failed_trials["m_t_x"]
    (run,) = settings.optimal_configs_dir.iterdir()
    for level in STUDY.levels:
        stem = result_key("m", "t", level.name)
        record = json.loads((run / f"{stem}.json").read_text())
        trials = json.loads((run / f"{stem}_trials.json").read_text())["trials"]
        assert failed == record["failed_trials"] == sum(trial["status"] != "completed" for trial in trials) > 0
        told = record["confirmation"]
        assert (told["error_from"], told["density_from"]) == (
            ("forced forward",) * 2 if told["confirmed"] else ("full replay",) * 2
        )
        assert {"attention_backend", "dense_backend", "weights", "device", "dtype", "versions"} <= record["provenance"].keys()


def test_the_analysis_has_rays_columns(settings: Settings) -> None:
    _finish(settings, failing=False)
    (path,) = settings.optimal_configs_dir.glob("*/*x_5pct_analysis.csv")
    rows = list(csv.DictReader(path.open()))
    rays = {"trial_id", "training_iteration", "time_this_iter_s", "time_total_s", "timestamp", "date", "done"}
    assert rays | {"iterations_since_restore", "time_since_restore", "config/oracletopk_heavy_size"} <= rows[0].keys()
    for row in rows:
        assert float(row["time_total_s"]) == pytest.approx(0.1 * int(row["training_iteration"]))
        assert float(row["time_this_iter_s"]) == pytest.approx(0.1)
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(int(row["timestamp"])))
        assert row["date"] == stamp and row["iterations_since_restore"] == row["training_iteration"]


def _with(settings: Settings, **changes: Any) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, **changes)


def _outcome(failing: bool) -> StudyOutcome:
    """The outcome of STUDY, with figures of a formula."""
    import tempfile
    from types import SimpleNamespace

    class Formula:
        key = "formula"

        def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation | None]:
            found: list[Evaluation | None] = []
            for config in configs:
                sink, local, heavy = config.masker_configs
                if failing and heavy.heavy_size > 0.1:
                    raise RuntimeError("no such kernel")
                density = sink.sink_size + local.window_size + heavy.heavy_size
                scores = [1.0, 1.0] if rung == 3 else None
                found.append(
                    Evaluation(
                        error=1.0 - heavy.heavy_size,
                        density=density,
                        seconds=0.1,
                        score=1.0 if scores else None,
                        sample_scores=scores,
                    )
                )
            return found

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        study = Study(STUDY.space(), list(STUDY.levels), Formula(), Journal(path / "j"), num_samples=12, timeout=60, seed=0)
        for _ in study.run():
            pass
        lm = SimpleNamespace(dtype="torch.float32", device="cpu", dense_backend="sdpa")
        world = SimpleNamespace(samples=[], traces=[], layers=[0], lm=lm)
        write_outcome(path / "o", STUDY, study, world, 1.0)  # type: ignore[arg-type]
        return read_record(path / "o", StudyOutcome, "")


def _finish(settings: Settings, failing: bool) -> SearchOutcome:
    """STUDY as if it had been searched in a run of its own."""
    identity = STUDY.identity(settings, "s")
    outcome = SearchOutcome(settings.optimal_configs_dir / "run_20240315_143022")
    path = outcome_path(settings.ray_results_dir, STUDY, identity)
    write_record(path, _outcome(failing))
    assert config_search._collect(STUDY, path, settings, identity, outcome) is None
    assert search_files.trial_id(identity, 0) == f"{identity[:8]}_00000"
    return outcome
