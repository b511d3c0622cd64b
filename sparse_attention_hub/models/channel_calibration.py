"""Ranks the channels of a model by their weight in attention scores, for DoubleSparsity.

python -m sparse_attention_hub.maskers.double_sparsity --model MODEL --out FILE [--text FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..maskers.channel_file import Channels, write_channels
from .load import LanguageModel
from .recording import calibrate_command, record, sample_texts


def calibrate(lm: LanguageModel, texts: list[str] | None = None, tokens: int = 1024) -> Channels:
    """{"model.layers.{L}.self_attn.{q_proj|k_proj|qk_proj}": [channels by importance, per query head]}.

    Importance: mean |q| (q_proj), mean |k| (k_proj) or their product (qk_proj), after RoPE, over `texts`
    of up to `tokens` tokens each (default: 4 generated ones).
    """
    sums: dict[int, list[Tensor]] = {}
    for recording in record(lm, texts if texts is not None else sample_texts(4), tokens):
        for layer, (queries, keys) in recording.items():
            size = [queries.float().abs().mean(1).cpu(), keys.float().abs().mean(1).cpu()]
            sums[layer] = [a + b for a, b in zip(sums[layer], size, strict=True)] if layer in sums else size
    lists = {}
    for layer, (of_queries, of_keys) in sums.items():
        of_keys = of_keys.repeat_interleave(of_queries.shape[0] // of_keys.shape[0], 0)
        for name, importance in (("q_proj", of_queries), ("k_proj", of_keys), ("qk_proj", of_queries * of_keys)):
            order = importance.argsort(dim=-1, descending=True, stable=True)
            lists[f"model.layers.{layer}.self_attn.{name}"] = order.tolist()
    return lists


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate with --model; without, draw the masker's mask as every masker module does."""

    def write(lm: LanguageModel, texts: list[str] | None, tokens: int, out: Path) -> str:
        lists = calibrate(lm, texts, tokens)
        write_channels(lists, out)
        return f"channels of {len(lists) // 3} layers"

    return calibrate_command("double_sparsity", "a model's important channels", "JSON", write, arguments)
