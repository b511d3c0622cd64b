"""What is refused, or made right, before or while weights are loaded: each in one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, tokens, wrap
from transformers import LlamaConfig

from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import answer, check_model, load_model, load_shape, load_tokenizer, prefill
from sparse_attention_hub.models.config_checks import max_positions
from sparse_attention_hub.models.embedded import embedded_folder
from sparse_attention_hub.models.survey_models import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the embedded model's tokenizer, an embedding for it and tiny random weights."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    build("llama", vocab_size=49152).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder() / name, folder / name)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def change(folder: Path, **fields: Any) -> str:
    """Change config.json; None removes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(folder)


def rename(folder: Path, how: Any) -> str:
    """Give the weights other names; how: name -> its new name, None to leave it out."""
    path = folder / "model.safetensors"
    weights = {how(name): tensor for name, tensor in load_file(path).items() if how(name) is not None}
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def refused(folder: str, words: str, load: Any = load_model) -> str:
    with pytest.raises(UserError, match=words) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 420
    return text


@pytest.mark.parametrize(
    ("how", "count"),
    [
        (lambda name: "base_model.model." + name, 39),
        (lambda name: "_orig_mod." + name, 39),
        (lambda name: "module." + name, 39),
        (lambda name: "module." + name if "layers.2." in name else name, 9),
        (lambda name: None if "layers.1." in name else name, 9),
        (lambda name: None if name == "lm_head.weight" else name, 1),
        (lambda name: None if name == "model.norm.weight" else name, 1),
    ],
)
def test_missing_weights_are_refused(folder: Path, how: Any, count: int) -> None:
    refused(rename(folder, how), f"{count} of 39 weights are missing")


def test_one_layer_more_than_the_file_has(folder: Path) -> None:
    refused(change(folder, num_hidden_layers=5), "9 of 48 weights are missing from its files, such as model.layers.4.")


def test_tied_weights_are_not_missing(folder: Path) -> None:
    rename(folder, lambda name: None if name == "lm_head.weight" else name)
    lm = load_model(change(folder, tie_word_embeddings=True), device="cpu")
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_unexpected_weights_are_noted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(change(folder, num_hidden_layers=3), device="cpu")
    assert any("9 weights of its files are not used" in record.message for record in caplog.records)


def test_names_that_transformers_knows_itself_load_as_they_are(folder: Path, saved: Path) -> None:
    expected = load_model(str(saved), device="cpu").model.state_dict()
    for name, weight in load_model(rename(folder, lambda name: name), device="cpu").model.state_dict().items():
        assert torch.equal(weight, expected[name])


def test_an_attention_in_config_json_does_not_decide(folder: Path) -> None:
    lm = load_model(change(folder, _attn_implementation="flash_attention_2"), device="cpu", dense_backend="sdpa")
    assert lm.dense_backend == "sdpa" and lm.model.config._attn_implementation == "sdpa"
    assert len(answer(lm, prefill(lm, [5, 6, 7], 9), [8], None, 3).token_ids) == 3


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    build("llama", vocab_size=49000).save_pretrained(folder)
    for load in (load_model, check_model):
        refused(str(folder), "49152 tokens, its embedding 49000", load)


@pytest.mark.parametrize("load", [check_model, load_model, load_shape])
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("hidden_size", 10**30), ("vocab_size", -1), ("num_attention_heads", "eight")],
)
def test_absurd_sizes(folder: Path, field: str, value: Any, load: Any) -> None:
    refused(change(folder, **{field: value}), f"{field} in config.json must be a whole number", load)


def test_the_old_name_of_longrope(folder: Path) -> None:
    scaling = {"type": "su", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    refused(change(folder, rope_parameters=None, rope_scaling=scaling), "write 'longrope' instead", check_model)


def test_a_longest_text_that_is_a_text(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    for given, read in (("8192", 8192), ("many", 2**62)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": given}))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.model_max_length == read and len(tokenizer.encode("a b c")) > 0


def test_a_broken_chat_template_is_told_at_planning(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for")
    refused(str(folder), "chat template cannot be rendered", check_model)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("bloom", "in its own code"),
        ("mpt", "in its own code"),
        ("codegen", "in its own code"),
        ("mamba", "no attention layers"),
        ("t5gemma", "encoder-decoder"),
        ("falcon", "in its own code"),
        ("falcon with new_decoder_architecture", "in its own code"),
        ("doge", "makes its own attention mask"),
    ],
)
def test_models_that_are_not_supported_are_refused_without_weights(folder: Path, model_type: str, words: str) -> None:
    from transformers import CONFIG_MAPPING

    (folder / "model.safetensors").unlink()
    model_type, _, switched_on = model_type.partition(" with ")
    CONFIG_MAPPING[model_type](vocab_size=50000, **{switched_on: True} if switched_on else {}).save_pretrained(folder)
    for load in (check_model, load_model, load_shape):
        assert model_type in refused(str(folder), words, load)


@pytest.mark.parametrize(
    ("kind", "layers", "sparse", "numbers"),
    [
        ("llama", 4, 4, 2 * 2 * 16),
        ("deepseek_v3", 4, 4, 4 * (24 + 16)),
        ("qwen3_next", 2, 2, 2 * 2 * 16),
        ("gpt_oss", 4, 2, 2 * 2 * 16),  # the others have a window
    ],
)
def test_the_shape_of_a_cache_is_known_without_weights(folder: Path, kind: str, layers: int, sparse: int, numbers: int) -> None:
    (folder / "model.safetensors").unlink()
    tiny_config(kind, vocab_size=50000).save_pretrained(folder)
    assert load_shape(str(folder), dtype="float32") == (layers * 4 * numbers, sparse, 4 * numbers)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        (
            {
                "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 256,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
            512,
        ),
    ],
)  # fmt: skip
def test_how_long_a_text_may_be(scaling: Any, expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=512, rope_parameters=scaling and {**scaling, "rope_theta": 1e4})
    assert max_positions(config) == expected


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_context_may_have_as_many_tokens_as_the_scaling_reaches(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    lm = wrap(build("llama", max_position_embeddings=64, rope_parameters=scaling))
    assert len(answer(lm, prefill(lm, tokens(250), 9), [8], None, 3).token_ids) == 3
    with pytest.raises(UserError, match="the context has 257 tokens, tiny takes 256"):
        prefill(lm, tokens(257), 9)


def test_layers_that_scale_differently_reach_as_far_as_the_least() -> None:
    from transformers import Gemma3TextConfig

    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = Gemma3TextConfig(
        max_position_embeddings=512, rope_parameters={"full_attention": linear, "sliding_attention": plain}
    )
    assert max_positions(config) == 512
