"""The prompt: one BOS, the right order, a cut in the middle of the context only; and the fixed tuning split."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from fakes import FakeTokenizer, chatml, stripping
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.tasks.base import (
    Sample,
    UserError,
    build_prompt,
    in_tuning_split,
    prompt_length,
)

FIRST_TUNING_ROWS = [1, 4, 10, 11, 14, 19, 22, 23, 29]  # of "row-0" to "row-29": they must never change


def sample(context: str = "one two three", question: str = " What?", prefix: str = " Answer:") -> Sample:
    return Sample("t/x:0", "t/x", context, question, prefix, ["a"], 5)


@pytest.mark.parametrize("part", ["context", "question", "answer_prefix", "references"])
@pytest.mark.parametrize("bad", ["half a pair \ud83d", 3, None])
def test_a_sample_that_no_file_takes_is_refused(part, bad):
    good = sample()
    with pytest.raises(UserError, match="sample 't/x:0': prompt and references must be text, got "):
        replace(good, **{part: [bad] if part == "references" else bad})


def whole(prompt, tokenizer) -> str:
    return tokenizer.decode(prompt.context_ids + prompt.question_ids)


def build(s: Sample, tokenizer, length: int = 10**6, template: bool = True, answer: int = 5):
    return build_prompt(s, tokenizer, max_context_length=length, max_new_tokens=answer, use_chat_template=template)


def test_without_a_template_the_parts_join_as_they_are():
    tokenizer = FakeTokenizer()
    prompt = build(sample(), tokenizer)
    assert whole(prompt, tokenizer) == "one two three What? Answer:"
    assert tokenizer.decode(prompt.context_ids) == "one two three"
    assert prompt.truncated_tokens == 0


def test_the_answer_prefix_starts_the_assistants_turn():
    tokenizer = FakeTokenizer(chatml)
    prompt = build(sample(), tokenizer)
    assert whole(prompt, tokenizer) == (
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\none two three What? <|im_end|>\n"
        "<|im_start|>assistant\nAnswer:"
    )
    assert tokenizer.decode(prompt.context_ids).endswith("user\none two three")


def test_the_template_is_left_out_where_the_benchmark_does_without():
    tokenizer = FakeTokenizer(chatml)
    assert whole(build(sample(), tokenizer, template=False), tokenizer) == "one two three What? Answer:"


def test_a_template_that_strips_the_message_loses_nothing_else():
    tokenizer = FakeTokenizer(stripping, bos="<s>", adds_bos=True)
    prompt = build(sample(context="\n one two ", question="\nWhat?\n"), tokenizer)
    assert whole(prompt, tokenizer) == "<s>[INST] one two \nWhat? [/INST]Answer:"


@pytest.mark.parametrize(
    "tokenizer",
    [
        FakeTokenizer(bos="<s>", adds_bos=True),
        FakeTokenizer(stripping, bos="<s>", adds_bos=True),
        FakeTokenizer(stripping, bos="<s>", adds_bos=False),
        FakeTokenizer(lambda text: f"[INST] {text} [/INST]", bos="<s>", adds_bos=True),
        FakeTokenizer(lambda text: f"<s><s>{text}", bos="<s>", adds_bos=True),
    ],
)
@pytest.mark.parametrize("length", [10**6, 28])
def test_exactly_one_bos(tokenizer, length):
    prompt = build(sample(context="w " * 50), tokenizer, length)
    ids = prompt.context_ids + prompt.question_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert (prompt.truncated_tokens > 0) == (length == 28)


def test_a_bos_that_the_tokenizer_would_not_add_is_not_added():
    tokenizer = FakeTokenizer(bos="<s>")
    assert tokenizer.bos_token_id not in build(sample(), tokenizer).context_ids


def test_a_bos_of_the_template_is_not_doubled_by_later_turns():
    # ChatML's BOS is the mark of every turn: the first one is the BOS, the others stay.
    tokenizer = FakeTokenizer(chatml, bos="<|im_start|>")
    ids = build(sample(), tokenizer).context_ids
    assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id


def test_the_middle_of_the_context_is_cut():
    tokenizer = FakeTokenizer()
    context = " ".join(f"w{i}" for i in range(100))  # 199 tokens
    prompt = build(sample(context=context, question="?", prefix="!"), tokenizer, length=27)
    assert tokenizer.decode(prompt.context_ids) == "w0 w1 w2 w3 w4  w95 w96 w97 w98 w99"
    assert len(prompt.context_ids) + len(prompt.question_ids) + 5 <= 27
    assert prompt.truncated_tokens == 199 - len(prompt.context_ids)


def test_a_cut_keeps_the_templates_head():
    tokenizer = FakeTokenizer(chatml)
    prompt = build(sample(context="w " * 500), tokenizer, length=60)
    text = whole(prompt, tokenizer)
    assert text.startswith("<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nw ")
    assert text.endswith("What? <|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert len(prompt.context_ids) + len(prompt.question_ids) + 5 == 60


def test_a_question_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="t/x: a context length of 10 is too short for the question"):
        build(sample(), FakeTokenizer(chatml), length=10)


def test_an_empty_context_still_gives_a_token_to_prefill():
    prompt = build(sample(context=""), FakeTokenizer())
    assert len(prompt.context_ids) == 1


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "b", "\n", " ", "c."]), max_size=60),
    length=st.integers(36, 90),
    answer=st.integers(1, 8),
    template=st.sampled_from([None, chatml, stripping]),
)
def test_a_prompt_never_passes_its_bound(words, length, answer, template):
    tokenizer = FakeTokenizer(template, bos="<s>", adds_bos=True)
    s = sample(context="".join(words))
    full = prompt_length(s, tokenizer, True)
    prompt = build(s, tokenizer, length, answer=answer)
    used = len(prompt.context_ids) + len(prompt.question_ids)
    assert used + answer <= length
    assert used + prompt.truncated_tokens == full
    assert prompt.truncated_tokens == max(0, full + answer - length)


def test_the_tuning_split_is_a_fixed_fifth():
    ids = [f"row-{i}" for i in range(5000)]
    tuning = {row for row in ids if in_tuning_split(row)}
    assert 0.18 < len(tuning) / len(ids) < 0.22
    assert [i for i in range(30) if in_tuning_split(f"row-{i}")] == FIRST_TUNING_ROWS


def test_importing_the_tasks_is_cheap():
    code = (
        "import sys, benchmark.tasks; from benchmark.tasks import available_tasks, score_prediction; available_tasks();"
        "score_prediction('ruler/4096/vt', 'A', ['A']);"
        "print([m for m in ('torch','transformers','datasets','ray','pandas','nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
