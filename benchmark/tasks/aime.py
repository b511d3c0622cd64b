r"""AIME 2024 and 2025 (American Invitational Mathematics Examination): 30 problems each, integers from 0 to 999.

There is no official grader. Here, for both years, the text after the last "boxed{" up to its matching brace, stripped of
`$`, `\text{}` (around a number, or around the unit after it), commas and degree signs, must be the answer without leading
zeros. No other number in the text counts.
"""

import re
from typing import Any

from benchmark.tasks.base import PromptParts, Sample, Scores, Task, TaskDescription
from benchmark.tasks.data import Row, Source
from benchmark.tasks.sources import DataTask, Form
from benchmark.tasks.values import as_texts
from sparse_attention_hub.errors import quoted

_PROBLEM = (
    "Solve the following AIME (American Invitational Mathematics Examination) problem.\n\nProblem: {problem}\n\nInstructions:\n"
)
_INSTRUCTIONS = {
    "aime2024": "- The answer should be an integer between 0 and 999\n"
    "- Please reason step by step, and put your final answer within \\boxed{...} format",
    "aime2025": "- The answer should be an integer between 0 and 999\n- You must wrap your final answer in \\boxed{...} format",
}
_QUESTION = "\n\nWhat is the answer to this problem?"


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


def _plain(answer: str) -> str:
    """The answer without blanks and leading zeros."""
    answer = answer.strip()
    return answer.lstrip("0") or answer[:1]


class AimeTask(DataTask):
    """aime2024/aime2024 and aime2025/aime2025. The problem and the instructions are the context; score: accuracy."""

    metric = "accuracy"

    def __init__(self, year: str) -> None:
        self.year = year
        self.name = f"{year}/{year}"
        hub_id = "Maxwell-Jia/AIME_2024" if year == "aime2024" else "yentinglin/aime_2025"
        self.sources = [Source(year, year, hub_id, split="train"), Source(year, year, f"xAlg-AI/att-hub-{year}")]
        self.description = TaskDescription(hub_id, self.metric, 32000, 30, "one problem")
        self.forms = [
            Form({"Problem": "text", "Answer": "anything", "ID": "?anything"}, self._original),
            Form({"problem": "text", "answer": "anything", "id": "?anything"}, self._original),
            Form({"context": "text", "question": "text", "answer": "anything", "id": "?anything"}, self._copy),
        ]
        if year == "aime2025":
            self.forms[:2] = self.forms[1::-1]  # a message about missing columns names those of the first form

    def _original(self, row: Row) -> PromptParts:
        problem = row["Problem" if "Problem" in row else "problem"]
        return _PROBLEM.replace("{problem}", problem) + _INSTRUCTIONS[self.year], _QUESTION, ""

    def _copy(self, row: Row) -> PromptParts:
        # The 2024 copy has a stray line "f" between the problem and the instructions.
        return row["context"].replace("\nf\nInstructions:", "\n\nInstructions:"), _QUESTION, ""

    def make(self, identity: object, row: Row, prompt: PromptParts) -> Sample:
        column = "Answer" if "Answer" in row else "answer"
        answer = [_plain(text) for text in as_texts(row[column], f"column {column!r}")]
        if len(answer) != 1 or not re.fullmatch("[0-9]{1,3}", answer[0]):
            raise ValueError(f"column {column!r} must be an integer from 0 to 999, got {quoted(row[column])}")
        own = row.get("ID", row.get("id"))
        return self.make_sample(identity if own in (None, "") else own, prompt, answer, columns=row)

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> Scores:
        """accuracy: 1 if the boxed integer is a reference."""
        value = extract_integer(prediction)
        return {"accuracy": float(str(value) in map(_plain, as_texts(references)))}

    def aggregate(self, scores: list[Scores], samples: list[Sample]) -> dict[str, object]:
        """Number of problems, and of those solved."""
        graded = [score["accuracy"] for score in scores if "accuracy" in score]
        return {"correct_answers": int(sum(graded)), "total_problems": len(graded)}


def make_tasks() -> dict[str, Task]:
    return {f"{year}/{year}": AimeTask(year) for year in ("aime2024", "aime2025")}
