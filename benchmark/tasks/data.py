"""Rows of a data set: from the user's folder, else from the Hugging Face hub, checked against a schema while reading.

`--data-dir DIR` holds `DIR/<benchmark>/<subset>.jsonl` (or .parquet, .csv) with the hub's columns; in a csv file, lists
and dicts are JSON. Nothing is evaluated as code: no pickle, no data set scripts (datasets >= 4 has none).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_attention_hub.errors import UserError

SUFFIXES = (".jsonl", ".parquet", ".csv")
PROBE_SECONDS = 4.0
UNREACHABLE = "the hub cannot be reached from here"

Row = dict[str, Any]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The types that a schema may give a column. A csv cell that is not text is read as JSON.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "list of texts": _is_texts,
    "text or list of texts": lambda value: isinstance(value, str) or _is_texts(value),
    "dict": lambda value: isinstance(value, dict),
    "anything": lambda value: True,
}


@dataclass(frozen=True)
class Source:
    """Where the rows of a subset come from.

    `columns`: name -> one of KINDS; a column whose kind starts with "?" may be absent, null or "". `archive`: a zip in the
    hub repository whose jsonl file `member` holds the rows, for data sets that are published as a script.
    """

    benchmark: str
    subset: str
    hub_id: str
    columns: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    split: str = "test"
    archive: str = ""
    member: str = ""

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.subset}"


class DataMissingError(UserError):
    """There are no data to read. `reason`: why the hub gave none."""

    reason = ""


def load_rows(source: Source, data_dir: Path | None) -> Iterator[Row]:
    """The rows in order, read lazily: of the user's file if there is one, else of the hub.

    Raises DataMissingError when there are none to read (an archive: at its first row) and UserError, with row number and
    column, at a row that does not fit `source.columns`.
    """
    path = data_file(source, data_dir)
    if path is not None:
        rows = _read_file(path, source)
    else:
        rows = _read_archive(source, data_dir) if source.archive else _read_hub(source, data_dir)
    return _checked(rows, source.columns, location(source, data_dir))


def data_file(source: Source, data_dir: Path | None) -> Path | None:
    """The user's own file for this source, if there is one."""
    return first_file(data_dir, [source.name + suffix for suffix in SUFFIXES])


def first_file(data_dir: Path | None, names: list[str]) -> Path | None:
    """The first of these files in the user's folder, if there is one."""
    paths = [] if data_dir is None else [Path(data_dir) / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def location(source: Source, data_dir: Path | None) -> str:
    """Where a row was read, for messages: the user's file, or the hub data set."""
    path = data_file(source, data_dir)
    return f"{source.hub_id} ({source.name})" if path is None else str(path)


def _checked(rows: Iterator[Row], columns: dict[str, str], where: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where} row {number}: a row must be an object of columns, got {type(row).__name__}")
        for column, kind in columns.items():
            optional, kind = kind.startswith("?"), kind.lstrip("?")
            if optional and row.get(column) in (None, ""):
                continue
            if row.get(column) is None:
                what = "is empty" if column in row else f"is missing (there are {', '.join(map(str, row))})"
                raise UserError(f"{where} row {number}: column {column!r} {what}; it must be {kind}")
            if not KINDS[kind](row[column]):
                raise UserError(f"{where} row {number}: column {column!r} must be {kind}, got {shown(row[column])}")
        yield row


def shown(value: Any) -> str:
    """The value for a message, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_file(path: Path, source: Source) -> Iterator[Row]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".csv":
        yield from _read_csv(path, source)
    else:
        with path.open(encoding="utf-8") as lines:
            yield from _read_jsonl(lines, path)


def _read_jsonl(lines: Iterable[str], where: object) -> Iterator[Row]:
    number = 0
    try:
        for line in lines:
            if line.strip():
                number += 1
                yield json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} row {number}: not JSON ({error})") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _read_csv(path: Path, source: Source) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a context is one cell
    number = 0
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                number += 1
                yield {name: _cell(value, source.columns.get(name, "text")) for name, value in row.items() if name}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} row {number + 1}: not csv ({error})") from error


def _cell(value: str | None, kind: str) -> Any:
    optional, kind = kind.startswith("?"), kind.lstrip("?")
    if value is None or (optional and value == ""):
        return None
    if kind == "text" or (kind == "text or list of texts" and not value.startswith("[")):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return value  # the schema check says what is wrong, or text is allowed
    return parsed if KINDS[kind](parsed) else value


def _read_hub(source: Source, data_dir: Path | None) -> Iterator[Row]:
    reachable = hub_reachable()
    if not reachable and not _in_hub_cache(source.hub_id):
        raise missing_data(source, data_dir, UNREACHABLE)
    import datasets

    with contextlib.nullcontext() if reachable else _offline():
        try:
            rows = datasets.load_dataset(source.hub_id, source.config, split=source.split)
        except Exception as error:  # of many types: gated, not found, broken download, no such config
            raise missing_data(source, data_dir, f"{type(error).__name__}: {_first_line(error)}") from error
    return iter(rows)


def _read_archive(source: Source, data_dir: Path | None) -> Iterator[Row]:
    from huggingface_hub import hf_hub_download

    reachable = hub_reachable()
    try:
        path = hf_hub_download(source.hub_id, source.archive, repo_type="dataset", local_files_only=not reachable)
    except Exception as error:  # of many types: not found, offline and not cached, broken download
        reason = f"{type(error).__name__}: {_first_line(error)}" if reachable else UNREACHABLE
        raise missing_data(source, data_dir, reason) from error
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if f"/{name}".endswith("/" + source.member)), None)
        if member is None:
            raise missing_data(source, data_dir, f"{source.archive} holds no {source.member}")
        with archive.open(member) as file:
            yield from _read_jsonl(io.TextIOWrapper(file, encoding="utf-8"), f"{source.hub_id} {member}")


def missing_data(source: Source, data_dir: Path | None, reason: str, task: str | None = None) -> DataMissingError:
    """The error that names what was tried for a task (by default the source's), why it failed, and what to do."""
    hub = f"hub data set {source.hub_id}" + (f" ({source.config})" if source.config else "")
    file = Path(data_dir or "DIR") / source.benchmark / f"{source.subset}.jsonl"
    tried = f"{file} (.parquet, .csv): not there; {hub}" if data_dir is not None else hub
    way = f"give --data-dir DIR and put it there as {file}" if data_dir is None else "put it there"
    error = DataMissingError(
        f"{task or source.name}: no data found. Tried {tried}: {reason}. "
        f"Either {way}, in the hub's columns, or run once where the hub can be reached (it is then cached)"
    )
    error.reason = reason
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within seconds. Its own clients retry for minutes when there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError:  # an answer too
            answered.set()
        except (OSError, ValueError):
            pass

    # In a thread: the timeout does not bound the name look-up.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 1)
    return answered.is_set()


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import constants

    # The cache folder of `datasets`, found without importing it: that takes seconds.
    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return (Path(cache) / hub_id.replace("/", "___")).is_dir()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside, the hub's clients read their caches only."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
