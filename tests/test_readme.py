"""The README is short, its example runs, it names every masker; every flag is documented; what is pinned is what is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 180
    assert (
        len(re.findall(r"<!-- speed-table -->(.*?)<!-- /speed-table -->", README, flags=re.DOTALL)[0].strip().splitlines())
        == 2 + 6
    )


def test_its_speed_figures_are_those_of_the_page_of_speed() -> None:
    page = (ROOT / "docs/speed.md").read_text()
    rows = re.findall(r"<!-- speed-table -->(.*?)<!-- /speed-table -->", README, flags=re.DOTALL)[0].strip().splitlines()[2:]
    for row in rows:
        for figure in re.findall(r"\d[\d.]*[x%]?", row.split("|")[2]):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", page), f"{figure} of {row}"


def test_every_masker_is_named() -> None:
    import sparse_attention_hub as hub

    for name in hub.__all__:
        if name.endswith("Config") and name not in ("MaskerConfig", "ResearchAttentionConfig", "TopKConfig"):
            assert f"`{name}(" in README, name


def test_every_flag_is_documented_in_its_group() -> None:
    script = ROOT / "benchmark/raytune/run_full_benchmark.py"
    shown = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    page = (ROOT / "docs/command_line.md").read_text()
    groups = re.findall(r"^(what to run|Phase 1.*|Phase 2.*|where):\n((?:  .*\n|\n)+)", shown, flags=re.MULTILINE)
    assert len(groups) == 4
    for title, flags in groups:
        table = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
        assert table, title
        documented = re.findall(r"^\| `(--[a-z0-9-]+)", table[1], flags=re.MULTILINE)
        assert documented == re.findall(r"^  (--[a-z0-9-]+)", flags, flags=re.MULTILINE), title
        for flag in re.findall(r"`(--[a-z0-9-]+)`", next(row for row in README.splitlines() if row.startswith(f"| {title}"))):
            assert flag in documented, f"README: {flag}"


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_lock_pins_what_is_installed() -> None:
    """`requirements.lock` and the resolution of pyproject.toml (pinned to a day) agree, package by package."""
    pinned = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate():
                pinned[requirement.name.lower()] = requirement
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        name = Requirement(text).name.lower()
        assert name in pinned, f"{name} is not in requirements.lock: make it anew (CONTRIBUTING.md)"
        assert metadata.version(name) in pinned[name].specifier, name
    assert "llm" not in pinned and "llama-cpp-python" not in pinned


def test_no_registry_address_is_pinned() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
