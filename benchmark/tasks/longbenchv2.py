"""LongBench v2 (arXiv 2412.15204): 503 four-choice questions on long texts, answered directly or after reasoning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, take_split
from benchmark.tasks.data import Row, Source
from benchmark.tasks.sources import PROMPT_COLUMNS, Form, as_texts, read_samples

_CONTEXT = "Please read the following text and answer the {question} below.\n\n<text>\n{context}\n</text>\n\n"
_QUESTION = "What is the correct answer to this question: {Q}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
_INSTRUCTION = 'Format your response as follows: "The correct answer is (insert answer here)".'
_REASONING = "Let’s think step by step:"

DIRECT_TOKENS = 128
REASONING_TOKENS = 1024


def extract_answer(prediction: str) -> str | None:
    """The letter of "The correct answer is (X)", else of "The correct answer is X", else None. Asterisks are ignored."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found[1] if found else None


class LongBenchV2Task(Task):
    """longbenchv2/0shot and longbenchv2/cot.

    The authors ask cot in two calls, the second one without the text. Here it is one call: the question asks for the
    reasoning and the format of the answer, and the answer length has room for both.
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
            Form(PROMPT_COLUMNS | shared, self._copy),
            Form({"context": "text", "question": "text", **choices, **shared}, self._original),
        ]
        sources = [
            Source("longbenchv2", self.mode, "THUDM/LongBench-v2", split="train"),
            Source("longbenchv2", self.mode, "Xnhyacinth/LongBench-v2", config=self.mode),
        ]
        return take_split(read_samples(sources, forms, request.data_dir), request, lambda sample: sample.context)

    def _original(self, row: Row, number: int) -> Iterator[Sample]:
        noun = "question" if self.mode == "0shot" else "questions"
        context = _CONTEXT.replace("{question}", noun).replace("{context}", row["context"].strip())
        choices = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        yield self._sample(row, number, context, _QUESTION.format(Q=row["question"].strip(), **choices))

    def _copy(self, row: Row, number: int) -> Iterator[Sample]:
        # The copies hold the instruction in the answer prefix; it belongs in the user's turn.
        yield self._sample(row, number, row["context"], row["question"])

    def _sample(self, row: Row, number: int, context: str, question: str) -> Sample:
        instruction = _INSTRUCTION if self.mode == "0shot" else f"{_INSTRUCTION}\n\n{_REASONING}"
        prompt = (context, question + instruction, "")
        return self.make_sample(row.get("_id") or number, prompt, [row["answer"]], columns=dict(row))

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """accuracy: 1 if the extracted letter is the reference's."""
        return {"accuracy": float(extract_answer(prediction) in as_texts(references))}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """Accuracy (absent if empty) and size of Overall, Easy, Hard (all that is not easy), Short, Medium and Long."""
        groups: dict[str, list[float]] = {name: [] for name in ("Overall", "Easy", "Hard", "Short", "Medium", "Long")}
        for score, sample in zip(scores, samples, strict=True):
            if "accuracy" in score:
                difficulty = "Easy" if sample.columns["difficulty"] == "easy" else "Hard"
                length = {"short": "Short", "medium": "Medium"}.get(str(sample.columns["length"]).lower(), "Long")
                for name in ("Overall", difficulty, length):
                    groups[name].append(score["accuracy"])
        return {"groups": metrics.group_means(groups, "accuracy")}


def make_tasks() -> dict[str, Task]:
    return {f"longbenchv2/{mode}": LongBenchV2Task(mode) for mode in ("0shot", "cot")}
