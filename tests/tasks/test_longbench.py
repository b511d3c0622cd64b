"""LongBench and LongBench v2: the authors' prompts, chat-template exceptions, length buckets, difficulty groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmark_data import both_splits, read_rows
from fakes import FakeTokenizer, chatml

from benchmark.tasks import get_task, score_prediction
from benchmark.tasks.base import UserError, build_prompt
from benchmark.tasks.longbench import SUBSETS, length_bucket

STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
# Published prompts, written out whole.
PROMPTS = {
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
    "question "
    + STORY
    + "\n\nStory: {context}\n\nNow, answer the question based on the story "
    + STORY
    + "\n\nQuestion: {input}\n\nAnswer:",
    "multifieldqa_zh": "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
    "只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    "lsht": "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
    "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the "
    'number of the paragraph that the abstract is from. The answer format must be like "Paragraph 1", '
    '"Paragraph 2", etc.\n\nThe answer is: ',
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}


@pytest.mark.parametrize("subset", PROMPTS)
def test_context_question_and_prefix_make_up_the_published_prompt(subset: str) -> None:
    rows = {row["_id"]: row for row in read_rows(f"longbench/{subset}")}
    for sample in both_splits(f"longbench/{subset}"):
        row = rows[sample.columns["_id"]]
        whole = PROMPTS[subset].replace("{context}", row["context"]).replace("{input}", row["input"])
        assert sample.context + sample.question + sample.answer_prefix == whole


def test_few_shot_and_code_tasks_are_asked_without_a_chat_template_and_with_their_label_as_prefix() -> None:
    plain = {name for name in SUBSETS if not get_task(f"longbench/{name}").use_chat_template}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    prefixes = {name: both_splits(f"longbench/{name}")[0].answer_prefix for name in plain}
    assert prefixes == {
        "trec": "Type:", "triviaqa": "Answer:", "samsum": "Summary:", "lsht": "",
        "lcc": "Next line of code:\n", "repobench-p": "Next line of code:\n",
    }  # fmt: skip


def test_answer_lengths_are_the_authors() -> None:
    lengths = {
        128: {"narrativeqa", "qasper", "dureader", "samsum"},
        64: {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"},
        512: {"gov_report", "qmsum", "multi_news", "vcsum"},
    }
    for name, spec in SUBSETS.items():
        assert spec.max_new_tokens == next((length for length, names in lengths.items() if name in names), 32)


def test_longbench_e_reports_length_buckets_and_no_mean_for_an_empty_one() -> None:
    task, samples = get_task("longbench/qasper_e"), both_splits("longbench/qasper_e")
    of_length = [replace(samples[0], columns={"length": length}) for length in (0, 3999, 4000, 7999, 8000)]
    assert [length_bucket(sample) for sample in of_length] == [["0-4k"], ["0-4k"], ["4-8k"], ["4-8k"], ["8k+"]]
    scores = [{"qa_f1": 1.0}, {"qa_f1": 0.5}, {"qa_f1": 0.0}]
    assert task.aggregate(scores, samples) == {
        "length_buckets": {
            "0-4k": {"n": 1, "qa_f1": 1.0}, "4-8k": {"n": 1, "qa_f1": 0.5}, "8k+": {"n": 1, "qa_f1": 0.0},
        }
    }  # fmt: skip
    assert task.aggregate(scores[:1], samples[:1])["length_buckets"]["8k+"] == {"n": 0}
    assert get_task("longbench/qasper").aggregate(scores, samples) == {}


def test_classification_needs_its_classes() -> None:
    with pytest.raises(UserError, match="all_classes is needed"):
        score_prediction("longbench/trec", "City", ["City"])


def test_only_the_first_line_counts_for_few_shot_tasks() -> None:
    assert score_prediction("longbench/triviaqa", "\nParis\nQuestion:", ["Paris"]) == {"qa_f1": 1.0}
    assert score_prediction("longbench/hotpotqa", "Paris\nnot", ["Paris"])["qa_f1"] < 1


def test_longbenchv2_asks_in_the_users_turn() -> None:
    row = read_rows("longbenchv2/0shot")[0]
    whole = (
        f"Please read the following text and answer the question below.\n\n<text>\n{row['context']}\n</text>\n\n"
        f"What is the correct answer to this question: {row['question']}\nChoices:\n"
        f"(A) {row['choice_A']}\n(B) {row['choice_B']}\n(C) {row['choice_C']}\n(D) {row['choice_D']}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    direct = both_splits("longbenchv2/0shot")[0]
    assert direct.context + direct.question == whole and direct.answer_prefix == ""
    reasoned = both_splits("longbenchv2/cot")[0]
    assert reasoned.question.endswith('(insert answer here)".\n\nLet’s think step by step:') and reasoned.answer_prefix == ""
    tokenizer = FakeTokenizer(chatml)
    prompt = build_prompt(reasoned, tokenizer, max_context_length=10**6, max_new_tokens=9, use_chat_template=True)
    assert tokenizer.decode(prompt.question_ids).endswith("step:<|im_end|>\n<|im_start|>assistant\n")
    assert "answer the questions below" in reasoned.context
    assert (direct.max_new_tokens, reasoned.max_new_tokens) == (128, 1152)


def test_longbenchv2_groups_by_difficulty_and_length() -> None:
    task, samples = get_task("longbenchv2/0shot"), both_splits("longbenchv2/0shot")
    groups = task.aggregate([{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 1.0}], samples)["groups"]
    assert groups["Overall"] == {"n": 3, "accuracy": pytest.approx(2 / 3)}
    assert groups["Easy"] == {"n": 1, "accuracy": 1.0} and groups["Hard"] == {"n": 2, "accuracy": 0.5}
    assert [groups[name]["accuracy"] for name in ("Short", "Medium", "Long")] == [1.0, 0.0, 1.0]
    assert task.aggregate([{"accuracy": 1.0}], samples[:1])["groups"]["Long"] == {"n": 0}
