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
from benchmark.tasks.data import Row, Source, _cannot_be_had, _checked, _first_line, data_file, hub_reachable, load_rows


@dataclass(frozen=True)
class Form:
    """Columns (name -> kind, as in data.Source) and the samples of a row.

    `samples(row, number)`; `number` counts rows from 0.
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

    UserError, one line, when there is none, or with row number and column when a row does not fit its form.
    """
    source = Source(benchmark, subset, places[0].hub_id, {}, places[0].config, places[0].split)
    if data_file(source, data_dir) is not None:
        return _samples(lambda columns: load_rows(replace(source, columns=columns), data_dir), forms)
    errors: list[str] = []
    for place in places:
        here = replace(source, hub_id=place.hub_id, config=place.config, split=place.split)
        try:
            return _samples(_opener(place, here, data_dir), forms)
        except UserError as error:
            errors.append(str(error))
    others = [place.hub_id for place in places[1:] if place.hub_id != places[0].hub_id]
    raise UserError(errors[0].replace(places[0].hub_id, " or ".join([places[0].hub_id, *dict.fromkeys(others)]), 1))


def _opener(place: Place, source: Source, data_dir: Path | None) -> Callable[[dict[str, str]], Iterator[Row]]:
    if place.archive is None:
        return lambda columns: load_rows(replace(source, columns=columns), data_dir)
    where = f"{place.hub_id} ({source.name})"
    return lambda columns: _checked(_read_archive(place, source, data_dir), replace(source, columns=columns), where)


def _samples(open_rows: Callable[[dict[str, str]], Iterator[Row]], forms: list[Form]) -> Iterator[Sample]:
    """Look at the first row, choose the form, read on.

    The first row is read here, not lazily, so that missing data are noticed.
    """
    first = list(itertools.islice(open_rows({}), 1))
    row = first[0] if first else {}
    form = min(forms, key=lambda form: len(form.missing(row)))  # of several that fit, the first
    rows = open_rows(form.columns)
    return (sample for number, row in enumerate(rows) for sample in form.samples(row, number))


def _read_archive(place: Place, source: Source, data_dir: Path | None) -> Iterator[Row]:
    from huggingface_hub import hf_hub_download

    assert place.archive is not None and place.member is not None
    try:
        path = hf_hub_download(place.hub_id, place.archive, repo_type="dataset", local_files_only=not hub_reachable())
    except Exception as error:  # of many kinds: not found, offline and not cached, broken download
        reason = f"{type(error).__name__}: {_first_line(error)}" if hub_reachable() else "the hub cannot be reached from here"
        raise UserError(_cannot_be_had(source, data_dir, reason)) from error
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name == place.member or name.endswith("/" + place.member)]
        if not names:
            raise UserError(_cannot_be_had(source, data_dir, f"{place.archive} holds no {place.member}"))
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
