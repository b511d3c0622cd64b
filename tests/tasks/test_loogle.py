"""LooGLE: one context for all questions of a document, the three forms of its data, micro-averaged clozes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_data import both_splits, read_rows, samples, write_rows

from benchmark.tasks import get_task, score_prediction
from sparse_attention_hub.errors import UserError


def test_the_questions_of_a_document_share_its_context() -> None:
    test, tuning = samples("loogle/longdep_qa"), samples("loogle/longdep_qa", split="tuning")
    assert len(test) == len(tuning) == 2
    assert len({sample.context for sample in test}) == len({sample.context for sample in tuning}) == 1
    assert test[0].context.startswith("Please answer the question based on the long texts below. \nThe lighthouse")
    assert test[1].question == "\nQuestion: What did the keeper Olav Brekke keep behind the house?\n"
    assert (test[1].answer_prefix, test[1].references) == ("Answer: ", ["Bees."])


def test_cloze_and_summary_prompts() -> None:
    cloze = samples("loogle/shortdep_cloze")[0]
    assert (
        "for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': 'Bethel Horizon'}\nThe light"
        in cloze.context
    )
    asked = "\n Question: <mask-0> built the lighthouse on <mask-1>. What are the masked entities? \nAnswer:"
    assert cloze.question + cloze.answer_prefix == asked
    assert json.loads(cloze.references[0]) == {"<mask-0>": "Ada Lund", "<mask-1>": "Skarv Island"}
    summary = samples("loogle/longdep_summarization")[0]
    assert summary.question + summary.answer_prefix == "\n Summarization: "


@pytest.mark.parametrize("as_text", [False, "json", "python"])
def test_rows_of_whole_documents(as_text: bool | str, tmp_path: Path) -> None:
    want = both_splits("loogle/longdep_qa")
    rows = []
    for row in read_rows("loogle/longdep_qa"):
        pair = {"Q": row["question"], "A": row["answer"], "S": ["it's"]}
        if rows and rows[-1]["input"] == row["context"]:
            rows[-1]["qa_pairs"].append(pair)
        else:
            rows.append({"input": row["context"], "title": "Sheet", "qa_pairs": [pair], "output": "none"})
    for row in rows if as_text else ():
        row["qa_pairs"] = json.dumps(row["qa_pairs"]) if as_text == "json" else repr(row["qa_pairs"])
    got = both_splits("loogle/longdep_qa", write_rows(tmp_path, "loogle/longdep_qa", rows))
    assert [(s.context, s.question, s.references) for s in got] == [(s.context, s.question, s.references) for s in want]
    rows = [
        {"input": row["context"], "qa_pairs": "none", "output": row["answer"]}
        for row in read_rows("loogle/longdep_summarization")
    ]
    got = both_splits("loogle/longdep_summarization", write_rows(tmp_path, "loogle/longdep_summarization", rows))
    assert [s.references for s in got] == [s.references for s in both_splits("loogle/longdep_summarization")]


def test_code_in_the_data_is_not_run(tmp_path: Path) -> None:
    rows = [{"input": "text", "qa_pairs": "[__import__('os').abort()]", "output": "none"}]
    with pytest.raises(UserError, match=r"longdep_qa\.jsonl row 1: column 'qa_pairs' must be a list of questions"):
        samples("loogle/longdep_qa", write_rows(tmp_path, "loogle/longdep_qa", rows))
    rows = [{**read_rows("loogle/shortdep_cloze")[0], "answer": "Bob"}]
    with pytest.raises(UserError, match=r"cloze\.jsonl row 1: column 'answer': a cloze reference must be .* got 'Bob'"):
        samples("loogle/shortdep_cloze", write_rows(tmp_path, "loogle/shortdep_cloze", rows))
    rows = [{"input": "text", "qa_pairs": [{"Q": "who?", "A": 3}], "output": "none"}]
    with pytest.raises(UserError, match=r"cloze\.jsonl row 1: column 'qa_pairs': a cloze reference must be .* got 3"):
        samples("loogle/shortdep_cloze", write_rows(tmp_path, "loogle/shortdep_cloze", rows))


def test_clozes_are_averaged_over_masks() -> None:
    task, rows = get_task("loogle/shortdep_cloze"), both_splits("loogle/shortdep_cloze")
    answers = [
        "{'<mask-0>': 'Ada Lund', '<mask-1>': 'an Island'}",
        "{'<mask-0>': 'Ruth Amsel', '<mask-1>': 'Orrin glacier'}",
    ]
    scores = [task.score(answer, row) for answer, row in zip(answers, rows, strict=True)]
    assert scores == [{"exact_match": 0.5, "partial_match": 1.0}, {"exact_match": 1.0, "partial_match": 1.0}]
    assert task.aggregate(scores, rows) == {"micro_average": {"exact_match": 0.75, "partial_match": 1.0, "masks": 4}}
    assert task.aggregate([{}, {}], rows) == {}


def test_references_of_a_cloze_may_be_a_dict_or_its_text() -> None:
    masks = {"<mask-0>": "Bob"}
    for references in (masks, [masks], json.dumps(masks), [json.dumps(masks)], str(masks)):
        assert score_prediction("loogle/shortdep_cloze", "{'<mask-0>': 'Bob'}", references)["exact_match"] == 1


@pytest.mark.parametrize(
    ("value", "prediction", "exact", "partial"),
    [
        (5, "{'<mask-0>': 5}", 1, 1),
        (5, "{'<mask-0>': '5'}", 0, 0),
        ("5", "{'<mask-0>': 5}", 0, 0),
        (["Bob"], "{'<mask-0>': ['Bob']}", 1, 1),
        (None, "{}", 0, 0),
    ],
)
def test_a_cloze_compares_values_not_their_texts(value: object, prediction: str, exact: int, partial: int) -> None:
    for references in ({"<mask-0>": value}, [json.dumps({"<mask-0>": value})]):
        score = score_prediction("loogle/shortdep_cloze", prediction, references)
        assert score == {"exact_match": exact, "partial_match": partial}


def test_a_cloze_of_numbers_is_asked_and_scored(tmp_path: Path) -> None:
    rows = [{**row, "answer": {"<mask-0>": 1887}} for row in read_rows("loogle/shortdep_cloze")]
    sample = samples("loogle/shortdep_cloze", write_rows(tmp_path, "loogle/shortdep_cloze", rows))[0]
    assert sample.references == ['{"<mask-0>": 1887}']
    assert get_task("loogle/shortdep_cloze").score("{'<mask-0>': 1887}", sample)["exact_match"] == 1
