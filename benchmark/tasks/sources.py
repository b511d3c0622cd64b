"""Data sets that exist in several forms: the authors' own, and copies with the prompt already in the columns.

A `Form` says which columns a form has and turns a row into samples; a `Place` says where a form is published. The
user's file may be in any form: its first row tells.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.tasks.base import Sample, UserError
from benchmark.tasks.data import (
    DataMissingError,
    Row,
    Source,
    cannot_be_had,
    checked,
    data_file,
    first_line,
    hub_reachable,
    load_rows,
    place_of,
)


@dataclass(frozen=True)
class Form:
    """Columns (name -> kind, as in data.Source) and the samples of a row.

    `samples(row, number)`; `number` counts rows from 0. ValueError, which names the column, for a row it cannot take.
    """

    columns: dict[str, str]
    samples: Callable[[Row, int], Iterable[Sample]]

    def missing(self, row: Row) -> list[str]:
        return [column for column, kind in self.columns.items() if not kind.startswith("?") and column not in row]


@dataclass(frozen=True)
class Place:
    """A hub data set, or a jsonl file inside a zip of a hub repository (where the data set is a script)."""

    hub_id: str
    config: str | None = None
    split: str = "test"
    archive: str | None = None
    member: str | None = None


def read_samples(
    benchmark: str, subset: str, places: list[Place], forms: list[Form], data_dir: Path | None
) -> Iterator[Sample]:
    """The samples of the user's file if there is one, else of the first place that can be had.

    One line each: DataMissingError when there is none, UserError with place, row number and column when a row does not
    fit its form.
    """
    source = Source(benchmark, subset, places[0].hub_id, {}, places[0].config, places[0].split)
    errors: list[DataMissingError] = []
    for place in places:
        here = replace(source, hub_id=place.hub_id, config=place.config, split=place.split)
        try:
            return _samples(_opener(place, here, data_dir), forms, place_of(here, data_dir))
        except DataMissingError as error:
            errors.append(error)
    every = replace(source, hub_id=" or ".join(dict.fromkeys(place.hub_id for place in places)))
    raise cannot_be_had(every, data_dir, errors[0].reason)


def _opener(place: Place, source: Source, data_dir: Path | None) -> Callable[[dict[str, str]], Iterator[Row]]:
    if place.archive is None or data_file(source, data_dir) is not None:
        return lambda columns: load_rows(replace(source, columns=columns), data_dir)
    return lambda columns: checked(
        _read_archive(place, source, data_dir), replace(source, columns=columns), place_of(source, data_dir)
    )


def _samples(open_rows: Callable[[dict[str, str]], Iterator[Row]], forms: list[Form], place: str) -> Iterator[Sample]:
    """Look at the first row, choose the form, read on.

    The first row is read here, not lazily, so that missing data are noticed.
    """
    first = list(itertools.islice(open_rows({}), 1))
    row = first[0] if first else {}
    form = min(forms, key=lambda form: len(form.missing(row)))  # of several that fit, the first
    return _of_rows(open_rows(form.columns), form, place)


def _of_rows(rows: Iterator[Row], form: Form, place: str) -> Iterator[Sample]:
    for number, row in enumerate(rows):
        try:
            yield from form.samples(row, number)
        except ValueError as error:
            raise UserError(f"{place} row {number + 1}: {error}") from error


def _read_archive(place: Place, source: Source, data_dir: Path | None) -> Iterator[Row]:
    from huggingface_hub import hf_hub_download

    assert place.archive is not None and place.member is not None
    try:
        path = hf_hub_download(place.hub_id, place.archive, repo_type="dataset", local_files_only=not hub_reachable())
    except Exception as error:  # of many kinds: not found, offline and not cached, broken download
        reason = f"{type(error).__name__}: {first_line(error)}" if hub_reachable() else "the hub cannot be reached from here"
        raise cannot_be_had(source, data_dir, reason) from error
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name == place.member or name.endswith("/" + place.member)]
        if not names:
            raise cannot_be_had(source, data_dir, f"{place.archive} holds no {place.member}")
        with archive.open(names[0]) as binary:
            for number, line in enumerate(io.TextIOWrapper(binary, encoding="utf-8"), start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{place.hub_id} {names[0]} row {number}: not JSON ({error})") from error


def as_texts(value: object) -> list[str]:
    """References as a list of texts: one text is a list of one, null is none."""
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
