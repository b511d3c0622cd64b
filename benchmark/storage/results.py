"""The results on disk: names, whole-file writes, append-only journals, and what identifies a result."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any


def safe_name(text: str) -> str:
    """A model or task name as a file name: "/" and other separators become "_"; "." and ".." would be other folders."""
    name = "".join("_" if c in '/\\:*?"<>|' else c for c in text)
    return name.replace(".", "_") if set(name) == {"."} else name


def result_key(model: str, task: str, name: str) -> str:
    """ "{model}_{task}_{masker}": the stem of every Phase 1 file."""
    return f"{safe_name(model)}_{safe_name(task)}_{safe_name(name)}"


def fingerprint(value: Any) -> str:
    """A short hash of plain values: equal for equal content, whatever the order of dictionary keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all: temporary file beside it, fsync, rename. What is no text (half of a
    surrogate pair, in somebody's data) is written as its escape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole; NaN and infinity are refused (they are not JSON, and a missing number is null)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # NumPy scalars
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """An append-only file of JSON lines. A record is there after `append` returns, whatever happens next.

    A torn last line (the writer was killed in it) is dropped on reading and cut off before the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on disk."""
        line = (json.dumps(record, default=_plain, allow_nan=False) + "\n").encode()
        if not self._checked:
            self._cut_torn_line()
        with self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records, in order; an absent file has none."""
        return list(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line torn by a kill and later written past
            if isinstance(record, dict):
                yield record

    def _cut_torn_line(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                os.truncate(self.path, whole)
        self._checked = True


@functools.cache
def environment() -> dict[str, str | None]:
    """Versions and commit that produced a result."""
    from sparse_attention_hub.attention import ENGINE_VERSION

    packages = ("sparse-attention-hub", "torch", "transformers", "ray", "optuna", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["engine"] = str(ENGINE_VERSION)
    versions["commit"] = _commit()
    return versions


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
