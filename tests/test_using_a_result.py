"""From the files of a search to generated text: what the README and docs/using_a_result.md promise."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.tasks import get_task
from benchmark.tasks.base import SampleRequest, build_prompt
from examples.generate import MODEL, SAMPLE_RUNS, generate
from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, UserError, best_config
from sparse_attention_hub.models import LanguageModel, load_model

(RUN,) = SAMPLE_RUNS.glob("run_*")
RESULTS = Path("benchmark_results/sample") / MODEL.replace("/", "_")
TASK = "ruler/1024/niah_single_1"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model(MODEL, device="cpu")


def rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name / TASK.replace("/", "_") / "raw_results.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_generated_text_is_what_the_benchmark_answered(lm: LanguageModel) -> None:
    """The same sample through transformers' `generate` and through Phase 2."""
    task, name = get_task(TASK), "sink_local_oracle_top_k_10pct"
    record = json.loads((RESULTS / name / TASK.replace("/", "_") / "config.json").read_text())
    attention = ResearchAttention.from_file(RESULTS / name / TASK.replace("/", "_") / "config.json", lm)
    answered = rows(name)[0]
    limits = {key: record[key] for key in ("max_context_length", "max_new_tokens")}
    samples = task.samples(SampleRequest(lm.tokenizer, max_samples=1, max_context_length=limits["max_context_length"]))
    (sample,) = samples
    assert sample.question in answered["question"]
    limits["max_new_tokens"] = min(limits["max_new_tokens"], sample.max_new_tokens)
    prompt = build_prompt(sample, lm.tokenizer, **limits, use_chat_template=task.use_chat_template)
    ids = generate(lm, attention, prompt.context_ids, prompt.question_ids, limits["max_new_tokens"])
    assert lm.tokenizer.decode(ids, skip_special_tokens=True).strip() == answered["predicted_answer"].strip()


def test_the_best_configuration_within_a_budget() -> None:
    found = best_config(RUN, model=MODEL, task=TASK, budget=0.10, oracles=True)
    assert json.loads(found.read_text())["masker_name"].endswith("_10pct")
    without = best_config(RUN, model=MODEL, task=TASK, budget=0.10)
    assert "oracle" not in without.name
    named = best_config(RUN, model=MODEL, task=TASK, budget=0.10, masker="sink_local")
    assert named.name.endswith("_sink_local_10pct.json")
    assert isinstance(ResearchAttention.from_file(named), ResearchAttention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.001}, "no configuration of .* meets a budget of 0.001"),
        ({"task": "ruler/1024/nope"}, "searched: embedded/SmolLM2-135M-Instruct on infinite_bench/passkey, "),
        ({"masker": "sink_local_quest"}, "with sink_local_quest"),
    ],
)
def test_nothing_fits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        best_config(RUN, **{"model": MODEL, "task": TASK, "budget": 0.1, **changes})


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        best_config(tmp_path / "none", model=MODEL, task=TASK, budget=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has no sparse_config"),
        ('{"sparse_config": 3}', "has no sparse_config"),
        ('{"sparse_config": {"masker_configs": 3}}', "does not fit this version"),
        (
            '{"sparse_config": {"masker_configs": [{"type": "NoSuchConfig", "params": {}}]}}',
            "unknown masker type 'NoSuchConfig'",
        ),
        ('{"sparse_config": {"masker_configs": [], "head_budgets": [[-1]]}}', "factors > 0, got -1"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        ResearchAttention.from_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_file_of_channels_is_named(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    params = {"heavy_size": 0.1, "sorted_channel_file": None}
    entry = {"type": "DoubleSparsityTopKMaskerConfig", "params": params}
    path.write_text(json.dumps({"sparse_config": {"masker_configs": [entry]}}))
    with pytest.raises(UserError, match="sorted_channel_file must name a file"):
        ResearchAttention.from_file(path)


def test_a_written_configuration_is_read(tmp_path: Path) -> None:
    config = ResearchAttentionConfig([OracleTopKConfig(0.1)], dense_layers=[0], head_budgets=[[1.0, 2.0]])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert ResearchAttentionConfig.from_file(path) == config
