"""--plugin: a masker, configurations and a task from outside, through both phases with real workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.plugins import load_plugins
from benchmark.raytune import run_full_benchmark
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs, main
from benchmark.speed.toy import save_tiny_model
from sparse_attention_hub.errors import UserError

ROOT = Path(run_full_benchmark.__file__).parents[2]
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), flags=re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    (tmp_path / "stride.py").write_text(EXAMPLE)


def test_the_example_of_the_docs_runs_in_both_phases(tmp_path: Path) -> None:
    """In a process of its own, from another folder: Ray's workers and pebble's import the file by themselves."""
    (tmp_path / "elsewhere").mkdir()
    model = save_tiny_model(tmp_path / "tiny")
    few = "--num-samples 3 --search-max-requests 2 --max-requests 2 --max-new-tokens 2 --search-max-new-tokens 2 --device cpu"
    few += " --max-context-length 256 --search-max-context-length 256 --max-concurrent-benchmarks 1"
    command = [sys.executable, str(ROOT / "benchmark/raytune/run_full_benchmark.py"), "--plugin", "../stride.py", *few.split()]
    command += ["--models", str(model), "--tasks", "my_words/colours", "--configs", "dense", "sink_stride_*"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "elsewhere/benchmark_results/benchmark_summary.json").read_text())
    rows = {row["configuration"]: row for row in summary["results"]}
    assert set(rows) == {"dense", "sink_stride_5pct", "sink_stride_10pct"} and summary["failures"] == []
    assert rows["sink_stride_10pct"]["provenance"] is not None and rows["sink_stride_10pct"]["samples"]["ok"] == 2


def test_its_configurations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugin", "stride.py", "--configs", "list"]) == 0
    names = [name for name in capsys.readouterr().out.splitlines() if not name.startswith("preset:")]
    own = [name for name, _, _ in get_all_sparse_configs()]
    assert names == [*own, "sink_stride_5pct", "sink_stride_10pct"]
    assert main(["--configs", "list"]) == 0
    assert [name for name in capsys.readouterr().out.splitlines() if not name.startswith("preset:")] == own


BAD = {
    "absent.py": "no such file",
    "no_such_module": "No module named 'no_such_module'",
    "raises.py": "ZeroDivisionError: division by zero",
    "wrong.py": "SyntaxError",
    "json.py": "rename the file",
    "again.py": "there is a benchmark 'ruler' already",
}


@pytest.mark.parametrize("name", BAD)
def test_a_plugin_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "wrong.py").write_text("def (\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "again.py").write_text("def make_tasks():\n    return {'ruler/x': None}\n")
    with pytest.raises(UserError, match=re.escape(BAD[name])) as found:
        load_plugins([name])
    assert str(found.value).isprintable()
