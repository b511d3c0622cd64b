"""The CUDA branches give what the CPU gives: every masker, decoding in lockstep, replay, and the evaluator of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pipelines import NAMES, all_examples, example, families, small_model
from pretend import PretendedGPU
from tiny_models import tokens
from torch import Tensor

import sparse_attention_hub as hub
from benchmark.search import evaluator as evaluation
from benchmark.search.evaluator import TraceEvaluator
from benchmark.search.samples import TuningSample
from benchmark.settings import Settings
from benchmark.tasks.base import Prompt, Sample
from sparse_attention_hub.attention import AttentionResult
from sparse_attention_hub.maskers.drawing import DIM, HEADS
from sparse_attention_hub.micro_metrics import MetricRecorder
from sparse_attention_hub.models import answer_many, forced_many, prefill
from sparse_attention_hub.models.observer import observed_by
from sparse_attention_hub.models.trace import record_trace
from sparse_attention_hub.replay import replay, spread

DTYPES = [torch.float32, torch.bfloat16]
CONTEXT, QUESTION, ANSWER = tokens(150), tokens(5, 2), tokens(4, 3)


def alike(number: Any, wanted: Any, **tolerance: float) -> bool:
    """Two figures; None is one that was not measured."""
    return number is wanted or bool(number == pytest.approx(wanted, **tolerance))


def figures(result: AttentionResult) -> dict[str, Any]:
    """Everything of a result, on the host."""
    found = [result.mask.inclusion_probability(), result.output.float(), result.log_sum_exp]
    named = zip(("mask", "output", "lse"), (tensor.cpu() for tensor in found), strict=True)
    return dict(named) | {"density": result.density, "kv_fraction": result.kv_fraction, "empty": int(result.empty_rows)}


@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_every_masker(name: str, rows: int, padded: bool, dtype: torch.dtype) -> None:
    keys, generator = 130, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    queries, *cache = normal(2, HEADS, rows + 1, DIM), normal(2, 1, keys + 1, DIM), normal(2, 1, keys + 1, DIM)
    allowed = torch.ones(rows + 1, keys + 1, dtype=torch.bool).tril(keys - rows).expand(2, 1, -1, -1).clone()
    if padded:
        allowed[0, :, :, :37] = False

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[dict[str, Any]]:
        """Two calls on one state: the second has a key more."""
        attention, context = example(name), keys - rows
        state = attention.new_state()
        attention.prepare(k[:, :, :context], 0, state, mask[:, 0, -1, :context] if padded else None)
        found = []
        for end in (keys, keys + 1):
            own = slice(end - keys, end - keys + rows)
            call = q[:, :, own], k[:, :, :end], v[:, :, :end], mask[:, :, own, :end]
            found.append(figures(attention(*call, state=state, seeds=[3, 4])))
        return found

    expected = run(queries, *cache, allowed)
    with PretendedGPU() as gpu:
        found = run(*gpu.move([tensor.clone() for tensor in (queries, *cache, allowed)]))
    assert gpu.launches.total() - gpu.launches["uniforms_kernel"] == 4
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["mask"], other["mask"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["output"], other["output"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(one["lse"], other["lse"], rtol=1e-4, atol=1e-4)
        for figure in ("density", "kv_fraction", "empty"):
            assert one[figure] == pytest.approx(other[figure])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lockstep(dtype: torch.dtype) -> None:
    """Question and answer under dense attention and every masker, as one batch."""

    def run(gpu: PretendedGPU | None) -> list[tuple[Any, ...]]:
        lm = small_model(gpu, dtype)
        assert lm.device.type == ("cpu" if gpu is None else "cuda")
        ways = [None, *all_examples()]
        prefilled = prefill(lm, CONTEXT, 20, observed_by(ways))
        recorders = [MetricRecorder("full") for _ in ways]
        forced = forced_many(lm, prefilled, QUESTION, ANSWER, ways, stepwise=True, seed=3, recorders=recorders)
        answers = answer_many(lm, prefilled, QUESTION, ways, 4, seed=3)
        return [
            (one.nll, one.density, one.kv_fraction, recorder.error, other.density, other.token_ids)
            for one, recorder, other in zip(forced, recorders, answers, strict=True)
        ]

    expected = run(None)
    with PretendedGPU() as gpu:
        found = run(gpu)
    close = {"rel": 1e-4, "abs": 1e-5} if dtype == torch.float32 else {"rel": 2e-2, "abs": 2e-2}
    for name, one, other in zip(["dense", *NAMES], found, expected, strict=True):
        for number, wanted in zip(one[:4], other[:4], strict=True):
            assert alike(number, wanted, **close), f"{name}: {number}, on the CPU {wanted}"
        if dtype == torch.float32:  # in bfloat16 a token may differ, and all that follow it
            assert alike(one[4], other[4]) and one[5] == other[5], name


def test_rows_that_leave_the_batch() -> None:
    """When some answers have ended, the other rows still attend in one launch. The last row attends by itself."""

    def run(gpu: PretendedGPU | None, stop: frozenset[int]) -> list[tuple[Any, ...]]:
        lm = small_model(gpu)
        lm.eos_token_ids = stop
        ways = [None, *families(2)]
        prefilled = prefill(lm, CONTEXT, 20)
        answers = answer_many(lm, prefilled, QUESTION, ways, 6, seed=3)
        return [(one.token_ids, one.density, one.kv_fraction) for one in answers]

    said = [answer for answer, *_ in run(None, frozenset())]
    stop = frozenset(answer[place % 4] for place, answer in enumerate(said) if place % 3)
    expected = run(None, stop)
    assert len({len(answer) for answer, *_ in expected}) > 2
    with PretendedGPU() as gpu:
        found = run(gpu, stop)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        assert alike(one[1], other[1], rel=1e-4, abs=1e-5) and alike(one[2], other[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay(dtype: torch.dtype, tmp_path: Path) -> None:
    ways = all_examples()
    trace = record_trace(small_model(None, dtype), CONTEXT, QUESTION, 6, tmp_path / "host", observe=observed_by(ways))
    for rows in (None, spread(trace.rows, 4)):
        expected = replay(trace, ways, rows=rows, seed=3)
        with PretendedGPU():
            found = replay(trace, ways, rows=rows, seed=3, device="cuda")
        for name, one, other in zip(NAMES, found, expected, strict=True):
            torch.testing.assert_close(one.errors, other.errors, rtol=1e-3, atol=1e-4, msg=name)
            torch.testing.assert_close(one.densities, other.densities, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("graphs", [True, False])
def test_evaluator(graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search records traces on the device and measures configurations on all rungs; the steps of the last one are graphs, where
    all maskers can be in them."""
    names = [name for name in NAMES if name != "magic_pig" or not graphs]
    sample = Sample("s", "infinite_bench/passkey", "", "", "", ["7"], 4)
    samples = [TuningSample(sample, Prompt(CONTEXT, QUESTION, 0), 8, seed=1)]
    monkeypatch.setattr(evaluation, "tuning_samples", lambda *_: samples)
    configs = [example(name, dense_layers=[1]).config for name in names]

    def run(gpu: PretendedGPU | None) -> list[list[Any]]:
        made = TraceEvaluator(
            small_model(gpu), "infinite_bench/passkey", Settings(models=("t",), tasks=("t",)), tmp_path / str(gpu)
        )
        return [made.evaluate(configs, rung, 60.0) for rung in range(4)]

    expected = run(None)
    with PretendedGPU() as gpu:
        found = run(gpu)
    assert bool(gpu.operations["graph"]) == graphs
    for rung, (ones, others) in enumerate(zip(found, expected, strict=True)):
        for name, one, other in zip(names, ones, others, strict=True):
            assert one is not None and other is not None, name
            for figure in ("density", "error", "kv_fraction", "reference_nll", "score", "reproduced"):
                number, wanted = getattr(one, figure), getattr(other, figure)
                same = alike(number, wanted, rel=1e-3, abs=1e-4)
                assert same, f"{name}, rung {rung}: {figure} {number}, on the CPU {wanted}"


@pytest.mark.parametrize("rows", [1, 5])
def test_hash_networks_of_each_query_head(rows: int) -> None:
    """Codes of keys lie by head then, also where several query heads share a kv head."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"query_matrix": (8, 16, 32), "query_bias": (8, 32), "key_matrix": (8, 16, 32), "key_bias": (8, 32)}
    weights = {0: {name: [torch.randn(shape, generator=generator)] for name, shape in shapes.items()}}
    config = hub.HashAttentionTopKMaskerConfig(0.2, 32, 1, 0, "relu", hat_weights=weights)
    attention = hub.ResearchAttention(hub.ResearchAttentionConfig([config]))
    tensors = [torch.randn(1, heads, length, 16, generator=generator) for heads, length in ((8, rows), (2, 90), (2, 90))]
    expected = figures(attention(*tensors))
    with PretendedGPU() as gpu:
        found = figures(attention(*gpu.move([tensor.clone() for tensor in tensors])))
    torch.testing.assert_close(found["mask"], expected["mask"])
