"""Loki: keys by their first principal components, against NumPy; the file of axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import AttentionState, LokiConfig, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.maskers.principal_axes import principal_axes, read_axes, write_axes
from sparse_attention_hub.testing import MaskerContract

KV_HEADS, DIM = 2, 16


def keys_to_learn_from(layer: int, kv_heads: int = KV_HEADS, dim: int = DIM) -> Tensor:
    """(Hkv, 300, D), with a mean and with directions of very different variance."""
    generator = torch.Generator().manual_seed(layer)
    mixing = torch.randn(kv_heads, dim, dim, generator=generator) * torch.linspace(2.0, 0.1, dim).unsqueeze(-1)
    return torch.randn(kv_heads, 300, dim, generator=generator) @ mixing + 3.0


def axes_by_numpy(keys: np.ndarray) -> np.ndarray:
    """Principal axes of keys (N, D) as columns, those of largest variance first."""
    values, vectors = np.linalg.eigh(np.cov(keys.T))
    return vectors[:, np.argsort(-values)]


def axes_file(folder: Path, kv_heads: int = KV_HEADS, dim: int = DIM) -> str:
    path = folder / "axes.safetensors"
    write_axes({layer: principal_axes(keys_to_learn_from(layer, kv_heads, dim)) for layer in range(2)}, path)
    return str(path)


class TestLoki(MaskerContract):
    """The axes are shared by all kv heads, of which the contract has several numbers."""

    def make_config(self) -> LokiConfig:
        return LokiConfig(heavy_size=0.1, axes_file=axes_file(self.tmp_path, 1, self.head_dim), components=8)


def tensors(n: int, rows: int = 1, batch: int = 1) -> list[Tensor]:
    """4 query heads on 2 kv heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, rows, DIM), (batch, KV_HEADS, n, DIM), (batch, KV_HEADS, n, DIM)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(*args: Any, **kwargs: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([LokiConfig(*args, **kwargs)]))


def check(chosen: Tensor, queries: Tensor, keys: Tensor, layer: int, components: int, size: int) -> None:
    """Chosen (H, N) are the keys with the highest scores over the first components, each query head for itself."""
    for head in range(queries.shape[0]):
        kv_head = head * keys.shape[0] // queries.shape[0]
        axes = axes_by_numpy(keys_to_learn_from(layer)[kv_head].double().numpy())[:, :components]
        scores = (keys[kv_head].double().numpy() @ axes) @ (queries[head].double().numpy() @ axes)
        assert set(chosen[head].nonzero()[:, 0].tolist()) == set(np.argsort(-scores)[:size].tolist())


def test_the_axes_are_those_of_the_covariance() -> None:
    """Up to their signs."""
    keys = keys_to_learn_from(0)
    axes = principal_axes(keys)
    assert axes.dtype == torch.float32 and axes.shape == (KV_HEADS, DIM, DIM)
    for head in range(KV_HEADS):
        alike = np.abs(axes_by_numpy(keys[head].double().numpy()).T @ axes[head].double().numpy())
        np.testing.assert_allclose(alike, np.eye(DIM), atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("components", [1, 4, 16])
def test_selection_is_the_definition(tmp_path: Path, layer: int, components: int) -> None:
    q, k, v = tensors(101)
    loki = attention(12, axes_file(tmp_path), components)
    loki(q, k, v, layer_idx=1 - layer)  # the other layer first: its axes must not stay
    chosen = loki(q, k, v, layer_idx=layer).mask.inclusion_probability()[0, :, 0]
    check(chosen, q[0, :, 0], k[0], layer, components, 12)


def test_a_batch_with_padding_is_its_items_alone(tmp_path: Path) -> None:
    q, k, v = tensors(90, batch=3)
    padding = [0, 13, 40]
    allowed = torch.arange(90) >= torch.tensor(padding).unsqueeze(-1)
    k.masked_fill_(~allowed[:, None, :, None], float("nan"))
    loki = attention(11, axes_file(tmp_path), 0.25)
    chosen = loki(q, k, v, attention_mask=allowed[:, None, None]).mask.inclusion_probability()[:, :, 0]
    for item, start in enumerate(padding):
        assert bool((chosen[item, :, :start] == 0).all())
        check(chosen[item, :, start:], q[item, :, 0], k[item, :, start:], 0, 4, 11)


def test_decoding_with_a_state_rewound_and_forked_is_a_call_without_one(tmp_path: Path) -> None:
    q, k, v = tensors(120)
    loki = attention(15, axes_file(tmp_path), 4)
    state, forked = loki.new_state(), AttentionState()
    loki.prepare(k[:, :, :100], 0, state)

    def check_steps(state: AttentionState, keys: Tensor) -> None:
        for n in range(101, 121):
            got = loki(q, keys[:, :, :n], v[:, :, :n], state=state).mask.inclusion_probability()
            assert torch.equal(got, loki(q, keys[:, :, :n], v[:, :, :n]).mask.inclusion_probability()), n

    check_steps(state, k)
    assert state.entry(0, 0).codes().shape == (1, 2, 120, 4)
    forked.adopt(0, 0, state.entry(0, 0).fork(100))
    check_steps(forked, torch.cat([k[:, :, :100], 3 * k[:, :, :20]], 2))
    torch.testing.assert_close(state.entry(0, 0).codes(), loki.maskers[0].encode(k, True, 0), msg="the fork changed its parent")
    state.rewind(100)
    check_steps(state, torch.cat([k[:, :, :100], -k[:, :, :20]], 2))


def test_bytes_read_are_those_of_the_kept_components(tmp_path: Path) -> None:
    result = attention(12, axes_file(tmp_path), 4)(*tensors(120))
    shared = float(result.mask.group_counts().float().mean()) / 120
    assert result.kv_fraction - shared == pytest.approx(4 / 32)


def test_axes_survive_their_file(tmp_path: Path) -> None:
    axes = {3: principal_axes(keys_to_learn_from(3))}
    write_axes(axes, tmp_path / "deep" / "axes.safetensors")
    found = read_axes(str(tmp_path / "deep" / "axes.safetensors"))
    assert list(found) == [3] and torch.equal(found[3], axes[3])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["axes.safetensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": -1}, "heavy_size must be > 0, got -1"),
        ({"components": 0}, "components must be > 0, got 0"),
        ({"components": 1.5}, r"components must be > 0; as a fraction in \(0, 1\], got 1.5"),
        ({"axes_file": "nowhere"}, "axes_file must be an existing file, got 'nowhere'"),
        ({"axes_file": None}, "axes_file must name a file of principal axes, got None"),
    ],
)
def test_bad_configs(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**({"heavy_size": 15, "axes_file": axes_file(tmp_path)} | fields))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (None, "is not a safetensors file"),
        ({"other": torch.zeros(2, 16, 16)}, "holds 'other', which is no layer of principal axes"),
        ({"layers.1": torch.zeros(2, 16, 16)}, "has no principal axes of layer 0"),
        ({"layers.0": torch.zeros(2, 8, 8)}, r"are \(2, 8, 8\), the model has 2 kv heads of 16 channels"),
        ({"layers.0": torch.zeros(3, 16, 16)}, r"are \(3, 16, 16\), the model has 2 kv heads of 16 channels"),
    ],
)
def test_bad_files(tmp_path: Path, axes: dict[str, Tensor] | None, message: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "bad.safetensors"
    path.write_text("{") if axes is None else save_file(axes, path)
    with pytest.raises(ValueError, match=message):
        attention(15, str(path))(*tensors(50))
