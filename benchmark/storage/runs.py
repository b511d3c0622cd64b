"""The runs of Phase 1 in a folder: when each was made, which is the newest, and which one a name means."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from benchmark.storage.records import Record, write_record
from sparse_attention_hub.errors import UserError, quoted
from sparse_attention_hub.found import MARK, run_created


class RunMark(Record):
    """created: in seconds since 1970."""

    created: float = Field(gt=0, le=1e15)


def mark_run(run: Path) -> None:
    """Record that the run is made now."""
    write_record(run / MARK, RunMark(created=time.time()))


def list_runs(folder: Path) -> list[Path]:
    """The folders run_YYYYMMDD_HHMMSS in a folder, newest first."""
    found = [(run_created(path), path) for path in folder.glob("run_*") if path.is_dir()]
    return [path for created, path in sorted(found, reverse=True) if created]


def find_run(folder: Path, name: str, flag: str) -> Path:
    """The run of this name in a folder. UserError for any other name, also for a path."""
    runs = list_runs(folder)
    for run in runs:
        if run.name == name:
            return run
    known = ", ".join(run.name for run in runs[:5])
    listed = f"there are {known}" if known else "there is none yet, run --phase 1"
    raise UserError(f"{flag} {quoted(name)}: no such run in {folder}; {listed}")
