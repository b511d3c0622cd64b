"""ZeroSCROLLS (arXiv 2305.14196, huggingface.co/datasets/tau/zero_scrolls): ten tasks on long documents.

The test references are private, so the validation data, about twenty rows a task with outputs, are asked and scored.
`zero_scrolls/default` asks all ten: every sample is scored as its own task, and the benchmark's score is the mean over
tasks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, TaskSelection, UserError, take_split
from benchmark.tasks.data import DataMissingError, Row, Source, cannot_be_had, data_file
from benchmark.tasks.sources import Form, Place, as_texts, read_samples

logger = logging.getLogger(__name__)

HUB_ID = "tau/zero_scrolls"

# task -> (answer length in tokens, metric)
SUBSETS: dict[str, tuple[int, str]] = {
    "gov_report": (1024, "rouge"),
    "summ_screen_fd": (512, "rouge"),
    "qmsum": (512, "rouge"),
    "qasper": (128, "f1"),
    "narrative_qa": (64, "f1"),
    "quality": (10, "accuracy"),
    "musique": (32, "f1"),
    "squality": (512, "rouge"),
    "space_digest": (36, "exp_similarity"),
    "book_sum_sort": (256, "concordance_index"),
}


def first_letter(text: str) -> str | None:
    """The first standalone capital A, B, C or D."""
    found = re.search(r"\b[A-D]\b", text)
    return found[0] if found else None


def first_percentage(text: str) -> float | None:
    """The first "N%" as a fraction."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*%", text)
    return float(found[1]) / 100 if found else None


def exp_similarity(prediction: str, reference: str) -> float:
    """2^(-10 |p - q|) for the first percentages p and q (fractions); 0 without one.

    A reference may also be a plain number.
    """
    p, q = first_percentage(prediction), first_percentage(reference)
    if q is None:
        try:
            q = float(reference) / (100 if float(reference) > 1 else 1)
        except ValueError:
            return 0.0
    return 0.0 if p is None else 2.0 ** (-10 * abs(p - q))


def _order(text: str) -> list[str]:
    return re.findall(r"\d+", "".join(character for character in text if character in "0123456789," or character.isspace()))


def concordance_index(prediction: str, reference: str) -> float:
    """Share of the pairs that prediction and reference put in the same order; 0 if the prediction is not a permutation
    of the reference.
    """
    guess, gold = _order(prediction), _order(reference)
    if not gold or len(set(gold)) != len(gold) or sorted(guess) != sorted(gold):
        return 0.0
    place = {item: position for position, item in enumerate(guess)}
    pairs = list(combinations(gold, 2))
    return sum(place[first] < place[second] for first, second in pairs) / len(pairs) if pairs else 1.0


def score_subset(subset: str, prediction: str, references: list[str]) -> dict[str, float]:
    """One task's scores, the best over the references.

    Summaries: `rouge` is the geometric mean of the best rouge1, rouge2 and rougeL.
    """
    name = SUBSETS[subset][1]
    if name == "rouge":
        triple = metrics.rouge_triple(prediction, references)
        return {"rouge": metrics.geometric_mean(list(triple.values())), **triple}
    if name == "f1":
        values = [metrics.word_f1_ascii(prediction, reference) for reference in references]
    elif name == "accuracy":
        letter = first_letter(prediction)
        values = [float(letter is not None and letter == first_letter(reference)) for reference in references]
    else:
        measure = exp_similarity if name == "exp_similarity" else concordance_index
        values = [measure(prediction, reference) for reference in references]
    return {name: max(values, default=0.0)}


def subset_score(subset: str, scores: list[dict[str, float]]) -> float:
    """A task's score over its samples.

    For summaries the geometric mean is taken of the mean rouge1, rouge2 and rougeL, as SCROLLS does.
    """
    name = SUBSETS[subset][1]
    if name == "rouge":
        return metrics.geometric_mean([_mean([score[kind] for score in scores]) for kind in ("rouge1", "rouge2", "rougeL")])
    return _mean([score[name] for score in scores])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _merge_references(samples: Iterator[Sample]) -> list[Sample]:
    """Rows with one id are one question with several references."""
    merged: dict[str, Sample] = {}
    for sample in samples:
        known = merged.setdefault(sample.sample_id, sample)
        if known is not sample:
            known.references.extend(text for text in sample.references if text not in known.references)
    return list(merged.values())


class ZeroScrollsTask(Task):
    """zero_scrolls/<task>."""

    def __init__(self, subset: str) -> None:
        self.name = f"zero_scrolls/{subset}"
        self.subset = subset
        self.max_new_tokens, self.metric = SUBSETS[subset]

    @property
    def description(self) -> TaskDescription:
        return TaskDescription(f"{HUB_ID} (validation)", self.metric, self.max_new_tokens, None, "5k to 50k words")

    def samples(self, request: SampleRequest) -> list[Sample]:
        places = [Place(HUB_ID, self.subset, "validation", f"{self.subset}.zip", "validation.jsonl")]
        samples = read_samples("zero_scrolls", self.subset, places, _forms(self.subset), request.data_dir)
        return take_split(_merge_references(samples), request, lambda sample: sample.context)

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        return score_subset(self.subset, prediction, as_texts(references))

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """Summaries: the task's score, which is not the mean of the samples' geometric means."""
        graded = [score for score in scores if self.metric in score]
        return {"task_score": subset_score(self.subset, graded)} if graded and self.metric == "rouge" else {}


