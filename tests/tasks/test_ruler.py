"""RULER's 13 tasks: wording, length, unique answers, seeds, scores, and the data that seven of them need."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fakes import FakeTokenizer, chatml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.tasks import data, expand_task, get_task, ruler_generators, score_prediction
from benchmark.tasks.base import Sample, SampleRequest, UserError, build_prompt, prompt_length
from benchmark.tasks.ruler import TASKS
from benchmark.tasks.ruler_generators import NOISE, Generator, TooShort, fill, sample_seed

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_metrics_ruler_infinite.json").read_text("utf-8"))
RULER_CASES = [case for case in GOLDEN["cases"] if case["benchmark"] == "ruler"]

# More than one essay's worth of sentences of different lengths.
ESSAY = " ".join(f"Essay sentence {i} has {'very ' * (i % 5)}few ideas." for i in range(120))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: False)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "ruler"
    folder.mkdir()
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": ESSAY}), "utf-8")
    articles = []
    for a in range(4):
        paragraphs = []
        for p in range(3):
            context = f"Paragraph {p} of article {a} says that city {a}{p} lies on river R{a}{p}. " + "Filler text here. " * 5
            qas = [
                {"id": f"q{a}{p}{i}", "question": f"Where does city {a}{p} lie?", "is_impossible": i == 1,
                 "answers": [] if i == 1 else [{"text": text} for text in (f"river R{a}{p}", f"R{a}{p}")]}
                for i in range(3)
            ]  # fmt: skip
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": f"Article {a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}), "utf-8")
    hotpot = [
        {"_id": f"h{i}", "question": f"Who met person {i}?", "answer": f"friend {i}",
         "context": [[f"Title {i} {j}", [f"Sentence {j} of {i}.", " It goes on."]] for j in range(10)]}
        for i in range(15)
    ]  # fmt: skip
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot), "utf-8")
    return tmp_path


def make(name: str, count: int = 2, tokenizer: FakeTokenizer | None = None, **request) -> list[Sample]:
    return get_task(name).samples(SampleRequest(tokenizer or FakeTokenizer(), max_samples=count, **request))


def text(sample: Sample) -> str:
    return sample.context + sample.question + sample.answer_prefix


# ---- length, seeds ---------------------------------------------------------------------------------------

# What one unit of the haystack may hold with the fake tokenizer: the most that may stay unused.
UNIT = {"niah_multikey_2": 40, "niah_multikey_3": 50, "cwe": 150, "qa_1": 90, "qa_2": 90}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("length", [1500, 4096, 9000])
@pytest.mark.parametrize("template", [None, chatml])
def test_a_prompt_fills_its_length_and_never_passes_it(kind, length, template, data_dir):
    tokenizer = FakeTokenizer(template, bos="<s>", adds_bos=template is None)
    for sample in make(f"ruler/{length}/{kind}", 2, tokenizer, data_dir=data_dir):
        used = prompt_length(sample, tokenizer, True) + sample.max_new_tokens
        assert length - max(UNIT.get(kind, 45), length // 128) <= used <= length
        prompt = build_prompt(
            sample, tokenizer, max_context_length=length, max_new_tokens=sample.max_new_tokens, use_chat_template=True
        )
        assert prompt.truncated_tokens == 0


@pytest.mark.parametrize("kind", TASKS)
def test_a_sample_does_not_depend_on_how_many_are_asked_for(kind, data_dir):
    few = make(f"ruler/1500/{kind}", 2, data_dir=data_dir)
    many = make(f"ruler/1500/{kind}", 4, data_dir=data_dir)
    assert many[:2] == few and len({text(s) for s in many}) == 4
    assert len({s.sample_id for s in many}) == 4
    other = make(f"ruler/1500/{kind}", 2, data_dir=data_dir, seed=1)
    tuning = make(f"ruler/1500/{kind}", 4, data_dir=data_dir, split="tuning")
    assert {text(s) for s in other + tuning}.isdisjoint({text(s) for s in many})


def test_seeds_of_different_samples_differ():
    seeds = {
        sample_seed(seed, split, task, length, index)
        for seed in (0, 1)
        for split in ("test", "tuning")
        for task in ("vt", "cwe")
        for length in (4096, 8192)
        for index in range(20)
    }
    assert len(seeds) == 320


def test_tuning_samples_may_be_shorter():
    (sample,) = make("ruler/4096/vt", 1, split="tuning", length=1500)
    assert prompt_length(sample, FakeTokenizer(), True) < 1500
    assert sample.sample_id == "ruler/4096/vt:tuning-0@1500" and sample.columns["context_length"] == 1500


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_length_too_short_is_one_line(kind):
    with pytest.raises(UserError, match=f"ruler/200/{kind}: a length of 200 tokens is too short") as caught:
        make(f"ruler/200/{kind}")
    assert "\n" not in str(caught.value)


def test_few_encodings_fill_a_long_prompt():
    tokenizer = FakeTokenizer()
    make("ruler/32768/niah_single_1", 1, tokenizer)
    assert tokenizer.encodes <= 24  # context and question of some ten candidates


@settings(max_examples=200, deadline=None)
@given(
    unit=st.integers(1, 300),
    fixed=st.integers(0, 500),
    wobble=st.integers(0, 3),
    budget=st.integers(300, 200_000),
    smallest=st.integers(1, 80),
)
def test_fill_takes_the_largest_that_fits(unit, fixed, wobble, budget, smallest):
    sizes: list[int] = []

    def measure(n: int) -> int:
        sizes.append(n)
        return fixed + unit * n + n * 7919 % (wobble + 1)

    try:
        n, _ = fill(Generator(lambda n: n, smallest), measure, budget)
    except TooShort:
        assert measure(smallest) > budget
        return
    assert n >= smallest and measure(n) <= budget
    assert budget - measure(n) <= max(2 * unit, 32) + wobble
    assert len(sizes) < 30


# ---- wording ---------------------------------------------------------------------------------------------


def test_niah_single_1():
    (sample,) = make("ruler/600/niah_single_1", 1)
    key = re.search(r"magic number for (\S+(?: \S+)*?) mentioned", sample.question).group(1)
    (value,) = sample.references
    assert re.fullmatch(r"[1-9]\d{6}", value)
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert sample.question == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    lines = sample.context.removesuffix("\n").split("\n")[1:]
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert lines.count(needle) == 1 and set(lines) == {NOISE, needle}
    assert sample.max_new_tokens == 128


def test_niah_multiquery_and_multivalue(data_dir):
    (sample,) = make("ruler/1500/niah_multiquery", 1, data_dir=data_dir)
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    keys = re.fullmatch(
        r"What are all the special magic numbers for (.+), (.+), (.+), and (.+) mentioned in the provided text\?",
        sample.question,
    ).groups()
    assert sample.answer_prefix == (
        f" The special magic numbers for {', '.join(keys[:3])}, and {keys[3]} mentioned in the provided text are"
    )
    for key, value in zip(keys, sample.references, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in sample.context
    (sample,) = make("ruler/1500/niah_multivalue", 1, data_dir=data_dir)
    assert "What are all the special magic numbers for" in sample.question and len(set(sample.references)) == 4


def test_the_essays_are_whole_around_the_needles(data_dir):
    (sample,) = make("ruler/1500/niah_multikey_1", 1, data_dir=data_dir)
    body = sample.context.split("\n", 1)[1].removesuffix("\n")
    needles = re.findall(r"One of the special magic numbers for [^:]+ is: \d{7}\.", body)
    assert len(needles) == 4
    for needle in needles:
        before, _, after = body.partition(needle)
        assert not before or before.endswith((". ", "."))  # between sentences
        body = before + after.removeprefix(" ")
    assert (ESSAY + " " + ESSAY).startswith(body.strip()[:400])


@pytest.mark.parametrize("kind", ["niah_multikey_2", "niah_multikey_3"])
def test_a_needle_haystack_has_one_answer(kind):
    for sample in make(f"ruler/3000/{kind}", 4):
        lines = sample.context.removesuffix("\n").split("\n")[1:]
        pairs = [re.fullmatch(r"One of the special magic \w+ for (.+) is: (.+)\.", line).groups() for line in lines]
        assert len({key for key, _ in pairs}) == len(pairs) == len({value for _, value in pairs})
        key = re.search(r"for (.+) mentioned", sample.question).group(1)
        assert [dict(pairs)[key]] == sample.references


UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def test_uuids_are_version_4():
    (sample,) = make("ruler/1500/niah_multikey_3", 1)
    assert re.fullmatch(UUID4, sample.references[0])
    assert sample.question.startswith("What is the special magic uuid for ")


def test_variable_tracking():
    for sample in make("ruler/2000/vt", 4):
        example, main = sample.context.split("\n\nMemorize and track")
        assert example.startswith("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n")
        assert len(FakeTokenizer().encode(example.split(" they are: ")[0])) <= 500
        value = re.fullmatch(
            r"Question: Find all variables that are assigned the value (\d{5}) in the text above\.", sample.question
        ).group(1)
        assert sample.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )
        names = sample.references
        assert len(set(names)) == 5 and all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
        links = [line for line in main.split("\n") if line.startswith("VAR")]
        assert links == [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False)]
        shown = re.search(r"assigned the value (\d{5}), they are:  ([A-Z]{3}(?: [A-Z]{3}){4})$", example)
        assert shown and shown.group(1) != value
        assert f"VAR {shown.group(2).split()[0]} = {shown.group(1)}\n" in example


@pytest.mark.parametrize(("length", "common", "rest"), [(2500, 6, 1), (6000, 30, 3)])
def test_common_words(length, common, rest):
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    for sample in make(f"ruler/{length}/cwe", 2):
        assert (sample.question, sample.answer_prefix) == (question, prefix)
        empty, example, main = sample.context.split(head)
        assert empty == ""
        shown, answer = example.split("\n" + question + prefix)
        assert re.fullmatch(r" 1\. .+ 2\. .+ 10\. .+\n", answer)
        counts = _count(main.removesuffix("\n"))
        assert {word for word, n in counts.items() if n == common} == set(sample.references)
        assert set(counts.values()) == {common, rest} and len(sample.references) == 10
        assert not set(_count(shown)) & set(counts)


def test_words_that_run_out_are_told_once(monkeypatch, caplog):
    monkeypatch.setattr(ruler_generators, "english_words", lambda: tuple(f"word{i}" for i in range(300)))
    make("ruler/1500/cwe", 3)
    assert caplog.messages == []
    samples = make("ruler/30000/cwe", 3)
    assert [prompt_length(sample, FakeTokenizer(), True) < 20000 for sample in samples] == [True] * 3
    assert caplog.messages == [
        "ruler/30000/cwe: 3 of 3 samples do not fill 30000 tokens: there are no more words or documents for them"
    ]


def _count(numbered: str) -> dict[str, int]:
    words = re.split(r"(?:^| )\d+\. ", numbered)[1:]
    return {word: words.count(word) for word in words}


def test_the_word_list_is_the_pinned_one():
    assert len(ruler_generators.english_words()) == 8166


@pytest.mark.parametrize("length", [700, 1024, 5000])
def test_frequent_words(length):
    for sample in make(f"ruler/{length}/fwe", 3):
        head = (
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. "
        )
        assert sample.context.startswith(head)
        assert sample.question == (
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        )
        assert sample.answer_prefix == (
            " Answer: According to the coded text above, the three most frequently appeared words are:"
        )
        words = sample.context.removeprefix(head).split()
        ranks = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert ranks[0][1] == "..." and [word for _, word in ranks[1:4]] == sample.references
        top = [count for count, _ in ranks[:5]]
        assert all(a > b for a, b in zip(top, top[1:], strict=False)) and top[3] >= 1


@pytest.mark.parametrize("kind", ["qa_1", "qa_2"])
def test_question_answering(kind, data_dir):
    instruction = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    for sample in make(f"ruler/1500/{kind}", 5, data_dir=data_dir):
        start = f"{instruction}\n\nThe following are given documents.\n\nDocument 1:\n"
        assert sample.context.startswith(start) and sample.context.endswith("\n\n")
        assert sample.question.startswith(f"{instruction}\n\nQuestion: Wh") and sample.answer_prefix == " Answer:"
        if kind == "qa_1":
            assert len(sample.references) == 2 and sample.references[0] in sample.context
        else:
            number = sample.references[0].split()[1]
            assert all(f"Title {number} {j}\nSentence {j} of {number}. It goes on." in sample.context for j in range(10))


# ---- data and names --------------------------------------------------------------------------------------


def test_without_data_there_are_6_of_13_tasks(data_dir, tmp_path_factory):
    selection = expand_task("ruler/4096")
    assert [name.removeprefix("ruler/4096/") for name in selection.names] == list(OFFLINE)
    assert selection.note.startswith("6 of 13 tasks: needs essays") and "\n" not in selection.note
    whole = expand_task("ruler/1024", data_dir)
    assert [name.removeprefix("ruler/1024/") for name in whole.names] == list(TASKS) and whole.note is None
    (data_dir / "ruler" / "hotpotqa.json").unlink()
    ruler_sources_clear()
    assert expand_task("ruler/1024", data_dir).note == (
        "12 of 13 tasks: needs HotpotQA (DIR/ruler/hotpotqa.json) in --data-dir DIR, or the hub"
    )


def ruler_sources_clear():
    from benchmark.tasks import ruler_sources

    for load in (ruler_sources.load_essays, ruler_sources.load_squad, ruler_sources.load_hotpotqa, ruler_sources._rows):
        load.cache_clear()


def test_own_essays_make_tasks_of_another_name(tmp_path):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "essays.txt").write_text(ESSAY, "utf-8")
    selection = expand_task("ruler/1500", tmp_path)
    assert "ruler/1500/niah_single_2@own" in selection.names and "ruler/1500/niah_single_2" not in selection.names
    assert selection.note.startswith("11 of 13 tasks") and "not comparable" in selection.note
    (sample,) = make("ruler/1500/niah_single_2@own", 1, data_dir=tmp_path)
    assert sample.task == "ruler/1500/niah_single_2@own"
    with pytest.raises(UserError, match="needs essays: .*PaulGrahamEssays.json"):
        make("ruler/1500/niah_single_2", 1, data_dir=tmp_path)


def test_a_byte_order_mark_is_left_out(data_dir, tmp_path_factory):
    (data_dir / "ruler" / "essays.txt").write_text(ESSAY, "utf-8")
    marked = tmp_path_factory.mktemp("marked")
    (marked / "ruler").mkdir()
    for file in (data_dir / "ruler").iterdir():
        (marked / "ruler" / file.name).write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for kind in ("niah_single_2", "niah_single_2@own", "qa_1", "qa_2"):
        want = make(f"ruler/1500/{kind}", data_dir=data_dir)
        assert list(map(text, make(f"ruler/1500/{kind}", data_dir=marked))) == list(map(text, want))


@pytest.mark.parametrize(
    ("file", "content", "kind", "message"),
    [
        ("squad.json", "{", "qa_1", "squad.json row 1: not JSON"),
        (
            "squad.json",
            '{"data": [{"title": "x", "paragraphs": [{"context": "c"}]}]}',
            "qa_1",
            "squad.json row 1: not in the expected form .KeyError: 'qas'",
        ),
        ("hotpotqa.json", '[{"_id": "1"}]', "qa_2", "hotpotqa.json row 1: not in the expected form .KeyError: 'context'"),
        ("PaulGrahamEssays.json", "[1]", "niah_single_2", "row 1: column 'text' must be text, got 1"),
    ],
)
def test_malformed_data_say_where(tmp_path, file, content, kind, message):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / file).write_text(content, "utf-8")
    assert f"ruler/4096/{kind}" in expand_task("ruler/4096", tmp_path).names  # it is there, so it is run, and fails
    with pytest.raises(UserError, match=message):
        make(f"ruler/4096/{kind}", 1, data_dir=tmp_path)


def test_published_rows(tmp_path):
    folder = tmp_path / "ruler_hf"
    folder.mkdir()
    fixture = Path(__file__).parents[1] / "data" / "ruler_hf" / "4096.jsonl"
    (folder / "4096.jsonl").write_text(fixture.read_text("utf-8"), "utf-8")
    assert expand_task("ruler_hf/4096").names == [f"ruler_hf/4096/{kind}" for kind in TASKS]
    test, tuning = (make("ruler_hf/4096/vt", None, data_dir=tmp_path, split=split) for split in ("test", "tuning"))
    assert len(test) + len(tuning) == 8 and test and tuning
    assert test[0].references == ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"] and test[0].max_new_tokens == 30
    assert test[0].columns["context_length"] == 4096
    with pytest.raises(UserError, match="4096.jsonl has no rows of this task"):
        make("ruler_hf/4096/cwe", None, data_dir=tmp_path)


@pytest.mark.parametrize("benchmark", ["ruler16k", "ruler32k"])
def test_published_long_rows(tmp_path, benchmark):
    (tmp_path / benchmark).mkdir()
    row = {"context": "c", "question": "q", "answer_prefix": "a", "answer": ["x"], "task": "qa_1", "max_new_tokens": 32}
    lines = "".join(json.dumps(row) + "\n" for _ in range(9))
    (tmp_path / benchmark / "qa_1.jsonl").write_text(lines, "utf-8")
    samples = make(f"{benchmark}/qa_1", None, data_dir=tmp_path)
    assert samples and get_task(f"{benchmark}/qa_1").score("X marks", samples[0]) == {"string_match": 1.0}


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RULER_CASES, ids=lambda case: case["id"])
def test_golden_scores(case):
    name = f"ruler/4096/{case['subset']}"
    if isinstance(case["prediction"], list):
        pairs = zip(case["prediction"], case["references"], strict=True)
        scores = [score_prediction(name, prediction, references)["string_match"] for prediction, references in pairs]
    else:
        scores = [score_prediction(name, case["prediction"], case["references"])["string_match"]]
    assert round(100 * sum(scores) / len(scores), 2) == case["expected_score"]


@given(
    kind=st.sampled_from(TASKS),
    prediction=st.text(max_size=60),
    references=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5),
)
def test_scores_are_shares_and_order_does_not_matter(kind, prediction, references):
    score = score_prediction(f"ruler/4096/{kind}", prediction, references)["string_match"]
    assert 0 <= score <= 1
    assert score == pytest.approx(score_prediction(f"ruler/4096/{kind}", prediction, references[::-1])["string_match"])


@pytest.mark.parametrize("kind", TASKS)
def test_the_answer_itself_scores_1(kind, data_dir):
    for sample in make(f"ruler/1500/{kind}", 2, data_dir=data_dir):
        assert get_task(sample.task).score(" ".join(sample.references), sample) == {"string_match": 1.0}
        assert get_task(sample.task).score("", sample) == {"string_match": 0.0}


# ---- with the embedded model's tokenizer -----------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    from sparse_attention_hub.models import load_tokenizer

    return load_tokenizer("embedded/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("kind", OFFLINE)
def test_the_embedded_tokenizer_fills_1024_tokens(kind, smollm):
    for sample in make(f"ruler/1024/{kind}", 3, smollm):
        prompt = build_prompt(
            sample, smollm, max_context_length=1024, max_new_tokens=sample.max_new_tokens, use_chat_template=True
        )
        used = len(prompt.context_ids) + len(prompt.question_ids) + sample.max_new_tokens
        assert 1024 - 60 <= used <= 1024 and prompt.truncated_tokens == 0
        # As the original counts: no template, no special tokens, one text.
        assert len(smollm.encode(text(sample), add_special_tokens=False)) + sample.max_new_tokens <= 1024
        assert prompt.context_ids[0] == smollm.bos_token_id != prompt.context_ids[1]
        seen = smollm.decode(prompt.context_ids + prompt.question_ids)
        assert seen.endswith("<|im_start|>assistant\n" + sample.answer_prefix.lstrip())
