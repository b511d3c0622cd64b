"""Decode steps as CUDA graphs, on the pretended device: they give what steps give that the host starts one by one."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pipelines import NAMES, all_examples, example, families, small_model
from pretend import PretendedGPU
from tiny_models import Letters, tokens

import sparse_attention_hub as hub
from sparse_attention_hub.errors import NonFiniteError
from sparse_attention_hub.kernels.select import _numbers
from sparse_attention_hub.maskers.oracle_top_k import OracleTopK
from sparse_attention_hub.maskers.oracle_top_p import OracleTopP
from sparse_attention_hub.micro_metrics import MetricRecorder
from sparse_attention_hub.models import LanguageModel, answer_many, forced_and_answered, prefill, step_graphs
from sparse_attention_hub.models.lockstep import Lockstep
from sparse_attention_hub.models.observer import observed_by
from sparse_attention_hub.models.survey_models import tiny_model

CONTEXT, QUESTION = tokens(150), tokens(5, 2)
Figures = list[tuple[list[int], float | None, float | None]]
#: Maskers that wait for the device in each step.
WAITING = {"magic_pig"}


def answers(
    gpu: PretendedGPU | None,
    ways: Sequence[hub.ResearchAttention | None] | None = None,
    length: int = 40,
    stop: frozenset[int] = frozenset(),
    lm: LanguageModel | None = None,
    **about: Any,
) -> Figures:
    """Tokens, density and share of KV bytes of each way, by default of dense attention and eight families."""
    lm = small_model(gpu) if lm is None else lm
    lm.eos_token_ids, fails = stop, about.pop("fails", False)
    ways = [None, *families(lm.num_layers)] if ways is None else ways
    prefilled = prefill(lm, CONTEXT, 50, observed_by(ways))
    found = answer_many(lm, prefilled, QUESTION, ways, length, seed=3, **about)
    assert lm.graphs_failed == fails
    return [(one.token_ids, one.density, one.kv_fraction) for one in found]


def check(found: Figures, expected: Figures) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        for number, wanted in zip(one[1:], other[1:], strict=True):
            assert number == wanted or number == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_a_graph_serves_all_steps(sparse_from: str) -> None:
    expected = answers(None, sparse_from=sparse_from)
    with PretendedGPU() as gpu:
        check(answers(gpu, sparse_from=sparse_from), expected)
    assert gpu.operations["graph"] == 36 + 2  # all but the first three of 39 steps, and two to compare


@pytest.mark.parametrize("name", NAMES)
def test_every_masker(name: str) -> None:
    """Beside a row of another kind. The second layer is dense, also for the sparse rows."""

    def ways() -> list[hub.ResearchAttention | None]:
        return [None, example("sink", dense_layers=[1]), example(name, dense_layers=[1])]

    expected = answers(None, ways())
    with PretendedGPU() as gpu:
        check(answers(gpu, ways()), expected)
    assert gpu.operations["graph"] == (0 if name in WAITING else 38)


def test_all_maskers_together() -> None:
    def ways() -> list[hub.ResearchAttention | None]:
        return [None, *(way for name, way in zip(NAMES, all_examples(), strict=True) if name not in WAITING)]

    expected = answers(None, ways())
    with PretendedGPU() as gpu:
        check(answers(gpu, ways()), expected)
    assert gpu.operations["graph"] == 38


def test_rows_that_leave_the_batch() -> None:
    """Their graph is dropped, and another made for those that stay; the last row has none."""
    said = [answer for answer, *_ in answers(None)]
    first = {token: min(answer.index(token) for answer in said if token in answer) for answer in said for token in answer}
    late = sorted(token for token, place in first.items() if place >= 8)
    stop = frozenset(late[::2])
    expected = answers(None, stop=stop)
    lengths = sorted(len(answer) for answer, *_ in expected)
    assert len(set(lengths)) > 3 and lengths[0] >= 8
    with PretendedGPU() as gpu:
        check(answers(gpu, stop=stop), expected)
    assert gpu.operations["graph"] > 10


def test_rows_that_fork() -> None:
    """A forced answer, from which rows part: a fork begins with a step of its own kind, then all have a graph again."""

    def run(gpu: PretendedGPU | None) -> list[Any]:
        lm = small_model(gpu)
        lm.eos_token_ids = frozenset()
        ways = [None, *families(2)]
        prefilled = prefill(lm, CONTEXT, 50)
        recorders = [None if way is None else MetricRecorder("full") for way in ways]
        forced = forced_and_answered(lm, prefilled, QUESTION, given, ways, 40, seed=3, recorders=recorders)
        errors = [recorder and recorder.error for recorder in recorders]
        return [(a.nll, a.density, b.token_ids, b.density, e) for (a, b), e in zip(forced, errors, strict=True)]

    given = answers(None)[0][0]  # that of dense attention
    expected = run(None)
    with PretendedGPU() as gpu:
        found = run(gpu)
    for one, other in zip(found, expected, strict=True):
        assert one[2] == other[2]
        for number, wanted in zip((*one[:2], *one[3:]), (*other[:2], *other[3:]), strict=True):
            assert number == wanted or number == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert gpu.operations["graph"] > 20


def test_head_budgets() -> None:
    def ways() -> list[hub.ResearchAttention | None]:
        table = ((0.5, 1.5), (1.25, 0.75))
        configs = [replace(way.config, head_budgets=table) for way in families(2)]
        return [None, *map(hub.ResearchAttention, configs)]

    expected = answers(None, ways())
    with PretendedGPU() as gpu:
        check(answers(gpu, ways()), expected)
    assert gpu.operations["graph"] == 38


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3_text", "gpt_oss", "llama4_text"])
def test_models_that_limit_layers_or_change_scores(kind: str) -> None:
    """Sliding windows and chunks, softcap, sinks, experts."""
    ways = [None, *(hub.ResearchAttention(hub.ResearchAttentionConfig(configs)) for configs in PLAIN)]

    def model(gpu: PretendedGPU | None) -> LanguageModel:
        made = tiny_model(kind)
        return LanguageModel.wrap(made if gpu is None else gpu.move(made), Letters(), name="tiny", dense_backend="sdpa")

    expected = answers(None, ways, lm=model(None))
    with PretendedGPU() as gpu:
        check(answers(gpu, ways, lm=model(gpu)), expected)
    assert gpu.operations["graph"] == 38


PLAIN: list[list[hub.MaskerConfig]] = [
    [hub.SinkMaskerConfig(4), hub.LocalMaskerConfig(16), hub.OracleTopKConfig(0.1)],
    [hub.SinkMaskerConfig(4), hub.LocalMaskerConfig(16), hub.QuestTopKMaskerConfig(0.2, 8)],
]


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_figures_of_calls(mode: str) -> None:
    """What Phase 2 records of the layers is measured behind the graph, by the tensors that it leaves."""

    def run(gpu: PretendedGPU | None) -> list[list[list[Any]]]:
        ways = [None, *families(2), example("twilight"), example("quest", dense_layers=[1])]
        recorders = [None if way is None else MetricRecorder(mode) for way in ways]  # type: ignore[arg-type]
        answers(gpu, ways, recorders=recorders)
        return [recorder.calls() for recorder in recorders if recorder is not None]

    expected = run(None)
    with PretendedGPU() as gpu:
        found = run(gpu)
    assert gpu.operations["graph"] == 38
    for calls, others in zip(found, expected, strict=True):
        assert len(calls) == len(others) > (70 if mode == "full" else 8)
        for one, other in zip(calls, others, strict=True):
            assert one[:2] == other[:2]
            assert one[2:5] == pytest.approx(other[2:5], rel=1e-3, abs=1e-5)


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CUDA_GRAPHS", "0")
    with PretendedGPU() as gpu:
        answers(gpu, length=6)
    assert gpu.operations["graph"] == 0


def test_a_step_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The answers are the same, one line says why, and it is not tried again."""
    expected, select = answers(None), OracleTopK.select

    def waiting(self: Any, inputs: Any, mask: Any) -> Any:
        chosen = select(self, inputs, mask)
        int(chosen.counts().max())
        return chosen

    monkeypatch.setattr(OracleTopK, "select", waiting)
    with PretendedGPU() as gpu, caplog.at_level(logging.WARNING):
        lm = small_model(gpu)
        for _ in range(2):
            check(answers(gpu, lm=lm, fails=True), expected)
    assert gpu.operations["graph"] == 0
    (line,) = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert "not permitted when stream is capturing" in line


