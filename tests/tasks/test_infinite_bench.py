"""InfiniteBench: generated subsets, published rows in both forms, and the authors' scores."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from benchmark_data import read_rows, write_rows
from fakes import FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from benchmark.tasks import data, get_task, score_prediction
from benchmark.tasks.base import Sample, SampleRequest, UserError, prompt_length
from benchmark.tasks.infinite_bench import SUBSETS, prompt_parts
from benchmark.tasks.infinite_bench_generators import GENERATORS

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "golden_metrics_ruler_infinite.json").read_text("utf-8"))
CASES = [case for case in GOLDEN["cases"] if case["benchmark"] == "infinite_bench"]
SCORED = [case for case in CASES if case["expected_score"] is not None]
REAL = [subset for subset in SUBSETS if subset not in GENERATORS]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: False)


def make(subset: str, count: int | None = 2, length: int = 1500, **request) -> list[Sample]:
    name = subset if "/" in subset else f"infinite_bench/{subset}"
    return get_task(name).samples(SampleRequest(FakeTokenizer(), max_samples=count, max_context_length=length, **request))


# ---- generated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", GENERATORS)
@pytest.mark.parametrize("length", [900, 4096])
def test_it_fills_the_context_length(subset, length):
    for sample in make(subset, 3, length):
        used = prompt_length(sample, FakeTokenizer(), False) + sample.max_new_tokens
        assert length - 60 <= used <= length
        assert get_task(sample.task).score(sample.references[0], sample) == {get_task(sample.task).metric: 1.0}


@pytest.mark.parametrize("subset", GENERATORS)
def test_a_sample_depends_on_seed_split_and_index_alone(subset):
    many = make(subset, 5)
    assert make(subset, 2) == many[:2]
    texts = [{s.context + s.question for s in samples} for samples in
             (many, make(subset, 5, seed=1), make(subset, 5, split="tuning"))]  # fmt: skip
    assert all(len(group) == 5 for group in texts) and len(set.union(*texts)) == 15


@pytest.mark.parametrize("subset", GENERATORS)
def test_too_short_a_length_is_one_line(subset):
    with pytest.raises(UserError, match=f"infinite_bench/{subset}: a length of 30 tokens is too short"):
        make(subset, 1, 30)


def test_the_published_size_is_the_most():
    generator = GENERATORS["passkey"](7, 3)
    assert generator.largest == 5220
    row = generator.build(5220)
    assert row.context.count("The grass is green.") == 5220
    (sample,) = make("code_run", 1, 10**6)
    assert sample.context.count("def func_") == 550


def test_passkey_wording_and_depths():
    samples = make("passkey", 30, 1500)
    for sample in samples:
        key = sample.label
        assert re.fullmatch(r"\d{5}", key)
        assert sample.context.startswith(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information.\n\n"
        )
        assert sample.context.count(f"The pass key is {key}. Remember it. {key} is the pass key.\n") == 1
        assert sample.question + sample.answer_prefix == "\n\nWhat is the pass key?\n\nThe pass key is"
    places = [s.context.index("The pass key is") / len(s.context) for s in samples]
    assert min(places) < 0.15 and max(places) > 0.85 and 0.35 < statistics.mean(places) < 0.65
    slots = [(i * 363 + 295) % 590 // 10 for i in range(590)]
    assert sorted(slots) == sorted(list(range(59)) * 10)


def test_number_string_has_runs():
    for sample in make("number_string", 5):
        assert re.fullmatch(r"\d{10}", sample.label)
        assert len(re.findall(r"(\d)\1*", sample.label)) <= 5
        assert f"The sequence of digits is {sample.label}. Remember it." in sample.context


def test_kv_retrieval():
    for sample in make("kv_retrieval", 5):
        prompt = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        assert sample.context.startswith(prompt)
        pairs = json.loads(sample.context.removeprefix(prompt))
        key = re.fullmatch(r'\n\n\nKey: "(.+)"\n', sample.question).group(1)
        assert pairs[key] == sample.label and len({*pairs, *pairs.values()}) == 2 * len(pairs)
        assert sample.answer_prefix == "The value associated with the specified key is: "


def test_math_find():
    samples = make("math_find", 14)
    for sample, target in zip(samples, ["largest", "second largest", "third largest", "smallest", "second smallest",
                                        "third smallest", "median"] * 2, strict=True):  # fmt: skip
        head, numbers = sample.context.split("\n\n")
        assert head == f"What is the {target} number in the following list?"
        assert sample.question + sample.answer_prefix == (
            f"\n\nYou should answer with only one number, no other words. The {target} number of the list is: "
        )
        numbers = json.loads(numbers)
        distinct = sorted(set(numbers))
        expected = {
            "largest": distinct[-1], "second largest": distinct[-2], "third largest": distinct[-3],
            "smallest": distinct[0], "second smallest": distinct[1], "third smallest": distinct[2],
            "median": statistics.median(numbers),
        }[target]  # fmt: skip
        assert sample.label == expected and all(0 <= n <= 99 for n in numbers)
        assert isinstance(sample.label, float) == (target == "median")


def test_math_calc():
    for sample in make("math_calc", 3):
        expression = sample.context.rpartition("Expression: ")[2]
        terms = re.findall(r"(?:^|([+-]) )(\d+)", expression)
        value, values = 0, []
        for sign, number in terms:
            value += -int(number) if sign == "-" else int(number)
            values.append(value)
        assert values == sample.label and all(0 <= v <= 99 for v in values)


def test_code_run():
    for index, sample in enumerate(make("code_run", 10)):
        code = sample.context.partition("\n\n")[2]
        functions = {int(i): body for i, body in re.findall(r"def func_(\d+)\(x\):\n    return (.+)\n", code)}
        assert list(functions) == sorted(functions)
        start, x = map(int, re.search(r"func_(\d+)\((-?\d+)\)", sample.question).groups())
        assert sample.context.startswith(f"There is a function called func_{start} in the following Python code.\n\n")
        assert sample.question == (
            f"\n\nPlease give me the exact number of the return value of func_{start}({x}). "
            "Your response should end with the sentence 'The return value is:'."
        )
        depth, result = 0, x
        while start:
            inner, sign, addend = re.fullmatch(r"(x|func_\d+\(x\))(?: ([+-]) (\d+))?", functions[start]).groups()
            result += int(f"{sign or '+'}{addend or 0}")
            start = 0 if inner == "x" else int(inner[5:-3])
            depth += 1
        assert depth == [2, 4, 6, 8, 10][index % 5] and result == sample.label and -10 <= x <= 10


# ---- published rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", REAL)
def test_real_data_are_needed(subset):
    with pytest.raises(UserError, match=f"infinite_bench/{subset}: no data found") as caught:
        make(subset)
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("subset", REAL)
def test_rows_in_the_authors_columns(subset):
    task = get_task(f"infinite_bench/{subset}")
    samples = [*make(subset, None, data_dir=DATA), *make(subset, None, data_dir=DATA, split="tuning")]
    rows = [json.loads(line) for line in (DATA / "infinite_bench" / f"{subset}.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == len(rows) and all(s.max_new_tokens == SUBSETS[subset].max_new_tokens for s in samples)
    for sample in samples:
        assert sample.columns["context"] in sample.context and sample.columns["input"] in sample.question + "\n"
        best = sample.references[-1] if "choice" in subset else sample.references[0]
        answer = f"{sample.references[1]}." if subset == "code_debug" else best
        assert task.score(answer, sample)[task.metric] == pytest.approx(1.0)


def test_every_subset_takes_published_rows():
    for subset in GENERATORS:
        samples = make(f"infinite_bench_hf/{subset}", None, data_dir=DATA)
        samples += make(f"infinite_bench_hf/{subset}", None, data_dir=DATA, split="tuning")
        for sample in samples:
            assert get_task(sample.task).score(sample.references[0], sample) == {get_task(sample.task).metric: 1.0}
        assert samples


def test_prepared_rows(tmp_path):
    (tmp_path / "infinite_bench_hf").mkdir()
    row = {"context": "code", "question": "Which?\nA. one\nB. two\nC. cmd_gen\nD. four",
           "answer_prefix": "The correct option is:", "answer": ["cmd_gen"]}  # fmt: skip
    lines = "".join(json.dumps({**row, "context": f"code {i}"}) + "\n" for i in range(6))
    (tmp_path / "infinite_bench_hf" / "code_debug.jsonl").write_text(lines, "utf-8")
    sample = make("infinite_bench_hf/code_debug", 1, data_dir=tmp_path)[0]
    assert sample.label == ["cmd_gen", "C"] and sample.answer_prefix == "The correct option is:"


def test_an_answer_that_is_no_option_says_the_row(tmp_path):
    (tmp_path / "infinite_bench").mkdir()
    row = {"id": 0, "context": "c", "input": "i", "answer": ["x"], "options": ["a", "b", "c", "d"]}
    (tmp_path / "infinite_bench" / "code_debug.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    with pytest.raises(UserError, match=r"/code_debug\.jsonl row 1: column 'answer': the answer 'x' is none of"):
        make("code_debug", None, data_dir=tmp_path)


@pytest.mark.parametrize("options", ["", None, []])
def test_no_options_are_written_in_several_ways(tmp_path, options):
    rows = [{**row, "options": options} for row in read_rows("infinite_bench_hf/code_run")]
    samples = make("infinite_bench_hf/code_run", None, data_dir=write_rows(tmp_path, "infinite_bench_hf/code_run", rows))
    assert [sample.label for sample in samples] == [s.label for s in make("infinite_bench_hf/code_run", None, data_dir=DATA)]


@pytest.mark.parametrize(
    ("subset", "answer"),
    [("code_run", "x"), ("code_run", []), ("math_find", "x"), ("math_find", []), ("math_calc", "[1, 4"), ("math_calc", []),
     ("code_debug", []), ("code_debug", "BC")],
)  # fmt: skip
def test_an_answer_that_cannot_be_one_says_the_row(tmp_path, subset, answer):
    rows = [{"id": 0, "context": "c", "input": "i", "answer": answer, "options": ["a", "b", "c", "d"]}]
    name = f"infinite_bench_hf/{subset}"
    with pytest.raises(UserError, match=rf"/{subset}\.jsonl row 1: column 'answer': the answer ") as caught:
        make(name, None, data_dir=write_rows(tmp_path, name, rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("subset", "answer", "options", "label"),
    [
        ("code_run", ["-3"], None, -3),
        ("math_find", ["88"], None, 88),
        ("math_find", ["49.5"], None, 49.5),
        ("math_find", 7, None, 7),
        ("math_calc", ["[1, 4, 8]"], None, [1, 4, 8]),
        ("math_calc", ["1", "4"], None, [1, 4]),
        ("math_calc", [[1, 4]], None, [1, 4]),
        ("kv_retrieval", ["v"], None, "v"),
        ("code_debug", ["f", "B"], None, ["f", "B"]),
        ("longbook_choice_eng", "B", ["w", "x", "y", "z"], ["x", "B"]),
        ("longbook_sum_eng", "text", None, ["text"]),
    ],
)
def test_labels(subset, answer, options, label):
    assert SUBSETS[subset].label(answer, *([options] if options else [])) == label


def test_the_other_prompts():
    assert prompt_parts("longbook_qa_eng", "BOOK", "Who?", None) == (
        "Read the book and answer the question. Be very concise in your answer.\n\nBOOK",
        "\n\nQuestion: Who?",
        "\nAnswer:",
    )
    joined = "".join(prompt_parts("longbook_choice_eng", "BOOK", "Who?", ["a", "b", "c", "d"]))
    assert joined == (
        "Read the book and answer the question.\n\nBOOK\n\nQuestion: Who?\nA. a\nB. b\nC. c\nD. d\n\n"
        "The letter of the correct answer is"
    )
    assert "".join(prompt_parts("longdialogue_qa_eng", "TALK", "", None)).endswith(
        "TALK\n\nThe name that has been replaced with $$MASK$$ is likely"
    )


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCORED, ids=lambda case: case["id"])
def test_golden_scores(case):
    task = get_task(f"infinite_bench/{case['subset']}")
    scores = score_prediction(task.name, case["prediction"], case["references"])
    assert scores == {task.metric: pytest.approx(case["expected_score"], abs=1e-9)}


def test_a_whole_number_with_a_point_counts():
    """The authors' code stops with an error on "88.0" for 88; the number is right."""
    assert score_prediction("infinite_bench/math_find", "88.0", 88) == {"accuracy": 1.0}
    assert score_prediction("infinite_bench/math_find", "88.5", 88) == {"accuracy": 0.0}


