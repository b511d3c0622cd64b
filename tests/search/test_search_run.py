"""The whole program on a tiny model: both phases, reuse, recovery from a kill, reproducible files."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark.raytune import run_full_benchmark
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.results import Journal

SCRIPT = Path(run_full_benchmark.__file__)
CONFIGS = ["dense", "sink_local_25pct", "sink_local_oracle_top_k_10pct", "sink_local_oracle_top_k_25pct"]
TIMES = {"search_time", "seconds", "timestamp", "time_total_s", "started", "finished"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama"))


def command(model: str, *more: str) -> list[str]:
    return [
        sys.executable, str(SCRIPT), "--models", model, "--tasks", "infinite_bench/passkey", "--configs", *CONFIGS,
        "--num-samples", "8", "--search-max-requests", "2", "--search-max-context-length", "700", "--max-context-length", "700",
        "--search-max-new-tokens", "4", "--max-new-tokens", "4", "--max-requests", "3", "--device", "cpu", *more,
    ]  # fmt: skip


def run(model: str, folder: Path, *more: str, expect: int = 0) -> str:
    done = subprocess.run(command(model, *more), cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(model, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run that are not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "optimal_configs").iterdir())


def test_it_writes_three_files_a_level_and_the_results_tree(finished: Path, model: str) -> None:
    (found,) = runs(finished)
    names = sorted(contents(found))
    assert len(names) == 9
    for config in CONFIGS[1:]:
        stem = next(name for name in names if name.endswith(f"_{config}.json")).removesuffix(".json")
        best = json.loads((found / f"{stem}.json").read_text())
        assert best["masker_name"] == config and best["sparse_config"]["masker_configs"][0]["type"] == "SinkMaskerConfig"
        assert best["confirmation"]["error_from"] == "forced forward" and best["provenance"]["seed"] == 0
        assert best["density"] <= best["budget"] or not best["meets_budget"]
        trials = json.loads((found / f"{stem}_trials.json").read_text())["trials"]
        assert best["best_trial_id"] in {trial["trial_id"] for trial in trials}
        rows = list(csv.DictReader((found / f"{stem}_analysis.csv").open()))
        assert (
            len(rows) == len(trials)
            and {"trial_id", "training_iteration", "time_total_s", "error", "density"} <= rows[0].keys()
        )
        assert any(name.startswith("config/") for name in rows[0])
    results = finished / "benchmark_results"
    summary = json.loads((results / "benchmark_summary.json").read_text())
    assert summary["config_run_used"] == found.name
    for config in CONFIGS:
        (tree,) = results.glob(f"*/{config}/infinite_bench_passkey")
        expected = {"raw_results.csv", "metrics.json", "config.json"} | (
            {"micro_metrics.jsonl"} if config != "dense" else set()
        )
        assert {path.name for path in tree.iterdir()} == expected
    assert (finished / "ray_results" / "search_runs").is_dir() and list((finished / "ray_results" / "traces").iterdir())


def test_a_second_run_copies_the_first(finished: Path, model: str) -> None:
    printed = run(model, finished, "--phase", "1")
    assert "copied from run_" in printed and "Ray" not in printed
    assert contents(runs(finished)[0]) == contents(runs(finished)[-1])


def test_phase_2_alone_uses_the_newest_run_and_reuses_its_answers(finished: Path, model: str) -> None:
    before = {path: path.read_bytes() for path in (finished / "benchmark_results").glob("*/*/*/raw_results.csv")}
    run(model, finished, "--phase", "2")
    assert before == {path: path.read_bytes() for path in before}


def test_levels_with_a_budget_are_not_searched_again_for_another_objective(finished: Path, model: str) -> None:
    printed = run(model, finished, "--phase", "1", "--objective", "sparsity_5")
    assert printed.count("copied from run_") == 2
    assert contents(runs(finished)[0]) == contents(runs(finished)[-1])


def evaluations(journal: Path) -> list[dict[str, Any]]:
    return [record for line in Journal(journal).read() for record in line["evaluations"]]


@pytest.mark.slow
def test_a_killed_forced_search_resumes_and_ends_like_an_undisturbed_one(finished: Path, model: str, tmp_path: Path) -> None:
    """SIGKILL to the whole process group in the middle of the search; the journalled trials are not evaluated again.
    tests/faults/test_search_kills.py kills searches that are not forced."""
    process = subprocess.Popen(
        command(model, "--phase", "1", "--force-search"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    journals = tmp_path / "ray_results" / "journals"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(len(evaluations(path)) >= 8 for path in journals.glob("*.jsonl")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.read_bytes() for path in journals.glob("*.jsonl")}
    assert any(kept.values())
    run(model, tmp_path, "--phase", "1", "--force-search")
    for name, content in kept.items():
        whole = content[: content.rfind(b"\n") + 1]
        assert (journals / name).read_bytes().startswith(whole)
        keys = [record["key"] for record in evaluations(journals / name)]
        assert len(keys) == len(set(keys)), "a journalled trial was evaluated again"
    assert comparable(runs(tmp_path)[-1]) == comparable(runs(finished)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_search_says_how_to_resume(model: str, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        command(model, "--phase", "1", "--num-samples", "500"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list((tmp_path / "ray_results").glob("journals/*.jsonl")):
        time.sleep(0.1)
    process.send_signal(number)
    table, printed = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "run the same command again" in printed
    assert "interrupted " in table and "FAILED" not in table


def comparable(folder: Path) -> dict[str, Any]:
    """The result files without their times."""
    return {path.name: without_times(json.loads(path.read_text())) for path in sorted(folder.glob("[!.]*.json"))}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value
