"""The user's own files: lists written as text, a file of tuning samples, questions on one context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from benchmark_data import DATA, both_splits, read_rows, samples, write_rows

from benchmark.tasks import available_tasks, data, get_task, score_prediction
from benchmark.tasks.base import Sample
from benchmark.tasks.sources import DataTask
from benchmark.tasks.values import as_texts, parse_literal, parse_text
from sparse_attention_hub.errors import UserError

WITH_FILE = [name for name in available_tasks() if (DATA / f"{name}.jsonl").is_file()]
QA = "longbench/qasper"


def parts(sample: Sample) -> tuple[Any, ...]:
    return sample.context, sample.question, sample.answer_prefix, sample.references, sample.label, sample.all_classes


@pytest.mark.parametrize("name", WITH_FILE)
def test_a_csv_file_of_pandas_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    """Pandas writes a list as Python does: ['71432']."""
    file = tmp_path / f"{name}.csv"
    file.parent.mkdir()
    pandas.DataFrame([{k: v if v != [] else None for k, v in row.items()} for row in read_rows(name)]).to_csv(file, index=False)
    assert list(map(parts, both_splits(name, tmp_path))) == list(map(parts, both_splits(name)))


@pytest.mark.parametrize("name", WITH_FILE)
def test_a_list_in_the_text_of_a_json_line_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    lists = {"answer", "Answer", "answers", "all_classes", "options", "output"}
    rows = [{k: str(v) if k in lists and isinstance(v, list) and v else v for k, v in row.items()} for row in read_rows(name)]
    assert list(map(parts, both_splits(name, write_rows(tmp_path, name, rows)))) == list(map(parts, both_splits(name)))


@pytest.mark.parametrize(
    ("name", "answers", "said"),
    [
        ("infinite_bench_hf/passkey", ["71432"], " 71432."),
        ("infinite_bench_hf/kv_retrieval", ["a14cb8ba-002b"], ' "a14cb8ba-002b"'),
        ("infinite_bench_hf/longdialogue_qa_eng", ["ACE", "ACE ROTHSTEIN"], "Ace Rothstein"),
        ("infinite_bench_hf/longbook_qa_eng", ["a smoker", "Walking Georgie"], "Walking Georgie"),
        ("aime2025/aime2025", ["70"], r"So it is \boxed{70}."),
    ],
)
def test_the_right_answer_to_a_csv_file_of_pandas_scores_1(name: str, answers: list[str], said: str, tmp_path: Path) -> None:
    column = "problem" if name.startswith("aime") else "context"
    rows = [{column: f"text {i}", "input": "Which?", "answer": answers} for i in range(40)]
    (tmp_path / name).parent.mkdir()
    pandas.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    asked = both_splits(name, tmp_path)
    assert len(asked) == 40
    for sample in asked:
        assert set(get_task(name).score(said, sample).values()) == {1.0}
    assert set(score_prediction(name, said, str(answers)).values()) == {1.0}


def test_a_list_of_numpy_is_refused_with_row_and_column(tmp_path: Path) -> None:
    """Python would join its texts: ['a' 'b'] is ['ab']."""
    rows = [{**row, "answers": numpy.array(["one", "two"])} for row in read_rows(QA)]
    (tmp_path / "longbench").mkdir()
    pandas.DataFrame(rows).to_csv(tmp_path / f"{QA}.csv", index=False)
    with pytest.raises(UserError, match=r"qasper\.csv row 1: column 'answers' .*without commas.*\['one' 'two'\]"):
        samples(QA, tmp_path)
    with pytest.raises(UserError, match="without commas"):
        score_prediction(QA, "one", "['one' 'two']")


LABELS = {
    "infinite_bench/code_run": [3],
    "infinite_bench/math_find": [3],
    "infinite_bench/math_calc": [3, 4],
    "infinite_bench/code_debug": ["f", "A"],
    "loogle/shortdep_cloze": {"<mask-0>": "3"},
    "infinite_bench/kv_retrieval": ["3"],
}
ANSWERS = ("3, 4", "A. f", "\\boxed{3}", "The correct answer is (A)", "{'<mask-0>': '3'}", "Paragraph 3, 3%", "bee")


@pytest.mark.parametrize(
    "name", [*(n for n in available_tasks() if n.split("/")[0] not in ("ruler", "ruler_hf")), "ruler/4096/vt"]
)
def test_score_prediction_takes_a_list_as_text(name: str) -> None:
    if name == "zero_scrolls/default":
        return
    label = LABELS.get(name.replace("_hf", ""), ["3", "bee", "A"])
    once = label[0] if name.endswith("kv_retrieval") else label  # its authors do not take the label out of a list
    for answer in ANSWERS:
        want = score_prediction(name, answer, once, ["3", "A"])
        assert score_prediction(name, answer, str(label), ["3", "A"]) == want
        assert score_prediction(name, answer, json.dumps(label), ["3", "A"]) == want


def test_values() -> None:
    assert parse_text('["a"]') == parse_text("['a']") == ["a"] and parse_text("[a]") is None
    assert parse_text("[" * 10**5) is None and parse_literal("-" * 10**5 + "1") is None and parse_literal("9" * 5000) is None
    assert (
        as_texts("[Applause]") == ["[Applause]"] and as_texts(["[1, 2]"]) == ["[1, 2]"] and as_texts("['a', 1]") == ["a", "1"]
    )
    assert as_texts(None) == as_texts("[]") == [] and as_texts(("a", 2)) == ["a", "2"]
    for bad in ([["a"]], "[None]", [{"a": 1}], [float("nan")]):
        with pytest.raises(UserError, match="the answer must be a text, a number or a list of them, got"):
            as_texts(bad)


# ---- splits ----------------------------------------------------------------------------------------------


def write_qa(folder: Path, rows: list[tuple[str, str]], name: str = QA) -> Path:
    return write_rows(folder, name, [{"context": c, "input": q, "answers": ["a"]} for c, q in rows])


@pytest.mark.parametrize("count", [3, 12, 100])
def test_questions_on_one_context_are_split_by_question(count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data.warn_once.cache_clear()
    write_qa(tmp_path, [("One text", f"Question {i}?") for i in range(count)])
    test, tuning = samples(QA, tmp_path), samples(QA, tmp_path, split="tuning")
    assert len(test) + len(tuning) == count and 1 <= len(tuning) <= max(2, count // 3)
    assert {s.question for s in test}.isdisjoint({s.question for s in tuning})
    assert caplog.messages == [f"{QA}: all rows of {tmp_path}/{QA}.jsonl share one context, so they are split by question"]
    more = write_qa(tmp_path / "more", [("One text", f"Question {i}?") for i in range(count + 20)])
    assert {s.question for s in samples(QA, more)} >= {s.question for s in test} or count == 3


def test_two_contexts_are_never_split_by_question(tmp_path: Path) -> None:
    write_qa(tmp_path, [(f"Text {i % 20}", f"Question {i}?") for i in range(200)])
    test, tuning = samples(QA, tmp_path), samples(QA, tmp_path, split="tuning")
    assert len(test) + len(tuning) == 200 and {s.context for s in test}.isdisjoint({s.context for s in tuning})


def test_rows_on_one_side_alone_say_what_helps(tmp_path: Path) -> None:
    write_qa(tmp_path, [("row-0", "a?"), ("row-0", "b?"), ("row-2", "c?")])
    assert len(samples(QA, tmp_path)) == 3
    with pytest.raises(
        UserError, match=r"no tuning samples: rows are split by a hash.*put rows for tuning into qasper\.tuning\.jsonl"
    ):
        samples(QA, tmp_path, split="tuning")
    write_qa(tmp_path, [("row-5", "c?"), ("row-6", "d?")], f"{QA}.tuning")
    assert len(samples(QA, tmp_path)) == 3 and len(samples(QA, tmp_path, split="tuning")) == 2


def test_a_tuning_file_of_ones_own(tmp_path: Path) -> None:
    write_qa(tmp_path, [(f"Text {i}", "Who?") for i in range(30)])
    write_qa(tmp_path, [("Text 0", "When?"), ("Text 31", "Who?")], f"{QA}.tuning")
    test, tuning = samples(QA, tmp_path), samples(QA, tmp_path, split="tuning")
    assert len(test) == 30 and len(samples(QA, tmp_path, max_samples=4)) == 4
    assert [s.context[-7:].split()[-1] for s in tuning] and [s.sample_id for s in tuning] == [
        f"{QA}:tuning-0",
        f"{QA}:tuning-1",
    ]
    write_qa(tmp_path, [("Text 3", "Who?")], f"{QA}.tuning")
    for split in ("test", "tuning"):
        with pytest.raises(UserError, match=r"qasper\.tuning\.jsonl: qasper\.jsonl asks the same question on the same context"):
            samples(QA, tmp_path, split=split)
    (tmp_path / f"{QA}.tuning.jsonl").write_text('{"context": 3}\n')
    with pytest.raises(UserError, match=r"qasper\.tuning\.jsonl row 1: column 'input' is missing"):
        samples(QA, tmp_path)


def test_every_task_over_data_takes_a_tuning_file(tmp_path: Path) -> None:
    for name in WITH_FILE:
        rows = read_rows(name)
        write_rows(tmp_path, name, rows[:1])
        assert len(samples(name, write_rows(tmp_path, f"{name}.tuning", rows[-1:]))) == 1
        assert len(samples(name, tmp_path, split="tuning")) >= 1


def test_a_row_may_be_called_0() -> None:
    rows = [{"_id": number, "answers": ["a"], "all_classes": None} for number in (1, 0, "")]
    task = get_task("longbench/qasper")
    for make in (task.make, lambda *given: DataTask.make(task, *given)):
        found = [make("place", row, ("c", "q", "")) for row in rows]
        assert [sample.sample_id.rpartition(":")[2] for sample in found] == ["1", "0", "place"]
