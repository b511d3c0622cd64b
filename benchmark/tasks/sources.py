"""Tasks over data sets that are published in several forms: the authors' own, and copies that hold the prompt in columns."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from benchmark.tasks.base import PromptParts, Row, Sample, SampleRequest, Task, hash64, in_tuning_split
from benchmark.tasks.data import DataMissingError, Source, data_file, load_rows, location, missing_data, warn_once
from benchmark.tasks.values import as_texts
from sparse_attention_hub.errors import UserError, quoted

PROMPT_COLUMNS = {"context": "text", "question": "text", "answer_prefix": "text"}  # of the copies


def prompt_of(row: Row) -> PromptParts:
    """The prompt that a row holds in PROMPT_COLUMNS."""
    return row["context"], row["question"], row["answer_prefix"]


def _whole(number: int, row: Row) -> Iterable[tuple[object, Row]]:
    return [(number, row)]


@dataclass(frozen=True)
class Form:
    """Columns (name -> kind, as in data.Source), the prompt of a row, and the questions in it: by default one.

    `questions(number, row)`: (identity, row) of each; `number` counts rows from 0. `prompt` and `questions` raise ValueError,
    naming the column, for a row without a sample.
    """

    columns: dict[str, str]
    prompt: Callable[[Row], PromptParts] = prompt_of
    questions: Callable[[int, Row], Iterable[tuple[object, Row]]] = _whole

    def missing(self, row: Row) -> list[str]:
        return [column for column, kind in self.columns.items() if not kind.startswith("?") and column not in row]


class EmptySplitError(UserError):
    """All samples are in the other split."""


def own_id(row: Row, identity: object, *columns: str) -> object:
    """The first id that a row has in these columns, 0 included; else `identity`."""
    return next((row[name] for name in columns if row.get(name) not in (None, "")), identity)


class DataTask(Task):
    """A task over a data set. `sources`: copies of it; the first one that can be read is. `forms`: how its rows may look.

    The user's file, DIR/<benchmark>/<subset>.jsonl, may be in any form: its first row decides. A second file,
    <subset>.tuning.jsonl, may hold the tuning samples. Without it a fixed fifth of the contexts is for tuning, or of the
    questions where all rows share one context.
    """

    sources: list[Source]
    forms: list[Form]
    unique_ids = True  # False: rows with one id are parts of one question

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        """The sample of a row: its id, or else `identity`, and its answers. ValueError, naming the column, without any."""
        column = next((name for name in ("answers", "output", "answer") if name in row), None)
        if column is None:
            raise ValueError(f"a column 'answers', 'output' or 'answer' is missing (there are {quoted(list(row))})")
        answers = as_texts(row[column], f"column {column!r}")
        return self.make_sample(own_id(row, identity, "_id", "id"), prompt, answers, columns=row)

    def samples(self, request: SampleRequest) -> list[Sample]:
        own = data_file(self.sources[0], request.data_dir)
        if own is not None:
            return self._own_samples(own, request)[: request.max_samples]
        wanted = request.split == "tuning"
        found = (s for s in self.read(self.sources, request.data_dir) if in_tuning_split(self.split_key(s)) == wanted)
        chosen = list(islice(found, request.max_samples))
        if not chosen and request.max_samples != 0:
            raise EmptySplitError(f"{self.name}: its data hold no rows of the {request.split} split")
        return chosen

    def _own_samples(self, file: Path, request: SampleRequest) -> list[Sample]:
        """Those of the user's files. All rows are read: a fault in any, of either split, is found before the search."""
        samples, wanted = list(self.read(self.sources, request.data_dir)), request.split == "tuning"
        if not samples:
            raise UserError(f"{self.name}: {file} has no rows of this task")
        sources = [replace(source, subset=f"{source.subset}.tuning") for source in self.sources]
        tuning_file = data_file(sources[0], request.data_dir)
        if tuning_file is not None:
            tuning = [
                replace(sample, sample_id=sample.sample_id.replace(":", ":tuning-", 1))
                for sample in self.read(sources, request.data_dir)
            ]
            both = {(sample.context, sample.question) for sample in samples}
            for sample in tuning:
                if (sample.context, sample.question) in both:
                    raise UserError(
                        f"{tuning_file}: {file.name} asks the same question on the same context, {quoted(sample.question)}"
                    )
            samples = tuning if wanted else samples
        elif len(set(map(self.split_key, samples))) == 1 < len({sample.question for sample in samples}):
            warn_once(f"{self.name}: all rows of {file} share one context, so they are split by question")
            lowest = min(hash64(sample.question) for sample in samples)  # at least one is for tuning
            samples = [s for s in samples if (in_tuning_split(s.question) or hash64(s.question) == lowest) == wanted]
        else:
            samples = [sample for sample in samples if in_tuning_split(self.split_key(sample)) == wanted]
        if not samples:
            raise EmptySplitError(
                f"{self.name}: no {request.split} samples: rows are split by a hash of their context, a fifth is for tuning, "
                f"and none of {file} is on this side; put rows for tuning into {file.stem}.tuning.jsonl beside it, then all of "
                f"{file.name} are test rows"
            )
        return samples

    def split_key(self, sample: Sample) -> str:
        """Samples with one key are in one split: no test question is asked on a context seen in tuning."""
        return sample.context

    def read(self, sources: list[Source], data_dir: Path | None) -> Iterator[Sample]:
        """All samples, of the user's file if there is one, else of the first source on the hub that can be read.

        Raises DataMissingError when no source can be read and UserError, with file or data set, row number and column, when
        a row does not fit its form.
        """
        reasons: list[str] = []
        for source in sources:
            try:
                first = next(load_rows(source, data_dir), {})
                form = min(self.forms, key=lambda form: len(form.missing(first)))  # of several that fit, the first
                rows = load_rows(replace(source, columns=form.columns), data_dir)
            except DataMissingError as error:
                reasons.append(error.reason)
            else:
                return self._samples(rows, form, location(source, data_dir))
        hub_ids = " or ".join(dict.fromkeys(source.hub_id for source in sources))
        raise missing_data(replace(sources[0], hub_id=hub_ids), data_dir, reasons[0])

    def _samples(self, rows: Iterator[Row], form: Form, where: str) -> Iterator[Sample]:
        first_row: dict[str, int] = {}  # sample id -> its row
        for number, row in enumerate(rows):
            try:
                for identity, question in form.questions(number, row):
                    sample = self.make(identity, question, form.prompt(question))
                    before = first_row.setdefault(sample.sample_id, number)
                    if before != number and self.unique_ids:
                        raise ValueError(f"its id is that of row {before + 1} too, got {quoted(sample.sample_id)}")
                    yield sample
            except ValueError as error:
                raise UserError(f"{where} row {number + 1}: {error}") from error
