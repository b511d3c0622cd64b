"""Memory beside a long context: codes are held once, long questions are taken in blocks, and estimates fit what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import SIZES, attention, build, few_keys, forced, peak_bytes, tokens, wrap
from torch import Tensor

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    KeyDiffConfig,
    LocalMaskerConfig,
    MagicPigConfig,
    Mask,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    PQCacheConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    SinkMaskerConfig,
    lists,
)
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.maskers.state import MaskerState
from sparse_attention_hub.micro_metrics import MetricRecorder
from sparse_attention_hub.models import LanguageModel, answer_many, estimate_bytes, forced_many, lockstep, prefill

CONTEXT = tokens(90)
SINK, LOCAL = SinkMaskerConfig(2), LocalMaskerConfig(4)


def pq(size: float) -> PQCacheConfig:
    return PQCacheConfig(size, pq_group_factor=4, pq_bits=4, kmeans_iter=3, init_offset=2, metric="euclidean")


def many_kinds() -> list[ResearchAttention]:
    return [
        *few_keys(),
        attention(SINK, LOCAL, OracleTopPMaskerConfig(0.6)),
        attention(SINK, LOCAL, QuestTopKMaskerConfig(0.2, page_size=8)),
        attention(SINK, LOCAL, pq(0.1)),
        attention(SINK, LOCAL, OracleTopKConfig(0.1), AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.3, 0, 0)),
    ]


# -- codes -----------------------------------------------------------------------------------------------------------


def holding(count: int) -> MaskerState:
    state = MaskerState()
    state.fitted, state.fit_length = True, count
    state.append(torch.arange(float(count)).view(1, 1, count, 1))
    return state


def add(state: MaskerState, *numbers: float) -> None:
    state.append(torch.tensor(numbers).view(1, 1, -1, 1))


def codes(state: MaskerState) -> list[float]:
    return state.codes().flatten().tolist()


def test_forks_share_the_codes_of_their_common_keys() -> None:
    state = holding(1000)
    forks = [state.fork(1000) for _ in range(5)]
    for step in range(3):
        for number, fork in enumerate(forks):
            add(fork, 10.0 * number + step)
            assert codes(fork)[1000:] == [10.0 * number + past for past in range(step + 1)]
    common = {part.untyped_storage().data_ptr() for fork in forks for part in fork.parts() if part.shape[2] >= 1000}
    assert len(common) == 1 and len({id(part) for fork in forks for part in fork.parts()}) == 1 + 5


def test_a_fork_goes_back_and_takes_another_way() -> None:
    state = holding(8)
    one, other = state.fork(8), state.fork(8)
    add(one, 100, 101, 102)
    assert codes(one) == [*range(8), 100, 101, 102]
    one.rewind(9)
    add(one, 200)
    assert codes(one) == [*range(8), 100, 200]  # though the room after the shared codes still held 101
    add(other, 300)
    assert codes(other) == [*range(8), 300] and codes(one) == [*range(8), 100, 200]
    again = one.fork(9)
    add(again, 400)
    assert codes(again) == [*range(8), 100, 400] and codes(one) == [*range(8), 100, 200]


def test_a_state_keeps_its_own_codes_when_it_is_forked() -> None:
    state = holding(8)
    add(state, 50, 51)
    fork = state.fork(8)
    add(fork, *range(100, 200))  # more than the room that there was
    assert codes(fork) == [*range(8), *range(100, 200)] and codes(state) == [*range(8), 50, 51]
    add(state, 52)
    assert codes(state) == [*range(8), 50, 51, 52]


def test_a_state_that_goes_back_before_the_shared_codes_leaves_them_alone() -> None:
    state = holding(8)
    state.fit_length = 5
    one, other = state.fork(8), state.fork(8)
    one.rewind(6)
    add(one, 70, 71, 72)
    assert codes(one) == [*range(6), 70, 71, 72]
    assert codes(other) == codes(state) == [*range(8)]
    one.rewind(4)
    assert not one.is_fitted and other.is_fitted


def test_codes_of_pages_are_shared_too() -> None:
    state = MaskerState()
    state.fitted, state.fit_length, state.keys_per_code, state.offset = True, 17, 4, 1
    state.append(torch.arange(5.0).view(1, 1, 5, 1), 21)
    fork = state.fork(19)  # in the fifth page: its code is not known
    assert codes(fork) == [0, 1, 2, 3] and codes(state) == [0, 1, 2, 3, 4]
    fork.append(torch.full((1, 1, 1, 1), 9.0), 21)
    assert codes(fork) == [0, 1, 2, 3, 9] and codes(state) == [0, 1, 2, 3, 4]


def test_codes_that_a_replay_made_serve_the_model() -> None:
    with torch.inference_mode():
        state = holding(8)
        add(state, 60)
    fork = state.fork(8)
    add(fork, 80)  # outside inference mode, where its tensors cannot be changed
    assert codes(fork) == [*range(8), 80]
    with torch.inference_mode():
        add(state, 61)
        assert codes(state) == [*range(8), 60, 61]
    assert codes(fork) == [*range(8), 80]


@pytest.mark.parametrize("limit", [0, 2**30])
def test_rows_side_by_side_hold_one_copy_of_equal_codes(llama: LanguageModel, limit: int) -> None:
    ways = [attention(SinkMaskerConfig(size), pq(0.1 * size)) for size in (1, 2, 3)]
    prefilled = prefill(llama, CONTEXT, 40)
    prefilled.learned = SharedStates(limit_bytes=limit)
    before = prefilled.nbytes()
    together = answer_many(llama, prefilled, tokens(11, 2), ways, 5)
    held = {id(part): part for memory in prefilled.states.values() for part in memory.state.parts()}.values()
    assert sum(part.shape[2] >= 90 for part in held) == llama.num_layers
    assert prefilled.nbytes() - before == sum(part.nbytes for part in held)
    for way, given in zip(ways, together, strict=True):
        (alone,) = answer_many(llama, prefill(llama, CONTEXT, 40), tokens(11, 2), [way], 5)
        assert (alone.token_ids, alone.density) == (given.token_ids, given.density)
    prefilled.forget()
    assert prefilled.nbytes() == before


# -- blocks of queries -----------------------------------------------------------------------------------------------


def test_a_long_question_is_answered_in_blocks(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    question, reply, found = tokens(37, 2), tokens(20, 9), []
    for at_once in (1000, 16, 1):
        monkeypatch.setattr(lockstep, "QUERIES_AT_ONCE", at_once)
        ways = [*many_kinds(), attention(SINK, LOCAL, MagicPigConfig(lsh_l=16, lsh_k=4))]
        recorders = [MetricRecorder("full") for _ in ways]
        prefilled = prefill(llama, CONTEXT, 80)
        results = forced_many(llama, prefilled, question, reply, ways, seed=5, recorders=recorders)
        found.append([(r.nll, r.density, r.kv_fraction, m.density, m.error) for r, m in zip(results, recorders, strict=True)])
    for whole, *parts in zip(*found, strict=True):
        for part in parts:
            assert part == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_blocks_bound_the_memory_of_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, way = long_model(), attention(SINK, LOCAL, OracleTopKConfig(0.1))
    prefilled, peaks = prefill(lm, tokens(1000), 600), []
    for at_once in (64, 1000):
        monkeypatch.setattr(lockstep, "QUERIES_AT_ONCE", at_once)
        peaks.append(peak_bytes(lambda: forced(lm, prefilled, tokens(512, 2), [5], way)))
    assert peaks[0] < peaks[1] / 4


# -- estimates -------------------------------------------------------------------------------------------------------


def long_model() -> LanguageModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
    return wrap(build("llama", max_position_embeddings=4096, **sizes))


GROUPS: dict[str, Callable[[], Sequence[ResearchAttention | None]]] = {
    "dense": lambda: [None],
    "windows": lambda: [None, attention(SINK, LOCAL)],
    "top-k": lambda: [attention(SINK, LOCAL, OracleTopKConfig(0.1)), None],
    "top-p": lambda: [attention(SINK, LOCAL, OracleTopPMaskerConfig(0.5))],
    "random": lambda: [attention(SINK, LOCAL, RandomSamplingMaskerConfig(0.1))] * 9,
    "adaptive": lambda: [attention(SINK, LOCAL, OracleTopKConfig(0.05), AdaptiveSamplingMaskerConfig(0.05, 0.2, 0.2, 0, 0))],
    "quest": lambda: [attention(SINK, LOCAL, QuestTopKMaskerConfig(0.1, size, 8)) for size in (8, 16, 16)],
    "pq": lambda: [attention(SINK, LOCAL, pq(0.1)), attention(SINK, LOCAL, pq(0.2))],
    "magic pig": lambda: [attention(SINK, LOCAL, MagicPigConfig(lsh_l=64, lsh_k=8))],
    "many": lambda: [None, *many_kinds()],
}


def lists_only(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, *_: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What attention holds on a GPU beside its output, where a kernel reads the mask's lists in place."""
    from sparse_attention_hub.kernels import triton

    triton._lists(mask, triton.choose_kernel(mask, queries.shape[2], keys.shape[1]), queries.shape[2], values.shape[1])
    batch, heads, rows, _ = queries.shape
    return torch.zeros(batch, rows, heads, values.shape[3]), torch.zeros(batch, heads, rows)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_estimates_fit_what_is_measured(group: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ways = long_model(), GROUPS[group]()
    monkeypatch.setattr("sparse_attention_hub.models.cache.own_pages", Tensor.new_empty)  # peaks are those of torch's allocator
    if on_gpu:
        pytest.importorskip("triton")
        monkeypatch.setattr(lists, "HAS_NUMBA", False)
        monkeypatch.setattr(lists, "WIDE_ENTRIES", 0)  # as for a long context
        monkeypatch.setattr("sparse_attention_hub.attention.attend", lists_only)
    estimated = estimate_bytes(lm, 2000, 80, ways)

    def run() -> None:
        recorders = [None if way is None else MetricRecorder("sample") for way in ways]
        answer_many(lm, prefill(lm, tokens(2000), 80), tokens(64, 2), ways, 2, recorders=recorders)

    answer_many(lm, prefill(lm, CONTEXT, 80), tokens(64, 2), ways, 2)  # loops are compiled
    measured = peak_bytes(run)
    assert 0.8 * measured < estimated < 1.2 * measured, f"measured {measured}, estimated {estimated}"


def test_estimates_grow_with_rows_context_and_codes(llama: LanguageModel) -> None:
    def size(context: int, ways: Sequence[ResearchAttention | None], asked: Any = ()) -> int:
        return estimate_bytes(llama, context, 100, ways, asked)

    top_k, hashed = attention(OracleTopKConfig(0.1)), attention(MagicPigConfig(lsh_l=128, lsh_k=10))
    assert (
        size(1000, [None]) < size(1000, [None, top_k]) < size(1000, [None, top_k, hashed]) < size(4000, [None, top_k, hashed])
    )
    of_codes = 4000 * llama.num_layers * SIZES["num_key_value_heads"] * 128 * 2
    assert size(4000, [top_k], [top_k, hashed]) - size(4000, [top_k]) == pytest.approx(of_codes, rel=0.2)
    assert size(4000, [hashed], [hashed]) == size(4000, [hashed])  # equal codes are held once
    ranking = 4000 * llama.num_layers * SIZES["num_key_value_heads"] * 4  # an eviction holds one in place of codes
    evicting = attention(KeyDiffConfig(0.1))
    assert size(4000, [top_k], [top_k, evicting]) - size(4000, [top_k]) == pytest.approx(ranking, rel=0.2)
