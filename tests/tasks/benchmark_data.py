"""Fixture data for the tests of benchmark tasks: `tests/data/<benchmark>/<subset>.jsonl`, in the columns of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.tasks import get_task
from benchmark.tasks.base import Sample, SampleRequest

DATA = Path(__file__).parents[1] / "data"


def samples(task: str, data_dir: Path = DATA, **wanted: Any) -> list[Sample]:
    """The task's samples, by default the test ones."""
    return get_task(task).samples(SampleRequest(tokenizer=None, data_dir=data_dir, **wanted))


def both_splits(task: str, data_dir: Path = DATA) -> list[Sample]:
    return samples(task, data_dir) + samples(task, data_dir, split="tuning")


def write_rows(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the user would; returns the folder for --data-dir."""
    file = folder / f"{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def read_rows(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
