"""Retrieval heads: the mass outside sinks and window against NumPy, the command, and the model's own file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_recording import Letters
from tiny_models import forced

from sparse_attention_hub import DuoAttentionConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.duo_attention import read_pattern
from sparse_attention_hub.models import LanguageModel, prefill
from sparse_attention_hub.models.head_calibration import find_heads, head_values, main, outside_mass, write_pattern
from sparse_attention_hub.models.model_files import complete
from sparse_attention_hub.models.recording import sample_texts
from sparse_attention_hub.models.trace import TraceLayer, record_trace

SINK, WINDOW = 3, 7


@pytest.fixture
def model(llama: LanguageModel) -> LanguageModel:
    llama.tokenizer = Letters()
    llama.tokenizer.decode = lambda ids, **_: ""  # type: ignore[attr-defined]
    return llama


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_mass_outside_sink_and_window(softcap: float | None, sinks: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 5, 8, generator=generator)
    keys, values = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    layer = TraceLayer(0, queries, keys, values, torch.zeros(0), scaling=0.4, softcap=softcap, sinks=sinks)
    expected = np.zeros((2, 2, 5))
    for head in range(4):
        for row in range(5):
            seen = 40 - 5 + row + 1
            scores = 0.4 * keys[0, head // 2, :seen].double().numpy() @ queries[0, head, row].double().numpy()
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            total = np.exp(scores).sum() + (np.exp(float(sinks[head])) if sinks is not None else 0.0)
            expected[head // 2, head % 2, row] = np.exp(scores)[SINK : seen - WINDOW].sum() / total
    np.testing.assert_allclose(outside_mass(layer, SINK, WINDOW).numpy(), expected.mean((1, 2)), rtol=1e-5)


def test_layers_that_are_not_recorded_have_no_values(model: LanguageModel, tmp_path: Path) -> None:
    trace = record_trace(model, list(range(3, 60)), [5, 6, 7], 1, tmp_path / "trace", layers=[1, 3])
    values = head_values([trace], SINK, WINDOW)
    assert values.shape == (4, 2) and values.isnan().all(1).tolist() == [True, False, True, False]
    write_pattern(values, tmp_path / "heads.tsv")
    torch.testing.assert_close(read_pattern(str(tmp_path / "heads.tsv")), values, atol=1e-6, rtol=0, equal_nan=True)


def test_found_heads_serve_the_model(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", str(tmp_path))
    whole = complete(ResearchAttentionConfig([SinkMaskerConfig(2), DuoAttentionConfig(0.25)]), model)
    path = whole.masker_configs[1].pattern_file  # type: ignore[attr-defined]
    values = read_pattern(path)
    assert values.shape == (model.num_layers, 2) and bool(((values > 0) & (values < 1)).all())
    assert complete(whole, model) == whole
    result = forced(model, prefill(model, list(range(3, 60)), 20), [5, 6, 7], [8], ResearchAttention(whole))
    assert result.density is not None and 0.25 < result.density < 0.32  # 2 of 8 kv heads, and 2 sinks of 60 keys


def test_short_texts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="at least 40 tokens, got 8"):
        find_heads(model, ["a text."], sink=10, window=10)
    assert find_heads(model, sample_texts(1, characters=300), 128, 10, 10).shape == (4, 2)


def test_the_command(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparse_attention_hub.models.head_calibration.load_asked_model", lambda options: model)
    out = tmp_path / "heads.tsv"
    arguments = ["--model", "tiny", "--tokens", "200", "--sink", "4", "--window", "16", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}: 4 layers x 2 kv heads\n"
    assert read_pattern(str(out)).shape == (4, 2)
    assert main([*arguments, "--window", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