@pytest.mark.parametrize("changes", ["in each call", "from step to step"])
def test_a_graph_that_gives_something_else_is_not_used(
    changes: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A number of the host that changes: the graph would keep the one that it was made with."""
    expected, calls, steps, step_open = answers(None), [0], [0], Lockstep.step_open

    def changing(self: Any, inputs: Any, mask: Any) -> Any:
        calls[0] += 1
        turn = calls[0] % 4 < 2 if changes == "in each call" else steps[0] % 2
        return mask.union(inputs.choose_mass(mask, 0.1 if turn else 0.9))

    def counting(self: Lockstep, ids: Any) -> Any:
        steps[0] = self.step
        return step_open(self, ids)

    monkeypatch.setattr(OracleTopP, "select", changing)
    monkeypatch.setattr(Lockstep, "step_open", counting)
    with PretendedGPU() as gpu, caplog.at_level(logging.WARNING):
        found = answers(gpu, fails=True)
    others = [place for place, way in enumerate(families(2), 1) if not any(isinstance(m, OracleTopP) for m in way.maskers)]
    check([found[place] for place in others], [expected[place] for place in others])
    assert gpu.operations["graph"] == (1 if changes == "in each call" else 2)
    assert any("its logits differ by" in record.message for record in caplog.records)


def test_room_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are opened again, with more room and another graph."""
    monkeypatch.setattr(step_graphs, "ROOM", 9)
    expected = answers(None)
    with PretendedGPU() as gpu:
        check(answers(gpu), expected)
    assert 20 < gpu.operations["graph"] < 38


def test_numbers_that_are_not_finite_are_no_fault_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    step_open = Lockstep.step_open

    def broken(self: Lockstep, ids: Any) -> Any:
        return step_open(self, ids) * float("nan")

    monkeypatch.setattr(Lockstep, "step_open", broken)
    with PretendedGPU() as gpu:
        lm = small_model(gpu)
        with pytest.raises(NonFiniteError):
            answers(gpu, lm=lm)
    assert not lm.graphs_failed


@pytest.mark.parametrize("config", [hub.QuestTopKMaskerConfig(170, 16), hub.LandmarksConfig(170, 16)], ids=str)
@pytest.mark.parametrize("context", [150, 10])  # a whole number of keys above N, at first; no complete page
def test_pages(config: hub.MaskerConfig, context: int) -> None:
    def run(gpu: PretendedGPU | None) -> Figures:
        lm = small_model(gpu)
        lm.eos_token_ids = frozenset()
        ways = [hub.ResearchAttention(hub.ResearchAttentionConfig([hub.SinkMaskerConfig(2), config])) for _ in range(2)]
        found = answer_many(lm, prefill(lm, tokens(context), 60), QUESTION, [None, *ways], 50)
        return [(one.token_ids, one.density, one.kv_fraction) for one in found]

    expected = run(None)
    with PretendedGPU() as gpu:
        check(run(gpu), expected)
    assert gpu.operations["graph"] > 40


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_dense_layers_of_some_rows(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are then called together with different ones from layer to layer; what choosing reads is counted once."""
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CUDA_GRAPHS", graphs)
    top = [hub.SinkMaskerConfig(2), hub.OracleTopKConfig(0.1)]
    ways = [hub.ResearchAttention(hub.ResearchAttentionConfig(top, dense_layers=own)) for own in ([], [], [1], [0, 1])]
    expected = answers(None, [None, *ways])
    with PretendedGPU() as gpu:
        check(answers(gpu, [None, *ways]), expected)


def test_out_of_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected, select = answers(None), OracleTopK.select
    with PretendedGPU() as gpu:

        def full_while_recording(self: Any, inputs: Any, mask: Any) -> Any:
            return full() if gpu.recording is not None else select(self, inputs, mask)

        monkeypatch.setattr(OracleTopK, "select", full_while_recording)
        check(answers(gpu), expected)
        monkeypatch.setattr(torch.cuda, "graph", full)
        check(answers(gpu), expected)


def test_what_a_graph_reads_stays_alive() -> None:
    """A graph knows addresses alone: constants that caches may drop, weights, keys, codes."""
    held, parts = [], []
    make = step_graphs._StepGraph.__init__

    def remember(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        batch = arguments[0]
        held.append(self)
        parts.extend(tail for layer in batch.prefilled.cache.attention for tail in (*layer._tails, *layer._buffers))
        parts.extend(part for row in batch.rows if row.memory is not None for part in row.memory.state.parts())
        parts.extend(table for tables in batch.grouped.tables.values() for table in tables)

    with PretendedGPU() as gpu, pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_graphs._StepGraph, "__init__", remember)
        lm = small_model(gpu)
        answers(gpu, lm=lm)
        outside, tables = held[0]._read
        kept = [*outside.values(), *(table for own in tables.values() for table in own)]
        read = {tensor.untyped_storage().data_ptr() for tensor in kept}
        wanted = [*parts, *lm.model.parameters(), _numbers(256, torch.device("cuda", 0))]
        assert {tensor.untyped_storage().data_ptr() for tensor in wanted} <= read


def test_a_graph_is_let_go_with_its_answer() -> None:
    with PretendedGPU() as gpu:
        lm = small_model(gpu)
        lm.eos_token_ids = frozenset()
        prefilled = prefill(lm, CONTEXT, 50)
        answer_many(lm, prefilled, QUESTION, [None, *families(2)], 10)
        assert gpu.operations["graph"] > 5
        held = [weakref.ref(buffer) for layer in prefilled.cache.attention for buffer in layer._buffers]
        del prefilled
        gc.collect()
        assert held and not any(buffer() is not None for buffer in held)
