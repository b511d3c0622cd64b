"""What the speed scripts share: the report, parts in new processes, quick help, and one set of goals in scripts and docs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.speed import kernel_speed, masker_speed, phase2_speed, search_speed
from benchmark.speed.common import in_process, report

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmark/speed").glob("*.py") if '"__main__"' in path.read_text())


def test_goals_are_checked_on_exact_figures(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ratio": 1.99996, "errors": 0.0, "seconds": 3.0}
    code = report(
        figures, True, at_least={"ratio": 2.0, "not_measured": 1.0}, at_most={"errors": 0}, precision=".3g", threads=1
    )
    record = json.loads(capsys.readouterr().out)
    assert code == 1 and record["figures"] == {"ratio": 2.0, "errors": 0.0, "seconds": 3.0}
    assert record["goals"] == [
        {"name": "ratio", "value": 1.99996, "at_least": 2.0, "holds": False},
        {"name": "errors", "value": 0.0, "at_most": 0, "holds": True},
    ]
    assert set(record["machine"]) == {"cpu", "cores", "python", "threads"}
    assert report(figures, False, at_most={"errors": 0}) == 0
    assert "holds errors 0, at most 0" in capsys.readouterr().out


def test_a_part_in_a_new_process() -> None:
    process, seconds = in_process(os.getpid)
    assert process != os.getpid() and seconds > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script: str) -> None:
    """It imports nothing that takes seconds."""
    code = f"import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_path({f'benchmark/speed/{script}.py'!r}, run_name='__main__')\n"
    code += "finally: print('loaded', *{'torch', 'ray', 'numba', 'optuna', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and "--json" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


def test_goals_of_the_docs_are_those_of_the_scripts() -> None:
    search, phase2, kernel, masker = search_speed.GOALS, phase2_speed.GOALS, kernel_speed.CPU_GOALS, masker_speed.GOALS
    families = [
        f"{search[f'{f}_full_replay_ratio']:g}x, {search[f'{f}_cheapest_rung_ratio']:g}x" for f in search_speed.FAMILIES
    ]
    shared = ", ".join(f"{kernel['shared', density]:g}x" for density in (0.02, 0.05, 0.1, 0.25))
    goals = {
        ("search_speed", *families, f"{search['search_100_ratio']:g}x, -, {search['search_480_ratio']:g}x"),
        ("phase2_speed", *(f"{phase2[f'prefill_each_over_ours_{length}']:g}x" for length in (4096, 1024))),
        ("phase2_speed", f"{phase2['process_each_over_ours_4096']:g}x", f"{phase2['workers_share_of_limit']:.0%}"),
        ("kernel_speed", f"{shared}; {kernel['own', 0.05]:g}x"),
        ("masker_speed", ", ".join(f"{masker[m]:.2f}" for m in ("random_sampling", "quest", "double_sparsity", "pq_cache"))),
    }
    rows = [row.split("|") for row in (ROOT / "docs/speed.md").read_text().splitlines() if row.startswith("| ")]
    for script, *wanted in goals:
        given = {row[3].strip() for row in rows if f"speed/{script}.py" in row[-2]}
        assert set(wanted) <= given, f"{script}: {set(wanted) - given}"
    page = {goal for row in rows for goal in re.split(r"[,;] ", row[3].strip())}
    readme = re.search(r"<!-- speed-table -->(.*?)<!-- /speed-table -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert readme is not None
    for row in readme[1].strip().splitlines()[2:]:
        assert set(row.split("|")[3].strip().split(", ")) <= page, row
