"""Typed records: one for each file that is written and read again. This module reads and writes them, and has what both phases
share; search_records.py has those of Phase 1, benchmark_records.py those of Phase 2.

    best = read_record(path, BestConfig, "search again")     # UserError with file, field and value for a damaged file
    write_record(path, best)

Numbers must be finite, and a text is no number. Fields that a file has beyond its record are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from benchmark.storage.results import valid_text, write_json
from sparse_attention_hub.errors import UserError, quoted

RecordT = TypeVar("RecordT", bound="Record")


def _valid(value: Any) -> Any:
    return valid_text(value) if isinstance(value, str) else value


def _finite(value: JsonValue) -> JsonValue:
    if isinstance(value, int | float) and not -1e30 < value < 1e30:
        raise ValueError("numbers must be finite and between -1e30 and 1e30")
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(entry)
    return value


#: A text of a user's, of which a file holds every character: half of a surrogate pair is replaced by its escape.
Text = Annotated[str, BeforeValidator(_valid)]
Plain = Annotated[JsonValue, BeforeValidator(_valid), AfterValidator(_finite)]
#: {parameter of a search: its value}
Params = dict[str, Plain]
#: A figure of any sign. The bounds leave room for what tables and plots make of it.
Measured = Annotated[float, Field(ge=-1e15, le=1e15)]
Interval = tuple[Measured, Measured]
Versions = dict[str, str | None]
#: An error, a density or a duration. The upper bound leaves room for what tables and plots make of it.
Figure = Annotated[float, Field(ge=0, le=1e15)]
Count = Annotated[int, Field(ge=0)]
#: What a budget limits: the density, or the share of the dense KV bytes; and the figure that it is.
BudgetOn = Literal["density", "kv"]
SPENT: dict[BudgetOn, str] = {"density": "density", "kv": "kv_fraction"}


class Record(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )


class MaskerRecord(Record):
    """A masker's configuration, as the library's `config_to_dict` writes it."""

    type: str
    params: Params


class AttentionRecord(Record):
    """A ResearchAttentionConfig, as its `to_dict` writes it."""

    type: str = "ResearchAttentionConfig"
    masker_configs: list[MaskerRecord]
    dense_layers: list[int] = Field(default_factory=list)
    head_budgets: list[list[float]] | None = None


class EvenBudgets(Record):
    """The best trial of a level without head budgets, where some were fitted for it: what these are compared with."""

    trial_id: str
    error: Figure
    density: Figure
    kv_fraction: float | None
    score: float | None


class Failure(Record):
    """Something that was not answered. sample_id, configuration: None if it concerns all of them."""

    phase: int | None = None
    model: Text | None = None
    task: Text | None = None
    configuration: Text | None = None
    sample_id: Text | None = None
    status: str
    problem: Text | None = None


def read_record(path: Path, kind: type[RecordT], advice: str) -> RecordT:
    """The record in a JSON file. UserError, one line that ends with `advice`, if the file is damaged."""
    try:
        return parse_record(path.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from None


def parse_record(content: bytes | str, kind: type[RecordT]) -> RecordT:
    """The record in JSON text. ValueError with the first wrong field and what was got."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def read_lines(path: Path, kind: type[RecordT], advice: str) -> Iterator[RecordT]:
    """The records in a file of JSON lines; none for an absent file. Lines that a kill left incomplete are skipped; UserError
    for a line with other content."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise UserError(f"{path}, line {number}: {_first_problem(error)}; {advice}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    got = "" if first["type"] in ("missing", "json_invalid") else f", got {quoted(first['input'])}"
    problem = first["msg"].removeprefix("Value error, ")
    return valid_text(f"field {field}: {problem}{got}" if field else f"{problem}{got}")


def to_json(record: Record) -> dict[str, JsonValue]:
    """The record as plain JSON values, without the fields that were not set."""
    return record.model_dump(mode="json", exclude_unset=True)


def shared_fields(kind: type[Record], source: object) -> dict[str, Any]:
    """The fields of a record that an object, such as Settings, has under the same names."""
    return {name: getattr(source, name) for name in kind.model_fields if hasattr(source, name)}


def write_record(path: Path, record: Record) -> None:
    """Write a record; the file appears whole or not at all."""
    write_json(path, to_json(record))
