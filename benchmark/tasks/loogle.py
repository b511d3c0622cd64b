"""LooGLE (arXiv 2311.04939, github.com/bigai-nlco/LooGLE): questions, clozes, summaries on texts of over 24k tokens.

A document has many questions; all of them are asked on one context. BERTScore needs the extra `bertscore`, METEOR needs
nltk's WordNet data: without them these two metrics are absent.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, UserError, take_split
from benchmark.tasks.data import Row, shown
from benchmark.tasks.sources import Form, Place, as_texts, read_samples

_ANSWER = ("Please answer the question based on the long texts below. \n{input}", "\nQuestion: {Q}\n", "Answer: ")


@dataclass(frozen=True)
class Subset:
    """The authors' prompt in three parts, answer length in tokens, hub configurations, number of samples."""

    prompt: tuple[str, str, str]  # context, question, answer prefix
    max_new_tokens: int
    configs: tuple[str, ...]
    num_samples: int


SUBSETS: dict[str, Subset] = {
    "shortdep_qa": Subset(_ANSWER, 300, ("shortdep_qa",), 1951),
    "longdep_qa": Subset(_ANSWER, 500, ("longdep_qa",), 1101),
    "shortdep_cloze": Subset(
        (
            "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
            "question could be an entity of Person, Location or Organiocation. The same masks represent the same "
            "entity. Output a json format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine',"
            "'<mask-2>': 'Bethel Horizon'}\n{input}",
            "\n Question: {Q} What are the masked entities? \n",
            "Answer:",
        ),
        50, ("shortdep_cloze",), 2880,
    ),
    "longdep_summarization": Subset(
        ("Please generate a summary of the below paper. \n{input}", "\n ", "Summarization: "),
        500, ("summarization", "longdep_summarization"), 516,
    ),
}  # fmt: skip

MAX_LITERAL = 20_000  # characters of an answer that are parsed; the authors' answers have at most 50 tokens


def parse_literal_dict(text: str) -> dict[Any, Any] | None:
    """The dict that `text` writes as a Python literal, and nothing but it, else None. Nothing is evaluated."""
    if len(text) > MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in a model's text
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def cloze_hits(prediction: str, reference: dict[str, Any]) -> tuple[int, int, int]:
    """(masks with the very same value, masks that share a word with it, masks).

    An answer that is not a dict hits none; a value that is not a text shares with its equal alone.
    """
    answer = parse_literal_dict(prediction) or {}
    exact = partial = 0
    for mask in reference.keys() & answer.keys():
        given, value = answer[mask], reference[mask]
        exact += given == value
        texts = isinstance(given, str) and isinstance(value, str)
        partial += not set(given.split()).isdisjoint(value.split()) if texts else given == value
    return exact, partial, len(reference)


def _masks(references: Any) -> dict[str, Any]:
    """The gold masks from a dict, its JSON text or a list holding either. UserError for anything else."""
    masks = references[0] if isinstance(references, (list, tuple)) and len(references) == 1 else references
    if isinstance(masks, str):
        try:
            masks = json.loads(masks)
        except json.JSONDecodeError:
            masks = parse_literal_dict(masks)
    if not isinstance(masks, dict) or not masks:
        raise UserError(f"a cloze reference must be a dict of masks such as {{'<mask-0>': 'Bob'}}, got {shown(references)}")
    return {str(mask): value for mask, value in masks.items()}


