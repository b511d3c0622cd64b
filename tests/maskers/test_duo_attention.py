"""DuoAttention: which heads see everything, and the file that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    DuoAttentionConfig,
    LocalMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.duo_attention import read_pattern, retrieval_heads
from sparse_attention_hub.testing import MaskerContract

LAYERS, HEADS, KV_HEADS, KEYS = 3, 8, 4, 60


def write(folder: Path, values: np.ndarray) -> str:
    path = folder / "full_attention_heads.tsv"
    np.savetxt(path, values, delimiter="\t")  # as the published files were written
    return str(path)


class TestDuoAttention(MaskerContract):
    def make_config(self) -> MaskerConfig:
        # A value per query head: the contract's calls have 8, 2 and 1 kv heads.
        values = np.random.default_rng(0).random((5, 8))
        return DuoAttentionConfig(0.4, write(self.tmp_path, values))

    def full_config(self) -> MaskerConfig:
        return DuoAttentionConfig(1.0, write(self.tmp_path, np.ones((5, 8))))


def run(path: str, share: float, layer: int, rows: int = 1) -> Tensor:
    """bool (H, rows, KEYS)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, rows, 16), (1, KV_HEADS, KEYS, 16), (1, KV_HEADS, KEYS, 16)]
    args = [torch.randn(shape, generator=generator) for shape in shapes]
    configs = [SinkMaskerConfig(2), LocalMaskerConfig(3), DuoAttentionConfig(share, path)]
    result = ResearchAttention(ResearchAttentionConfig(configs))(*args, layer_idx=layer)
    assert result.kv_fraction == pytest.approx(result.density)  # choosing reads nothing
    return result.mask.inclusion_probability()[0] > 0


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_heads_above_the_quantile_see_everything_the_others_sink_and_window(
    tmp_path: Path, share: float, rows: int
) -> None:
    values = np.random.default_rng(1).random((LAYERS, KV_HEADS))
    path = write(tmp_path, values)
    count = max(1, int(share * LAYERS * KV_HEADS))
    full = values >= np.sort(values, axis=None)[-count]
    for layer in range(LAYERS):
        mask = run(path, share, layer, rows)
        for head in range(HEADS):
            for row in range(rows):
                seen = KEYS - rows + row + 1
                near = {0, 1, seen - 3, seen - 2, seen - 1}
                expected = set(range(seen)) if full[layer, head // 2] else near
                assert set(mask[head, row].nonzero()[:, 0].tolist()) == expected


def test_equal_values_are_taken_from_the_first_layer_on_and_none_at_share_0(tmp_path: Path) -> None:
    path = write(tmp_path, np.ones((LAYERS, KV_HEADS)))
    assert retrieval_heads(path, 0.5, KV_HEADS).sum(1).tolist() == [4, 2, 0]
    assert not retrieval_heads(path, 0.0, KV_HEADS).any()


def test_values_per_query_head_and_layers_without_any(tmp_path: Path) -> None:
    values = np.array([[0.1, 0.9, 0.2, 0.3], [np.nan] * 4, [0.8, 0.0, 0.0, 0.4]])
    path = write(tmp_path, values)
    assert retrieval_heads(path, 0.5, 2).tolist() == [[True, False], [False, False], [True, False]]
    assert retrieval_heads(path, 1.0, 2).tolist() == [[True, True], [False, False], [True, True]]


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "heads.tsv"
    path.write_text("0.5\t1\n", "utf-8-sig")
    assert read_pattern(str(path)).tolist() == [[0.5, 1.0]]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, np.zeros((2, 2)))
    assert float(read_pattern(path).sum()) == 0
    Path(path).write_text("1\t1\n1\t1\n")
    import os

    os.utime(path, (1, 1))
    assert float(read_pattern(path).sum()) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a line of as many numbers for each layer"),
        ("0.1\tx\n", "must hold numbers separated by tabs"),
        ("0.1\t0.2\n0.3\n", r"got \[1, 2\]"),
        ("inf\t0.2\n", "must hold finite numbers"),
        ("nan\tnan\n", "must hold finite numbers"),
        ("0.1\t0.2\t0.3\n" * LAYERS, "has 3 heads per layer, the model 4 kv heads"),
        ("0.1\t0.2\t0.3\t0.4\n", "is for 1 layers, this is layer 2"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        run(str(path), 0.5, 2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((1.5, None), r"retrieval_share must be a number in \[0.0, 1.0\], got 1.5"),
        ((0.5, "nowhere.tsv"), "pattern_file must be an existing file, got 'nowhere.tsv'"),
        ((0.5, None), "pattern_file must name a file of head values, got None; make one with: python -m"),
    ],
)
def test_bad_fields(fields: tuple[float, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResearchAttention(ResearchAttentionConfig([DuoAttentionConfig(*fields)]))
