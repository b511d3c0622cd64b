"""Recording queries and keys, calibrating channels, training signatures: on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import forced

from sparse_attention_hub import (
    DoubleSparsityTopKMaskerConfig,
    HashAttentionTopKMaskerConfig,
    LokiConfig,
    ResearchAttention,
    ResearchAttentionConfig,
)
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.channel_file import write_channels
from sparse_attention_hub.maskers.hat_weights import hat_config_fields, write_hat_weights
from sparse_attention_hub.maskers.principal_axes import read_axes, write_axes
from sparse_attention_hub.models import LanguageModel, prefill
from sparse_attention_hub.models.axes_calibration import calibrate_axes
from sparse_attention_hub.models.channel_calibration import calibrate
from sparse_attention_hub.models.channel_calibration import main as calibration_main
from sparse_attention_hub.models.hat_training import Recipe, train
from sparse_attention_hub.models.recording import read_texts, record, sample_texts


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [2 + ord(letter) % 60 for letter in text]


@pytest.fixture
def model(llama: LanguageModel) -> LanguageModel:
    llama.tokenizer = Letters()
    return llama


def test_sample_texts_are_reproducible_and_ask_about_what_they_tell() -> None:
    first, second = sample_texts(2, seed=3)
    assert [first, second] == sample_texts(2, seed=3) and first != second
    answer = first.rsplit("Answer: ", 1)[1]
    assert first.count(answer) == 2


def test_recorded_queries_and_keys_are_the_models(model: LanguageModel) -> None:
    (found,) = record(model, ["a short text to look at"], 200)
    ids = [1, *model.tokenizer.encode("a short text to look at")]
    assert sorted(found) == list(range(model.num_layers))
    queries, keys = found[0]
    assert queries.shape[1] == len(ids) - 1 and keys.shape[1] == len(ids)
    cached, _ = prefill(model, ids, 1).context_keys(0)
    torch.testing.assert_close(keys, cached[0], atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_in_the_middle_and_short_ones_refused(model: LanguageModel) -> None:
    (found,) = record(model, ["x" * 500], 64)
    assert found[0][1].shape[1] == 64
    with pytest.raises(UserError, match="8 tokens or more, got 4"):
        list(record(model, ["abc"], 64))


def test_texts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n---\ntwo\n---\n")
    assert read_texts(str(path)) == ["one", "two"]
    path.write_text("eins\n---\nzwölf\n", "utf-8-sig")
    assert read_texts(str(path)) == ["eins", "zwölf"]
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(str(path))
    with pytest.raises(UserError, match="existing text file"):
        read_texts(str(tmp_path / "nowhere"))


def test_calibrated_channels_serve_the_model(model: LanguageModel, tmp_path: Path) -> None:
    lists = calibrate(model, sample_texts(2, characters=300), tokens=128)
    assert len(lists) == 3 * model.num_layers
    (found,) = record(model, sample_texts(1, characters=300), 128)
    queries, keys = found[1]
    dim = queries.shape[2]
    assert all(sorted(order) == list(range(dim)) for lists_of_heads in lists.values() for order in lists_of_heads)
    single = calibrate(model, sample_texts(1, characters=300), tokens=128)
    assert single["model.layers.1.self_attn.q_proj"][0][0] == int(queries[0].abs().mean(0).argmax())
    assert single["model.layers.1.self_attn.k_proj"][0][0] == int(keys[0].abs().mean(0).argmax())
    path = tmp_path / "deep" / "channels.json"
    write_channels(lists, path)
    config = DoubleSparsityTopKMaskerConfig(heavy_size=0.3, sorted_channel_file=str(path), group_factor=4)
    attention = ResearchAttention(ResearchAttentionConfig([config]))
    result = forced(model, prefill(model, list(range(3, 60)), 20), [5, 6, 7], [8], attention)
    assert result.density is not None and 0.2 < result.density < 0.4


def test_calibrated_axes_serve_the_model(model: LanguageModel, tmp_path: Path) -> None:
    texts = sample_texts(2, characters=300)
    axes = calibrate_axes(model, texts, tokens=128)
    assert sorted(axes) == list(range(model.num_layers))
    keys = torch.cat([found[1][1] for found in record(model, texts, 128)], 1)
    for own, head in zip(axes[1], keys.double(), strict=True):
        variances = torch.cov((head @ own.double()).T)
        assert bool((variances.diagonal().diff() <= 1e-9).all()), "the first axis has the largest variance"
        torch.testing.assert_close(variances, variances.diagonal().diag(), atol=1e-6, rtol=0)
    write_axes(axes, tmp_path / "axes.safetensors")
    config = LokiConfig(heavy_size=0.3, axes_file=str(tmp_path / "axes.safetensors"))
    attention = ResearchAttention(ResearchAttentionConfig([config]))
    result = forced(model, prefill(model, list(range(3, 60)), 20), [5, 6, 7], [8], attention)
    assert result.density is not None and 0.2 < result.density < 0.4


def test_a_models_axes_are_found_once(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", str(tmp_path))
    asked = ResearchAttentionConfig([LokiConfig(0.1, axes_file=None)])
    for _ in range(2):
        (config,) = model.complete(asked).masker_configs
        assert isinstance(config, LokiConfig) and str(config.axes_file).startswith(str(tmp_path / "axes"))
    assert sorted(read_axes(str(config.axes_file))) == list(range(model.num_layers))
    assert caplog.text.count("calibrating the axes of") == 1


def test_trained_weights_serve_the_model(model: LanguageModel, tmp_path: Path) -> None:
    recordings = list(record(model, sample_texts(3, characters=600), 128))
    weights = train(recordings, Recipe(bits=16, steps=5))
    path = str(tmp_path / "hat.safetensors")
    write_hat_weights(weights, path, "silu")
    config = HashAttentionTopKMaskerConfig(heavy_size=0.3, hat_weight_file=path, **hat_config_fields(path))  # type: ignore[arg-type]
    attention = ResearchAttention(ResearchAttentionConfig([config]))
    result = forced(model, prefill(model, list(range(3, 60)), 20), [5, 6, 7], [8], attention)
    assert result.density is not None and 0.2 < result.density < 0.4


def test_calibration_as_a_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "channels.json"
    assert calibration_main(["--model", "x", "--out", str(out), "--text", str(tmp_path / "nowhere.txt")]) == 2
    assert "existing text file" in capsys.readouterr().err
    assert not out.exists()
