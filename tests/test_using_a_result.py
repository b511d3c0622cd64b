"""From the files of a search to generated text: what the README and docs/using_a_result.md promise."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from benchmark.report.data import read_tree
from benchmark.report.page import report_page
from benchmark.tasks import get_task
from benchmark.tasks.base import SampleRequest, build_prompt
from examples.generate import MODEL, SEARCHES, generate
from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, UserError, best_config
from sparse_attention_hub.maskers.hat_weights import hat_config_fields, hat_weights_for
from sparse_attention_hub.models import LanguageModel, load_model, sparse_attention

(RUN,) = (SEARCHES / "sample").glob("run_*")
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


def write_found(
    run: Path, name: str, error: float, *, protocol: str = "question", on: str = "density", weights: Any = None
) -> Path:
    """What `best_config` reads of a best configuration, for 10% of the model "m" on the task "t"."""
    record = {"model": "m", "task": "t", "masker_name": f"{name}_10pct", "budget": 0.1, "meets_budget": True, "error": error}
    more = {
        "sparse_config": {"masker_configs": []},
        "budget_on": on,
        "provenance": {"sparse_from": protocol, "weights": weights},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / f"{name}.json").write_text(json.dumps(record | more))
    return run / f"{name}.json"


def test_of_several_runs_the_newest_counts_and_the_sample_is_not_mixed_in(tmp_path: Path) -> None:
    def write(run: str, name: str, error: float) -> Path:
        return write_found(tmp_path / run, name, error)

    def best() -> Path:
        return best_config(tmp_path, model="m", task="t", budget=0.1)

    sample = write("sample/run_20270101_000000", "b", 0.01)
    assert best() == sample
    first = write("run_20260101_000000", "a", 0.2)
    assert best() == first
    write("run_20260101_000000", "b", 0.1)
    write("run_20260202_000000", "b", 0.4)
    assert best() == first, "the newer b is worse than a"
    (tmp_path / "run_20260202_000000" / ".run.json").write_text("{}")
    assert best_config(tmp_path / "sample", model="m", task="t", budget=0.1) == sample


def test_the_newest_run_is_not_that_of_the_latest_local_time(tmp_path: Path) -> None:
    """A search in Honolulu made after one in Tokyo has the earlier name."""
    for run, created in (("run_20240315_143022", 1000.0), ("run_20240314_200000", 2000.0)):
        write_found(tmp_path / run, "a", 0.1)
        (tmp_path / run / ".run.json").write_text(json.dumps({"created": created}))
    found = best_config(tmp_path, model="m", task="t", budget=0.1)
    assert found == tmp_path / "run_20240314_200000" / "a.json"


def test_other_protocols_budgets_and_weights_are_not_mixed(tmp_path: Path) -> None:
    first, second = tmp_path / "run_20260101_000000", tmp_path / "run_20260102_000000"
    decode = write_found(first, "a", 0.01, protocol="decode")
    kv = write_found(first, "b", 0.02, on="kv")
    write_found(first, "c", 0.03, weights=[["old", 1, 1]])
    newest = write_found(second, "d", 0.2, weights=[["new", 1, 2]])
    where = {"model": "m", "task": "t", "budget": 0.1}
    assert best_config(tmp_path, **where) == newest
    assert (
        best_config(tmp_path, **where, sparse_from="decode") == decode and best_config(tmp_path, **where, budget_on="kv") == kv
    )


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


HASH = {"heavy_size": 0.1, **hat_config_fields(str(hat_weights_for(MODEL))), "hat_weight_file": None}
CHANNELS = {"heavy_size": 0.1, "sorted_channel_file": None}


def write_config(path: Path, kind: str, params: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"sparse_config": {"masker_configs": [{"type": kind, "params": params}]}}))
    return path


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("DoubleSparsityTopKMaskerConfig", CHANNELS, "sorted_channel_file must name a file"),
        ("DoubleSparsityTopKMaskerConfig", CHANNELS | {"sorted_channel_file": "no.json"}, "existing file, got 'no.json'"),
        ("HashAttentionTopKMaskerConfig", HASH, "exactly one of hat_weights and hat_weight_file must be given, got neither"),
        ("HashAttentionTopKMaskerConfig", HASH | {"hat_weight_file": "no.safetensors"}, "no.safetensors"),
    ],
)
def test_a_missing_file_is_named(kind: str, params: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ResearchAttention.from_file(write_config(tmp_path / "found.json", kind, params))
    assert "\n" not in str(caught.value) and "found.json" in str(caught.value)


def test_the_model_has_the_files_that_a_configuration_leaves_out(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HashAttention's weights come with the library; DoubleSparsity's channels are calibrated once and kept."""
    hashes = ResearchAttention.from_file(write_config(tmp_path / "hash.json", "HashAttentionTopKMaskerConfig", HASH), lm)
    assert Path(hashes.config.masker_configs[0].hat_weight_file).is_file()  # type: ignore[attr-defined]
    channels = tmp_path / "channels.json"
    heads = [list(range(64)) for _ in range(9)]
    channels.write_text(json.dumps({f"model.layers.{i}.self_attn.qk_proj": heads for i in range(30)}))
    monkeypatch.setattr("sparse_attention_hub.models.model_files.channels_for", lambda lm: channels)
    double = ResearchAttention.from_file(write_config(tmp_path / "double.json", "DoubleSparsityTopKMaskerConfig", CHANNELS), lm)
    assert double.config.masker_configs[0].sorted_channel_file == str(channels)  # type: ignore[attr-defined]
    ids = lm.tokenizer("The sea is calm. " * 20, return_tensors="pt").input_ids
    for attention in (hashes, double):
        with sparse_attention(lm, attention) as session:
            lm.model.generate(ids, max_new_tokens=2, do_sample=False)
        assert session.density is not None and session.density < 0.2


def test_weights_that_no_model_has_are_said_to_be_missing(lm: LanguageModel, tmp_path: Path) -> None:
    other = replace(lm, id="org/other")
    path = write_config(tmp_path / "hash.json", "HashAttentionTopKMaskerConfig", HASH)
    with pytest.raises(UserError, match="there are no HashAttention weights for org/other: train some"):
        ResearchAttention.from_file(path, other)


def test_the_lines_of_the_report_load_the_result(lm: LanguageModel) -> None:
    """What ends a card of "What to use" is Python that runs."""
    page = report_page(read_tree(Path("benchmark_results/sample")))
    found = [unescape(text) for text in re.findall(r"<pre>(attention = .*?)</pre>", page, flags=re.DOTALL)]
    if not found:
        pytest.fail("no card of the sample run loads a result")
    names: dict[str, Any] = {"ResearchAttention": ResearchAttention, "sparse_attention": sparse_attention, "lm": lm}
    for lines in found:
        exec(f"{lines}\n    assert isinstance(attention, ResearchAttention)", names)


def test_a_written_configuration_is_read(tmp_path: Path) -> None:
    config = ResearchAttentionConfig([OracleTopKConfig(0.1)], dense_layers=[0], head_budgets=[[1.0, 2.0]])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert ResearchAttentionConfig.from_file(path) == config
