r"""AIME 2024 and 2025 (American Invitational Mathematics Examination): 30 problems each, integers from 0 to 999.

There is no official grader. Here, for both years, the text after the last "boxed{" up to its matching brace, stripped of
`$`, `\text{}` (around a number, or around the unit after it), commas and degree signs, must be the answer without leading
zeros. No other number in the text counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription, take_split
from benchmark.tasks.data import Row, Source, shown
from benchmark.tasks.sources import Form, as_texts, read_samples

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
    """The text after the last "boxed{" up to its matching brace, or to the end of a truncated answer; None without a box."""
    _, found, rest = text.rpartition("boxed{")
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
    # A unit becomes a blank: the numbers on both sides of it must not become one.
    wrapped = r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}"
    content = re.sub(wrapped, lambda found: found[1] if re.search("[0-9]", found[1]) else " ", content)
    content = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:text)?degree|°|\\[,;:! ]|[$,]", "", content).strip()
    return int(content) if re.fullmatch(r"0|[1-9][0-9]{0,2}", content) else None


class AimeTask(Task):
    """aime2024/aime2024 and aime2025/aime2025. The problem and the instructions are the context; score: accuracy."""

    metric = "accuracy"

    def __init__(self, year: str) -> None:
        self.year = year
        self.name = f"{year}/{year}"
        hub_id = "Maxwell-Jia/AIME_2024" if year == "aime2024" else "yentinglin/aime_2025"
        self.sources = [Source(year, year, hub_id, split="train"), Source(year, year, f"xAlg-AI/att-hub-{year}")]

    @property
    def description(self) -> TaskDescription:
        return TaskDescription(self.sources[0].hub_id, self.metric, MAX_NEW_TOKENS, 30, "one problem")

    def samples(self, request: SampleRequest) -> list[Sample]:
        forms = [
            Form({"Problem": "text", "Answer": "anything", "ID": "?anything"}, self._original),
            Form({"problem": "text", "answer": "anything", "id": "?anything"}, self._original),
            Form({"context": "text", "question": "text", "answer": "anything", "id": "?anything"}, self._copy),
        ]
        if self.year == "aime2025":
            forms[:2] = forms[1::-1]  # a message about missing columns names those of the first form
        return take_split(read_samples(self.sources, forms, request.data_dir), request, lambda sample: sample.context)

    def _original(self, row: Row, number: int) -> Iterator[Sample]:
        named = {name.lower(): name for name in row}
        context = _PROBLEM.replace("{problem}", row[named["problem"]]) + _INSTRUCTIONS[self.year]
        yield self._sample(row, number, context, row.get(named.get("id", "id")), named["answer"])

    def _copy(self, row: Row, number: int) -> Iterator[Sample]:
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
        prompt = (context, _QUESTION, "")
        return self.make_sample(number if identity is None else identity, prompt, [str(value)], columns=dict(row))

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        """accuracy: 1 if the boxed integer is a reference."""
        value = extract_integer(prediction)
        solutions = [int(text) for text in as_texts(references) if re.fullmatch(r"\s*[0-9]+\s*", text)]
        return {"accuracy": float(value in solutions)}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        """Number of problems, and of those solved."""
        graded = [score["accuracy"] for score in scores if "accuracy" in score]
        return {"correct_answers": int(sum(graded)), "total_problems": len(graded)}


def make_tasks() -> dict[str, Task]:
    return {f"{year}/{year}": AimeTask(year) for year in ("aime2024", "aime2025")}
