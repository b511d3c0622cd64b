"""LongBench v2 (arXiv 2412.15204): 503 four-choice questions on long texts, answered directly (0shot) or after
reasoning (cot).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, take_split
from benchmark.tasks.data import Row
from benchmark.tasks.sources import Form, Place, as_texts, read_samples

_CONTEXT = "Please read the following text and answer the {question} below.\n\n<text>\n{context}\n</text>\n\n"
_QUESTION = "What is the correct answer to this question: {Q}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
_INSTRUCTION = 'Format your response as follows: "The correct answer is (insert answer here)".'
_REASONING = "Let’s think step by step:"

DIRECT_TOKENS = 128
REASONING_TOKENS = 1024


def extract_answer(prediction: str) -> str | None:
    """The letter of "The correct answer is (X)", else of "The correct answer is X", case-sensitive, asterisks ignored;
    None without one.
    """
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found[1] if found else None


class LongBenchV2Task(Task):
    """longbenchv2/0shot and longbenchv2/cot.

    The authors ask cot in two calls, the second one without the text. Here it is one: the format of the answer and the
    reasoning are asked for with the question, and the answer has room for the reasoning and the verdict together.
    """

    metric = "accuracy"

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"longbenchv2/{mode}"
        self.max_new_tokens = DIRECT_TOKENS if mode == "0shot" else REASONING_TOKENS + DIRECT_TOKENS

    @property
    def description(self) -> TaskDescription:
        return TaskDescription("THUDM/LongBench-v2", self.metric, self.max_new_tokens, 503, "8k to 2M words")

    def samples(self, request: SampleRequest) -> list[Sample]:
        shared = {"answer": "text", "difficulty": "text", "length": "text", "_id": "?text"}
        choices = {f"choice_{letter}": "text" for letter in "ABCD"}
        forms = [
            Form({"context": "text", "question": "text", "answer_prefix": "text", **shared}, self._prompted),
            Form({"context": "text", "question": "text", **choices, **shared}, self._original),
        ]
        places = [Place("THUDM/LongBench-v2", split="train"), Place("Xnhyacinth/LongBench-v2", self.mode)]
        samples = read_samples("longbenchv2", self.mode, places, forms, request.data_dir)
        return take_split(samples, request, lambda sample: sample.context)

    def _original(self, row: Row, number: int) -> Iterator[Sample]:
        noun = "question" if self.mode == "0shot" else "questions"
        context = _CONTEXT.replace("{question}", noun).replace("{context}", row["context"].strip())
        choices = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        yield self._sample(row, number, context, _QUESTION.format(Q=row["question"].strip(), **choices))

    def _prompted(self, row: Row, number: int) -> Iterator[Sample]:
        # These copies keep what is asked for in the answer prefix; it belongs to the user's turn.
        yield self._sample(row, number, row["context"], row["question"])

    def _sample(self, row: Row, number: int, context: str, question: str) -> Sample:
        asked_for = _INSTRUCTION if self.mode == "0shot" else f"{_INSTRUCTION}\n\n{_REASONING}"
        return Sample(
            sample_id=f"{self.name}:{row.get('_id') or number}",
            task=self.name,
            context=context,
            question=question + asked_for,
            answer_prefix="",
            references=[row["answer"]],
            max_new_tokens=self.max_new_tokens,
            columns=dict(row),
        )

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """accuracy: 1 if the extracted letter is the reference's."""
        return {"accuracy": float(extract_answer(prediction) in as_texts(references))}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """Accuracy (0..1) and size of Overall, Easy, Hard (all that is not easy), Short, Medium, Long; an empty group
        has no accuracy.
        """
        groups: dict[str, list[float]] = {name: [] for name in ("Overall", "Easy", "Hard", "Short", "Medium", "Long")}
        for score, sample in zip(scores, samples, strict=True):
            if "accuracy" not in score:
                continue
            length = str(sample.columns["length"]).lower()
            for name in (
                "Overall",
                "Easy" if sample.columns["difficulty"] == "easy" else "Hard",
                "Short" if length == "short" else "Medium" if length == "medium" else "Long",
            ):
                groups[name].append(score["accuracy"])
        return {
            "groups": {
                name: {"n": len(values), **({"accuracy": sum(values) / len(values)} if values else {})}
                for name, values in groups.items()
            }
        }


def make_tasks() -> dict[str, Task]:
    return {f"longbenchv2/{mode}": LongBenchV2Task(mode) for mode in ("0shot", "cot")}
