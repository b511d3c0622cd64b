"""A search that is killed and started again ends with the files of an undisturbed one.

`python benchmark/speed/fault_run.py --phase 1` does the same at random moments, with 100 kills.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmark.speed.fault_run import WRONG, FaultRun


def journalled(run: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.glob("ray_results/journals/*.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_resumes_and_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    runs, killed = FaultRun(tmp_path, phase="1", samples=6), tmp_path / "killed"
    assert runs.start(runs.undisturbed, "1").wait(250) == 0
    for kills in (2, 3):  # in the first start a worker, then the program; in the second the program and its workers
        process, known = runs.start(killed, "1"), journalled(killed)
        while process.poll() is None and runs.counts["kills"] < kills:
            if journalled(killed) > known:
                runs.kill(process, killed)
                known = journalled(killed)
            time.sleep(0.02)
        process.wait(250)
    assert runs.counts["kills"] == 3
    assert runs.start(killed, "1").wait(250) == 0
    runs.compare(killed)
    assert {name: runs.counts[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
