"""analyze_trials.py on a small search: what it reads, tells, writes and refuses."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.raytune.analyze_trials import main
from benchmark.report.search_plots import pareto_front
from benchmark.report.search_run import choose_run, read_run
from benchmark.report.search_tables import _differences, hyperparameter_effects, shorten
from benchmark.storage.search_records import BestConfig
from sparse_attention_hub.errors import UserError
from tests.search.search_files import best_config, figures, trial, write_level

MODEL = "org/model-1B"


def make_trials(identity: str, worse: float) -> list[dict[str, Any]]:
    """Ten trials whose error falls with `heavy_size`; `idle` has no effect. Two reach the highest rung, the last one failed."""
    trials = []
    for number in range(10):
        heavy = 0.01 * (number + 1)
        rungs: dict[str, Any] = {"0": figures(worse / (number + 1), heavy)}
        if number in (2, 3):
            layers = {"layer_errors": [0.3, 0.2], "layer_densities": [heavy, heavy]}
            rungs["1"] = figures(worse / (number + 1) * 1.5, heavy, **layers)
            rungs["2"] = figures(worse / (number + 1) * 1.2, heavy, reproduced=1.0)
            rungs["3"] = figures(worse / (number + 1), heavy, score=0.75, sample_scores=[1.0, 0.5])
        params = {"heavy_size": heavy, "idle": number % 2, "kind": "ab"[number % 2]}
        failure = {"status": "failed", "error_message": "ValueError: too much"} if number == 9 else {}
        trials.append(trial(f"{identity}_{number:05d}", params, {} if failure else rungs, **failure))
    return trials


def add_level(
    run: Path, task: str, name: str, budget: float | None, identity: str, worse: float = 0.5, met: bool = True
) -> None:
    trials = make_trials(identity, worse)
    best = best_config(
        model=MODEL,
        task=task,
        masker_name=name,
        budget=budget,
        meets_budget=met,
        error=trials[2]["error"],
        density=trials[2]["density"],
        best_trial_id=trials[2]["trial_id"],
        provenance={"seed": 0 if worse == 0.5 else 1},
    )
    write_level(run, best, trials)


@pytest.fixture
def searches(tmp_path: Path) -> Path:
    folder = tmp_path / "optimal_configs"
    for name, worse in (("run_20240101_000000", 0.5), ("run_20240102_000000", 0.4)):
        run = folder / name
        for task in ("ruler/1024/vt", "loogle/longdep_qa"):
            add_level(run, task, "sink_local_oracle_top_k_5pct", 0.05, f"{task[0]}a", worse)
            add_level(run, task, "sink_local_oracle_top_k_10pct", 0.1, f"{task[0]}a", worse)
            add_level(run, task, "sink_local_10pct", 0.1, f"{task[0]}b", 2 * worse, met=False)
    (folder / "run_20240103_000000").mkdir()  # interrupted before anything was found
    return folder


def test_the_newest_run_with_trials_is_read(searches: Path) -> None:
    run = read_run(choose_run(searches, None))
    assert run.name == "run_20240102_000000"
    assert len(run.studies) == 4, "levels of one search share their trials"
    study = next(study for study in run.studies if study.combination == "sink_local_oracle_top_k")
    assert [level.budget for level in study.levels] == [0.05, 0.1]
    best = study.best_trial(study.levels[0])
    assert best is not None and best.trial_id == "la_00002"
    assert run.budgets == [0.05, 0.1]


def test_it_prints_and_writes_everything(searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--optimal-configs-dir", str(searches), "--output-dir", str(out)]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines()[: told.splitlines().index("Time spent")])) <= 100
    for title in (
        "Trials by combination",
        "Best of each level",
        "How well budgets",
        "Hyperparameters",
        "Where replay",
        "Time spent",
    ):
        assert title in told
    assert "4 of 6 budgets are met" in told
    assert "at 10%: sink_local_oracle_top_k_10pct, error 0.160" in told
    assert "ValueError: too much" in told
    assert "8 finalists differ by 10% or more" in told
    assert (out / "analysis.txt").read_text() in told + "\n"
    plots = ["error_against_density", "best_error_by_level", "progress", "layer_error", "layer_density", "importance"]
    for name in plots:
        assert (out / f"{name}.png").stat().st_size > 5000
        assert "<svg" in (out / f"{name}.svg").read_text()
    with (out / "all_trials_data.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 40, "a trial that levels share stands once"
    best = [row for row in rows if row["best_of"]]
    assert len(best) == 4
    assert {row["rung"] for row in best} == {"3"}
    assert [row["error"] for row in rows if row["status"] == "failed"] == [""] * 4, "a missing figure is missing"


def test_head_budgets_are_a_table_and_heat_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, name = tmp_path / "optimal_configs" / "run_20240101_000000", "sink_local_oracle_top_k_5pct"
    trials = make_trials("a", 0.5)
    table = {
        "level": name,
        "base": 2,
        "by": "kv_head",
        "strength": 0.75,
        "held_out": -0.125,
        "factors": [[0.5, 1.5], [1.0, 1.0]],
    }
    rungs = {
        "0": figures(0.1, 0.03),
        "1": figures(0.1, 0.03, head_densities=[[0.01, 0.05], [0.03, 0.03]]),
        "2": figures(0.12, 0.03, reference_nll=0.5),
        "3": figures(None, 0.03, score=1.0),
    }
    trials[2]["figures"]["2"]["reference_nll"] = 0.625
    trials.append(trial("a_00010", trials[2]["config"], rungs, table=table))
    even = {"trial_id": "a_00002", "error": 0.2, "density": 0.03, "kv_fraction": None, "score": 0.75}
    best = best_config(model=MODEL, task="t/a", masker_name=name, budget=0.05, best_trial_id="a_00010", even_budgets=even)
    write_level(run, best, trials)
    out = tmp_path / "out"
    assert main(["--optimal-configs-dir", str(run.parent), "--output-dir", str(out)]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"{name} +kv_head +75% +-12.5% +0.200 +0.120 +-0.125 +1.0% to 5.0% +yes", told)
    assert (out / "head_budgets.png").stat().st_size > 5000
    add_level(run, "t/b", name, 0.05, "b")
    assert {effect.name for study in read_run(run).studies for effect in hyperparameter_effects(study)} >= {"heavy_size"}
    assert [len(read_run(run).studies[0].trials)] == [11]


def test_budgets_on_kv_bytes_go_by_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "optimal_configs" / "run_20240101_000000"
    trials = make_trials("a", 0.5)
    for entry in trials:
        entry["kv_fraction"] = None if entry["density"] is None else entry["density"] + 0.5
        for rung in entry["figures"].values():
            rung["kv_fraction"] = rung["density"] + 0.5
    level = {"masker_name": "x_55pct", "budget": 0.55, "budget_on": "kv", "kv_fraction": 0.53, "best_trial_id": "a_00002"}
    write_level(run, best_config(model=MODEL, task="t/a", **level), trials)
    assert main(["--optimal-configs-dir", str(run.parent), "--output-dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"x_55pct +55% +53.0% +96% +5 of 9 +yes", told) and "used = KV bytes of the best / budget" in told
    assert "none was fitted" in told


def test_what_decides_the_error_is_found(searches: Path) -> None:
    study = read_run(choose_run(searches, None)).studies[0]
    effects = {effect.name: effect for effect in hyperparameter_effects(study)}
    heavy = effects["heavy_size"]
    assert heavy.error_importance is not None and heavy.error_importance > 0.9
    assert heavy.low_error > heavy.high_error and heavy.low_density < heavy.high_density
    assert set(effects) == {"heavy_size", "idle", "kind"}


def test_two_runs_are_compared(searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["run_20240101_000000", "run_20240102_000000"]
    out = tmp_path / "out"
    assert main(["--optimal-configs-dir", str(searches), "--output-dir", str(out), "--compare", *names]) == 0
    told = capsys.readouterr().out
    assert "6 levels in both: B has the smaller error in 6" in told
    assert "-20%" in told and "settings differ: seed" in told
    assert len((out / "comparison.csv").read_text().splitlines()) == 7


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto_front([(0.3, 0.1), (0.1, 0.5), (0.2, 0.6), (0.2, 0.3), (0.4, 0.1)]) == [(0.1, 0.5), (0.2, 0.3), (0.3, 0.1)]


def test_names_keep_both_ends() -> None:
    assert shorten("sink_local_oracle_top_k_10pct", 16) == "sink_lo..k_10pct"
    assert len(shorten("x" * 40, 17)) == 17


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--run", "run_x"], "--run 'run_x': no such run"),
        (["--optimal-configs-dir", "nowhere"], "no such folder"),
        (["--run", "run_20240103_000000"], "contains no finished search"),
        (["--compare", "run_20240101_000000", "run_y"], "--compare 'run_y': no such run"),
        (["--run", "run_20240101_000000", "--compare", "a", "b"], "cannot be given together"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    flags: list[str], says: str, searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--optimal-configs-dir", str(searches), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"trials": []}', json.dumps({"trials": [{}], "rungs": []})])
def test_damaged_files_are_named_and_the_others_shown(
    content: str, searches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.report.search_plots.draw_all", lambda *_: [])
    run = choose_run(searches, None)
    files = sorted(run.glob("*_trials.json"))
    files[0].write_text(content)
    assert main(["--optimal-configs-dir", str(searches), "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"left out: {files[0]}: ") and printed.err.count("\n") == 1
    assert "of 5 budgets are met" in printed.out
    for path in files:
        path.write_text(content)
    with pytest.raises(UserError, match=files[0].name):
        read_run(run)


def test_help_is_quick() -> None:
    code = "import sys; from benchmark.raytune.analyze_trials import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'matplotlib', 'optuna', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_searches_on_other_samples_or_weights_are_not_the_same() -> None:
    def run(**provenance: object) -> Any:
        level = BestConfig.model_validate(best_config(provenance=provenance))
        return SimpleNamespace(studies=[SimpleNamespace(levels=[level])])

    same = run(samples=["a", "b"], thinking="auto")
    assert _differences(same, run(samples=["a", "b"], thinking="auto")) == {}
    for changes in ({"samples": ["a", "c"]}, {"thinking": "off"}, {"head_budgets": "head"}, {"weights": [["w", 1, 2]]}):
        assert _differences(same, run(**{"samples": ["a", "b"], "thinking": "auto"} | changes)).keys() == changes.keys()
