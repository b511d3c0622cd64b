"""A search that is killed at random moments and started again ends with the files of an undisturbed one.

`python benchmark/speed/fault_run.py --phase 1` does the same with 100 kills.
"""

from __future__ import annotations

from pathlib import Path

from benchmark.speed.fault_run import WRONG, FaultRun


def test_a_killed_search_resumes_and_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    figures = FaultRun(tmp_path, phase="1", samples=6, seed=2).run(kills=3)
    assert figures["kills"] == 3
    assert {name: figures[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert figures["processes_left"] == 0
