"""Off the CPU a replay takes layers that are alike as the items of one call: the figures are those of layer by layer on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pipelines import NAMES, families, layered_examples, small_model
from pretend import GIB, PretendedGPU
from safetensors.torch import load_file, save_file
from tiny_models import tokens
from torch import Tensor

import sparse_attention_hub as hub
from sparse_attention_hub import Mask, Masker, MaskerConfig, ResearchAttention, ResearchAttentionConfig, register_masker
from sparse_attention_hub.attention import dense_attention
from sparse_attention_hub.lists import WIDE_ENTRIES
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.pq_cache import PQCacheMasker
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.maskers.state import MaskerState
from sparse_attention_hub.maskers.uniforms import keyed_uniforms
from sparse_attention_hub.models.observer import observed_by
from sparse_attention_hub.models.trace import HeldLayers, Trace, TraceLayer, TraceLayers, record_trace
from sparse_attention_hub.replay import ReplayResult, layers_at_once, replay

LAYERS = 5
CONTEXT, QUESTION = tokens(150), tokens(5, 2)
LABELS = [*NAMES, *(f"family {number}" for number in range(8))]


@dataclass
class ByLayerConfig(MaskerConfig):
    """A user's masker that reads the layer's number, and does not say so."""


@register_masker(ByLayerConfig)
class ByLayer(Masker[ByLayerConfig]):
    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        every = inputs.key_positions % (2 + inputs.layer_idx) == 0
        return mask.union(inputs.mask(every[:, None, None] & inputs.allowed))


@dataclass
class OwnFitConfig(MaskerConfig):
    """A user's masker whose fits nothing can join."""


@register_masker(OwnFitConfig)
class OwnFit(Masker[OwnFitConfig]):
    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> dict[str, Tensor]:
        return {"mean": keys.float().mean(2) + layer_idx}

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        return (keys.float() - fitted["mean"].unsqueeze(2)).norm(dim=-1)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        _, codes = self.codes(inputs)
        return mask.union(inputs.choose_top(codes.unsqueeze(2).expand(-1, -1, inputs.shape[2], -1), mask, 20))


@dataclass
class OwnPrepareConfig(MaskerConfig):
    """A user's masker that learns what it likes of all keys it is given, and keeps it on the state."""


@register_masker(OwnPrepareConfig)
class OwnPrepare(Masker[OwnPrepareConfig]):
    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        state.fitted, state.fit_length = keys.float().norm(dim=-1).mean(-1), keys.shape[2]

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        assert inputs.state is not None
        longer = inputs.keys.float().norm(dim=-1) > inputs.state.fitted.unsqueeze(-1)
        return mask.union(inputs.mask(longer.unsqueeze(2) & inputs.allowed))


@dataclass
class OwnSummaryConfig(MaskerConfig):
    """A user's masker that codes keys, and reads what the prefill saw."""


@register_masker(OwnSummaryConfig)
class OwnSummary(Masker[OwnSummaryConfig]):
    observes = ("queries",)

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        return keys.float()

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        _, codes = self.codes(inputs)
        assert inputs.state is not None and inputs.state.summary is not None and inputs.state.summary.queries is not None
        mean = inputs.state.summary.queries.float().mean((1, 2), keepdim=True)
        scores = (codes * mean).sum(-1).unsqueeze(2).expand(-1, -1, inputs.shape[2], -1)
        return mask.union(inputs.choose_top(scores, mask, 20))


def pipelines() -> list[ResearchAttention]:
    return [*layered_examples(LAYERS), *families(LAYERS)]


