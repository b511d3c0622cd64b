"""LooGLE (arXiv 2311.04939, github.com/bigai-nlco/LooGLE): questions, clozes, summaries on texts of over 24k tokens.

All questions on a document share one context. Without the extra `bertscore`, BERTScore is absent; without nltk's WordNet
data, METEOR.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, Scores, Task, TaskDescription, UserError
from benchmark.tasks.data import Row, Source
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, Form
from benchmark.tasks.values import as_list, as_texts, parse_literal, parse_text
from sparse_attention_hub.errors import quoted

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

MAX_ANSWER = 20_000  # characters of an answer that are parsed; the authors' answers have at most 50 tokens


def cloze_hits(prediction: str, reference: dict[str, Any]) -> tuple[int, int, int]:
    """(masks with the same value, masks with a word in common, all masks).

    An answer that is not a dict hits none. A value that is not a text must be equal in both counts.
    """
    answer = parse_literal(prediction, MAX_ANSWER)
    if not isinstance(answer, dict):
        answer = {}
    exact = partial = 0
    for mask in reference.keys() & answer.keys():
        given, value = answer[mask], reference[mask]
        exact += given == value
        texts = isinstance(given, str) and isinstance(value, str)
        partial += not set(given.split()).isdisjoint(value.split()) if texts else given == value
    return exact, partial, len(reference)


def _masks(references: Any) -> dict[str, Any]:
    """The gold masks from a dict, its JSON text or a list holding either. UserError for anything else."""
    values = as_list(references)
    masks = values[0] if len(values) == 1 else None
    masks = parse_text(masks) if isinstance(masks, str) else masks
    if not isinstance(masks, dict) or not masks:
        raise UserError(f"a cloze reference must be a dict of masks such as {{'<mask-0>': 'Bob'}}, got {quoted(references)}")
    return {str(mask): value for mask, value in masks.items()}


class LoogleTask(DataTask):
    """loogle/<subset>. Scores: bleu1, bleu4, ROUGE recalls, METEOR, BERTScore; of the cloze exact_match and partial_match."""

    def __init__(self, subset: str) -> None:
        self.name = f"loogle/{subset}"
        self.cloze = subset == "shortdep_cloze"
        self.metric = "exact_match" if self.cloze else "rouge-l"
        spec = self.spec = SUBSETS[subset]
        self.description = TaskDescription(
            "bigainlco/LooGLE", self.metric, spec.max_new_tokens, spec.num_samples, "over 24k tokens"
        )
        self.forms = [
            Form({**PROMPT_COLUMNS, "answer": "text"}),
            Form({"context": "text", "question": "?text", "answer": "anything" if self.cloze else "text"}, self._prompt),
            Form({"input": "text", "qa_pairs": "anything", "output": "?anything"}, self._prompt, self._questions),
        ]
        self.sources = [Source("loogle", subset, "bigainlco/LooGLE", config=config) for config in spec.configs]
        self.sources.append(Source("loogle", subset, "simonjegou/loogle", config=subset))

    def _prompt(self, row: Row) -> PromptParts:
        spec = self.spec
        context = spec.context.replace("{input}", row["context"])
        return context, spec.question.replace("{Q}", row.get("question") or ""), spec.answer_prefix

    def _questions(self, number: int, row: Row) -> Iterator[tuple[object, Row]]:
        """The questions on a whole document, as rows of one question; a summary has none."""
        columns = {name: value for name, value in row.items() if name not in ("input", "qa_pairs", "output")}
        columns["context"] = row["input"]
        pairs = row["qa_pairs"]
        if pairs == "none":
            yield number, {**columns, "answer": row["output"]}
            return
        fits = isinstance(pairs, list) and all(isinstance(p, dict) and isinstance(p.get("Q"), str) and "A" in p for p in pairs)
        if not fits:
            raise ValueError(f"column 'qa_pairs' must be a list of questions with Q and A, got {quoted(pairs)}")
        for index, pair in enumerate(pairs):
            self._references(pair["A"], "qa_pairs")
            yield f"{number}.{index}", {**columns, "question": pair["Q"], "answer": pair["A"]}

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        return self.make_sample(identity, prompt, self._references(row["answer"], "answer"), columns=row)

    def _references(self, answer: Any, column: str) -> list[str]:
        if not self.cloze:
            return as_texts(answer, f"column {column!r}")
        if isinstance(answer, list):  # the answers in the order of the masks
            answer = {f"<mask-{index}>": value for index, value in enumerate(answer)}
        try:
            return [json.dumps(_masks(answer), ensure_ascii=False, default=str)]
        except UserError as error:
            raise ValueError(f"column {column!r}: {error}") from None

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
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

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
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
