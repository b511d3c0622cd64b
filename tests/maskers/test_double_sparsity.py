"""Double Sparsity: channels of each layer and head, labels, and the file of channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import DoubleSparsityTopKMaskerConfig, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.maskers.channel_file import read_channels
from sparse_attention_hub.maskers.codes import pseudo_quantise
from sparse_attention_hub.testing import MaskerContract


def write_channels(folder: Path, heads: int, dim: int, layers: int = 2) -> tuple[str, dict[str, list[list[int]]]]:
    generator = torch.Generator().manual_seed(3)
    record = {
        f"model.layers.{layer}.self_attn.{selection}": [torch.randperm(dim, generator=generator).tolist() for _ in range(heads)]
        for layer in range(layers)
        for selection in ("q_proj", "k_proj", "qk_proj")
    }
    path = folder / "channels.json"
    path.write_text(json.dumps(record))
    return str(path), record


class TestDoubleSparsity(MaskerContract):
    def make_config(self) -> DoubleSparsityTopKMaskerConfig:
        path, _ = write_channels(self.tmp_path, self.heads, self.head_dim)
        return DoubleSparsityTopKMaskerConfig(heavy_size=0.1, sorted_channel_file=path, group_factor=4)


class TestDoubleSparsityFullLabels(TestDoubleSparsity):
    def make_config(self) -> DoubleSparsityTopKMaskerConfig:
        path, _ = write_channels(self.tmp_path, self.heads, self.head_dim)
        return DoubleSparsityTopKMaskerConfig(0.1, path, group_factor=2, label_bits=16, channel_selection="k_proj")


def tensors(n: int, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 1, dim), (1, kv_heads, n, dim), (1, kv_heads, n, dim)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def attention(*args: Any, **kwargs: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([DoubleSparsityTopKMaskerConfig(*args, **kwargs)]))


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path, record = write_channels(tmp_path, 4, 32)
    Path(path).write_text(json.dumps(record), "utf-8-sig")
    assert read_channels(path) == record


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_each_layer_and_head_has_its_own_channels(tmp_path: Path, layer: int, bits: int) -> None:
    path, record = write_channels(tmp_path, 4, 32)
    q, k, v = tensors(120)
    hub = attention(15, path, group_factor=4, label_bits=bits)
    hub(q, k, v, layer_idx=1 - layer)  # the other layer first: its channels must not stay
    mask = hub(q, k, v, layer_idx=layer).mask.inclusion_probability()[0, :, 0]
    for head in range(4):
        channels = record[f"model.layers.{layer}.self_attn.qk_proj"][head][:8]
        labels = pseudo_quantise(k[0, head // 2][:, channels], bits)
        scores = labels @ pseudo_quantise(q[0, head, 0][channels], bits)
        assert set(mask[head].nonzero()[:, 0].tolist()) == set(scores.topk(15).indices.tolist())


def test_labels_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_channels(tmp_path, 4, 32)
    hub = attention(15, path, group_factor=4)
    masker, seen = hub.maskers[0], []
    original = masker.encode
    monkeypatch.setattr(masker, "encode", lambda keys, *rest: (seen.append(keys.shape[2]), original(keys, *rest))[1])
    q, k, v = tensors(110)
    state = hub.new_state()
    monkeypatch.setattr(type(masker), "encode", lambda self, *args: masker.__dict__["encode"](*args))
    hub.prepare(k[:, :, :100], 0, state)
    for n in range(101, 111):
        hub(q, k[:, :, :n], v[:, :, :n], state=state)
    assert seen == [100] + [1] * 10


def test_bytes_read(tmp_path: Path) -> None:
    path, _ = write_channels(tmp_path, 4, 32)
    result = attention(12, path, group_factor=4, label_bits=4)(*tensors(120))
    shared = float(result.mask.group_counts().float().mean()) / 120
    # 2 query heads a kv head keep 8 channels of 4 bits each; key and value are 64 numbers of 32 bits.
    assert result.kv_fraction - shared == pytest.approx(2 * 8 * 4 / (64 * 32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": -1}, "heavy_size must be > 0, got -1"),
        ({"group_factor": 0}, "group_factor must be an integer >= 1, got 0"),
        ({"label_bits": 17}, r"label_bits must be an integer in \[1, 16\], got 17"),
        ({"channel_selection": "v_proj"}, "channel_selection must be one of q_proj, k_proj, qk_proj, got 'v_proj'"),
        ({"sorted_channel_file": "nowhere.json"}, "sorted_channel_file must be an existing file, got 'nowhere.json'"),
        ({"sorted_channel_file": None}, "sorted_channel_file must name a file of channels, got None"),
        ({"sorted_channel_file": ""}, "sorted_channel_file must name a file of channels, got None"),
    ],
)
def test_bad_configs(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path, _ = write_channels(tmp_path, 4, 32)
    with pytest.raises(ValueError, match=message):
        attention(**({"heavy_size": 15, "sorted_channel_file": path} | fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[1]", "must hold a JSON object"),
        ('{"model.layers.0.self_attn.qk_proj": [1, 2]}', "one list of channel numbers a head"),
        ('{"model.layers.0.self_attn.qk_proj": [["a"]]}', "one list of channel numbers a head"),
        ('{"model.layers.0.self_attn.q_proj": [[0, 1]]}', "has no entry 'model.layers.0.self_attn.qk_proj'"),
        ('{"model.layers.0.self_attn.qk_proj": [[0, 1]]}', "must list 8 channels a head or more"),
        (
            json.dumps({"model.layers.0.self_attn.qk_proj": [list(range(40, 60))] * 4}),
            r"must name channels in \[0, 31\]",
        ),
        (
            json.dumps({"model.layers.0.self_attn.qk_proj": [list(range(20))] * 6}),
            "is for 6 query heads, the model has 4",
        ),
        (
            json.dumps({"model.layers.0.self_attn.qk_proj": [list(range(20))] * 5}),
            "5 heads, which 2 kv heads do not divide",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        attention(15, str(path), group_factor=4)(*tensors(50))


def test_too_large_a_group_factor(tmp_path: Path) -> None:
    path, _ = write_channels(tmp_path, 4, 32)
    with pytest.raises(ValueError, match="group_factor must be at most the head dimension 32, got 64"):
        attention(15, path, group_factor=64)(*tensors(50))