def attention(*maskers: MaskerConfig, **options: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([hub.SinkMaskerConfig(4), *maskers], **options))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder, observe = tmp_path_factory.mktemp("traces") / "t", observed_by(pipelines())
    return record_trace(small_model(None, request.param, layers=LAYERS), CONTEXT, QUESTION, 6, folder, observe=observe)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The layers of each call that replays make."""
    found: list[tuple[int, ...]] = []
    attend = ResearchAttention.attend_inputs

    def watch(self: ResearchAttention, inputs: AttentionInputs, state: Any = None) -> Any:
        found.append(inputs.layers)
        return attend(self, inputs, state)

    monkeypatch.setattr(ResearchAttention, "attend_inputs", watch)
    return found


def on_gpu(trace: Trace, ways: Sequence[ResearchAttention], **options: Any) -> list[ReplayResult]:
    with PretendedGPU():
        return replay(trace, ways, device="cuda", **options)


def assert_equal(found: Sequence[ReplayResult], wanted: Sequence[ReplayResult], labels: Sequence[str] | None = None) -> None:
    """The same keys, and outputs up to rounding."""
    for label, one, other in zip(labels or range(len(wanted)), found, wanted, strict=True):
        for figure in ("error", "density", "errors", "densities", "kv_fraction", "kv_shares"):
            close = {"rtol": 1e-3, "atol": 1e-5} if figure.startswith("error") else {"rtol": 1e-6, "atol": 1e-7}
            pair = getattr(one, figure), getattr(other, figure)
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                torch.testing.assert_close(*pair, **close, msg=lambda text, at=(label, figure): f"{at}: {text}")


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, True),
        ({"rows": [1, 4, 9]}, True),
        ({"rows": [0, 3]}, False),  # without the last row: keys that it does not see are not coded, and layers come one by one
        ({"layers": [3, 0, 4]}, True),
        ({"kv": True, "parts": 2}, True),
        ({"latent": 40, "kv": True}, None),  # Twilight one by one, and with it all
    ],
    ids=str,
)
def test_every_masker(trace: Trace, options: dict[str, Any], whole: bool | None, called: list[tuple[int, ...]]) -> None:
    wanted = replay(trace, pipelines(), seed=3, **options)
    layers = tuple(options.get("layers", range(LAYERS)))
    assert {len(own) for own in called} == {1}
    called.clear()
    found = on_gpu(trace, pipelines(), seed=3, **options)
    assert_equal(found, wanted, LABELS)
    one_by_one = {(layer,) for layer in layers}
    assert set(called) == ({layers} if whole else one_by_one if whole is None else {layers} | one_by_one)
    assert whole is None or called.count(layers) >= 17


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [None, [1, 9]], ids=str)
def test_groups_of_any_size(trace: Trace, most: int, rows: Any, monkeypatch: pytest.MonkeyPatch, called: list[Any]) -> None:
    wanted = replay(trace, pipelines(), seed=3, rows=rows, kv=True)
    called.clear()
    monkeypatch.setattr("sparse_attention_hub.replay.layers_at_once", lambda *_, **__: most)
    assert_equal(on_gpu(trace, pipelines(), seed=3, rows=rows, kv=True), wanted, LABELS)
    assert set(called) == {tuple(range(LAYERS)[start : start + most]) for start in range(0, LAYERS, most)}


def test_layers_that_an_attention_takes_otherwise(trace: Trace, called: list[tuple[int, ...]]) -> None:
    """Dense layers and head budgets end a call: all attentions of one have the same rules in all of its layers."""
    top, quest = hub.OracleTopKConfig(0.1), hub.QuestTopKMaskerConfig(0.2, 8)
    adaptive = hub.AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.3, 0, 0)
    two, three = [[0.5]] * 2, [[2.0]] * 3
    ways = [
        attention(top, dense_layers=[0, 1]),
        attention(quest, dense_layers=[2]),
        attention(top, dense_layers=list(range(LAYERS))),
        attention(top, head_budgets=[[0.5, 2.0]] * LAYERS),
        attention(top, adaptive, head_budgets=two + three),
        attention(hub.SnapKVConfig(0.1, 4, 3), head_budgets=[[0.5 + layer, 1.0] for layer in range(LAYERS)]),
        attention(quest, head_budgets=two + three, dense_layers=[1, 2]),
    ]
    every = (0, 1, 2, 3, 4)
    one_by_one = [(layer,) for layer in every]
    parts = (
        [(0, 1), (2, 3, 4)],
        [(0, 1), (2,), (3, 4)],
        [every],
        [every],
        [(0, 1), (2, 3, 4)],
        one_by_one,
        [(0,), (1, 2), (3, 4)],
    )
    for way, own in zip(ways, parts, strict=True):
        wanted = replay(trace, [way], seed=3, kv=True)
        called.clear()
        assert_equal(on_gpu(trace, [way], seed=3, kv=True), wanted)
        assert called == own
    for some, own in ((ways[:2], [(0, 1), (2,), (3, 4)]), (ways, one_by_one)):
        wanted = replay(trace, some, seed=3, kv=True)
        called.clear()
        assert_equal(on_gpu(trace, some, seed=3, kv=True), wanted)
        assert list(dict.fromkeys(called)) == own


def test_a_table_of_another_model_is_refused(trace: Trace) -> None:
    with pytest.raises(ValueError, match="head_budgets is a table of 2 layers"):
        on_gpu(trace, [attention(hub.OracleTopKConfig(0.1), head_budgets=[[0.5], [0.5]])])


def test_maskers_from_outside_get_one_layer_if_they_ask_for_it(trace: Trace, called: list[tuple[int, ...]]) -> None:
    own = ByLayerConfig(), OwnFitConfig(), OwnPrepareConfig(), OwnSummaryConfig(), hub.QuestTopKMaskerConfig(0.2, 8)
    ways = [attention(config) for config in own]
    wanted = replay(trace, ways, seed=3, kv=True)
    called.clear()
    assert_equal(on_gpu(trace, ways, seed=3, kv=True), wanted)
    every = tuple(range(LAYERS))  # of the first, until it asks, and of Quest
    assert called == [every, every, *((layer,) for layer in every for _ in range(4))]


def change(trace: Trace, layer: int, **changed: Tensor) -> None:
    """Write other tensors of a layer, with the dense output that follows."""
    path = trace.folder / f"layer_{layer:03d}.safetensors"
    tensors = load_file(path) | changed
    call = {"scaling": trace.meta["scaling"][str(layer)], "sinks": tensors.get("sinks")}
    tensors["dense"] = dense_attention(*(tensors[name] for name in ("queries", "keys", "values")), **call).float()
    path.unlink()  # it may be mapped
    save_file(tensors, path)


def test_layers_that_differ(tmp_path: Path, called: list[tuple[int, ...]]) -> None:
    """A layer of fewer keys, one with sinks and one of another softcap are calls of their own."""
    made = record_trace(small_model(None, layers=8), CONTEXT, QUESTION, 6, tmp_path / "t")
    layer = made.layer(2)
    change(made, 2, keys=layer.keys[:, :, 40:].contiguous(), values=layer.values[:, :, 40:].contiguous())
    for number in (4, 5):
        change(made, number, sinks=torch.tensor([0.5, 1.0 + number]))
    made.meta["softcap"] = {"7": 5.0}
    ways = families(8)
    wanted = replay(made, ways, seed=3, kv=True)
    called.clear()
    assert_equal(on_gpu(made, ways, seed=3, kv=True), wanted)
    assert list(dict.fromkeys(called)) == [(0, 1), (2,), (3,), (4,), (5,), (6,), (7,)]


def test_states_of_a_group_are_those_of_its_layers(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is fitted once, whether it is replayed with others or not."""
    way, states, fitted = attention(hub.PQCacheConfig(0.1, 4, 3, 5, 4, "ip")), SharedStates(), list[int]()
    fit = PQCacheMasker.fit

    def count(self: PQCacheMasker, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> Any:
        fitted.append(layer_idx)
        return fit(self, keys, allowed, layer_idx)

    monkeypatch.setattr(PQCacheMasker, "fit", count)
    with PretendedGPU():
        replay(trace, [way], layers=[2], device="cuda", states=states)
        found = replay(trace, [way, way], device="cuda", states=states)
        again = replay(trace, [way], layers=[0, 3], device="cuda", states=states)
    assert fitted == [2, 0, 1, 3, 4]
    fitted.clear()
    uneven = attention(hub.PQCacheConfig(0.1, 4, 3, 5, 4, "ip"), head_budgets=[[0.5 + layer] for layer in range(LAYERS)])
    with PretendedGPU():  # layers one by one, without room for the states of two
        replay(trace, [uneven] * 3, device="cuda", states=SharedStates(1))
    assert fitted == [0, 1, 2, 3, 4]
    wanted = replay(trace, [way, way])
    assert_equal(found, wanted)
    torch.testing.assert_close(again[0].errors, wanted[0].errors[[0, 3]], rtol=1e-3, atol=1e-5)


def test_held_layers_are_held_once_and_side_by_side(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = Trace.layer

    def count(self: Trace, layer_idx: int, device: torch.device | str = "cpu") -> TraceLayer:
        read.append(layer_idx)
        return real(self, layer_idx, device)

    monkeypatch.setattr(Trace, "layer", count)
    wanted = {layers: replay(trace, families(LAYERS), layers=layers) for layers in (None, (0, 2, 4), (3,))}
    size = max(file.stat().st_size for file in trace.folder.glob("*.safetensors"))
    for room, missing in ((10 * size, []), (2 * size, [2, 3, 4])):
        held = HeldLayers(room)
        for layers in (None, (0, 2, 4), None, (3,)):
            read.clear()
            assert_equal(on_gpu(trace, families(LAYERS), layers=layers, held=held), wanted[layers])
            if layers is None and len(held._together):
                assert read in (missing, list(range(LAYERS)))
        numbers = [number for _, number in held._held]
        storages = {layer.keys.untyped_storage().data_ptr() for layer in held._held.values()}
        assert numbers == list(range(LAYERS - len(missing))) and len(storages) == (2 if missing else 1)


def test_a_layer_that_is_asked_for_twice_is_held_once(trace: Trace) -> None:
    held, layers = HeldLayers(2**30), [2, 2, 1]
    wanted = replay(trace, families(LAYERS), layers=layers)
    assert_equal(on_gpu(trace, families(LAYERS), layers=layers, held=held), wanted)
    storages = {layer.keys.untyped_storage().data_ptr(): layer.keys.untyped_storage().nbytes() for layer in held._held.values()}
    assert sum(storages.values()) == sum(layer.keys.nbytes for layer in held._held.values())


def test_a_group_is_let_go_before_the_next_one_is_read(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, alive, join, read = list[weakref.ref[TraceLayers]](), list[int](), TraceLayers.of, Trace.layer

    def remember(each: Sequence[TraceLayer]) -> TraceLayers:
        made = join(each)
        groups.append(weakref.ref(made))
        return made

    def count(self: Trace, layer_idx: int, device: torch.device | str = "cpu") -> TraceLayer:
        alive.append(sum(group() is not None for group in groups))
        return read(self, layer_idx, device)

    monkeypatch.setattr("sparse_attention_hub.replay.layers_at_once", lambda *_, **__: 2)
    monkeypatch.setattr(TraceLayers, "of", staticmethod(remember))
    monkeypatch.setattr(Trace, "layer", count)
    on_gpu(trace, families(LAYERS))
    assert alive == [0] * LAYERS and len(groups) == 3


def test_how_many_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(rows: int, keys: int) -> TraceLayer:
        every = (torch.empty(1, heads, length, 64) for heads, length in ((8, rows), (2, keys), (2, keys)))
        return TraceLayer(0, *every, dense=torch.empty(1, rows, 8, 64), scaling=1.0)  # type: ignore[misc]

    ways = families(1)
    assert layers_at_once(layer(4, 1000), 4, ways) == 1
    with PretendedGPU() as gpu:

        def count(rows: int, keys: int) -> int:
            made = layer(rows, keys)
            gpu.move([made.queries, made.keys, made.values])
            return layers_at_once(made, rows, ways)

        assert count(4, 1000) == WIDE_ENTRIES // 32_000 and count(40, 1000) == WIDE_ENTRIES // 320_000
        assert count(40, 200_000) == 1
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=GIB // 2))
        assert 1 < count(4, 1000) < 64


def test_uniforms_of_several_layers_are_those_of_each() -> None:
    rows, keys = torch.tensor([[3, 900]]).expand(3, -1), torch.arange(500).expand(3, -1)
    layers, seeds = (4, 0, 31), [7, 7, 8]

    def each(place: Any) -> Tensor:
        items = zip(seeds, layers, strict=True)
        return torch.cat([keyed_uniforms([seed], (layer,), 2, place(rows[:1]), place(keys[:1])) for seed, layer in items])

    wanted = each(lambda tensor: tensor)
    assert torch.equal(keyed_uniforms(seeds, layers, 2, rows, keys), wanted)
    with PretendedGPU() as gpu:
        on_device = [gpu.move(tensor.clone()) for tensor in (rows, keys)]
        assert torch.equal(keyed_uniforms(seeds, layers, 2, *on_device).cpu(), wanted)