class ZeroScrollsAllTask(Task):
    """zero_scrolls/default: all ten tasks. `score` is the value of each sample's own metric."""

    name = "zero_scrolls/default"
    metric = "score"

    @property
    def description(self) -> TaskDescription:
        longest = max(tokens for tokens, _ in SUBSETS.values())
        return TaskDescription(f"{HUB_ID} (validation)", self.metric, longest, None, "5k to 50k words")

    def samples(self, request: SampleRequest) -> list[Sample]:
        """In turn one of each task, so that the first few samples are of many tasks.

        DataMissingError if no task's data can be had.
        """
        if _own_file("default", request.data_dir):
            rows = read_samples("zero_scrolls", "default", [Place(HUB_ID)], _forms(None), request.data_dir)
            samples = take_split(_merge_references(rows), request, lambda sample: sample.context)
            return samples
        each: list[list[Sample]] = []
        missing: dict[str, str] = {}  # task -> why its data cannot be had
        for subset in _available(request.data_dir):
            try:
                each.append(ZeroScrollsTask(subset).samples(request))
            except DataMissingError as error:
                missing[subset] = error.reason
        if not each:
            raise cannot_be_had(_source("<task>"), request.data_dir, next(iter(missing.values())), self.name)
        if missing:
            reasons = "; ".join(dict.fromkeys(missing.values()))
            logger.warning("%s goes on without %s: %s", self.name, ", ".join(missing), reasons)
        turns = max(map(len, each))
        samples = [samples[turn] for turn in range(turns) for samples in each if turn < len(samples)]
        return samples[: request.max_samples]

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        raise UserError(f"{self.name} holds ten tasks with different scores: name one, such as zero_scrolls/qasper")

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        subset = sample.task.partition("/")[2]
        scores = score_subset(subset, prediction, sample.references)
        return {"score": scores[SUBSETS[subset][1]], **scores}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """Each task's score and the benchmark's: the mean over the tasks that were run, with their number."""
        by_task: dict[str, list[dict[str, float]]] = {}
        for score, sample in zip(scores, samples, strict=True):
            if "score" in score:
                by_task.setdefault(sample.task.partition("/")[2], []).append(score)
        tasks = {subset: subset_score(subset, by_task[subset]) for subset in SUBSETS if subset in by_task}
        if not tasks:
            return {}
        return {
            "task_scores": tasks,
            "average": _mean(list(tasks.values())),
            "tasks_run": len(tasks),
            "tasks_in_all": len(SUBSETS),
        }


def _own_file(subset: str, data_dir: Path | None) -> Path | None:
    return data_file(_source(subset), data_dir)


def _source(subset: str) -> Source:
    return Source("zero_scrolls", subset, HUB_ID, {})


def _available(data_dir: Path | None) -> list[str]:
    """The tasks to ask: those in the user's folder if it holds any, else all ten."""
    return [subset for subset in SUBSETS if _own_file(subset, data_dir)] or list(SUBSETS)


def _forms(subset: str | None) -> list[Form]:
    """`subset` None: a file of several tasks, whose column `task` says which."""
    task = {} if subset else {"task": "text"}

    def of_row(row: Row) -> str:
        name = subset or row["task"].removeprefix("zero_scrolls/")
        if name not in SUBSETS:
            raise ValueError(f"column 'task' must be one of {', '.join(SUBSETS)}, got {name!r}")
        return name

    def original(row: Row, number: int) -> Iterator[Sample]:
        text, document_end, query_end = row["input"], row["document_end_index"], row["query_end_index"]
        query_end = min(
            max(query_end, document_end), len(text)
        )  # tasks without a query give an index before the document's end
        parts = (text[:document_end], text[document_end:query_end], text[query_end:])
        yield _sample(of_row(row), row, number, parts, row["output"])

    def prompted(row: Row, number: int) -> Iterator[Sample]:
        yield _sample(of_row(row), row, number, (row["context"], row["question"], row["answer_prefix"]), row["answer"])

    indices = {"document_end_index": "integer", "query_end_index": "integer"}
    parts = {"context": "text", "question": "text", "answer_prefix": "text"}
    return [
        Form({"input": "text", "output": "text or list of texts", **indices, "id": "?text", **task}, original),
        Form({**parts, "answer": "text or list of texts", "id": "?text", **task}, prompted),
    ]


def _sample(subset: str, row: Row, number: int, parts: tuple[str, str, str], output: Any) -> Sample:
    return Sample(
        sample_id=f"zero_scrolls/{subset}:{row.get('id') or number}",
        task=f"zero_scrolls/{subset}",
        context=parts[0],
        question=parts[1],
        answer_prefix=parts[2],
        references=as_texts(output),
        max_new_tokens=SUBSETS[subset][0],
        columns=dict(row),
    )


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = [ZeroScrollsAllTask(), *(ZeroScrollsTask(subset) for subset in SUBSETS)]
    return {task.name: task for task in tasks}


def expand(name: str, data_dir: Path | None) -> TaskSelection | None:
    """zero_scrolls/default with a note where the user's folder holds some of the ten tasks only."""
    if name != "zero_scrolls/default" or _own_file("default", data_dir):
        return None
    available = _available(data_dir)
    if len(available) == len(SUBSETS):
        return None
    missing = [subset for subset in SUBSETS if subset not in available]
    return TaskSelection([name], f"{len(available)} of {len(SUBSETS)} tasks: no data for {', '.join(missing)}")
