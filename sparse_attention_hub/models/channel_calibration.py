"""Ranks the channels of a model by their weight in attention scores, for DoubleSparsity.

python -m sparse_attention_hub.maskers.double_sparsity --model MODEL --out FILE [--text FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, check_writable
from ..maskers.channel_file import Channels, write_channels
from .load import LanguageModel
from .recording import add_model_arguments, load_asked_model, read_texts, record, sample_texts


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
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word in ("-h", "--help", "--model") or word.startswith("--model=") for word in given):
        from ..maskers.drawing import main as draw_main

        draw_main("double_sparsity", given)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention_hub.maskers.double_sparsity",
        description="Find a model's important channels. Without --model: draw the masker's mask to --out, a PNG file.",
    )
    add_model_arguments(parser, text='a text file to calibrate on, texts separated by lines of "---" (default: generated)')
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    options = parser.parse_args(given)
    try:
        check_writable(options.out)
        texts = read_texts(options.text) if options.text else None
        lm = load_asked_model(options)
        with torch.inference_mode():
            lists = calibrate(lm, texts, options.tokens)
        write_channels(lists, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: channels of {len(lists) // 3} layers")
    return 0
