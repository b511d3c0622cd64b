"""The texts of seven RULER tasks, from `--data-dir DIR` or else the hub.

- essays (niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery):
  `DIR/ruler/PaulGrahamEssays.json` = {"text": "..."} as RULER's own download script writes it, or
  baber/paul_graham_essays on the hub. Essays of your own, `DIR/ruler/essays.txt` or `essays.json` ({"text": ...} or a
  list of texts), make tasks of another name, `niah_single_2@own`: their scores are not comparable with published ones;
- qa_1: `DIR/ruler/squad.json` or `dev-v2.0.json` (SQuAD's own format), or rajpurkar/squad_v2 on the hub;
- qa_2: `DIR/ruler/hotpotqa.json` or `hotpot_dev_distractor_v1.json` (HotpotQA's own format), or hotpotqa/hotpot_qa.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.tasks.data import DataMissingError, Row, Source, checked, first_file, load_rows
from benchmark.tasks.ruler_generators import Corpus, Essays, Question
from sparse_attention_hub.errors import UserError


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache
class Text:
    """Files that hold a text, or else the hub data set, and its rows in the same columns from both."""

    name: str
    needs: str  # what to add, for a message
    files: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    from_file: Callable[[Path], Iterator[Row]]
    hub: Source
    from_hub: Callable[[Row], Row] = lambda row: row

    def file(self, data_dir: Path | None) -> Path | None:
        """The user's file, if there is one."""
        return first_file(data_dir, [f"ruler/{name}" for name in self.files])


@functools.cache
def _rows(text: Text, data_dir: Path | None) -> list[Row]:
    path = text.file(data_dir)
    try:
        rows = map(text.from_hub, load_rows(text.hub, data_dir)) if path is None else text.from_file(path)
        return list(checked(rows, dict(text.columns), str(path or text.hub.hub_id)))
    except DataMissingError as error:
        raise UserError(
            f"ruler needs {text.name}: hub data set {text.hub.hub_id} cannot be read here. "
            f"Either put {' or '.join(text.files)} under DIR/ruler and give --data-dir DIR, or run once where the hub answers"
        ) from error


def _essay_rows(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    content = {"text": text} if path.suffix == ".txt" else json.loads(text)
    yield from ({"text": text} for text in (content if isinstance(content, list) else [content["text"]]))


def _squad_rows(path: Path) -> Iterator[Row]:
    for article in json.loads(path.read_text(encoding="utf-8-sig"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                yield {"title": article["title"], "context": paragraph["context"], **qa, "answers": answers}


def _hotpotqa_rows(path: Path) -> Iterator[Row]:
    for row in json.loads(path.read_text(encoding="utf-8-sig")):
        yield {**row, "id": row["_id"], "paragraphs": _paragraphs(row["context"])}


def _paragraphs(titled: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [f"{title}\n{''.join(sentences)}" for title, sentences in titled]


ESSAYS = Text(
    "essays", "essays (DIR/ruler/PaulGrahamEssays.json or essays.txt)", ("PaulGrahamEssays.json",),
    (("text", "text"),), _essay_rows,
    Source("ruler", "essays_hub", "baber/paul_graham_essays", split="train"),
)  # fmt: skip
SQUAD = Text(
    "squad", "SQuAD (DIR/ruler/squad.json)", ("squad.json", "dev-v2.0.json"),
    (("id", "text"), ("title", "text"), ("context", "text"), ("question", "text"), ("answers", "list of texts")), _squad_rows,
    Source("ruler", "squad", "rajpurkar/squad_v2", split="validation"),
    lambda row: {**row, "answers": list(row["answers"]["text"])},
)  # fmt: skip
HOTPOTQA = Text(
    "hotpotqa", "HotpotQA (DIR/ruler/hotpotqa.json)", ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
    (("id", "text"), ("question", "text"), ("answer", "text"), ("paragraphs", "list of texts")), _hotpotqa_rows,
    Source("ruler", "hotpotqa", "hotpotqa/hotpot_qa", config="distractor", split="validation"),
    lambda row: {**row, "paragraphs": _paragraphs(zip(row["context"]["title"], row["context"]["sentences"], strict=True))},
)  # fmt: skip
OWN_ESSAYS = replace(ESSAYS, name="own essays", files=("essays.txt", "essays.json"))


@functools.cache
def load_essays(data_dir: Path | None, own: bool = False) -> Essays:
    text = OWN_ESSAYS if own else ESSAYS
    if own and text.file(data_dir) is None:
        raise UserError("own essays are missing: put essays.txt or essays.json under DIR/ruler and give --data-dir DIR")
    return Essays(" ".join(row["text"] for row in _rows(text, data_dir)))


@functools.cache
def load_squad(data_dir: Path | None) -> Corpus:
    """A question's near distractors are the paragraphs of its article."""
    rows = _rows(SQUAD, data_dir)
    index = _index(row["context"] for row in rows)
    articles: dict[str, set[int]] = {}
    for row in rows:
        articles.setdefault(row["title"], set()).add(index[row["context"]])
    questions = [
        Question(row["id"], row["question"], row["answers"], [index[row["context"]]], sorted(articles[row["title"]]))
        for row in rows
        if row["answers"]  # a question without answers is one of SQuAD 2.0's impossible ones
    ]
    return Corpus(list(index), questions)


@functools.cache
def load_hotpotqa(data_dir: Path | None) -> Corpus:
    """Distractors are drawn from the paragraphs of all questions: those of a question are all gold."""
    rows = _rows(HOTPOTQA, data_dir)
    index = _index(paragraph for row in rows for paragraph in row["paragraphs"])
    questions = [
        Question(row["id"], row["question"], [row["answer"]], list(dict.fromkeys(index[p] for p in row["paragraphs"])), [])
        for row in rows
    ]
    return Corpus(list(index), questions)


def _index(documents: Iterable[str]) -> dict[str, int]:
    """The distinct documents in order, each with its number."""
    return {document: number for number, document in enumerate(sorted(set(documents)))}


def available(text: Text, data_dir: Path | None) -> bool:
    """Whether there are data to load. A malformed file counts: its task then says what is wrong."""
    try:
        return text.file(data_dir) is not None or bool(_rows(text, data_dir))
    except UserError:
        return False
