"""Around the studies: reuse of earlier runs, when files are written, and errors before anything is written."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from benchmark.search import config_search
from benchmark.search.config_search import SearchOutcome, find_finished, run_search
from benchmark.search.output import trial_id, write_level_files
from benchmark.search.spec import StudySpec, StudyWork, study_id
from benchmark.search.study import Study
from benchmark.search.trial import Level, Progress
from benchmark.settings import Settings
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.results import Journal, result_key, write_json
from benchmark.storage.runs import list_runs
from benchmark.storage.search_records import Evaluation
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
        with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster") as raised:
            search([STUDY], _with(settings, ray_address=address))
    assert time.monotonic() - started < 30 and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_two_searches_in_one_ray_folder_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_search, "start_ray", lambda _: False)
    settings.ray_results_dir.mkdir()
    with FileLock(settings.ray_results_dir / ".lock"):
        with pytest.raises(UserError, match="another run writes to .* another --ray-results-dir"):
            search([STUDY], settings)
        assert not settings.optimal_configs_dir.exists()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process."""

    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def test_runs_made_under_different_time_zones_are_in_order(clock: Callable[[str], None], tmp_path: Path) -> None:
    made = []
    for zone in ("<+09>-9", "<-10>10"):  # Tokyo, then Honolulu
        clock(zone)
        made.append(config_search._make_run_folder(tmp_path, config_search.new_run_name(tmp_path)))
    assert made[0].name > made[1].name and list_runs(tmp_path) == made[::-1]


def test_a_finished_study_is_copied_with_its_failed_trials(settings: Settings) -> None:
    _finish(settings, failing=True)
    outcome = search([STUDY], settings, "run_20240316_143022")
    old, new = sorted(settings.optimal_configs_dir.iterdir())
    assert {p.name: p.read_bytes() for p in old.iterdir()} == {p.name: p.read_bytes() for p in results(new)}
    # A copy is as old as what was found: a forced search that was interrupted would take it for its own.
    assert {p.name: p.stat().st_mtime for p in old.iterdir()} == {p.name: p.stat().st_mtime for p in results(new)}
    assert outcome.run_dir == new and len(outcome.levels) == 2
    assert outcome.failed_trials == {"m_t_x": outcome.levels[0].failed_trials}


