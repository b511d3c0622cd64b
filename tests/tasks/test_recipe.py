"""docs/adding_a_task.md, followed word by word: files as it says, its commands, the plan of its run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_a_task.md").read_text("utf-8")


#: Runs commands in one process, as they are on the page.
RUN = """
import json, sys
from benchmark.raytune.run_full_benchmark import main as run
from benchmark.tasks.__main__ import main as show
for words in json.loads(sys.argv[1]):
    assert (show(words[2:]) if words[1] == "benchmark.tasks" else run(words[1:])) == 0, words
"""


def test_the_steps(tmp_path: Path) -> None:
    blocks = re.split(r"^```(?:json|python)\n(.*?)```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    named = [
        (re.findall(r"Save \w+ as `([\w./]+)`", before)[-1], text)
        for before, text in zip(blocks[::2], blocks[1::2], strict=False)
    ]
    assert [name for name, _ in named] == [
        "data/my_qa/short.jsonl", "data/my_qa/short.tuning.jsonl", "my_qa.py", "price_list.py",
    ]  # fmt: skip
    for name, text in named:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    commands = re.findall(r"^uv run python (.*?) +# needs a file", PAGE, flags=re.MULTILINE)
    show_rows, both_phases, show_prices = map(shlex.split, commands)
    asked = [show_rows, [*show_rows, "--split", "tuning"], show_prices, [*both_phases, "--dry-run"]]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("Question: Who built the tower?", "Question: When does the ferry leave?", "This is a price list."):
        assert text in done.stdout
    assert "tasks:    my_qa/short" in done.stdout
