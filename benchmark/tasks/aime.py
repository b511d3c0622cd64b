r"""AIME 2024 and 2025 (American Invitational Mathematics Examination): 30 problems each, integers from 0 to 999.

There is no official grader; one serves both years: the text after the last "boxed{" up to its matching brace, stripped
of `$`, `\text{}` (around a number, or with the unit after it), commas and degree signs, must be the answer, written
without leading zeros. No other number in the text counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, take_split
from benchmark.tasks.data import Row, shown
from benchmark.tasks.sources import Form, Place, as_texts, read_samples

_PROBLEM = (
    "Solve the following AIME (American Invitational Mathematics Examination) problem.\n\nProblem: {problem}\n\nInstructions:\n"
)
_INSTRUCTIONS = {
    "aime2024": "- The answer should be an integer between 0 and 999\n"
    "- Please reason step by step, and put your final answer within \\boxed{...} format",
    "aime2025": "- The answer should be an integer between 0 and 999\n- You must wrap your final answer in \\boxed{...} format",
}
_QUESTION = "\n\nWhat is the answer to this problem?"
MAX_NEW_TOKENS = 32000


def boxed(text: str) -> str | None:
    """What the last "boxed{" holds, up to its matching brace, or to the end if the answer was cut off; None without."""
    before, found, rest = text.rpartition("boxed{")
    if not found:
        return None
    depth = 1
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:position]
    return rest


def extract_integer(text: str) -> int | None:
    """The integer from 0 to 999 in the last box; None if there is no box or it holds anything else."""
    content = boxed(text)
    if content is None:
        return None
    content = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}", _number_or_blank, content)
    content = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:text)?degree|°|\\[,;:! ]|[$,]", "", content).strip()
    return int(content) if re.fullmatch(r"0|[1-9][0-9]{0,2}", content) else None


def _number_or_blank(wrapped: re.Match[str]) -> str:
    # A unit leaves a blank, so that numbers on both sides of it do not become one.
    return wrapped[1] if re.search("[0-9]", wrapped[1]) else " "


class AimeTask(Task):
    """aime2024/aime2024 and aime2025/aime2025. The problem and the instructions are the context; score: accuracy."""

    metric = "accuracy"

    def __init__(self, year: str) -> None:
        self.year = year
        self.name = f"{year}/{year}"

    @property
    def _places(self) -> list[Place]:
        if self.year == "aime2024":
            return [Place("Maxwell-Jia/AIME_2024", split="train"), Place("xAlg-AI/att-hub-aime2024")]
        return [Place("yentinglin/aime_2025", split="train"), Place("xAlg-AI/att-hub-aime2025")]

    @property
    def description(self) -> TaskDescription:
        return TaskDescription(self._places[0].hub_id, self.metric, MAX_NEW_TOKENS, 30, "one problem")

    def samples(self, request: SampleRequest) -> list[Sample]:
        forms = [
            Form({"Problem": "text", "Answer": "anything", "ID": "?anything"}, self._original),
            Form({"problem": "text", "answer": "anything", "id": "?anything"}, self._original),
            Form({"context": "text", "question": "text", "answer": "anything", "id": "?anything"}, self._prompted),
        ]
        if self.year == "aime2025":
            forms[:2] = forms[1::-1]  # the form that a message about missing columns speaks of
        samples = read_samples(self.year, self.year, self._places, forms, request.data_dir)
        return take_split(samples, request, lambda sample: sample.context)

    def _original(self, row: Row, number: int) -> Iterator[Sample]:
        named = {name.lower(): name for name in row}
        context = _PROBLEM.replace("{problem}", row[named["problem"]]) + _INSTRUCTIONS[self.year]
        yield self._sample(row, number, context, row.get(named.get("id", "id")), named["answer"])

    def _prompted(self, row: Row, number: int) -> Iterator[Sample]:
        # The 2024 copy has a stray line "f" between the problem and the instructions.
        context = row["context"].replace("\nf\nInstructions:", "\n\nInstructions:")
        yield self._sample(row, number, context, row.get("id"), "answer")

    def _sample(self, row: Row, number: int, context: str, identity: Any, column: str) -> Sample:
        texts = as_texts(row[column])
        try:
            value = int(texts[0])
        except (IndexError, ValueError):
            value = -1
        if len(texts) != 1 or not 0 <= value <= 999:
            raise ValueError(f"column {column!r} must be an integer from 0 to 999, got {shown(row[column])}")
        return Sample(
            sample_id=f"{self.name}:{identity if identity is not None else number}",
            task=self.name,
            context=context,
            question=_QUESTION,
            answer_prefix="",
            references=[str(value)],
            max_new_tokens=MAX_NEW_TOKENS,
            columns=dict(row),
        )

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """accuracy: 1 if the boxed integer is a reference."""
        value = extract_integer(prediction)
        return {"accuracy": float(value is not None and any(value == _integer(text) for text in as_texts(references)))}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """How many problems were solved."""
        graded = [score["accuracy"] for score in scores if "accuracy" in score]
        return {"correct_answers": int(sum(graded)), "total_problems": len(graded)}


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[0-9]+\s*", text) else None


def make_tasks() -> dict[str, Task]:
    return {f"{year}/{year}": AimeTask(year) for year in ("aime2024", "aime2025")}
