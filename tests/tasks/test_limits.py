"""How long a prompt may be: what was asked for, the model's positions, a task's own length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeTokenizer, tokenizer_of

from benchmark.raytune.plan import length_notes
from benchmark.search.samples import tuning_samples
from benchmark.settings import Settings
from benchmark.tasks import get_task
from benchmark.tasks.base import ContextTooShortError, SampleRequest, prompt_length
from benchmark.tasks.limits import fitted, within_model


def request(tokenizer: FakeTokenizer, length: int) -> SampleRequest:
    return SampleRequest(tokenizer, max_samples=2, max_context_length=length)


@pytest.mark.parametrize(("asked", "allowed"), [(1000, 1000), (2048, 2048), (64000, 2048)])
def test_a_prompt_has_at_most_the_models_positions(asked: int, allowed: int, tmp_path: Path) -> None:
    assert within_model(request(tokenizer_of(tmp_path, 2048), asked)).max_context_length == allowed
    assert within_model(request(FakeTokenizer(), asked)).max_context_length == asked


def test_a_model_without_a_readable_configuration_sets_no_limit(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, 2048)
    (tmp_path / "config.json").write_text("{", "utf-8")
    assert within_model(request(tokenizer, 64000)).max_context_length == 64000


def test_generated_samples_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    task, tokenizer = get_task("infinite_bench/passkey"), tokenizer_of(tmp_path, 2048)
    for sample in task.samples(fitted(request(tokenizer, 64000), task, "m")):
        assert 2000 <= prompt_length(sample, tokenizer, False) + sample.max_new_tokens <= 2048
        assert f"The pass key is {sample.label}." in sample.context


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_rope_scaling_as_model_cards_write_it_lengthens_prompts(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, 512, rope_scaling={"type": kind, "factor": 4.0})
    task = get_task("infinite_bench/passkey")
    for sample in task.samples(fitted(request(tokenizer, 64000), task, "m")):
        assert 2000 <= prompt_length(sample, tokenizer, False) + sample.max_new_tokens <= 2048


def test_a_length_that_the_model_lowers_is_said(tmp_path: Path) -> None:
    settings, tokenizers = (
        Settings(models=("m",), tasks=("t",), search_max_context_length=2048),
        {"m": tokenizer_of(tmp_path, 2048)},
    )
    notes = ["m takes 2048 tokens: prompts are at most that long, not --max-context-length 64000"]
    assert length_notes(settings, ["ruler/1024/vt", "infinite_bench/passkey"], tokenizers) == notes
    assert length_notes(replace(settings, phases=(1,)), ["infinite_bench/passkey"], tokenizers) == []
    assert length_notes(settings, ["ruler/1024/vt"], tokenizers) == [], "refused where it does not fit"
    assert length_notes(settings, ["infinite_bench/passkey"], {"m": FakeTokenizer()}) == []


def test_a_task_of_a_fixed_length_is_whole_or_refused(tmp_path: Path) -> None:
    task, tokenizer = get_task("ruler/2048/vt"), tokenizer_of(tmp_path, 2048)
    assert fitted(request(tokenizer, 64000), task, "m").max_context_length == 2048
    with pytest.raises(ContextTooShortError) as caught:
        fitted(request(tokenizer, 1024), task, "m")
    assert str(caught.value) == (
        "ruler/2048/vt fills 2048 tokens, more than --max-context-length 1024: "
        "give --max-context-length 2048 or take a shorter task"
    )
    with pytest.raises(ContextTooShortError, match="^ruler/4096/vt fills 4096 tokens, m takes 2048 at most: take a shorter"):
        fitted(request(tokenizer, 1024), get_task("ruler/4096/vt"), "m")


@pytest.mark.parametrize(("name", "length", "filled"), [
    ("ruler/16384/vt", 1500, 1500), ("ruler/1500/vt", 8192, 1500), ("ruler/16384/vt", 8192, 2048),
    ("infinite_bench/passkey", 8192, 2048),
])  # fmt: skip
def test_tuning_samples_are_as_long_as_the_search_and_the_model_allow(
    name: str, length: int, filled: int, tmp_path: Path
) -> None:
    settings = Settings(models=("m",), tasks=(name,), search_max_context_length=length, search_max_requests=2)
    for entry in tuning_samples(tokenizer_of(tmp_path, 2048), name, settings):
        used = len(entry.prompt.context_ids) + len(entry.prompt.question_ids) + entry.sample.max_new_tokens
        assert filled - 60 <= used <= filled and entry.prompt.truncated_tokens == 0
