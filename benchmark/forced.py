"""A forced run does its work anew, whatever is there. If it is interrupted, the same command goes on with it: what was done since
it began is its own work, not that of an earlier run."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from benchmark.results import write_json


class ForcedRun:
    """A mark in a folder, from the beginning of a forced run to its end. Times are those of the folder's file system.

    identity: a hash of what the run does; a forced run of something else takes the mark's place.
    """

    def __init__(self, folder: Path, flag: str, identity: str) -> None:
        self.path, self.flag, self.identity = folder / ".forced.json", flag, identity
        self.since: float | None = None
        try:
            if json.loads(self.path.read_text()) == {"identity": identity}:
                self.since = self.path.stat().st_mtime
        except (OSError, ValueError):
            pass

    def begin(self) -> list[str]:
        """Set the mark, or go on under the one that is there. Returns what is worth telling."""
        if self.since is not None:
            began = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
            return [f"{self.flag}: goes on with the run of {began}, which had not ended; to start anew remove {self.path}"]
        write_json(self.path, {"identity": self.identity})
        self.since = self.path.stat().st_mtime
        return []

    def is_own(self, path: Path) -> bool:
        """Whether a file was written since this run began."""
        return self.since is not None and path.exists() and path.stat().st_mtime >= self.since


def end_forced(folder: Path) -> None:
    """The run has ended: the next one with the flag is another one."""
    (folder / ".forced.json").unlink(missing_ok=True)
