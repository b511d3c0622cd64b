"""LooGLE (arXiv 2311.04939, github.com/bigai-nlco/LooGLE): questions, clozes, summaries on texts of over 24k tokens.

All questions on a document share one context. Without the extra `bertscore`, BERTScore is absent; without nltk's WordNet
data, METEOR.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, SampleRequest, Task, TaskDescription, UserError, take_split
from benchmark.tasks.data import Row, Source, shown
from benchmark.tasks.sources import PROMPT_COLUMNS, Form, as_texts, prompt_of, read_samples

_ANSWER = ("Please answer the question based on the long texts below. \n{input}", "\nQuestion: {Q}\n", "Answer: ")


@dataclass(frozen=True)
class Subset:
    """The authors' prompt in three parts, answer length in tokens, hub configurations, number of samples."""

    context: str
    question: str
    answer_prefix: str
    max_new_tokens: int
    configs: tuple[str, ...]
    num_samples: int


SUBSETS: dict[str, Subset] = {
    "shortdep_qa": Subset(*_ANSWER, 300, ("shortdep_qa",), 1951),
    "longdep_qa": Subset(*_ANSWER, 500, ("longdep_qa",), 1101),
    "shortdep_cloze": Subset(
        "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
        "question could be an entity of Person, Location or Organiocation. The same masks represent the same "
        "entity. Output a json format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine',"
        "'<mask-2>': 'Bethel Horizon'}\n{input}",
        "\n Question: {Q} What are the masked entities? \n", "Answer:", 50, ("shortdep_cloze",), 2880,
    ),
    "longdep_summarization": Subset(
        "Please generate a summary of the below paper. \n{input}", "\n ", "Summarization: ",
        500, ("summarization", "longdep_summarization"), 516,
    ),
}  # fmt: skip

MAX_LITERAL = 20_000  # characters of an answer that are parsed; the authors' answers have at most 50 tokens


def _parse_literal(text: str) -> Any:
    """The value that `text` writes as a Python literal, and nothing but it, else None. Nothing is evaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in a model's text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parse_literal_dict(text: str) -> dict[Any, Any] | None:
    """The dict that an answer writes as a Python literal, and nothing but it, else None."""
    value = _parse_literal(text) if len(text) <= MAX_LITERAL else None
    return value if isinstance(value, dict) else None


def _parse_data(value: Any) -> Any:
    """A value of the data, which may be written as JSON or as a Python literal."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return _parse_literal(value)


def cloze_hits(prediction: str, reference: dict[str, Any]) -> tuple[int, int, int]:
    """(masks with the same value, masks with a word in common, all masks).

    An answer that is not a dict hits none. A value that is not a text must be equal in both counts.
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
    masks = _parse_data(masks)
    if not isinstance(masks, dict) or not masks:
        raise UserError(f"a cloze reference must be a dict of masks such as {{'<mask-0>': 'Bob'}}, got {shown(references)}")
    return {str(mask): value for mask, value in masks.items()}


class LoogleTask(Task):
    """loogle/<subset>. Scores: bleu1, bleu4, ROUGE recalls, METEOR, BERTScore; of the cloze exact_match and partial_match."""

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
            Form({**PROMPT_COLUMNS, "answer": "text"}, self._copy),
            Form({"context": "text", "question": "?text", "answer": answer}, self._one_question),
            Form({"input": "text", "qa_pairs": "anything", "output": "?anything"}, self._document),
        ]
        sources = [Source("loogle", self.subset, "bigainlco/LooGLE", config=config) for config in self.spec.configs]
        sources.append(Source("loogle", self.subset, "simonjegou/loogle", config=self.subset))
        return take_split(read_samples(sources, forms, request.data_dir), request, lambda sample: sample.context)

    def _copy(self, row: Row, number: int) -> Iterator[Sample]:
        yield self._sample(prompt_of(row), row["answer"], number, dict(row))

    def _one_question(self, row: Row, number: int) -> Iterator[Sample]:
        yield self._sample(self._prompt(row["context"], row.get("question") or ""), row["answer"], number, dict(row))

    def _document(self, row: Row, number: int) -> Iterator[Sample]:
        columns = {name: value for name, value in row.items() if name not in ("input", "qa_pairs", "output")}
        columns["context"] = row["input"]
        if row["qa_pairs"] == "none":
            yield self._sample(self._prompt(row["input"], ""), row["output"], number, columns)
            return
        pairs = _parse_data(row["qa_pairs"])
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) and "Q" in pair and "A" in pair for pair in pairs):
            raise ValueError(f"column 'qa_pairs' must be a list of questions with Q and A, got {shown(row['qa_pairs'])}")
        for index, pair in enumerate(pairs):
            asked = {**columns, "question": pair["Q"], "answer": pair["A"]}
            yield self._sample(self._prompt(row["input"], pair["Q"]), pair["A"], f"{number}.{index}", asked, "qa_pairs")

    def _prompt(self, text: str, question: str) -> PromptParts:
        spec = self.spec
        return spec.context.replace("{input}", text), spec.question.replace("{Q}", question), spec.answer_prefix

    def _sample(
        self, prompt: PromptParts, answer: Any, identity: object, columns: Row, answer_column: str = "answer"
    ) -> Sample:
        references = as_texts(answer)
        if self.cloze:
            if isinstance(answer, list):  # the answers in the order of the masks
                answer = {f"<mask-{index}>": value for index, value in enumerate(answer)}
            try:
                references = [json.dumps(_masks(answer), ensure_ascii=False, default=str)]
            except UserError as error:
                raise ValueError(f"column {answer_column!r}: {error}") from None
        return self.make_sample(identity, prompt, references, columns=columns)

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """Each score is the best over the references; without any, that of an empty one.

        As in the authors' code, an empty prediction is scored as the word "None".
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
        pairs = zip(scores, samples, strict=True)
        graded = [(score, len(_masks(sample.references))) for score, sample in pairs if "exact_match" in score]
        total = sum(masks for _, masks in graded)
        if not total:
            return {}
        names = ("exact_match", "partial_match")
        micro = {name: sum(round(score[name] * masks) for score, masks in graded) / total for name in names}
        return {"micro_average": {**micro, "masks": total}}


def make_tasks() -> dict[str, Task]:
    return {f"loogle/{subset}": LoogleTask(subset) for subset in SUBSETS}
