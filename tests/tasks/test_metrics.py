"""Text metrics against the originals' numbers, and properties that hold for any text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.tasks import metrics, score_prediction
from benchmark.tasks.aime import boxed, extract_integer
from benchmark.tasks.longbench import SUBSETS
from benchmark.tasks.longbenchv2 import extract_answer
from benchmark.tasks.loogle import MAX_ANSWER, cloze_hits
from benchmark.tasks.values import parse_literal

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_metrics_text.json").read_text(encoding="utf-8")
)


class NoSynonyms:
    """WordNet without a word: what the golden METEOR values were made with."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def cases(benchmark: str) -> Any:
    chosen = [case for case in CASES if case["benchmark"] == benchmark]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


@cases("longbench")
def test_longbench_golden(case: dict[str, Any]) -> None:
    task, expected = f"longbench/{case['subset']}", pytest.approx(case["expected_score"], abs=1e-9)
    if case["metric"] == "scorer":  # the mean of several samples, in percent
        pairs = zip(case["prediction"], case["references"], strict=True)
        values = [score_prediction(task, prediction, references)["qa_f1"] for prediction, references in pairs]
        assert round(100 * sum(values) / len(values), 2) == expected
        return
    score = score_prediction(task, case["prediction"], case["references"], case.get("all_classes"))
    assert list(score) == [case["metric"].removesuffix("_score")]
    value = next(iter(score.values()))
    assert 0 <= value <= 1
    if not case.get("env_dependent"):
        assert value == expected


@cases("longbenchv2")
def test_longbenchv2_golden(case: dict[str, Any]) -> None:
    letter = case["expected_score"]
    assert extract_answer(case["prediction"]) == letter
    for gold in case["references"]:
        assert score_prediction("longbenchv2/0shot", case["prediction"], [gold]) == {"accuracy": float(gold == letter)}


@cases("loogle")
def test_loogle_golden(case: dict[str, Any]) -> None:
    metric, prediction, reference, expected = (case[key] for key in ("metric", "prediction", "references", "expected_score"))
    if metric == "get_meteor_score":
        value = metrics.meteor(prediction, reference, NoSynonyms())
        assert value is not None
        low, high = case.get("range", (expected, expected))
        assert low - 1e-9 <= value <= high + 1e-9
    elif metric in ("get_exact_match", "get_partial_match"):
        exact, partial, masks = cloze_hits(prediction, reference)
        if expected is None:  # the original raises
            assert (exact, partial, masks) == (0, 0, len(reference))
            return
        assert [exact if metric == "get_exact_match" else partial, masks] == expected
        score = score_prediction("loogle/shortdep_cloze", prediction, reference)
        assert score[metric.removeprefix("get_")] == pytest.approx(expected[0] / expected[1])
    else:
        score = score_prediction("loogle/longdep_qa", prediction, [reference])
        names = ("bleu1", "bleu4") if metric == "get_bleu_score" else ("rouge-1", "rouge-2", "rouge-l")
        if expected is None:  # an empty prediction is scored as the word "None"
            assert score == score_prediction("loogle/longdep_qa", "None", [reference])
            return
        assert [score[name] for name in names] == pytest.approx(expected, abs=1e-9)


@cases("aime2025")
def test_aime_golden(case: dict[str, Any]) -> None:
    for year in ("aime2024", "aime2025"):
        score = score_prediction(f"{year}/{year}", case["prediction"], case["references"])
        assert score == {"accuracy": case["expected_score"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"so \boxed{7} no, \boxed{204}", 204),
        (r"\boxed{\text{204}}", 204),
        (r"\boxed{$204$}", 204),
        (r"\boxed{ 204 }", 204),
        (r"\boxed{204^\circ}", 204),
        (r"\boxed{204^{\circ}}", 204),
        (r"\boxed{204°}", 204),
        (r"\boxed{0}", 0),
        (r"\boxed{999}", 999),
        (r"\boxed{1,000}", None),
        (r"\boxed{1000}", None),
        (r"\boxed{-3}", None),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{a=1, b=2}", None),
        (r"\boxed{}", None),
        (r"\boxed{070}", None),
        (r"\boxed{70\text{ degrees}}", 70),
        (r"\boxed{\textrm{70}}", 70),
        (r"\boxed{70^\circ\mathrm{C}}", 70),
        (r"\boxed{7\text{ or }8}", None),
        (r"\boxed{\text{none}}", None),
        ("the answer is 204", None),
    ],
)
def test_aime_takes_an_integer_from_the_last_box(text: str, value: int | None) -> None:
    assert extract_integer(text) == value


def test_box_ends_at_its_own_brace() -> None:
    assert boxed(r"\boxed{\frac{1}{2}} and more}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{20") == "20"
    assert boxed("none") is None


def test_code_sim_is_the_difflib_ratio_of_the_first_line_of_code() -> None:
    assert metrics.code_sim("# a comment\nreturn x\nmore", "return x") == 1.0
    assert metrics.code_sim("", "x") == metrics.code_sim("x", "") == 0.0


def test_equal_code_is_equal_whatever_its_length() -> None:
    """fuzzywuzzy looks for equality first: difflib finds no similarity in long texts of few different characters."""
    assert score_prediction("longbench/lcc", "", [""]) == score_prediction("longbench/lcc", "#", [""]) == {"code_sim": 1.0}
    assert metrics.code_sim("x" * 300, "x" * 300) == 1.0


