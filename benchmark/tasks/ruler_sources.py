"""The texts of seven RULER tasks, from `--data-dir DIR` or else the hub.

- essays (niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery):
  `DIR/ruler/PaulGrahamEssays.json` = {"text": "..."} as RULER's own download script writes it, or
  baber/paul_graham_essays on the hub. Essays of your own, `DIR/ruler/essays.txt` or `essays.json` ({"text": ...} or a
  list of texts), make tasks of another name, `niah_single_2@own`: their scores are not comparable with published ones;
- qa_1: `DIR/ruler/squad.json` or `dev-v2.0.json` (SQuAD's own format), or rajpurkar/squad_v2 on the hub;
- qa_2: `DIR/ruler/hotpotqa.json` or `hotpot_dev_distractor_v1.json` (HotpotQA's own format), or hotpotqa/hotpot_qa.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmark.tasks.data import DataMissingError, Source, first_file, load_rows
from benchmark.tasks.ruler_generators import Corpus, Essays, Question
from sparse_attention_hub.errors import UserError

ESSAYS_FILES = ("PaulGrahamEssays.json",)
OWN_ESSAYS_FILES = ("essays.txt", "essays.json")
SQUAD_FILES = ("squad.json", "dev-v2.0.json")
HOTPOTQA_FILES = ("hotpotqa.json", "hotpot_dev_distractor_v1.json")

HUB_ESSAYS = Source("ruler", "essays_hub", "baber/paul_graham_essays", {"text": "text"}, split="train")
HUB_SQUAD = Source(
    "ruler", "squad", "rajpurkar/squad_v2",
    {"id": "text", "title": "text", "context": "text", "question": "text", "answers": "dict"}, split="validation",
)  # fmt: skip
HUB_HOTPOTQA = Source(
    "ruler", "hotpotqa", "hotpotqa/hotpot_qa",
    {"id": "text", "question": "text", "answer": "text", "context": "dict"}, config="distractor", split="validation",
)  # fmt: skip


def available(load: Callable[[Path | None], Any], files: tuple[str, ...], data_dir: Path | None) -> bool:
    """Whether there are data to load. A malformed file counts: its task then says what is wrong."""
    try:
        load(data_dir)
    except UserError:
        return _file(data_dir, files) is not None
    return True


def _file(data_dir: Path | None, names: tuple[str, ...]) -> Path | None:
    return first_file(data_dir, [f"ruler/{name}" for name in names])


def own_essays_file(data_dir: Path | None) -> Path | None:
    return _file(data_dir, OWN_ESSAYS_FILES)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


@functools.cache
def _read_essays(path: Path) -> Essays:
    if path.suffix == ".txt":
        return Essays(path.read_text(encoding="utf-8", errors="replace"))
    content = _read_json(path)
    texts: list[Any] = content if isinstance(content, list) else [content.get("text") if isinstance(content, dict) else None]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{path}: must be {{"text": "..."}} or a list of texts')
    return Essays(" ".join(texts))


@functools.cache
def load_essays(data_dir: Path | None) -> Essays:
    path = _file(data_dir, ESSAYS_FILES)
    if path is not None:
        return _read_essays(path)
    return Essays(" ".join(row["text"] for row in _hub_rows(HUB_ESSAYS, data_dir, ESSAYS_FILES)))


def load_own_essays(data_dir: Path | None) -> Essays:
    path = own_essays_file(data_dir)
    if path is None:
        raise UserError("own essays are missing: put essays.txt or essays.json under DIR/ruler and give --data-dir DIR")
    return _read_essays(path)


def _hub_rows(source: Source, data_dir: Path | None, files: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        return list(load_rows(source, data_dir))
    except DataMissingError as error:
        raise UserError(
            f"ruler needs {source.subset.removesuffix('_hub')}: hub data set {source.hub_id} cannot be read here. "
            f"Either put {' or '.join(files)} under DIR/ruler and give --data-dir DIR, or run once where the hub answers"
        ) from error


@functools.cache
def load_squad(data_dir: Path | None) -> Corpus:
    """A question's near distractors are the paragraphs of its article."""
    path = _file(data_dir, SQUAD_FILES)
    if path is not None:
        rows = _squad_file_rows(path)
    else:
        rows = [
            (row["id"], row["title"], row["context"], row["question"], list(row["answers"]["text"]))
            for row in _hub_rows(HUB_SQUAD, data_dir, SQUAD_FILES)
        ]
    index = _index(context for _, _, context, _, _ in rows)
    articles: dict[str, set[int]] = {}
    for _, title, context, _, _ in rows:
        articles.setdefault(title, set()).add(index[context])
    questions = [
        Question(row_id, question, answers, [index[context]], sorted(articles[title]))
        for row_id, title, context, question, answers in rows
        if answers  # a question without answers is one of SQuAD 2.0's impossible ones
    ]
    return Corpus(list(index), questions)


def _index(documents: Iterable[str]) -> dict[str, int]:
    """The distinct documents in order, each with its number."""
    return {document: number for number, document in enumerate(sorted(set(documents)))}


def _squad_file_rows(path: Path) -> list[tuple[str, str, str, str, list[str]]]:
    rows = []
    try:
        for article in _read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                    rows.append((qa["id"], article["title"], paragraph["context"], qa["question"], answers))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} question {len(rows) + 1}: not in SQuAD's dev-v2.0.json format ({error!r})") from error
    return rows


@functools.cache
def load_hotpotqa(data_dir: Path | None) -> Corpus:
    """Distractors are drawn from the paragraphs of all questions: those of a question are all gold."""
    path = _file(data_dir, HOTPOTQA_FILES)
    rows: list[tuple[str, str, str, list[str]]] = []
    try:
        for row in _hub_rows(HUB_HOTPOTQA, data_dir, HOTPOTQA_FILES) if path is None else _read_json(path):
            context = row["context"]
            titled = zip(context["title"], context["sentences"], strict=True) if path is None else context
            paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in titled]
            rows.append((row["id" if path is None else "_id"], row["question"], row["answer"], paragraphs))
    except (KeyError, TypeError, AttributeError) as error:
        where = path or HUB_HOTPOTQA.hub_id
        raise UserError(f"{where} question {len(rows) + 1}: not in HotpotQA's distractor format ({error!r})") from error
    index = _index(paragraph for *_, paragraphs in rows for paragraph in paragraphs)
    questions = [
        Question(row_id, question, [answer], list(dict.fromkeys(index[p] for p in paragraphs)), [])
        for row_id, question, answer, paragraphs in rows
    ]
    return Corpus(list(index), questions)
