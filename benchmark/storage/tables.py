"""CSV files that a spreadsheet can open safely and that are read back unchanged.

A text that begins with one of = + - @, a tab or a carriage return would be run as a formula: it is written with an apostrophe
in front, which `read_table` removes. Numbers, also negative ones, are written as they are.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file, every field quoted as in RFC 4180. Lists and dictionaries are JSON; a missing value is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([cell(name) for name in header])
    writer.writerows([cell(value) for value in row] for row in rows)
    return stream.getvalue()


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that `table_text` made, also saved again by a spreadsheet: {column: text}."""
    csv.field_size_limit(2**31 - 1)  # contexts of 32k tokens are longer than the default
    with path.open(newline="", encoding="utf-8-sig") as stream:
        header, *rows = ([_plain(text) for text in row] for row in csv.reader(stream))
        return [dict(zip(header, row, strict=True)) for row in rows]


def cell(value: Any) -> str:
    """A value as the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if _is_formula(value) else value
    if hasattr(value, "tolist"):  # NumPy
        value = value.tolist()
    return json.dumps(value, ensure_ascii=False, default=str)


def _plain(text: str) -> str:
    return text[1:] if text.startswith("'") and _is_formula(text) else text


def _is_formula(text: str) -> bool:
    """Also with apostrophes in front, so that these are read back too."""
    return text.lstrip("'").startswith(_FORMULA)
