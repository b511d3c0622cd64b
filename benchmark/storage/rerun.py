"""Marker that lets an interrupted --force run resume: what was written since the run began is its own work and is kept."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from benchmark.storage.results import write_text


class ForcedRun:
    """A marker file in a folder, from the beginning of a forced run to its end. Times are those of the folder's file system.

    identity: a hash of what the run does; other runs have their own markers.
    """

    def __init__(self, folder: Path, flag: str, identity: str) -> None:
        self.path, self.flag = folder / f".forced-{identity}", flag
        self.since = self.path.stat().st_mtime if self.path.exists() else None

    def begin(self) -> list[str]:
        """Write the marker, or resume the run of an existing one. Returns notes for the user."""
        if self.since is not None:
            began = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
            return [f"{self.flag}: continues the run of {began}, which had not ended; to start again remove {self.path}"]
        write_text(self.path, "")
        self.since = self.path.stat().st_mtime
        return []

    def is_own(self, path: Path) -> bool:
        """Whether a file was written since this run began."""
        return self.since is not None and path.exists() and path.stat().st_mtime >= self.since

    def end(self) -> None:
        """Remove the marker: the next run with the flag starts again."""
        self.path.unlink(missing_ok=True)
