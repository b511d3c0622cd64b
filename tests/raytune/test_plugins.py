"""--plugin: a masker, configurations and a task from outside, through both phases with real workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmark.plugins import load_plugins
from benchmark.raytune import run_full_benchmark
from benchmark.raytune.configurations import choose_configs, configs_of_plugin
from benchmark.raytune.run_full_benchmark import get_all_sparse_configs, main
from benchmark.speed.toy import save_tiny_model
from sparse_attention_hub import ResearchAttentionConfig, SinkMaskerConfig
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


MASKER = """
from dataclasses import dataclass
from sparse_attention_hub import Masker, MaskerConfig, register_masker

@dataclass
class QuestTopKMaskerConfig(MaskerConfig):
    pass

@register_masker(QuestTopKMaskerConfig)
class Mine(Masker):
    def select(self, inputs, mask):
        return mask
"""
BAD = {
    "absent.py": (None, "no such file"),
    "no_such_module": (None, "No module named 'no_such_module'"),
    "raises.py": ("1 / 0", "ZeroDivisionError: division by zero"),
    "leaves.py": ("import sys; sys.exit()", "cannot be imported (SystemExit"),
    "wrong.py": ("def (", "SyntaxError"),
    "json.py": ("", "rename the file"),
    "again.py": ("def make_tasks():\n    return {'ruler/x': None}", "there is a benchmark 'ruler' already"),
    "listed.py": ("def make_tasks():\n    return [None]", "make_tasks() failed (AttributeError"),
    "taken.py": (MASKER, "there is a QuestTopKMaskerConfig in sparse_attention_hub.maskers.quest: give taken's another name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_plugin_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as found:
        load_plugins([name])
    assert str(found.value).isprintable()


@pytest.mark.parametrize("beside", ["statistics.py", "benchmark", "sparse_attention_hub"])
def test_modules_beside_a_plugin_that_would_hide_others_are_refused(beside: str, tmp_path: Path) -> None:
    """Workers of a search find the plugin by PYTHONPATH, which comes before all other modules."""
    (tmp_path / "mine.py").write_text("")
    if beside.endswith(".py"):
        (tmp_path / beside).write_text("")
    else:
        (tmp_path / beside).mkdir()
        (tmp_path / beside / "__init__.py").write_text("")
    with pytest.raises(UserError, match=f"{beside} beside it would hide another module of its name"):
        load_plugins(["mine.py"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("1 / 0", "get_all_sparse_configs() failed (ZeroDivisionError"),
        ("None", "get_all_sparse_configs() failed (TypeError"),
        ("[('a', None)]", "a configuration is a (name, template, masker classes) triple, got"),
        ("[('baseline', None, None)]", "'baseline': the configuration without a template is called 'dense'"),
    ],
)
def test_configurations_that_are_none_are_one_line(made: str, message: str) -> None:
    module = ModuleType("own")
    exec(f"def get_all_sparse_configs():\n    return {made}", vars(module))
    with pytest.raises(UserError, match=re.escape(message)):
        configs_of_plugin(module, [5])


def test_a_name_may_look_like_a_pattern() -> None:
    config = ResearchAttentionConfig([SinkMaskerConfig(4)])
    (found,) = choose_configs([("sink[4]_5pct", config, [SinkMaskerConfig])], ["sink[4]_5pct"])
    assert found.name == "sink[4]_5pct"
