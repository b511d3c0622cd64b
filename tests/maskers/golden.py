"""Loads the recorded masker cases and turns their configs into ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_attention_hub as hub
from sparse_attention_hub.maskers.base import MaskerConfig

FOLDER = Path(__file__).parents[1] / "data" / "golden"
SIMPLE = {
    "Sink": "SinkMaskerConfig",
    "Local": "LocalMaskerConfig",
    "Causal": "CausalMaskerConfig",
    "OracleTopK": "OracleTopKConfig",
    "OracleTopP": "OracleTopPMaskerConfig",
    "Quest": "QuestTopKMaskerConfig",
    "PQCache": "PQCacheConfig",
    "MagicPig": "MagicPigConfig",
}


@cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as archive:
        return {key: archive[key] for key in archive.files}


@cache
def index() -> dict[str, dict[str, Any]]:
    return json.loads((FOLDER / "index.json").read_text())


@dataclass
class Case:
    """One recorded case. Arrays come as tensors: `array("mask")`, None if the case has none of that name."""

    name: str

    @property
    def entry(self) -> dict[str, Any]:
        return index()[self.name]

    @property
    def maskers(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, params) for name, params in json.loads(self.entry["config"])]

    def array(self, what: str) -> Tensor | None:
        value = _arrays("maskers.npz").get(f"{self.name}__{what}")
        return None if value is None else torch.from_numpy(value)

    def input(self, what: str) -> Tensor | None:
        value = _arrays("inputs.npz").get(f"{self.entry['inputs']}__{what}")
        return None if value is None else torch.from_numpy(value)

    def tensors(self) -> dict[str, Any]:
        names = ("queries", "keys", "values", "attention_mask")
        found: dict[str, Any] = {name: self.input(name) for name in names}
        return found | {"scaling": float(_arrays("inputs.npz")["scaling"]), "layer_idx": self.entry["layer_idx"]}

    def projections(self, lsh_l: int, lsh_k: int) -> Tensor:
        """The random projections (D + 1, L * K) that a MagicPig case was made with."""
        return torch.from_numpy(_arrays("magicpig_projections.npz")[f"proj__L{lsh_l}K{lsh_k}__seed42_layer0"])

    def configs(self, folder: Path) -> list[MaskerConfig]:
        return [_config(name, params, folder) for name, params in self.maskers]


def _config(name: str, params: dict[str, Any], folder: Path) -> MaskerConfig:
    if name in SIMPLE:
        params = {field: value for field, value in params.items() if field != "packing"}  # MagicPig has one packing
        return getattr(hub, SIMPLE[name])(**params)
    if name == "DoubleSparsity":
        path = folder / "channels.json"
        path.write_text(json.dumps(channel_file()))
        return hub.DoubleSparsityTopKMaskerConfig(**params, sorted_channel_file=str(path))
    if name == "HashAttention":
        params = dict(params)
        return hub.HashAttentionTopKMaskerConfig(**params | {"hat_weights": hash_weights(params.pop("weights"))})
    raise ValueError(f"no config is known for {name}")


def channel_file() -> dict[str, list[list[int]]]:
    """Sorted channels in the layout of DoubleSparsity's files."""
    found = {}
    for key, value in _arrays("inputs.npz").items():
        if key.startswith("ds_channels__"):
            _, layer, projection = key.split("__")
            found[f"model.layers.{layer.removeprefix('layer')}.self_attn.{projection}"] = value.tolist()
    return found


def hash_weights(name: str) -> dict[int, dict[str, list[Tensor]]]:
    """{layer: {"query_matrix", "query_bias", "key_matrix", "key_bias": one tensor per MLP layer}}."""
    arrays = _arrays("inputs.npz")
    weights: dict[str, list[Tensor]] = {}
    for part in ("query_matrix", "query_bias", "key_matrix", "key_bias"):
        names = sorted(key for key in arrays if key.startswith(f"hat__{name}__{part}__"))
        weights[part] = [torch.from_numpy(arrays[key]) for key in names]
    return {0: weights}