def test_long_texts_without_a_full_stop_score_zero_in_longbench_and_count_in_loogle() -> None:
    words = " ".join(f"w{number}" for number in range(1010))
    limit = sys.getrecursionlimit()
    assert metrics.rouge(words, words) == 0.0
    assert metrics.rouge_recall(words, words)["rouge-l"] == pytest.approx(1.0)
    assert sys.getrecursionlimit() == limit
    words = " ".join(f"w{number}" for number in range(900))
    assert metrics.rouge(words, words) == pytest.approx(1.0)

    def deep(level: int) -> float:
        return deep(level - 1) if level else metrics.rouge(words, words)

    assert deep(300) == pytest.approx(1.0)  # the caller's own stack does not count


def test_nothing_but_full_stops_scores_zero() -> None:
    assert metrics.rouge("...", "a b") == metrics.rouge("a b", ".") == 0.0
    assert set(metrics.rouge_recall("...", "a b").values()) == {0.0}


def test_chinese_characters_and_lines() -> None:
    assert metrics.character_f1_zh("田归农、商老太", "田归农, 商老太") == 1.0
    assert metrics.character_f1_zh("甲乙", "甲丙") == 0.5
    assert metrics.rouge_lsum("the cat\nthe dog", "the dog\nthe cat") == 1.0
    assert metrics.rouge_lsum("running dogs", "run dog") == 0.0
    assert metrics.to_ascii("Zoë’s Ærø Straße 漢") == "Zoe's AEro Strasse "


@pytest.mark.parametrize(
    "text", ["__import__('os').getcwd()", "dict(a=1)", "[1]", "{" * 300, "{'a': " * 99, "{}" + " " * 30000]
)
def test_an_answer_is_parsed_never_evaluated(text: str) -> None:
    assert not isinstance(parse_literal(text, MAX_ANSWER), dict)
    assert cloze_hits(text, {"a": 1}) == (0, 0, 1)


def test_meteor_and_bert_score_are_absent_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "wordnet", lambda: None)
    monkeypatch.setattr(metrics, "_bert_scorer", lambda: None)
    assert set(score_prediction("loogle/longdep_qa", "a", ["a"])) == {"bleu1", "bleu4", "rouge-1", "rouge-2", "rouge-l"}


def test_scores_do_not_hang_on_the_hash_seed() -> None:
    code = (
        "from benchmark.tasks import metrics as m, score_prediction as s\n"
        "class W:\n    synsets = staticmethod(lambda word: [])\n"
        "print(m.meteor('born in Jerez he was', 'He was born in Jerez', W()))\n"
        "print(s('loogle/longdep_qa', 'a b c', ['b c a']))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_importing_and_scoring_is_quiet_and_cheap() -> None:
    code = (
        "import sys\nfrom benchmark.tasks import score_prediction as s\n"
        "s('longbench/qasper', 'a', ['a'])\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'nltk', 'jieba', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\ns('longbench/multifieldqa_zh', '北京', ['北京'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WORDS = st.sampled_from(
    [
        "cat",
        "The",
        "a.",
        "3",
        "Paragraph 3",
        "12",
        "`x`",
        "# c",
        "x=1",
        "北京",
        "，",
        "\n",
        ".",
        "'",
        "段落2",
        "50%",
        "B",
    ]
)
TEXT = st.lists(WORDS, max_size=8).map(" ".join) | st.text(max_size=20)
CLASSES = ["cat", "The cat", "a", "北京", "x"]
# One task a metric.
TASKS = sorted({spec.metric: f"longbench/{subset}" for subset, spec in SUBSETS.items()}.values()) + [
    "longbenchv2/0shot", "loogle/longdep_qa", "aime2024/aime2024", "zero_scrolls/gov_report", "zero_scrolls/qasper",
    "zero_scrolls/quality", "zero_scrolls/space_digest", "zero_scrolls/book_sum_sort",
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=25, deadline=None)
@given(prediction=TEXT, references=st.lists(TEXT, min_size=1, max_size=3), data=st.data())
def test_any_score_is_in_range_and_the_order_of_references_does_not_matter(
    task: str, prediction: str, references: list[str], data: st.DataObject
) -> None:
    score = score_prediction(task, prediction, references, CLASSES)
    assert score and all(0 <= value <= 1 for value in score.values())
    shuffled = data.draw(st.permutations(references))
    assert score_prediction(task, prediction, shuffled, CLASSES) == score


@pytest.mark.parametrize(
    ("task", "answer", "least"),
    [
        ("longbench/qasper", "Barack Obama", 1),
        ("longbench/multifieldqa_zh", "北京是首都", 1),
        ("longbench/gov_report", "The cat sat. It slept.", 1 - 1e-7),
        ("longbench/dureader", "北京是首都", 1 - 1e-7),
        ("longbench/trec", "The cat", 1),
        ("longbench/passage_count", "12", 1),
        ("longbench/passage_retrieval_en", "Paragraph 12", 1),
        ("longbench/passage_retrieval_zh", "段落12", 1),
        ("longbench/lcc", "return x", 1),
        ("longbenchv2/0shot", "The correct answer is (B)", 0),
        ("loogle/longdep_qa", "He was born in Jerez", 1),
        ("loogle/shortdep_cloze", "{'<mask-0>': 'Bob'}", 1),
        ("zero_scrolls/gov_report", "the cat sat", 1),
        ("zero_scrolls/qasper", "Zoë’s", 1),
        ("zero_scrolls/quality", "(B) a cat", 1),
        ("zero_scrolls/space_digest", "62%", 1),
        ("zero_scrolls/book_sum_sort", "3, 1, 2", 1),
        ("aime2024/aime2024", "\\boxed{70}", 0),
    ],
)
def test_an_identical_answer_has_the_full_score(task: str, answer: str, least: float) -> None:
    score = score_prediction(task, answer, [answer], ["The cat", "cat", "dog"])
    score = {name: value for name, value in score.items() if name not in ("meteor", "bert")}  # 1 only in the limit
    assert all(value >= least for value in score.values()), score
