"""Every command and example of docs/ runs, or says why it cannot run everywhere, and the recipes work as they are written."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.raytune.analyze_trials import choose_search
from benchmark.report.__main__ import main as report

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: A comment that says what a command needs beside this checkout, or that it takes minutes.
NEEDS = re.compile(r"#.*\bneeds (a|GPUs)\b")
SLOW = re.compile(r"#.*\btakes minutes\b")


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[pytest.param]:  # type: ignore[valid-type]
    found = {}
    for page in PAGES:
        for line in (line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()):
            marks = [pytest.mark.slow, pytest.mark.timeout(1800)] if SLOW.search(line) else []
            if not NEEDS.search(line):
                command = line.partition(" #")[0].strip()
                found.setdefault(command, pytest.param(command, marks=marks, id=f"{page.stem}: {command}"))
    return list(found.values())


def run(words: list[str], folder: Path, seconds: int = 280) -> str:
    """What a Python command prints; it must succeed."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh clone: the code and the sample runs. Commands write beside it, and recipes may edit it."""
    ignore = shutil.ignore_patterns("__pycache__", ".lock", ".logs", ".journals", "report.html")
    for name in ("benchmark", "sparse_attention_hub", "examples", "optimal_configs/sample", "benchmark_results/sample"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")  # where a test has run it before
@pytest.mark.parametrize("command", commands())
def test_command_runs(
    command: str,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    python, *words = shlex.split(command.removeprefix("uv run "))
    assert python == "python", f"{command}: write what it needs in a comment (# needs a ...)"
    # A masker's module as a program would register its config a second time here.
    if request.node.get_closest_marker("slow") or "-m sparse_attention_hub.maskers" in command:
        assert run(words, checkout, seconds=1500).strip()
        return
    monkeypatch.chdir(checkout)
    execute, words = (runpy.run_module, words[1:]) if words[0] == "-m" else (runpy.run_path, words)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:  # in this process: to import all again takes ten seconds
        execute(words[0], run_name="__main__")
    printed = capsys.readouterr()
    assert not ended.value.code and printed.out.strip(), printed.err


def test_the_sample_runs_are_shown_until_there_are_others(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    configs = Path("optimal_configs")
    assert choose_search(configs, None).parent == configs / "sample" and "sample run" in capsys.readouterr().out
    shutil.copytree(next(configs.glob("sample/run_*")), configs / "run_20200101_000000")
    assert choose_search(configs, None).name == "run_20200101_000000" and not capsys.readouterr().out
    assert report([]) == 0 and "sample run" in capsys.readouterr().out
    assert Path("benchmark_results/sample/report.html").exists()
    shutil.copytree(next(Path("benchmark_results/sample").glob("embedded*")), "benchmark_results/model")
    assert report([]) == 0 and capsys.readouterr().out == "report: benchmark_results/report.html\n"
    page = Path("benchmark_results/report.html").read_text()
    assert page.count("<h3") == Path("benchmark_results/sample/report.html").read_text().count("<h3"), (
        "the sample is not mixed in"
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    for number, example in enumerate(blocks(page, "python")):
        assert len(example.splitlines()) <= 60
        script = tmp_path / f"test_example_{number}.py"
        script.write_text(example)
        runner = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "MaskerContract" in example else []
        printed = run([*runner, str(script)], ROOT)
        if "answer_many" in example and page.stem == "library":
            assert printed.count("71432") == 2, "both answers hold the key"


def test_the_recipe_of_a_task(checkout: Path) -> None:
    from_rows, generated = blocks(ROOT / "docs/adding_a_task.md", "python")
    (checkout / "benchmark/tasks/price_list.py").write_text(generated)
    (checkout / "benchmark/tasks/my_qa.py").write_text(from_rows)
    insert(checkout / "benchmark/tasks/__init__.py", "MODULES: dict[str, str] = {\n", '    "price_list": "price_list",\n')
    insert(checkout / "benchmark/tasks/__init__.py", "MODULES: dict[str, str] = {\n", '    "my_qa": "my_qa",\n')
    (checkout / "data/my_qa").mkdir(parents=True)
    rows = [f'{{"id": "{i}", "context": "Text {i}.", "question": "Which?", "answers": ["{i}"]}}\n' for i in range(20)]
    (checkout / "data/my_qa/short.jsonl").write_text("".join(rows))
    shown = run(["-c", SHOW_TASKS], checkout)
    assert "This is a price list." in shown and shown.count("Question: Which?") == 2
    assert "{'accuracy': 1.0} {'f1': 1.0}" in shown


def test_the_recipe_of_a_masker(checkout: Path) -> None:
    page = ROOT / "docs/adding_a_masker.md"
    (example,) = blocks(page, "python")
    register, test, imported, line = (re.sub("^   ", "", text, flags=re.MULTILINE) for text in blocks(page, ""))
    maskers, script = checkout / "sparse_attention_hub/maskers", checkout / "benchmark/raytune/run_full_benchmark.py"
    (maskers / "key_norm.py").write_text(example.partition("\n\nclass TestKeyNorm")[0].replace(CONTRACT, ""))
    insert(maskers / "__init__.py", "from .hash_attention import HashAttentionTopKMaskerConfig\n", register)
    insert(script, "    import sparse_attention_hub as hub\n", f"    {imported}", before=True)
    insert(script, "combinations: dict[str, list[Any]] = {\n", " " * 12 + line)
    (checkout / "tests/maskers").mkdir(parents=True)
    (checkout / "tests/maskers/test_key_norm.py").write_text(test)
    assert "TestKeyNorm" in run(["-m", "pytest", "-q", "--collect-only", "tests/maskers/test_key_norm.py"], checkout)
    plan = run([str(script), "--debug", "--dry-run", "--configs", "dense", "sink_local_key_norm_*"], checkout)
    assert "sink_local_key_norm (5%, 10%, 25%, 50%)" in plan


SHOW_TASKS = """
from benchmark.tasks import score_prediction
from benchmark.tasks.__main__ import main

show = ["show", "--model", "embedded/SmolLM2-135M-Instruct"]
assert main([*show, "price_list/40"]) == 0
for split in ("test", "tuning"):
    assert main([*show, "my_qa/short", "--data-dir", "data", "--split", split]) == 0
print(score_prediction("price_list/40", " 512.", ["512"]), score_prediction("my_qa/short", "a b", ["b"]))
"""
CONTRACT = "from sparse_attention_hub.testing import MaskerContract\n"


def insert(path: Path, mark: str, text: str, before: bool = False) -> None:
    content = path.read_text()
    assert content.count(mark) == 1, f"{path.name}: {mark}"
    path.write_text(content.replace(mark, text + mark if before else mark + text))


def test_every_subject_has_its_page() -> None:
    expected = (
        "adding_a_masker adding_a_model adding_a_task all_methods budgets_and_protocols cluster command_line engine file_formats gpu "
        "library methods models numbers plugins quick_start reading_the_report reliability speed troubleshooting using_a_result"
    )
    assert {page.stem for page in PAGES} == set(expected.split())


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """Three dots in a message stand for anything."""
    texts = [
        text
        for name in ("benchmark", "sparse_attention_hub")
        for path in (ROOT / name).rglob("*.py")
        for text in texts_of(path)
    ]
    messages = re.findall(r"^\| `([^`]*)` \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")))
        assert any(pattern.search(text) for text in texts), f"no message of the code: {message}"


def texts_of(path: Path) -> Iterator[str]:
    """Its text literals; an f-string with a dot for each value."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
