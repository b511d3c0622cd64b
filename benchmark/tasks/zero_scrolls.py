"""ZeroSCROLLS (arXiv 2305.14196, huggingface.co/datasets/tau/zero_scrolls): ten tasks on long documents.

The test references are private, so the samples are the validation data, about twenty rows per task. `zero_scrolls/default`
has the samples of all ten tasks, each scored as its own task; the benchmark's score is the mean over tasks.
"""

import logging
import math
import re
from bisect import bisect, insort
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, SampleRequest, Scores, Task, TaskDescription, TaskSelection, UserError
from benchmark.tasks.data import DataMissingError, Row, Source, data_file, missing_data
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, EmptySplitError, Form
from benchmark.tasks.values import as_texts
from sparse_attention_hub.errors import quoted

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
    found = re.search(r"(?<!\d)(\d+(?:\.\d+)?)\s*%", text)  # (?<!...): else the time grows as the square of many digits
    return float(found[1]) / 100 if found else None


def exp_similarity(prediction: str, reference: str) -> float:
    """2^(-10 |p - q|) for the first percentages p and q (fractions); 0 without one. A reference may be a plain number."""
    p, q = first_percentage(prediction), first_percentage(reference)
    if q is None:
        try:
            q = float(reference) / (100 if float(reference) > 1 else 1)
        except ValueError:
            return 0.0
    return 2.0 ** (-10 * abs(p - q)) if p is not None and math.isfinite(q) else 0.0


def _order(text: str) -> list[str]:
    return re.findall(r"\d+", re.sub(r"[^0-9,\s]", "", text))


def concordance_index(prediction: str, reference: str) -> float:
    """Share of pairs in the reference's order; 0 if the prediction is not a permutation of the reference."""
    guess, gold = _order(prediction), _order(reference)
    if not gold or len(set(gold)) != len(gold) or sorted(guess) != sorted(gold):
        return 0.0
    place = {item: position for position, item in enumerate(guess)}
    seen: list[int] = []  # sorted places of the earlier items
    concordant = 0
    for item in gold:
        concordant += bisect(seen, place[item])
        insort(seen, place[item])
    return concordant / math.comb(len(gold), 2) if len(gold) > 1 else 1.0


def same_letter(prediction: str, reference: str) -> float:
    """1 if both texts have the same first standalone letter A to D."""
    letter = first_letter(prediction)
    return float(letter is not None and letter == first_letter(reference))


MEASURES: dict[str, Callable[[str, str], float]] = {
    "f1": metrics.word_f1_ascii,
    "accuracy": same_letter,
    "exp_similarity": exp_similarity,
    "concordance_index": concordance_index,
}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class ZeroScrollsTask(DataTask):
    """zero_scrolls/<task>."""

    unique_ids = False

    def __init__(self, subset: str) -> None:
        self.name = f"zero_scrolls/{subset}"
        tokens, self.metric = SUBSETS[subset]
        self.description = TaskDescription(f"{HUB_ID} (validation)", self.metric, tokens, None, "5k to 50k words")
        self.sources = [_source(subset)]
        self.forms = _forms({"id": "?text"})

    def read(self, sources: list[Source], data_dir: Path | None) -> Iterator[Sample]:
        """Rows with one id are one question with several references."""
        merged: dict[str, Sample] = {}
        for sample in super().read(sources, data_dir):
            known = merged.setdefault(sample.sample_id, sample)
            if known is not sample:
                known.references.extend(text for text in sample.references if text not in known.references)
        return iter(merged.values())

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """The best over the references. Summaries: `rouge` is the geometric mean of the best rouge1, rouge2 and rougeL."""
        if self.metric != "rouge":
            return {self.metric: metrics.best(MEASURES[self.metric], prediction, as_texts(references))}
        triple = metrics.rouge_triple(prediction, as_texts(references))
        return {"rouge": metrics.geometric_mean(list(triple.values())), **triple}

    def task_score(self, scores: list[Scores]) -> float:
        """The mean. Summaries: the geometric mean of the mean rouge1, rouge2 and rougeL, as in SCROLLS."""
        if self.metric != "rouge":
            return _mean([score[self.metric] for score in scores])
        return metrics.geometric_mean([_mean([score[name] for score in scores]) for name in ("rouge1", "rouge2", "rougeL")])

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """Summaries: the task's score, which is not the mean of the samples' scores."""
        graded = [score for score in scores if self.metric in score]
        return {"task_score": self.task_score(graded)} if graded and self.metric == "rouge" else {}