def test_digits_of_any_script_are_a_number():
    assert score_prediction("infinite_bench/math_find", "It is ８８.", 88) == {"accuracy": 1.0}


def test_a_number_of_many_digits_is_compared():
    """More than int() reads (4300)."""
    assert score_prediction("infinite_bench/math_calc", "1, " + "9" * 5000, [1, 4, 8]) == {"leading_run": 1 / 3}
    assert score_prediction("infinite_bench/math_calc", "0" * 5000 + "1, 04 0", [1, 4, 0]) == {"leading_run": 1.0}


@pytest.mark.parametrize("label", [[1, 4, 8], [[1, 4, 8]], "[1, 4, 8]", ["[1, 4, 8]"], ["1", "4", "8"]])
def test_a_list_may_be_written_in_several_ways(label):
    assert score_prediction("infinite_bench/math_calc", "1, 4, 9", label) == {"leading_run": 2 / 3}


@pytest.mark.parametrize(
    ("subset", "label"),
    [("code_run", "x"), ("math_find", ["x"]), ("math_calc", "[1, 4"), ("math_calc", "x"),
     ("code_debug", ["C"]), ("code_debug", "C"), ("code_debug", ["a", "b", "C"])],
)  # fmt: skip
def test_a_label_that_cannot_be_one_says_so(subset, label):
    with pytest.raises(ValueError, match="the answer must be an? .*, got "):
        score_prediction(f"infinite_bench/{subset}", "C. 1", label)


LABELS = {
    "passkey": "71432",
    "number_string": "2200012222",
    "kv_retrieval": "c14c-b8ba",
    "math_find": 88,
    "math_calc": [1, 4, 8],
    "code_run": -3,
    "code_debug": ["cmd_gen", "C"],
    "longbook_choice_eng": ["Walking Georgie", "A"],
    "longbook_qa_eng": ["non smoker", "x"],
    "longbook_qa_chn": ["田归农"],
    "longbook_sum_eng": "the cat",
    "longdialogue_qa_eng": ["ACE", "ACE ROTHSTEIN"],
}


@given(subset=st.sampled_from(sorted(SUBSETS)), prediction=st.text(max_size=80))
def test_any_prediction_has_a_score_in_range(subset, prediction):
    (score,) = score_prediction(f"infinite_bench/{subset}", prediction, LABELS[subset]).values()
    assert 0 <= score <= 1
