"""Finds a model's retrieval heads for DuoAttention: those that attend outside sinks and window.

python -m sparse_attention_hub.maskers.duo_attention --model MODEL --out FILE [--text FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, check_writable, print_any_text
from ..maskers.inputs import AttentionInputs
from .load import LanguageModel
from .recording import add_model_arguments, encode_text, load_asked_model, read_texts, sample_texts
from .trace import Trace, TraceLayer, record_trace

SINK, WINDOW = 16, 64
#: The last tokens of a text whose queries are looked at: of generated texts, the questions.
QUESTION_SHARE = 1 / 8


def outside_mass(layer: TraceLayer, sink: int = SINK, window: int = WINDOW) -> Tensor:
    """The share of attention mass outside the first `sink` and the last `window` keys: float64 per kv head, the mean over a
    trace's rows and the query heads of the group."""
    inputs = AttentionInputs(layer.queries, layer.keys, layer.values, None, layer.scaling, softcap=layer.softcap)
    scores = inputs.scores().double()
    total = scores.logsumexp(-1, keepdim=True)
    if layer.sinks is not None:  # logits of the model's own sinks, which are no keys
        total = torch.logaddexp(total, layer.sinks.double().view(1, -1, 1, 1))
    near = inputs.layout.first_keys(inputs.resolve(sink)).union(inputs.layout.last_keys(inputs.resolve(window)))
    mass = ((scores - total).exp() * near.residual(inputs.allowed)).sum(-1)  # (1, H, R)
    return mass.view(inputs.kv_heads, -1).mean(-1)


def head_values(traces: Sequence[Trace], sink: int = SINK, window: int = WINDOW) -> Tensor:
    """`outside_mass` of every layer, the mean over recorded dense runs: float64 (layers, kv heads), NaN for layers that the
    traces do not have."""
    found = {layer: [outside_mass(trace.layer(layer), sink, window) for trace in traces] for layer in traces[0].layers}
    means = {layer: torch.stack(masses).mean(0).cpu() for layer, masses in found.items()}
    width = max(len(mean) for mean in means.values())
    table = torch.full((max(means) + 1, width), torch.nan, dtype=torch.float64)
    for layer, mean in means.items():
        table[layer, : len(mean)] = mean
    return table


def find_heads(
    lm: LanguageModel, texts: list[str] | None = None, tokens: int = 1024, sink: int = SINK, window: int = WINDOW
) -> Tensor:
    """`head_values` of a model on `texts` of up to `tokens` tokens each (default: 4 generated ones, whose last tokens ask for
    facts from the text). UserError for a text that is too short for the window."""
    values = []
    for text in sample_texts(4) if texts is None else texts:
        ids = encode_text(lm, text, min(tokens, (lm.max_positions or tokens + 1) - 1))  # one token is answered
        if len(ids) < 2 * (sink + window):
            raise UserError(f"a text must have at least {2 * (sink + window)} tokens, got {len(ids)}: give longer ones")
        start = len(ids) - max(1, int(QUESTION_SHARE * len(ids)))
        with tempfile.TemporaryDirectory() as folder:
            trace = record_trace(lm, ids[:start], ids[start:], 1, Path(folder) / "trace")
            values.append(head_values([trace], sink, window))
    return torch.stack(values).mean(0)


def write_pattern(values: Tensor, path: Path) -> None:
    """Save a table (layers, heads) as DuoAttention's full_attention_heads.tsv are, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("".join("\t".join(f"{value:.6f}" for value in row) + "\n" for row in values.tolist()))
    unfinished.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Find the heads with --model; without, draw the masker's mask as every masker module does."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word in ("-h", "--help", "--model") or word.startswith("--model=") for word in given):
        from ..maskers.drawing import main as draw_main

        draw_main("duo_attention", given)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention_hub.maskers.duo_attention",
        description="Find a model's retrieval heads: the share of each kv head's attention mass outside sinks and window. "
        "Without --model: draw the masker's mask to --out, a PNG file.",
    )
    add_model_arguments(parser, text='a text file, texts separated by lines of "---" (default: generated)')
    parser.add_argument("--sink", type=int, default=SINK, help="first keys that do not count (default: %(default)s)")
    parser.add_argument("--window", type=int, default=WINDOW, help="recent keys that do not count (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="the TSV file to write")
    options = parser.parse_args(given)
    print_any_text()
    try:
        if min(options.sink, options.window) < 1:
            raise UserError(f"--sink and --window must be at least 1, got {options.sink} and {options.window}")
        check_writable(options.out)
        texts = read_texts(options.text) if options.text else None
        lm = load_asked_model(options)
        with torch.inference_mode():
            values = find_heads(lm, texts, options.tokens, options.sink, options.window)
        write_pattern(values, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {values.shape[0]} layers x {values.shape[1]} kv heads")
    return 0
