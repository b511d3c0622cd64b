"""Names, groups, near matches, and the command line."""

from __future__ import annotations

import re

import pytest
from benchmark_data import DATA
from fakes import FakeTokenizer, tokenizer_of

from benchmark.tasks import __main__ as command
from benchmark.tasks import available_tasks, data, expand_task, get_task, score_prediction
from sparse_attention_hub.errors import UserError

# What the README and the two-phase script name.
NAMES = [
    "infinite_bench/passkey",
    "loogle/longdep_qa",
    "loogle/shortdep_qa",
    "loogle/shortdep_cloze",
    "loogle/longdep_summarization",
    "longbenchv2/0shot",
    "aime2024/aime2024",
    "aime2025/aime2025",
    "longbench/passage_retrieval_en",
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_in_hub_cache", lambda hub_id: False)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_users_type(name):
    assert get_task(name).name == name
    assert expand_task(name).names == [name]


def test_groups():
    assert len(expand_task("ruler/4096").names) == 6
    assert expand_task("zero_scrolls/default").names
    with pytest.raises(UserError, match="'ruler/4096' is a group of 13 tasks"):
        get_task("ruler/4096")
    with pytest.raises(UserError, match="'ruler/1024' is a group of 13 tasks: name one of them, such as ruler/1024/niah"):
        get_task("ruler/1024")


def test_every_listed_task_is_whole():
    names = available_tasks()
    assert len(names) == len(set(names)) > 200
    for name in names:
        task = get_task(name)
        about = task.description
        assert task.name == name and task.metric and about.source and about.metric and about.max_new_tokens > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ruller/4096", "unknown task 'ruller/4096': no such benchmark, near names: ruler"),
        ("xyz", "there are ruler, "),
        ("ruler", "task 'ruler' needs a subset: ruler/4096/niah_single_1"),
        ("loogle/", "task 'loogle/' needs a subset"),
        ("infinite_bench/pass_key", "near names are infinite_bench/passkey"),
        ("ruler/4096/vtt", "near names are ruler/4096/vt"),
        ("ruler/0/vt", "unknown task 'ruler/0/vt'"),
        ("ruler/4096/vt@own", "unknown task"),
        ("ruler_hf/5000", "unknown task"),
        ("ruler/1024/nope", "near names are ruler/1024/niah_single_1, ruler/1024/"),
        ("ruler/1024/vtt", "near names are ruler/1024/vt;"),
        ("x" * 10**5, "no such benchmark, there are ruler"),
        ("loogle/\x1b[31m" + "y" * 10**5, "'loogle/\\x1b[31myyy"),
    ],
)
def test_unknown_names(name, message):
    for ask in (get_task, expand_task):
        with pytest.raises(UserError) as caught:
            ask(name)
        assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_any_length_works():
    assert get_task("ruler/5000/vt").description.length == "5000 tokens"
    assert expand_task("ruler/1024").names[0] == "ruler/1024/niah_single_1"
    assert score_prediction("ruler/5000/vt", "ABCDE", ["ABCDE", "FGHIJ"]) == {"string_match": 0.5}
    assert score_prediction("ruler/qa_1", "ABCDE", ["ABCDE", "FGHIJ"]) == {"string_match": 1.0}


@pytest.mark.parametrize("name", ["aime2024", "aime2025", "longbenchv2"])
def test_a_benchmark_whose_tasks_score_alike_scores_under_its_own_name(name):
    listed = next(task for task in available_tasks() if task.startswith(f"{name}/"))
    for prediction in (r"\boxed{70}", "The correct answer is (B)"):
        for reference in ("70", "B"):
            assert score_prediction(name, prediction, [reference]) == score_prediction(listed, prediction, [reference])
    with pytest.raises(UserError, match=f"task '{name}' needs a subset"):
        expand_task(name)


@pytest.mark.parametrize("name", ["ruler", "ruler_hf", "ruler16k", "infinite_bench", "loogle", "zero_scrolls", "longbench"])
def test_a_benchmark_of_several_scores_needs_a_subset(name):
    with pytest.raises(UserError, match=f"task '{name}' needs a subset"):
        score_prediction(name, "a", ["a"])


LABELS = {
    "infinite_bench/code_run": 3,
    "infinite_bench/math_find": 3,
    "infinite_bench/math_calc": [1, 2],
    "infinite_bench/code_debug": ["f", "A"],
    "loogle/shortdep_cloze": {"<mask-0>": "Bob"},
}
# One task a score.
SCORED = [
    *(f"ruler/4096/{kind}" for kind in ("vt", "qa_1")),
    *(name for name in available_tasks() if name.startswith(("infinite_bench/", "loogle/", "longbenchv2/", "aime"))),
    *(name for name in available_tasks() if name.startswith(("longbench/", "zero_scrolls/")) and not name.endswith("default")),
]


