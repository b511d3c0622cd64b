"""The fault run at small size: a benchmark is killed, and ends with an undisturbed one's files (a search: tests/faults)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.speed.fault_run import WRONG, FaultRun, contents


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_lose_nothing(tmp_path: Path) -> None:
    figures = FaultRun(tmp_path, phase="2", samples=4, seed=1).run(3)
    assert figures["kills"] == 3 and figures["worker"] == figures["parent"] == figures["group"] == 1
    assert {name: figures[name] for name in (*WRONG, "processes_left")} == dict.fromkeys((*WRONG, "processes_left"), 0)


def test_what_is_compared(tmp_path: Path) -> None:
    """Numbers and texts of result files, without times, names of runs, and hidden files."""
    run = tmp_path / "optimal_configs/run_20200101_000000"
    run.mkdir(parents=True)
    (run / "a.json").write_text('{\n  "error": 0.5,\n  "seconds": 1.25,\n  "run": "run_20200101_000000"\n}\n')
    (run / "a.csv").write_text("error,time_total_s\n0.5,3\n")
    results = tmp_path / "benchmark_results/model/.journals"
    results.mkdir(parents=True)
    (results / "line.jsonl").write_text("{}\n")
    (results.parent / "b.jsonl").write_text('{"value": 1, "timestamp": 2.5}\n')
    assert contents(tmp_path) == [
        'benchmark_results/model/b.jsonl {"value": 1, }',
        'optimal_configs/run/a.csv {"error": "0.5", }',
        "optimal_configs/run/a.json {",
        'optimal_configs/run/a.json   "error": 0.5,',
        "optimal_configs/run/a.json   ,",
        'optimal_configs/run/a.json   "run": "run"',
        "optimal_configs/run/a.json }",
    ]
