"""Files of results: their names, whole-file writes, append-only journals, and the versions that produced them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import JsonValue

#: Bytes of a file name that is made of one name, and of several. The rest of 255 is for what is put before and behind it.
NAME_BYTES, KEY_BYTES = 100, 200


class StorageError(OSError):
    """A file could not be written, for example because the disk is full. What is on disk already stays valid."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the file system becomes a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; make room or mend the folder, then run the same command again"
        raise StorageError(error.errno, reason, str(path)) from None


def valid_text(text: str) -> str:
    """The text with halves of surrogate pairs, which no file can hold, as their escapes."""
    return text.encode(errors="backslashreplace").decode()


def safe_name(text: str) -> str:
    """A model, task or configuration name as a file name of at most NAME_BYTES: "/" and other separators become "_"; "." and
    ".." would be other folders. A name that is cut, or loses characters that no file name can have, ends in its hash."""
    plain = "".join(c if c.isprintable() else "_" for c in text)
    name = "".join("_" if c in '/\\:*?"<>|' else c for c in plain)
    name = name.replace(".", "_") if set(name) == {"."} else name
    return name if plain == text and len(name.encode()) <= NAME_BYTES else _hashed(name, text, NAME_BYTES)


def result_key(model: str, task: str, name: str) -> str:
    """ "{model}_{task}_{masker}", at most KEY_BYTES: the stem of every Phase 1 file."""
    key = f"{safe_name(model)}_{safe_name(task)}_{safe_name(name)}"
    return key if len(key.encode()) <= KEY_BYTES else _hashed(key, f"{model}\n{task}\n{name}", KEY_BYTES)


def _hashed(name: str, text: str, size: int) -> str:
    """The beginning of a name and a hash of the text that it stands for, together at most `size` bytes."""
    return f"{name.encode()[: size - 9].decode(errors='ignore')}-{fingerprint(text)[:8]}"


def fingerprint(value: Any) -> str:
    """A short hash of plain values: equal for equal content, whatever the order of dictionary keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all: temporary file beside it, fsync, rename. Half of a surrogate pair,
    which is no text, is written as its escape."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("x", encoding="utf-8", newline="", errors="backslashreplace") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole; NaN and infinity are refused (they are not JSON, and a missing number is null)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """An append-only file of JSON lines. When `append` returns, the line is on disk.

    A last line that a kill left incomplete is skipped on reading and cut off before the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False

    def append(self, record: dict[str, JsonValue]) -> None:
        """Write one line and wait until it is on disk."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with storage_errors(self.path):
            if not self._checked:
                self._cut_incomplete_line()
            self._checked = False  # unless the line is written to its end
            with self.path.open("ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._checked = True

    def read(self) -> list[Any]:
        """The objects of all complete lines, in order; none for an absent file."""
        found = []
        for line in self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # left incomplete by a kill, and a later line was appended to it
        return found

    def _cut_incomplete_line(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)


@functools.cache
def environment() -> dict[str, str | None]:
    """Versions and commit that produced a result, and the date that chat templates were given."""
    from sparse_attention_hub.attention import ENGINE_VERSION
    from sparse_attention_hub.models.prompts import TEMPLATE_DATE

    packages = ("sparse-attention-hub", "torch", "transformers", "ray", "optuna", "numpy")
    own = {"engine": str(ENGINE_VERSION), "template-date": TEMPLATE_DATE.date().isoformat(), "commit": _commit()}
    return {**{name: _version(name) for name in packages}, **own}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
