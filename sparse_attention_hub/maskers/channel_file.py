"""The file of a model's most important channels: JSON {"model.layers.{L}.self_attn.{q_proj|k_proj|qk_proj}": [[channels, most
important first], ... one list per query head]}."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

Channels = dict[str, list[list[int]]]


def read_channels(path: str) -> Channels:
    """The whole file, checked; read again only after it has changed. ValueError for other content."""
    return _read(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: str, modified: int) -> Channels:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(record, dict) or not record:
        raise ValueError(f"{path} must hold a JSON object of channel lists, got {type(record).__name__}")
    for key, lists in record.items():
        heads = isinstance(lists, list) and bool(lists) and all(isinstance(entry, list) for entry in lists)
        if not heads or not all(type(channel) is int for entry in lists for channel in entry):
            raise ValueError(f"{key!r} in {path} must be one list of channel numbers a head")
    return record


def layer_channels(path: str, layer_idx: int, selection: str, kept: int, dim: int) -> Tensor:
    """The `kept` most important of `dim` channels per query head: int64 (H, kept). ValueError if the file lacks them."""
    record, key = read_channels(path), f"model.layers.{layer_idx}.self_attn.{selection}"
    if key not in record:
        raise ValueError(f"{path} has no entry {key!r}")
    if any(len(entry) < kept for entry in record[key]):
        raise ValueError(f"{key} in {path} must list {kept} channels a head or more")
    channels = torch.tensor([entry[:kept] for entry in record[key]])
    if int(channels.min()) < 0 or int(channels.max()) >= dim:
        raise ValueError(f"{key} in {path} must name channels in [0, {dim - 1}]")
    return channels


def write_channels(lists: Channels, path: Path) -> None:
    """Save channel lists so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(lists))
    unfinished.replace(path)
