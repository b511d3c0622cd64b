"""Data sets published in several forms: the authors' own, and copies that hold the prompt in their columns.

A `Form` gives the columns of one form and turns a row into samples. The user's file may be in any form: its first row
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.tasks.base import PromptParts, Sample, UserError
from benchmark.tasks.data import DataMissingError, Row, Source, load_rows, location, missing_data

PROMPT_COLUMNS = {"context": "text", "question": "text", "answer_prefix": "text"}  # of the copies


def prompt_of(row: Row) -> PromptParts:
    """The prompt that a row holds in PROMPT_COLUMNS."""
    return row["context"], row["question"], row["answer_prefix"]


@dataclass(frozen=True)
class Form:
    """Columns (name -> kind, as in data.Source) and the samples of a row.

    `samples(row, number)`: `number` counts rows from 0. Raises ValueError, naming the column, for a row without a sample.
    """

    columns: dict[str, str]
    samples: Callable[[Row, int], Iterable[Sample]]

    def missing(self, row: Row) -> list[str]:
        return [column for column, kind in self.columns.items() if not kind.startswith("?") and column not in row]


def read_samples(sources: list[Source], forms: list[Form], data_dir: Path | None) -> Iterator[Sample]:
    """The samples of the user's file if there is one, else of the first source on the hub that can be read.

    `sources`: copies of one subset. Raises DataMissingError when none can be read and UserError, with file or data set,
    row number and column, when a row does not fit its form.
    """
    reasons: list[str] = []
    for source in sources:
        try:
            first = next(load_rows(source, data_dir), {})
            form = min(forms, key=lambda form: len(form.missing(first)))  # of several that fit, the first
            rows = load_rows(replace(source, columns=form.columns), data_dir)
        except DataMissingError as error:
            reasons.append(error.reason)
        else:
            return _samples(rows, form, location(source, data_dir))
    hub_ids = " or ".join(dict.fromkeys(source.hub_id for source in sources))
    raise missing_data(replace(sources[0], hub_id=hub_ids), data_dir, reasons[0])


def _samples(rows: Iterator[Row], form: Form, where: str) -> Iterator[Sample]:
    for number, row in enumerate(rows):
        try:
            yield from form.samples(row, number)
        except ValueError as error:
            raise UserError(f"{where} row {number + 1}: {error}") from error


def as_texts(value: object) -> list[str]:
    """References as a list of texts: one value is a list of one, null is none."""
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