@pytest.mark.parametrize("name", SCORED)
def test_no_answer_is_an_empty_answer_and_no_reference_scores_zero(name):
    label = LABELS.get(name, ["3"])
    assert score_prediction(name, None, label, ["3", "5"]) == score_prediction(name, "", label, ["3", "5"])
    for references in (None, []):
        scores = score_prediction(name, "A. 5, The correct answer is (A) \\boxed{5}", references, ["3", "5"])
        assert scores and set(scores.values()) == {0.0}


@pytest.mark.parametrize("name", [name for name in SCORED if name not in LABELS])
def test_one_value_is_one_reference(name):
    answer = "5, \\boxed{5}"
    same = "5" if name == "infinite_bench/kv_retrieval" else ["5"]  # its authors do not take the label out of a list
    assert score_prediction(name, answer, 5, ["3", "5"]) == score_prediction(name, answer, same, ["3", "5"])


def test_list(capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "samples", "length", "answer", "tokens", "source", "metric"]
    assert len(lines) == len(available_tasks()) + 3
    assert "ruler/1024/vt, or ruler/1024 for its 13 tasks" in lines[-1]
    assert any(line.startswith("ruler/4096/vt ") and "500" in line and "generated" in line for line in lines)


def test_show_prints_what_the_model_sees(capsys, monkeypatch):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: FakeTokenizer(), raising=False)
    assert command.main(["show", "ruler/1500/vt", "--model", "any"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Memorize and track the chain(s)") and out.rstrip("\n").endswith("they are: ")
    assert "references: [" in err and "cut 0" in err and len(err.strip().splitlines()) == 1
    assert "answer up to 30 tokens" in err
    assert command.main(["show", "ruler/1500/vt", "--model", "any", "--max-new-tokens", "7"]) == 0
    assert "answer up to 7 tokens" in capsys.readouterr().err, "as long as Phase 2 lets it be"


def test_show_says_that_a_group_is_more_than_its_first_task(capsys, monkeypatch):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: FakeTokenizer(), raising=False)
    assert command.main(["show", "ruler/1500", "--model", "any"]) == 0
    err = capsys.readouterr().err
    assert "--- ruler/1500/niah_single_1:0: " in err
    assert "--- ruler/1500 is a group, its first task is shown: ruler/1500/niah_single_1, ruler/1500/niah_multikey_2, " in err
    assert "--- ruler/1500: 6 of 13 tasks: needs essays" in err


@pytest.mark.parametrize(
    ("positions", "flags", "message"),
    [
        (8192, ["--max-context-length", "1024"], "4096 tokens, more than --max-context-length 1024: give --max-context-length 4096"),
        (2048, [], "ruler/4096/vt fills 4096 tokens, any takes 2048 at most: take a shorter task or another model"),
    ],
)  # fmt: skip
def test_show_cuts_no_generated_sample(positions, flags, message, capsys, monkeypatch, tmp_path):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: tokenizer_of(tmp_path, positions), raising=False)
    assert command.main(["show", "ruler/4096/vt", "--model", "any", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.strip().splitlines()) == 1
    assert command.main(["show", "infinite_bench/passkey", "--model", "any", *flags]) == 0
    shown = re.search(r"= (\d+), cut 0, answer up to 6 tokens", capsys.readouterr().err)
    assert min(positions, 1024 if flags else 64000) - 60 <= int(shown[1]) + 6 <= min(positions, 1024 if flags else 64000)


@pytest.mark.parametrize(("positions", "asked", "bound"), [
    (60, "64000", "the model takes no more"), (60, "60", "raise --max-context-length"), (8192, "60", "raise --max-context-length"),
])  # fmt: skip
def test_show_says_whether_the_flag_or_the_model_bounds_a_prompt(positions, asked, bound, capsys, monkeypatch, tmp_path):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: tokenizer_of(tmp_path, positions), raising=False)
    for task in (["infinite_bench/passkey"], ["loogle/shortdep_qa", "--data-dir", str(DATA)]):
        assert command.main(["show", *task, "--model", "any", "--max-context-length", asked]) == 2
        err = capsys.readouterr().err
        assert "too short" in err and err.endswith(f": {bound}\n") and len(err.splitlines()) == 1


@pytest.mark.parametrize("positions", [8192, 128_000])
def test_a_ruler_length_that_is_too_short_blames_neither_flag_nor_model(positions, capsys, monkeypatch, tmp_path):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: tokenizer_of(tmp_path, positions), raising=False)
    assert command.main(["show", "ruler/100/vt", "--model", "any"]) == 2
    said = "error: ruler/100/vt: a length of 100 tokens is too short: the smallest prompt and its answer have [0-9]+\n"
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "ruler/1500/vtt", "--model", "any"], "error: unknown task"),
        (["show", "ruler/1500/vt", "--model", "any", "--index", "-1"], "error: --index counts from 0 to 9999, got -1"),
        (["show", "loogle/longdep_qa", "--model", "any"], "error: loogle/longdep_qa: no data found"),
    ],
)
def test_show_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: FakeTokenizer(), raising=False)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
