"""Every command and example of docs/ runs, or says why it cannot run everywhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: A comment that says what a command needs beside this checkout, or that it takes minutes.
NEEDS = re.compile(r"#.*\bneeds (a|GPUs)\b")
SLOW = re.compile(r"#.*\btakes minutes\b")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[pytest.param]:  # type: ignore[valid-type]
    found = {}
    for page in PAGES:
        for line in (line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()):
            marks = [pytest.mark.slow, pytest.mark.timeout(1800)] if SLOW.search(line) else []
            if not NEEDS.search(line):
                command = line.partition(" #")[0].strip()
                found.setdefault(command, pytest.param(command, marks=marks, id=f"{page.stem}: {command}"))
    return list(found.values())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the code and copies of the sample runs, so that what a command writes lands beside it."""
    for name in ("benchmark", "sparse_attention_hub"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("optimal_configs", "benchmark_results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*"))
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_command_runs(command: str, checkout: Path) -> None:
    words = shlex.split(command.removeprefix("uv run "))
    assert words[0] == "python", f"{command}: write what it needs in a comment (# needs a ...)"
    done = subprocess.run([sys.executable, *words[1:]], cwd=checkout, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    for number, example in enumerate(blocks(page, "python")):
        assert len(example.splitlines()) <= 60
        script = tmp_path / f"test_example_{number}.py"
        script.write_text(example)
        runner = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "MaskerContract" in example else []
        command = [sys.executable, *runner, str(script)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_subject_has_its_page() -> None:
    expected = "adding_a_masker adding_a_model adding_a_task all_methods budgets_and_protocols cluster engine file_formats numbers quick_start"
    assert {page.stem for page in PAGES} == {*expected.split(), "reading_the_report"}
