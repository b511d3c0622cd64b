"""AIME: prompts of both years, answers checked, the copies' stray line removed."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_data import both_splits, read_rows, samples, write_rows

from benchmark.tasks import get_task
from sparse_attention_hub.errors import UserError

OPENING = "Solve the following AIME (American Invitational Mathematics Examination) problem.\n\nProblem: "


@pytest.mark.parametrize(
    ("year", "instruction"),
    [
        ("aime2024", "- Please reason step by step, and put your final answer within \\boxed{...} format"),
        ("aime2025", "- You must wrap your final answer in \\boxed{...} format"),
    ],
)
def test_the_problem_is_the_context(year: str, instruction: str) -> None:
    row = {name.lower(): value for name, value in read_rows(f"{year}/{year}")[0].items()}
    sample = both_splits(f"{year}/{year}")[0]
    instructions = f"\n\nInstructions:\n- The answer should be an integer between 0 and 999\n{instruction}"
    assert sample.context == OPENING + row["problem"] + instructions
    assert sample.question == "\n\nWhat is the answer to this problem?" and sample.answer_prefix == ""
    assert sample.references == [str(row["answer"])] and sample.max_new_tokens == 32000


def test_the_prepared_copies(tmp_path: Path) -> None:
    want = both_splits("aime2024/aime2024")
    rows = [
        {
            "context": sample.context.replace("\n\nInstructions:", "\nf\nInstructions:"),
            "question": "What is the answer to this problem?",
            "answer_prefix": "",
            "answer": sample.references,
            "max_new_tokens": 32000,
        }
        for sample in want
    ]
    got = both_splits("aime2024/aime2024", write_rows(tmp_path, "aime2024/aime2024", rows))
    assert [(s.context, s.question, s.references) for s in got] == [(s.context, s.question, s.references) for s in want]


@pytest.mark.parametrize("answer", ["1000", "x", "-1", [], ["1", "2"]])
@pytest.mark.parametrize(("year", "column"), [("aime2024", "Answer"), ("aime2025", "answer")])
def test_an_answer_must_be_an_integer_from_0_to_999(answer: object, year: str, column: str, tmp_path: Path) -> None:
    rows = [{**read_rows(f"{year}/{year}")[0], column: answer}]
    message = rf"{tmp_path}.*{year}\.jsonl row 1: column '{column}' must be an integer from 0 to 999, got"
    with pytest.raises(UserError, match=message):
        samples(f"{year}/{year}", write_rows(tmp_path, f"{year}/{year}", rows))


def test_an_answer_is_written_without_leading_zeros(tmp_path: Path) -> None:
    rows = [{**row, "answer": "033"} for row in read_rows("aime2025/aime2025")]
    sample = samples("aime2025/aime2025", write_rows(tmp_path, "aime2025/aime2025", rows))[0]
    assert sample.references == ["33"]


def test_solved_problems_are_counted() -> None:
    task, asked = get_task("aime2024/aime2024"), samples("aime2024/aime2024")
    scores = [task.score(f"so \\boxed{{{asked[0].references[0]}}}", asked[0]), task.score("no box", asked[1])]
    assert task.aggregate(scores, asked) == {"correct_answers": 1, "total_problems": 2}