def test_studies_with_transient_failures_are_searched_again(settings: Settings) -> None:
    identity = STUDY.identity(settings, "s")
    _finish(settings, failing=True)
    assert find_finished(STUDY, settings.optimal_configs_dir, identity) is not None
    for path in settings.optimal_configs_dir.glob("*/*pct.json"):
        write_json(path, {**json.loads(path.read_text()), "transient_failures": 1})
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
    (note,) = again.begin()
    assert "continues" in note and str(again.path) in note
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
            _write(settings, failing=False)
            trial = SimpleNamespace(config={"study": "m_t_x"})
            ended = {"finished": True, "progress": Progress("search"), "problem": None}
            self.callback.on_trial_result(1, [], trial, ended)
            (run,) = settings.optimal_configs_dir.iterdir()
            written.append({path.name for path in results(run)})
            raise KeyboardInterrupt

    monkeypatch.setattr("ray.tune.Tuner", Tuner)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.nodes", lambda: [])
    monkeypatch.setattr(config_search, "start_ray", lambda _: False)
    outcome = search([STUDY, other], settings)
    assert len(written[0]) == 6 and outcome.interrupted and len(outcome.levels) == 2
    assert outcome.unfinished == ["m_u_x"] and outcome.failures == {} and outcome.failed_trials == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_very_end_is_not_lost(number: int, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All studies have ended, so Tune looks at the flag of its handler no more."""
    from ray.tune.tune import _setup_signal_catching

    class Tuner:
        def __init__(self, *_: Any, run_config: Any, **__: Any) -> None:
            (self.callback,) = run_config.callbacks

        def fit(self) -> None:
            stopped = _setup_signal_catching()
            self.callback.setup()
            _write(settings, failing=False)
            ended = {"finished": True, "progress": Progress("search"), "problem": None}
            self.callback.on_trial_result(1, [], SimpleNamespace(config={"study": "m_t_x"}), ended)
            with suppress(KeyboardInterrupt):  # as an exception in a callback of C code is dropped
                os.kill(os.getpid(), number)
            assert stopped.is_set() == (number == signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ray.tune.Tuner", Tuner)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.nodes", lambda: [])
    monkeypatch.setattr(config_search, "start_ray", lambda _: False)
    outcome = search([STUDY], settings)
    assert outcome.interrupted and outcome.unfinished == [] and len(outcome.levels) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_missing_or_damaged_files_of_a_worker_are_one_line(settings: Settings) -> None:
    outcome = SearchOutcome(settings.optimal_configs_dir / "run_20240315_143022")
    work = config_search._work(STUDY, settings, "s")
    problem = config_search._collect(outcome, work, None)
    assert problem is not None and str(work.results) in problem and "must see --ray-results-dir" in problem
    assert config_search._collect(outcome, work, "no answer has a sparse row") == "no answer has a sparse row"
    _write(settings, failing=False)
    for path in work.results.glob("*pct.json"):
        write_json(path, {**json.loads(path.read_text()), "num_trials": "many"})
    problem = config_search._collect(outcome, work, None)
    assert problem is not None and "field num_trials" in problem and "got 'many'" in problem and "\n" not in problem
    assert outcome.failures == {"m_t_x": problem} and outcome.levels == []


@pytest.mark.parametrize("character", ["x", "模"])
def test_names_of_any_length_become_files(character: str, settings: Settings) -> None:
    name = character * 300
    levels = tuple(Level(f"{name}_{level.name}", level.budget, level.template) for level in STUDY.levels)
    spec = StudySpec(f"/models/{name}", f"{name}/task", name, levels)
    work = _write(settings, failing=False, spec=spec)
    outcome = SearchOutcome(settings.optimal_configs_dir / "run_20240315_143022")
    assert config_search._collect(outcome, work, None) is None and len(outcome.levels) == 2
    assert find_finished(spec, settings.optimal_configs_dir, work.identity) == outcome.run_dir
    assert len(f"search_{study_id(spec)}".encode()) <= 255


def test_failed_trials_are_counted_and_rungs_named(settings: Settings) -> None:
    outcome = _finish(settings, failing=True)
    failed = outcome.failed_trials["m_t_x"]
    (run,) = settings.optimal_configs_dir.iterdir()
    for level in STUDY.levels:
        stem = result_key("m", "t", level.name)
        record = json.loads((run / f"{stem}.json").read_text())
        trials = json.loads((run / f"{stem}_trials.json").read_text())["trials"]
        assert failed == record["failed_trials"] == sum(trial["status"] != "completed" for trial in trials) > 0
        confirmation = record["confirmation"]
        assert (confirmation["error_from"], confirmation["density_from"]) == (
            ("forced forward",) * 2 if confirmation["confirmed"] else ("full replay",) * 2
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


def results(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if not path.name.startswith(".")]


def _write(settings: Settings, failing: bool, spec: StudySpec = STUDY) -> StudyWork:
    """Write what a worker writes of a study, with figures of a formula."""

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

    work = config_search._work(spec, settings, "s")
    study = Study(spec.space(), list(spec.levels), Formula(), Journal(work.journal), num_samples=12, timeout=60, seed=0)
    for _ in study.run():
        pass
    lm = SimpleNamespace(dtype="torch.float32", device="cpu", dense_backend="sdpa")
    world = SimpleNamespace(samples=[], traces=[], layers=[0], lm=lm)
    write_level_files(work, study, world, 1.0)  # type: ignore[arg-type]
    return work


def _finish(settings: Settings, failing: bool) -> SearchOutcome:
    """STUDY as if it had been searched in a run of its own."""
    outcome = SearchOutcome(settings.optimal_configs_dir / "run_20240315_143022")
    work = _write(settings, failing)
    assert config_search._collect(outcome, work, None) is None
    assert outcome.levels[0].best_trial_id.startswith(trial_id(work.identity, 0)[:10])
    return outcome
