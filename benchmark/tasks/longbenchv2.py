"""LongBench v2 (arXiv 2412.15204): 503 four-choice questions on long texts, answered directly or after reasoning."""

import re
from typing import Any

from benchmark.tasks import metrics
from benchmark.tasks.base import PromptParts, Sample, Scores, Task, TaskDescription
from benchmark.tasks.data import Row, Source
from benchmark.tasks.sources import PROMPT_COLUMNS, DataTask, Form
from benchmark.tasks.values import as_texts

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


def _groups(sample: Sample) -> tuple[str, str, str]:
    difficulty = "Easy" if sample.columns["difficulty"] == "easy" else "Hard"
    return "Overall", difficulty, {"short": "Short", "medium": "Medium"}.get(sample.columns["length"].lower(), "Long")


class LongBenchV2Task(DataTask):
    """longbenchv2/0shot and longbenchv2/cot.

    The authors ask cot in two calls, the second one without the text. Here it is one call: the question asks for the
    reasoning and the format of the answer, and the answer length has room for both.
    """

    metric = "accuracy"

    def __init__(self, mode: str) -> None:
        self.direct = mode == "0shot"
        self.name = f"longbenchv2/{mode}"
        tokens = DIRECT_TOKENS if self.direct else REASONING_TOKENS + DIRECT_TOKENS
        self.description = TaskDescription("THUDM/LongBench-v2", self.metric, tokens, 503, "8k to 2M words")
        shared = {"answer": "text", "difficulty": "text", "length": "text", "_id": "?text"}
        choices = {f"choice_{letter}": "text" for letter in "ABCD"}
        self.forms = [
            Form(PROMPT_COLUMNS | shared, self._copy),
            Form({"context": "text", "question": "text", **choices, **shared}, self._original),
        ]
        self.sources = [
            Source("longbenchv2", mode, "THUDM/LongBench-v2", split="train"),
            Source("longbenchv2", mode, "Xnhyacinth/LongBench-v2", config=mode),
        ]

    def _original(self, row: Row) -> PromptParts:
        noun = "question" if self.direct else "questions"
        context = _CONTEXT.replace("{question}", noun).replace("{context}", row["context"].strip())
        choices = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        return context, _QUESTION.format(Q=row["question"].strip(), **choices) + self._instruction(), ""

    def _copy(self, row: Row) -> PromptParts:
        # The copies hold the instruction in the answer prefix; it belongs in the user's turn.
        return row["context"], row["question"] + self._instruction(), ""

    def _instruction(self) -> str:
        return _INSTRUCTION if self.direct else f"{_INSTRUCTION}\n\n{_REASONING}"

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """accuracy: 1 if the extracted letter is the reference's."""
        return {"accuracy": float(extract_answer(prediction) in as_texts(references))}

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """Accuracy (absent if empty) and size of Overall, Easy, Hard (all that is not easy), Short, Medium and Long."""
        names = ("Overall", "Easy", "Hard", "Short", "Medium", "Long")
        return {"groups": metrics.group_means("accuracy", scores, samples, names, _groups)}


def make_tasks() -> dict[str, Task]:
    return {f"longbenchv2/{mode}": LongBenchV2Task(mode) for mode in ("0shot", "cot")}
