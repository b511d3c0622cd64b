"""The evaluator: which layers it replays, how figures are averaged, the size of traces, what determines its key."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import build, tokens, wrap

from benchmark.search import evaluator as evaluation
from benchmark.search.evaluator import TraceEvaluator
from benchmark.search.samples import TuningSample, samples_key
from benchmark.settings import Settings
from benchmark.tasks import get_task
from benchmark.tasks.base import Prompt, Sample
from sparse_attention_hub import (
    H2OConfig,
    LocalMaskerConfig,
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    SnapKVConfig,
)
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import LanguageModel, answer_many, prefill
from sparse_attention_hub.models.session import sparse_layers
from tests.toy import ToyTask

CONFIGS = [
    ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(4)]),
    ResearchAttentionConfig([SinkMaskerConfig(2), OracleTopKConfig(0.2)]),
]


def sample(number: int, question: int, new_tokens: int = 4) -> TuningSample:
    """Context of 60 tokens; samples differ in how long question and answer are."""
    own = Sample(f"s{number}", "infinite_bench/passkey", "", "", "", ["7"], new_tokens)
    prompt = Prompt(tokens(60, seed=number), tokens(question, seed=10 + number), 0)
    return TuningSample(own, prompt, new_tokens, seed=number)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[TuningSample]:
    found = [sample(1, question=3), sample(2, question=20, new_tokens=6)]
    monkeypatch.setattr(evaluation, "tuning_samples", lambda *_: found)
    return found


def evaluator(lm: LanguageModel, folder: Path, **changes: Any) -> TraceEvaluator:
    settings = Settings(models=("tiny",), tasks=("t",), **changes)
    made = TraceEvaluator(lm, "infinite_bench/passkey", settings, folder)
    for _ in made.record():
        pass
    return made


@pytest.mark.parametrize(("architecture", "layers"), [("llama", [0, 1, 2, 3]), ("gemma3", [1, 3])])
@pytest.mark.usefixtures("samples")
def test_every_rung_looks_at_the_layers_that_can_be_sparse(architecture: str, layers: list[int], tmp_path: Path) -> None:
    lm = wrap(build(architecture))
    made = evaluator(lm, tmp_path)
    assert made.layers == sparse_layers(lm) == layers and all(trace.layers == layers for trace in made.traces)
    for rung in range(4):
        for found in made.evaluate(CONFIGS, rung, 60.0):
            assert 0 < found.density < 1 and (found.error is None if rung == 3 else found.error > 0)
    full = made.evaluate(CONFIGS[:1], 1, 60.0)[0]
    assert full.layer_errors is not None and len(full.layer_errors) == len(layers)


@pytest.mark.usefixtures("samples")
def test_answers_come_from_the_pass_of_rung_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(build("llama"))
    configs = [ResearchAttentionConfig([LocalMaskerConfig(1.0)]), *CONFIGS]  # the first is dense attention
    alone, made = (evaluator(lm, tmp_path) for _ in range(2))
    monkeypatch.setattr(made.task, "score", lambda text, _: {made.task.metric: float(len(text))})
    monkeypatch.setattr(alone.task, "score", lambda text, _: {made.task.metric: float(len(text))})
    expected = alone.evaluate(configs, 3, 60.0)
    confirmed = made.evaluate(configs, 2, 60.0)
    assert confirmed[0].reproduced == 1.0
    asked: list[int] = []
    monkeypatch.setattr(evaluation, "answer_many", lambda *a, **k: asked.append(len(a[3])) or answer_many(*a, **k))
    for found, one, forced in zip(made.evaluate(configs, 3, 60.0), expected, confirmed, strict=True):
        assert found.sample_scores == one.sample_scores
        assert found.density == pytest.approx(one.density, abs=1e-9)
        if forced.reproduced == 1.0:
            assert found.density == pytest.approx(forced.density, abs=1e-9)
    assert not asked and any(forced.reproduced < 1.0 for forced in confirmed)


@pytest.mark.usefixtures("samples")
def test_a_model_of_windows_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sliding-window layers only") as raised:
        evaluator(wrap(build("mistral_sliding")), tmp_path)
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("protocol", ["question", "decode"])
def test_traces_take_no_more_than_was_said(protocol: str, tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    whole = evaluator(lm, tmp_path / "whole", sparse_from=protocol)
    assert 0.7 * whole.trace_bytes < sum(trace.nbytes for trace in whole.traces) <= whole.trace_bytes
    budget = 0.6 * whole.trace_bytes / 1e9
    thin = evaluator(lm, tmp_path / "thin", sparse_from=protocol, trace_budget_gb=budget)
    assert thin.layers == [0, 3] and sum(trace.nbytes for trace in thin.traces) <= 1e9 * budget


def test_samples_count_alike_however_many_rows_they_have(samples: list[TuningSample], tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    made = evaluator(lm, tmp_path)
    (found,) = made.evaluate(CONFIGS[:1], 3, 60.0)
    alone = []
    for entry in samples:
        prefilled = prefill(lm, entry.prompt.context_ids, 30)
        attention = made._attention(CONFIGS[0])
        ids, limit = entry.prompt.question_ids, entry.max_new_tokens
        alone += answer_many(lm, prefilled, ids, [attention], limit, seed=entry.seed)
    assert found.error is None
    assert found.density == pytest.approx(sum(answer.density for answer in alone) / 2, rel=1e-4)


@pytest.mark.usefixtures("samples")
def test_the_attention_backend_is_the_one_asked_for(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    made = evaluator(lm, tmp_path, attention_backend="reference")
    assert made._attention(CONFIGS[0]).config.backend == "reference"
    assert made.key != evaluator(lm, tmp_path).key
    with pytest.raises(UserError, match="--attention-backend triton: .* GPU"):
        evaluator(lm, tmp_path, attention_backend="triton")


def test_the_key_of_samples_holds_all_that_they_are_scored_by() -> None:
    one = sample(1, question=3)
    others = [
        sample(1, question=4),
        replace(one, seed=2),
        replace(one, max_new_tokens=3),
        replace(one, sample=replace(one.sample, references=["8"])),
        replace(one, sample=replace(one.sample, label=3)),
    ]
    task = get_task("ruler/512/niah_single_1")
    assert samples_key([one], task) == samples_key([sample(1, question=3)], task)
    assert len({samples_key([entry], task) for entry in [one, *others]}) == 6
    assert samples_key([one], ToyTask()) != samples_key([one], task), "the code of a user's task scores"


@pytest.mark.parametrize("both", [False, True])
def test_an_answer_of_one_token_has_no_sparse_row_when_decoding(
    both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample(1, question=3, new_tokens=1)
    found = [first, replace(first, seed=9) if both else sample(2, question=20, new_tokens=6)]
    monkeypatch.setattr(evaluation, "tuning_samples", lambda *_: found)
    lm = wrap(build("llama"))
    if both:
        with pytest.raises(UserError, match="--sparse-from question"):
            evaluator(lm, tmp_path, sparse_from="decode")
        return
    made = evaluator(lm, tmp_path, sparse_from="decode")
    assert [trace.rows for trace in made.traces][0] == 0 and made.traces[1].rows > 0
    monkeypatch.setattr(evaluation, "tuning_samples", lambda *_: found[1:])
    alone = evaluator(lm, tmp_path, sparse_from="decode")
    for rung in range(3):
        for one, other in zip(made.evaluate(CONFIGS, rung, 60.0), alone.evaluate(CONFIGS, rung, 60.0), strict=True):
            assert one.error == pytest.approx(other.error, rel=1e-5) and one.density == pytest.approx(other.density)


@pytest.mark.usefixtures("samples")
def test_what_a_kill_left_of_a_trace_is_removed(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    first = evaluator(lm, tmp_path).traces[0].folder
    (first / "trace.json").unlink()
    (tmp_path / f".{first.name}.abcdef").mkdir()
    (tmp_path / f".{first.name}.abcdef" / "layer_000.safetensors").write_bytes(b"half")
    evaluator(lm, tmp_path)
    assert not any(path.is_dir() for path in tmp_path.glob(".*")) and (first / "trace.json").is_file()


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("part", ["lm_head", "layers.1.self_attn.v_proj"])
def test_a_dense_answer_that_is_not_finite_is_one_line(part: str, tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    (weight,) = [weight for name, weight in lm.model.named_parameters() if name.endswith(f"{part}.weight")]
    weight.data[0] = float("nan")
    with pytest.raises(UserError, match="tuning sample s1 has no dense answer on .*not finite") as raised:
        evaluator(lm, tmp_path)
    assert "\n" not in str(raised.value) and not list(tmp_path.glob("*/trace.json"))


@pytest.mark.usefixtures("samples")
def test_a_trace_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    folder = evaluator(lm, tmp_path).traces[1].folder
    path = folder / "layer_002.safetensors"
    tensors = load_file(path)
    tensors["dense"][0, 0] = float("inf")
    save_file(tensors, path)
    meta = json.loads((folder / "trace.json").read_text())
    meta["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "trace.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="tuning sample s2 has no dense answer on .*layer 2 is not finite"):
        evaluator(lm, tmp_path)


SIZES = ResearchAttentionConfig([SinkMaskerConfig(0.02), OracleTopKConfig(0.15)])


@pytest.mark.parametrize(("by", "columns"), [("layer", 1), ("kv_head", 2), ("head", 8)])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.usefixtures("samples")
def test_head_budgets_are_fitted_to_the_whole_model(by: str, columns: int, architecture: str, tmp_path: Path) -> None:
    lm = wrap(build(architecture))
    made = evaluator(lm, tmp_path)
    configs = [SIZES, replace(SIZES, masker_configs=[SinkMaskerConfig(0.03), OracleTopKConfig(0.3)])]
    tables = made.fit_head_budgets(configs, by, 60.0)  # both from the curves of the first
    assert len(tables) == 2 and evaluator(lm, tmp_path).fit_head_budgets(configs, by, 60.0) == tables
    for config, fitted in zip(configs, tables, strict=True):
        if fitted is None:  # even budgets do as well on this tiny model
            continue
        assert [len(row) for row in fitted.table] == [columns] * lm.num_layers and fitted.held_out <= 0
        assert all(fitted.table[layer] == [1.0] * columns for layer in range(lm.num_layers) if layer not in made.layers)
        plain, uneven = made.evaluate([config, replace(config, head_budgets=fitted.table)], 1, 60.0)
        assert uneven is not None and plain is not None and uneven.density == pytest.approx(plain.density, rel=0.1)
        assert plain.head_densities is None and uneven.head_densities is not None
        assert [len(row) for row in uneven.head_densities] == [columns] * len(made.layers)


@pytest.mark.usefixtures("samples")
def test_what_has_no_head_budgets(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    made = evaluator(lm, tmp_path)
    sampling = ResearchAttentionConfig([SinkMaskerConfig(0.02), RandomSamplingMaskerConfig(0.2)])
    tokens_only = ResearchAttentionConfig([SinkMaskerConfig(2), OracleTopKConfig(9)])
    assert made.fit_head_budgets([sampling], "kv_head", 60.0) == [None]
    assert made.fit_head_budgets([tokens_only], "kv_head", 60.0) == [None]
    thin = evaluator(lm, tmp_path / "thin", trace_budget_gb=0.6 * made.trace_bytes / 1e9)
    assert thin.fit_head_budgets([SIZES], "kv_head", 60.0) == [None]


@pytest.mark.usefixtures("samples")
def test_replays_measure_the_kv_bytes_that_budgets_are_on(tmp_path: Path) -> None:
    lm = wrap(build("llama"))
    plain, made = evaluator(lm, tmp_path), evaluator(lm, tmp_path, budget_on="kv")
    assert plain.key != made.key
    config = [ResearchAttentionConfig([LocalMaskerConfig(4), OracleTopKConfig(0.2)])]
    some, full, forced = (made.evaluate(config, rung, 60.0)[0] for rung in range(3))
    assert some is not None and full is not None and forced is not None
    assert full.kv_fraction == pytest.approx(forced.kv_fraction, rel=0.05) and some.kv_fraction > 0.5 < full.kv_fraction
    (unmeasured,) = plain.evaluate(config, 1, 60.0)
    assert unmeasured is not None and unmeasured.kv_fraction is None and unmeasured.density == full.density


@pytest.mark.usefixtures("samples")
@pytest.mark.parametrize("protocol", ["question", "decode"])
def test_traces_are_recorded_again_for_what_a_configuration_chooses_by(protocol: str, tmp_path: Path) -> None:
    made = evaluator(wrap(build("llama")), tmp_path, sparse_from=protocol)
    assert all(trace.observed == frozenset() for trace in made.traces)
    plain = made.evaluate(CONFIGS, 1, 60.0)
    snap_kv = ResearchAttentionConfig([SinkMaskerConfig(2), SnapKVConfig(0.2, window_size=4)])
    hitters = ResearchAttentionConfig([SinkMaskerConfig(2), H2OConfig(0.2)])
    for rung in range(4):
        for found in made.evaluate([snap_kv, hitters], rung, 60.0):
            assert found is not None and 0 < found.density < 1
    assert all(trace.observed == {"queries", "attention"} for trace in made.traces)
    assert [found.error for found in made.evaluate(CONFIGS, 1, 60.0)] == [found.error for found in plain]


@pytest.mark.parametrize(("varies", "layers"), [(False, [0, 4, 8]), (True, list(range(10)))])
def test_a_masker_whose_density_differs_between_layers_is_judged_by_all(varies: bool, layers: list[int]) -> None:
    evaluator: Any = object.__new__(TraceEvaluator)
    evaluator.traces, evaluator.layers = [SimpleNamespace(rows=20)], list(range(10))
    evaluator._replay = lambda number, attentions, rows, layers: layers
    maskers = [SimpleNamespace(varies_by_layer=False), SimpleNamespace(varies_by_layer=varies)]
    assert evaluator._replay_some(0, [SimpleNamespace(maskers=maskers)]) == layers
