"""Which channels matter most to a model's attention scores: the file that Double Sparsity reads.

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
from .recording import read_texts, record, sample_texts


def calibrate(lm: LanguageModel, texts: list[str] | None = None, tokens: int = 1024) -> Channels:
    """Channels by falling importance, {"model.layers.{L}.self_attn.{q_proj|k_proj|qk_proj}": one list a query head}.

    A channel's importance is its mean |q| (q_proj), mean |k| (k_proj) or the product of both (qk_proj), after RoPE, over
    `texts` of up to `tokens` tokens each (default: 4 generated ones).
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
    asked = any(word in ("-h", "--help", "--model") or word.startswith("--model=") for word in given)
    if not asked:
        from ..maskers.drawing import main as draw_main

        draw_main("double_sparsity", given)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention_hub.maskers.double_sparsity",
        description="Find a model's important channels. Without --model: draw the masker's mask to --out, a PNG file.",
    )
    parser.add_argument("--model", required=True, help="model id or folder, e.g. embedded/SmolLM2-135M-Instruct")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--text", help='a text file to calibrate on, texts separated by lines of "---" (default: generated)')
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each text at most (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(given)
    try:
        check_writable(options.out)
        from .load import load_model

        texts = read_texts(options.text) if options.text else None
        lm = load_model(options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        with torch.inference_mode():
            lists = calibrate(lm, texts, options.tokens)
        write_channels(lists, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: channels of {len(lists) // 3} layers")
    return 0
