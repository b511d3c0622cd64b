"""Finds the principal axes of a model's keys, for Loki.

python -m sparse_attention_hub.maskers.loki --model MODEL --out FILE [--text FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..maskers.principal_axes import principal_axes, write_axes
from .load import LanguageModel
from .recording import calibrate_command, record, sample_texts


def calibrate_axes(lm: LanguageModel, texts: list[str] | None = None, tokens: int = 1024) -> dict[int, Tensor]:
    """{layer: principal axes of each kv head's keys after RoPE, float32 (Hkv, D, D)}, over `texts` of up to `tokens` tokens each
    (default: 4 generated ones)."""
    keys: dict[int, list[Tensor]] = {}
    for recording in record(lm, texts if texts is not None else sample_texts(4), tokens):
        for layer, (_, own) in recording.items():
            keys.setdefault(layer, []).append(own.cpu())
    return {layer: principal_axes(torch.cat(parts, 1)) for layer, parts in keys.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate with --model; without, draw the masker's mask as every masker module does."""

    def write(lm: LanguageModel, texts: list[str] | None, tokens: int, out: Path) -> str:
        axes = calibrate_axes(lm, texts, tokens)
        write_axes(axes, out)
        return f"principal axes of {len(axes)} layers"

    return calibrate_command("loki", "the principal axes of a model's keys", "safetensors", write, arguments)