class LoogleTask(Task):
    """loogle/<subset>: bleu1, bleu4 (4-grams alone), ROUGE recalls, and METEOR and BERTScore where they can be had; the
    cloze: exact_match and partial_match.
    """

    def __init__(self, subset: str) -> None:
        self.name = f"loogle/{subset}"
        self.subset = subset
        self.spec = SUBSETS[subset]
        self.cloze = subset == "shortdep_cloze"
        self.metric = "exact_match" if self.cloze else "rouge-l"

    @property
    def description(self) -> TaskDescription:
        spec = self.spec
        return TaskDescription("bigainlco/LooGLE", self.metric, spec.max_new_tokens, spec.num_samples, "over 24k tokens")

    def samples(self, request: SampleRequest) -> list[Sample]:
        answer = "anything" if self.cloze else "text"
        forms = [
            Form({"context": "text", "question": "text", "answer_prefix": "text", "answer": "text"}, self._prompted),
            Form({"context": "text", "question": "?text", "answer": answer}, self._one_question),
            Form({"input": "text", "qa_pairs": "anything", "output": "?anything"}, self._document),
        ]
        places = [Place("bigainlco/LooGLE", config) for config in self.spec.configs]
        places.append(Place("simonjegou/loogle", self.subset))
        samples = read_samples("loogle", self.subset, places, forms, request.data_dir)
        return take_split(samples, request, lambda sample: sample.context)

    def _one_question(self, row: Row, number: int) -> Iterator[Sample]:
        yield self._asked(row["context"], row.get("question") or "", row["answer"], f"{number}", dict(row))

    def _document(self, row: Row, number: int) -> Iterator[Sample]:
        columns = {name: value for name, value in row.items() if name not in ("input", "qa_pairs", "output")}
        columns["context"] = row["input"]
        pairs = row["qa_pairs"]
        if pairs == "none":
            yield self._asked(row["input"], "", row["output"], f"{number}", columns)
            return
        for index, pair in enumerate(self._pairs(pairs)):
            asked = {**columns, "question": pair["Q"], "answer": pair["A"]}
            yield self._asked(row["input"], pair["Q"], pair["A"], f"{number}.{index}", asked, "qa_pairs")

    @staticmethod
    def _pairs(column: Any) -> list[dict[str, Any]]:
        """The questions of a document: a list, or its text as JSON or as a Python literal."""
        pairs = column
        if isinstance(pairs, str):
            try:
                pairs = json.loads(pairs)
            except json.JSONDecodeError:
                try:
                    pairs = ast.literal_eval(pairs)
                except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                    pairs = None
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) and "Q" in pair and "A" in pair for pair in pairs):
            raise ValueError(f"column 'qa_pairs' must be a list of questions with Q and A, got {shown(column)}")
        return pairs

    def _prompted(self, row: Row, number: int) -> Iterator[Sample]:
        parts = (row["context"], row["question"], row["answer_prefix"])
        yield self._sample(parts, row["answer"], f"{number}", dict(row))

    def _asked(
        self, text: str, question: str, answer: Any, identity: str, columns: dict[str, Any], column: str = "answer"
    ) -> Sample:
        context, asked, prefix = self.spec.prompt
        # The list of a cloze's answers is in the order of its masks.
        if self.cloze and isinstance(answer, list):
            answer = {f"<mask-{index}>": value for index, value in enumerate(answer)}
        return self._sample(
            (context.replace("{input}", text), asked.replace("{Q}", question), prefix), answer, identity, columns, column
        )

    def _sample(
        self, parts: tuple[str, str, str], answer: Any, identity: str, columns: dict[str, Any], column: str = "answer"
    ) -> Sample:
        """`column`: where the answer stands, for a message."""
        references = as_texts(answer)
        if self.cloze:
            try:
                references = [json.dumps(_masks(answer), ensure_ascii=False, default=str)]
            except UserError as error:
                raise ValueError(f"column {column!r}: {error}") from None
        return Sample(
            sample_id=f"{self.name}:{identity}",
            task=self.name,
            context=parts[0],
            question=parts[1],
            answer_prefix=parts[2],
            references=references,
            max_new_tokens=self.spec.max_new_tokens,
            columns=columns,
        )

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """Scores against the reference (the best over several; with none, as against an empty one).

        An empty prediction counts as the word "None", as the authors have it.
        """
        prediction = prediction or "None"
        if self.cloze:
            exact, partial, masks = cloze_hits(prediction, _masks(references)) if references else (0, 0, 1)
            return {"exact_match": exact / masks, "partial_match": partial / masks}
        scored = [self._similarity(prediction, reference) for reference in as_texts(references) or [""]]
        return {name: max(scores[name] for scores in scored) for name in scored[0]}

    @staticmethod
    def _similarity(prediction: str, reference: str) -> dict[str, float]:
        scores: dict[str, float | None] = {
            **metrics.bleu(prediction, reference),
            **metrics.rouge_recall(prediction, reference),
            "meteor": metrics.meteor(prediction, reference),
            "bert": metrics.bert(prediction, reference),
        }
        return {name: value for name, value in scores.items() if value is not None}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """The cloze's micro-average: hits of all samples over masks of all samples."""
        if not self.cloze:
            return {}
        masks = [len(_masks(sample.references)) for sample in samples]
        total = sum(count for count, score in zip(masks, scores, strict=True) if "exact_match" in score)
        if not total:
            return {}
        micro = {
            name: sum(round(score[name] * count) for count, score in zip(masks, scores, strict=True) if name in score) / total
            for name in ("exact_match", "partial_match")
        }
        return {"micro_average": {**micro, "masks": total}}


def make_tasks() -> dict[str, Task]:
    return {f"loogle/{subset}": LoogleTask(subset) for subset in SUBSETS}
