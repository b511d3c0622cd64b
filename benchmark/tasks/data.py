"""Rows of a data set: from the user's folder, else from the Hugging Face hub, checked against a schema while reading.

`--data-dir DIR` holds `DIR/<benchmark>/<subset>.jsonl` (or .parquet, .csv) in the hub's own columns. In a csv file,
lists and dicts are JSON.
Nothing is evaluated as code: no pickle, no data set scripts (datasets >= 4 has none).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_attention_hub.errors import UserError

SUFFIXES = (".jsonl", ".parquet", ".csv")
PROBE_SECONDS = 4.0

Row = dict[str, Any]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# What a schema may say of a column. A csv cell that is not text is read as JSON.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "integer": _is_integer,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "list of texts": _is_texts,
    "text or list of texts": lambda value: _is_text(value) or _is_texts(value),
    "list": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
    "anything": lambda value: True,
}


@dataclass(frozen=True)
class Source:
    """Where a subset's rows are.

    `columns`: name -> one of KINDS; a kind with a leading "?" may be absent, null or "".
    """

    benchmark: str
    subset: str
    hub_id: str
    columns: dict[str, str]
    config: str | None = None
    split: str = "test"

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.subset}"


class DataMissingError(UserError):
    """There are no data to read. `reason`: why the hub gave none."""

    reason = ""


def load_rows(source: Source, data_dir: Path | None) -> Iterator[Row]:
    """The rows in order, read lazily.

    Raises DataMissingError when they cannot be had, UserError with row number and column (while reading) when one is
    malformed.
    """
    path = data_file(source, data_dir)
    rows = _read_hub(source, data_dir) if path is None else _read_file(path, source)
    return checked(rows, source, place_of(source, data_dir))


def data_file(source: Source, data_dir: Path | None) -> Path | None:
    """The user's own file for this source, if there is one."""
    if data_dir is None:
        return None
    stem = Path(data_dir) / source.benchmark / source.subset
    return next((path for path in (stem.with_name(stem.name + suffix) for suffix in SUFFIXES) if path.is_file()), None)


def place_of(source: Source, data_dir: Path | None) -> str:
    """What a message about a row says of where it is: the user's file, or the hub data set."""
    path = data_file(source, data_dir)
    return f"{source.hub_id} ({source.name})" if path is None else str(path)


def checked(rows: Iterator[Row], source: Source, place: str) -> Iterator[Row]:
    """The rows, read lazily; UserError with row number and column at the first that does not fit `source.columns`."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{place} row {number}: a row must be an object of columns, got {type(row).__name__}")
        for column, kind in source.columns.items():
            optional, kind = kind.startswith("?"), kind.lstrip("?")
            if optional and row.get(column) in (None, ""):
                continue
            if row.get(column) is None:
                what = "is empty" if column in row else f"is missing (there are {', '.join(map(str, row))})"
                raise UserError(f"{place} row {number}: column {column!r} {what}; it must be {kind}")
            if not KINDS[kind](row[column]):
                raise UserError(f"{place} row {number}: column {column!r} must be {kind}, got {shown(row[column])}")
        yield row


def shown(value: Any) -> str:
    """A value as a message quotes it, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_file(path: Path, source: Source) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    return _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path, source)


def _read_jsonl(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    number += 1
                    yield json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} row {number}: not JSON ({error})") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error


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
    wants_text = kind == "text" or (kind == "text or list of texts" and not value.startswith("["))
    if wants_text:
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return value  # the schema check says what is wrong, or text is fine
    return parsed if KINDS[kind](parsed) else value


def _read_hub(source: Source, data_dir: Path | None) -> Iterator[Row]:
    reachable = hub_reachable()
    if not reachable and not _in_hub_cache(source.hub_id):
        raise cannot_be_had(source, data_dir, "the hub cannot be reached from here")
    import datasets

    with contextlib.nullcontext() if reachable else _offline():
        try:
            rows = datasets.load_dataset(source.hub_id, source.config, split=source.split)
        except Exception as error:  # of many kinds: gated, not found, broken download, no such config
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise cannot_be_had(source, data_dir, reason) from error
    return iter(rows)


def cannot_be_had(source: Source, data_dir: Path | None, reason: str, task: str | None = None) -> DataMissingError:
    """What was tried for a task (by default the source's) and why it failed, and the two ways out, in one line."""
    hub = f"hub data set {source.hub_id}" + (f" ({source.config})" if source.config else "")
    folder = Path(data_dir) if data_dir is not None else Path("DIR")
    file = folder / source.benchmark / f"{source.subset}.jsonl"
    tried = f"{file} (.parquet, .csv): not there; {hub}" if data_dir is not None else hub
    way = f"give --data-dir DIR and put it there as {file}" if data_dir is None else "put it there"
    error = DataMissingError(
        f"{task or source.name}: its data cannot be had. Tried {tried}: {reason}. "
        f"Either {way}, in the hub's columns, or run once where the hub can be reached (it is then cached)"
    )
    error.reason = reason
    return error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers at all, within seconds: its own clients retry for minutes where there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError:  # it answered, if only to say no
            answered.set()
        except (OSError, ValueError):
            pass

    # A thread, because the time-out does not bound the name look-up.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 1)
    return answered.is_set()


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import constants

    # Where `datasets` keeps its cache; asked without importing it, which takes seconds.
    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return (Path(cache) / hub_id.replace("/", "___")).is_dir()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The hub's clients read only their caches inside."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def first_rows(source: Source, data_dir: Path | None, count: int) -> list[Row]:
    """The first rows, as a check that the data are there."""
    return list(itertools.islice(load_rows(source, data_dir), count))