class ZeroScrollsAllTask(ZeroScrollsTask):
    """zero_scrolls/default: all ten tasks. `score`: the metric of each sample's own task."""

    def __init__(self) -> None:
        self.name = "zero_scrolls/default"
        self.metric = "score"
        longest = max(tokens for tokens, _ in SUBSETS.values())
        self.description = TaskDescription(f"{HUB_ID} (validation)", self.metric, longest, None, "5k to 50k words")
        self.sources = [_source("default")]
        self.forms = _forms({"id": "?text", "task": "text"})

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        name = row["task"].removeprefix("zero_scrolls/")
        if name not in SUBSETS:
            raise ValueError(f"column 'task' must be one of {', '.join(SUBSETS)}, got {quoted(name)}")
        return ZeroScrollsTask(name).make(identity, row, prompt)

    def samples(self, request: SampleRequest) -> list[Sample]:
        """One of each task in turn, so that the first samples cover many tasks.

        Raises DataMissingError if there are no data for any of them, EmptySplitError if all are in the other split.
        """
        if _own_file("default", request.data_dir):
            return super().samples(request)
        each: list[list[Sample]] = []
        missing: dict[str, str] = {}  # task -> why
        empty: EmptySplitError | None = None
        for subset in _available(request.data_dir):
            try:
                each.append(ZeroScrollsTask(subset).samples(request))
            except DataMissingError as error:
                missing[subset] = error.reason
            except EmptySplitError as error:
                empty = error
        if not each and empty is not None:
            raise empty
        if not each:
            raise missing_data(_source("<task>"), request.data_dir, next(iter(missing.values())), self.name)
        if missing:
            reasons = "; ".join(dict.fromkeys(missing.values()))
            logger.warning("%s leaves out %s: %s", self.name, ", ".join(missing), reasons)
        turns = zip_longest(*each)
        return [sample for turn in turns for sample in turn if sample is not None][: request.max_samples]

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        raise UserError(f"{self.name} holds ten tasks with different scores: name one, such as zero_scrolls/qasper")

    def score(self, prediction: str, sample: Sample) -> Scores:
        task = ZeroScrollsTask(sample.task.partition("/")[2])
        scores = task.score(prediction, sample)
        return {"score": scores[task.metric], **scores}

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """The score of each task, their mean, and how many tasks there are."""
        by_task: dict[str, list[Scores]] = {}
        for score, sample in zip(scores, samples, strict=True):
            if "score" in score:
                by_task.setdefault(sample.task.partition("/")[2], []).append(score)
        tasks = {subset: ZeroScrollsTask(subset).task_score(by_task[subset]) for subset in SUBSETS if subset in by_task}
        if not tasks:
            return {}
        average = _mean(list(tasks.values()))
        return {"task_scores": tasks, "average": average, "tasks_run": len(tasks), "tasks_in_all": len(SUBSETS)}


def _source(subset: str) -> Source:
    return Source("zero_scrolls", subset, HUB_ID, split="validation", archive=f"{subset}.zip", member="validation.jsonl")


def _forms(shared: dict[str, str]) -> list[Form]:
    answer = "text or list of texts"
    indices = {"document_end_index": "integer", "query_end_index": "integer"}
    return [
        Form({"input": "text", "output": answer, **indices, **shared}, _original_prompt),
        Form({**PROMPT_COLUMNS, "answer": answer, **shared}),
    ]


def _original_prompt(row: Row) -> PromptParts:
    text, document_end = row["input"], row["document_end_index"]
    # Tasks without a query have an index before the document's end.
    query_end = min(max(row["query_end_index"], document_end), len(text))
    return text[:document_end], text[document_end:query_end], text[query_end:]


def _own_file(subset: str, data_dir: Path | None) -> Path | None:
    return data_file(_source(subset), data_dir)


def _available(data_dir: Path | None) -> list[str]:
    """The tasks in the user's folder if it holds any, else all ten."""
    return [subset for subset in SUBSETS if _own_file(subset, data_dir)] or list(SUBSETS)


def make_tasks() -> dict[str, Task]:
    tasks: list[Task] = [ZeroScrollsAllTask(), *(ZeroScrollsTask(subset) for subset in SUBSETS)]
    return {task.name: task for task in tasks}


def expand(name: str, data_dir: Path | None) -> TaskSelection | None:
    """zero_scrolls/default, with a note if the user's folder holds only some of the ten tasks."""
    if name != "zero_scrolls/default" or _own_file("default", data_dir):
        return None
    available = _available(data_dir)
    if len(available) == len(SUBSETS):
        return None
    missing = [subset for subset in SUBSETS if subset not in available]
    return TaskSelection([name], f"{len(available)} of {len(SUBSETS)} tasks: no data for {', '.join(missing)}")
