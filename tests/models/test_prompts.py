"""Prompts: templates that fail in one line and do not know the day, and continuations without a space that the text lacks."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from benchmark.execution.prompts import reference_ids
from benchmark.tasks.base import Sample, build_prompt
from examples.generate import prompt as example_prompt
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import prompts
from sparse_attention_hub.models.prompts import (
    encode_continuation,
    knows_thinking,
    opens_thinking,
    render_chat,
    set_thinking,
    without_thinking,
)


def letters(**parts: Any) -> Any:
    """A tokenizer of single letters and a few words, with SentencePiece's mark for a space."""
    pieces = ["<unk>", "\n", *"▁=|0abcdefgh.", "▁a", "▁ab", "ab"]
    tokenizer = Tokenizer(kinds.BPE({p: i for i, p in enumerate(pieces)}, [("a", "b"), ("▁", "ab")], unk_token="<unk>"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def templated(template: str | dict[str, str]) -> Any:
    tokenizer = letters()
    tokenizer.chat_template = template
    return tokenizer


SPACES = {
    "first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)},
    "always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)},
    "prepend": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
    "never": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never", split=False)},
}


@pytest.mark.parametrize("scheme", SPACES)
@pytest.mark.parametrize("text", ["ab", " ab", "\nab", "c ab", "= ab", " "])
def test_a_continuation_is_encoded_as_within_the_text(scheme: str, text: str) -> None:
    tokenizer = letters(**SPACES[scheme])
    before = list(tokenizer.encode("h", add_special_tokens=False))
    whole = list(tokenizer.encode("h" + text, add_special_tokens=False))
    assert whole[: len(before)] == before
    assert encode_continuation(tokenizer, text) == whole[len(before) :]
    if scheme in ("always", "prepend", "first") and text == "ab":
        assert encode_continuation(tokenizer, text) != list(tokenizer.encode(text, add_special_tokens=False))
    assert encode_continuation(tokenizer, "") == []


def test_a_template_does_not_know_the_day() -> None:
    tokenizer = templated("{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert render_chat(tokenizer, "ab") == "26 Jul 2024 ab"


QWEN = "{{ messages[0].content }}|{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DEEPSEEK = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ messages[0].content }}|<{{ '' if thinking else '/' }}think>"
ALWAYS = "{{ messages[0].content }}|<think>"


@pytest.mark.parametrize(
    ("template", "auto", "off", "on"),
    [
        (QWEN, "", "<think>\n\n</think>\n\n", ""),
        (DEEPSEEK, "</think>", "</think>", "<think>"),
        (ALWAYS, *["<think>"] * 3),
        ("{{ messages[0].content }}|", "", "", ""),
    ],
)
def test_templates_are_told_whether_to_think(template: str, auto: str, off: str, on: str) -> None:
    tokenizer = templated(template)
    assert knows_thinking(tokenizer) == (template in (QWEN, DEEPSEEK))
    for thinking, end in (("off", off), ("on", on), ("auto", auto)):
        set_thinking(tokenizer, thinking)
        assert render_chat(tokenizer, "ab") == f"ab|{end}"
        assert opens_thinking(tokenizer) == (end.strip() == "<think>")
    assert not opens_thinking(letters())


def test_thinking_is_taken_off_an_answer() -> None:
    assert without_thinking("42", opened=False) == "42"
    assert without_thinking("<think>a b</think>\n\n42\n", opened=False) == "42\n"
    assert without_thinking("a</think> b</think>42", opened=True) == "42"
    assert without_thinking("a b </think>", opened=True) == ""
    assert without_thinking("\n<think>a b", opened=False) is None and without_thinking("a b", opened=True) is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages[0].content.undefined.more }}", "UndefinedError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ({"rag": "{{ messages[0].content }}"}, "ValueError"),  # named, and none is the default
    ],
)
def test_a_template_that_fails_is_told_in_one_line(template: str | dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        render_chat(templated(template), "ab")
    assert "\n" not in str(error.value) and "chat template" in str(error.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RENDER_SECONDS", 0.3)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
    started = time.perf_counter()
    with pytest.raises(UserError, match="does not end within 0.3 s"):
        render_chat(templated(endless), "ab")
    assert time.perf_counter() - started < 10
    assert render_chat(templated("{{ messages[0].content }}"), "ab") == "ab"
    time.sleep(0.4)  # no alarm of an earlier template goes off


@pytest.mark.parametrize("scheme", SPACES)
def test_question_and_reference_are_encoded_as_within_the_text(scheme: str) -> None:
    tokenizer = letters(**SPACES[scheme])
    sample = Sample("s", "t", "ab cd", ".ab", "=", ["ab", "cd"], max_new_tokens=4)
    prompt = build_prompt(sample, tokenizer, max_context_length=100, max_new_tokens=4, use_chat_template=False)
    reference = reference_ids(tokenizer, prompt, "ab")
    whole = tokenizer.encode("ab cd.ab= ab", add_special_tokens=False)
    assert prompt.context_ids + prompt.question_ids + reference == list(whole)


@pytest.mark.parametrize("scheme", SPACES)
def test_a_context_that_is_cut_is_encoded_as_behind_its_template(scheme: str) -> None:
    tokenizer = letters(**SPACES[scheme])
    tokenizer.chat_template = "h{{ messages[0].content }}|"
    sample = Sample("s", "t", "ab cd" * 20, ".ab", "=", ["ab"], max_new_tokens=4)
    prompt = build_prompt(sample, tokenizer, max_context_length=40, max_new_tokens=4, use_chat_template=True)
    whole = tokenizer.encode("h" + sample.context, add_special_tokens=False)
    head, kept = len(tokenizer.encode("h", add_special_tokens=False)), len(prompt.context_ids)
    front = head + (kept - head) // 2
    assert prompt.truncated_tokens == len(whole) - kept > 0
    assert prompt.context_ids == whole[:front] + whole[len(whole) - (kept - front) :]


@pytest.mark.parametrize("template", [None, "h{{ messages[0].content }}|"])
@pytest.mark.parametrize("scheme", SPACES)
def test_the_example_encodes_a_question_as_within_the_text(scheme: str, template: str | None) -> None:
    tokenizer = letters(**SPACES[scheme])
    tokenizer.chat_template = template
    context, question = example_prompt(tokenizer, "ab cd", "ab")
    whole = "ab cd\n\nab\n" if template is None else "hab cd\n\nab|"
    assert context + question == tokenizer.encode(whole, add_special_tokens=False)


def test_a_template_of_a_prompt_that_fails_is_told() -> None:
    sample = Sample("s", "t", "ab cd", ".ab", "=", ["ab"], max_new_tokens=4)
    with pytest.raises(UserError, match="cannot be rendered"):
        build_prompt(sample, templated("{% for"), max_context_length=100, max_new_tokens=4, use_chat_template=True)
