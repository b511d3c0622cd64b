"""Rows of a data set: from the user's folder, else from the Hugging Face hub, checked against a schema while reading.

`--data-dir DIR` holds `DIR/<benchmark>/<subset>.jsonl` (or .parquet, .csv) with the hub's columns. A list or dict may be
written as text, in JSON or as pandas writes it. Nothing is evaluated as code: no pickle, no data set scripts (datasets >= 4
has none).
"""

import contextlib
import csv
import functools
import io
import json
import logging
import os
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.tasks.base import Row as Row  # re-exported
from benchmark.tasks.base import is_writable
from benchmark.tasks.values import parse_text
from sparse_attention_hub.errors import UserError, quoted

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".parquet", ".csv")
PROBE_SECONDS = 4.0
UNREACHABLE = "the hub cannot be reached from here"
MAX_DEPTH = 50  # levels of lists and dicts in a row; what is written later may add some


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The types that a schema may give a column.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "list of texts": _is_texts,
    "text or list of texts": lambda value: isinstance(value, str) or _is_texts(value),
    "dict": lambda value: isinstance(value, dict),
    "anything": lambda value: value is not None,
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


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time it is given: data are read several times in a run."""
    logger.warning("%s", message)


def load_rows(source: Source, data_dir: Path | None) -> Iterator[Row]:
    """The rows in order, read lazily: of the user's file if there is one, else of the hub.

    Raises DataMissingError when there are none to read (an archive: at its first row) and UserError, with row number and
    column, at a row that does not fit `source.columns`.
    """
    path = data_file(source, data_dir)
    if path is not None:
        rows = _read_file(path)
    else:
        rows = _read_archive(source, data_dir) if source.archive else _read_hub(source, data_dir)
    return checked(rows, source.columns, location(source, data_dir))


def data_file(source: Source, data_dir: Path | None) -> Path | None:
    """The user's own file for this source, if there is one."""
    return first_file(data_dir, [source.name + suffix for suffix in SUFFIXES])


def first_file(data_dir: Path | None, names: list[str]) -> Path | None:
    """The first of these files in the user's folder, if there is one."""
    paths = [] if data_dir is None else [Path(data_dir) / name for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)


def location(source: Source, data_dir: Path | None) -> str:
    """Where a row was read, for messages: the user's file, or the hub data set."""
    path = data_file(source, data_dir)
    return f"{source.hub_id} ({source.name})" if path is None else str(path)


def checked(rows: Iterable[Row], columns: dict[str, str], where: str) -> Iterator[Row]:
    """The rows with the types of `columns`. UserError, with the row's number, for any fault of a row or in reading it."""
    number = 0
    try:
        for row in rows:
            number += 1
            _check(row, columns)
            yield row
    except DataMissingError:
        raise
    except UserError as error:
        raise UserError(f"{where} row {number}: {error}") from None
    except Exception as error:  # of many types, in reading the next row
        raise UserError(f"{where} row {number + 1}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({quoted(error)}): save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({quoted(error)})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if type(error) is ValueError and "4300 digits" in str(error):
        return "a number has more than 4300 digits"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    what = "not in the expected form" if isinstance(error, (KeyError, TypeError, AttributeError)) else "cannot be read"
    return f"{what} ({type(error).__name__}: {quoted(error)})"


def _check(row: Row, columns: dict[str, str]) -> None:
    """UserError unless the row has the columns. A text is parsed where another kind of value is asked for."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object of columns, got {type(row).__name__}")
    for column, kind in columns.items():
        optional, kind = kind.startswith("?"), kind.lstrip("?")
        value = row.get(column)
        if optional and value in (None, ""):
            continue
        if value is None:
            what = "is empty" if column in row else f"is missing (there are {quoted(list(row))})"
            raise UserError(f"column {column!r} {what}; it must be {kind}")
        brackets = isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
        if isinstance(value, str) and kind != "text" and (brackets or kind in ("integer", "list of texts", "dict")):
            try:
                parsed = parse_text(value)
            except UserError as error:
                raise UserError(f"column {column!r} is {error}") from None
            row[column] = value = parsed if KINDS[kind](parsed) else value
        if not KINDS[kind](value):
            raise UserError(f"column {column!r} must be {kind}, got {quoted(value)}")
    for column, value in row.items():
        fault = _fault(column) or _fault(value)
        if fault:
            raise UserError(f"column {quoted(column)} {fault}")


def _fault(value: Any, depth: int = 0) -> str | None:
    """What keeps a value from being written to a file, if anything does."""
    if isinstance(value, str) and not is_writable(value):
        return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: remove it"
    if isinstance(value, (list, dict)):
        if depth == MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} levels deep"
        if isinstance(value, dict) and not all(isinstance(key, (str, int, float)) for key in value):
            return f"has a key that is neither text nor number, got {quoted(value)}"
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((fault for item in inner if (fault := _fault(item, depth + 1))), None)
    return None


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8-sig", newline="") as lines:  # Excel writes a byte-order mark, which -sig leaves out
        yield from _read_csv(lines) if path.suffix == ".csv" else _read_jsonl(lines)


def _read_jsonl(lines: Iterable[str]) -> Iterator[Row]:
    return (json.loads(line) for line in lines if line.strip())


def _read_csv(lines: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a context is one cell
    return ({name: value for name, value in row.items() if name} for row in csv.DictReader(lines))


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
            yield from _read_jsonl(io.TextIOWrapper(file, encoding="utf-8"))


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


def _first_line(error: Exception) -> str:
    return quoted(Exception(str(error).strip().partition("\n")[0])) or "no message"


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
