"""Names, groups, near matches, and the command line."""

from __future__ import annotations

import pytest
from fakes import FakeTokenizer

from benchmark.tasks import __main__ as command
from benchmark.tasks import available_tasks, data, expand_task, get_task, score_prediction
from benchmark.tasks.base import UserError

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
        ("ruller/4096", "unknown task 'ruller/4096': no benchmark 'ruller', near names: ruler"),
        ("xyz", "there are ruler, "),
        ("ruler", "task 'ruler' needs a subset: ruler/4096/niah_single_1"),
        ("loogle/", "task 'loogle/' needs a subset"),
        ("infinite_bench/pass_key", "near names are infinite_bench/passkey"),
        ("ruler/4096/vtt", "near names are ruler/4096/vt"),
        ("ruler/0/vt", "unknown task 'ruler/0/vt'"),
        ("ruler/4096/vt@own", "unknown task"),
        ("ruler_hf/5000", "unknown task"),
    ],
)
def test_unknown_names(name, message):
    for ask in (get_task, expand_task):
        with pytest.raises(UserError) as caught:
            ask(name)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_any_length_works():
    assert get_task("ruler/5000/vt").description.length == "5000 tokens"
    assert expand_task("ruler/1024").names[0] == "ruler/1024/niah_single_1"
    assert score_prediction("ruler/5000/vt", "ABCDE", ["ABCDE", "FGHIJ"]) == {"string_match": 0.5}
    assert score_prediction("ruler/qa_1", "ABCDE", ["ABCDE", "FGHIJ"]) == {"string_match": 1.0}


def test_list(capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "samples", "length", "answer", "tokens", "source", "metric"]
    assert len(lines) == len(available_tasks()) + 1
    assert any(line.startswith("ruler/4096/vt ") and "500" in line and "generated" in line for line in lines)


def test_show_prints_what_the_model_sees(capsys, monkeypatch):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: FakeTokenizer(), raising=False)
    assert command.main(["show", "ruler/1500/vt", "--model", "any"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Memorize and track the chain(s)") and out.rstrip("\n").endswith("they are: ")
    assert "references: [" in err and "cut 0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "ruler/1500/vtt", "--model", "any"], "error: unknown task"),
        (["show", "ruler/1500/vt", "--model", "any", "--index", "-1"], "error: --index counts from 0, got -1"),
        (["show", "loogle/longdep_qa", "--model", "any"], "error: loogle/longdep_qa: its data cannot be had"),
    ],
)
def test_show_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    import sparse_attention_hub.models as models

    monkeypatch.setattr(models, "load_tokenizer", lambda model: FakeTokenizer(), raising=False)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
