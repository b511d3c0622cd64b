"""Pipelines, models and samples that the tests of the pretended GPU share."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from pretend import PretendedGPU
from tiny_models import Letters, build

import sparse_attention_hub as hub
from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.maskers.base import registered_configs
from sparse_attention_hub.maskers.channel_file import write_channels
from sparse_attention_hub.maskers.drawing import DIM, HEADS, example_configs
from sparse_attention_hub.maskers.principal_axes import principal_axes, write_axes
from sparse_attention_hub.models import LanguageModel

#: Channel files must outlive the configurations that name them.
FOLDER = Path(tempfile.mkdtemp())


def masker_names() -> list[str]:
    """The module of every masker of the library; `example_configs` has a pipeline for each."""
    folder, _, _ = ResearchAttention.__module__.partition(".")
    modules = {config.__module__ for config in registered_configs().values()}
    return sorted(module.rpartition(".")[2] for module in modules if module.startswith(f"{folder}.maskers."))


NAMES = masker_names()


def example(name: str, **options: Any) -> ResearchAttention:
    """The pipeline that shows a masker, for 2 query heads, 1 kv head and layer 0."""
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    return ResearchAttention(ResearchAttentionConfig(example_configs(name, folder), **options))


def all_examples() -> list[ResearchAttention]:
    """Of a model with two layers: files of models name the first alone, so the second is dense."""
    return [example(name, dense_layers=[1]) for name in NAMES]


def layered_examples(layers: int) -> list[ResearchAttention]:
    """All examples for a model with so many layers: files hold tables of every layer, which differ."""
    folder, generator = FOLDER / f"of {layers} layers", torch.Generator().manual_seed(8)
    folder.mkdir(exist_ok=True)
    channels, axes, heads = (str(folder / name) for name in ("all.json", "all.safetensors", "all.tsv"))
    orders = {layer: torch.rand(HEADS, DIM, generator=generator).argsort(-1).tolist() for layer in range(layers)}
    write_channels({f"model.layers.{layer}.self_attn.qk_proj": order for layer, order in orders.items()}, Path(channels))
    keys = torch.randn(layers, 1, 50, DIM, generator=generator)
    write_axes({layer: principal_axes(own) for layer, own in enumerate(keys)}, Path(axes))
    Path(heads).write_text("".join(f"{number}\n" for number in torch.rand(layers, generator=generator).tolist()))
    hashes = {}
    for layer in range(layers):
        parts = ("query_matrix", (DIM, 32)), ("query_bias", (32,)), ("key_matrix", (DIM, 32)), ("key_bias", (32,))
        hashes[layer] = {
            name: [torch.randn(1, *shape, generator=generator).repeat_interleave(HEADS, 0)] for name, shape in parts
        }
    fields: dict[str, dict[str, Any]] = {
        "double_sparsity": {"sorted_channel_file": channels},
        "loki": {"axes_file": axes},
        "duo_attention": {"pattern_file": heads},
        "hash_attention": {"hat_weights": hashes},
    }
    pipelines = [example_configs(name, folder) for name in NAMES]
    own = [
        [*configs[:-1], replace(configs[-1], **fields.get(name, {}))] for name, configs in zip(NAMES, pipelines, strict=True)
    ]
    return [ResearchAttention(ResearchAttentionConfig(configs)) for configs in own]


def families(layers: int) -> list[ResearchAttention]:
    """Pipelines of eight families, all behind a sink and a local window."""
    channels = FOLDER / "families.json"
    every = [list(range(DIM))] * HEADS
    write_channels({f"model.layers.{layer}.self_attn.qk_proj": every for layer in range(layers)}, channels)
    selectors: list[list[hub.MaskerConfig]] = [
        [],
        [hub.RandomSamplingMaskerConfig(0.1)],
        [hub.OracleTopKConfig(0.1)],
        [hub.OracleTopPMaskerConfig(0.5)],
        [hub.QuestTopKMaskerConfig(0.1, 16)],
        [hub.DoubleSparsityTopKMaskerConfig(0.1, str(channels), 4)],
        [hub.PQCacheConfig(0.1, 4, 4, 5, 16, "euclidean")],
        [hub.OracleTopKConfig(0.05), hub.AdaptiveSamplingMaskerConfig(0.05, 0.3, 0.3, 0, 0)],
    ]
    first = [hub.SinkMaskerConfig(16), hub.LocalMaskerConfig(32)]
    return [ResearchAttention(ResearchAttentionConfig([*first, *own])) for own in selectors]


def small_model(gpu: PretendedGPU | None, dtype: torch.dtype = torch.float32, layers: int = 2, **sizes: Any) -> LanguageModel:
    """A random Llama with the heads of the examples, on the pretended device if there is one."""
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": DIM} | sizes
    model = build("llama", num_hidden_layers=layers, **sizes).to(dtype)
    if gpu is not None:
        gpu.move(model)
    return LanguageModel.wrap(model, Letters(), name="tiny", dense_backend="sdpa")
