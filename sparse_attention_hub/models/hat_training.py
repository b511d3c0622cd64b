"""Trains HashAttention's bit signatures for a model, and converts weights trained elsewhere.

    python -m sparse_attention_hub.maskers.hash_attention train --model MODEL --out FILE.safetensors [--text FILE]
    python -m sparse_attention_hub.maskers.hash_attention convert IN.pkl OUT.safetensors

Signatures are linear, sign(x W + b), with one network per query head and one per kv head, so that a
key is signed once for its group. The loss is the cross-entropy between the model's attention and the
softmax of (equal - different bits) times a learned scale, over the keys outside a sink and a window.
Signs have the gradient of tanh. Layers are trained separately, in seconds each on one core.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, check_writable, print_any_text
from ..kernels.reference import group_scores
from ..maskers.hat_weights import PARTS, Layer, write_hat_weights
from .recording import Recording, add_model_arguments, load_asked_model, read_texts, record, sample_texts

NEVER = -1e30
#: Keys not ranked: any sensible pipeline covers them by a sink and a window.
SINK, WINDOW = 4, 16


@dataclass(frozen=True)
class Recipe:
    """Training settings. bits: per signature; rows: queries per step; rate: learning rate."""

    bits: int = 32
    steps: int = 500
    rows: int = 64
    rate: float = 0.01
    seed: int = 0


def train_layer(pairs: list[tuple[Tensor, Tensor]], recipe: Recipe) -> Layer:
    """Weights of one layer from recorded (queries (H, n - 1, D), keys (Hkv, n, D)) of several texts."""
    chance = torch.Generator().manual_seed(recipe.seed)
    pairs = [(queries.float().cpu(), keys.float().cpu()) for queries, keys in pairs]
    heads, _, dim = pairs[0][0].shape
    all_keys = torch.cat([keys for _, keys in pairs], 1)
    # Both sides start as the same random hyperplanes; keys lie around their mean, so the planes go through it.
    planes = torch.randn(1, dim, recipe.bits, generator=chance) / dim**0.5
    query_scale = torch.stack([queries.std((1, 2)) for queries, _ in pairs]).mean(0)
    key_matrix = (planes / all_keys.std((1, 2)).view(-1, 1, 1)).requires_grad_()
    query_matrix = (planes / query_scale.view(-1, 1, 1)).requires_grad_()
    key_bias = (-(all_keys.mean(1, keepdim=True) @ key_matrix.detach())).requires_grad_()
    query_bias = torch.zeros(heads, 1, recipe.bits).requires_grad_()
    log_scale = torch.full((heads, 1, 1), math.log(0.3)).requires_grad_()
    optimiser = torch.optim.Adam([query_matrix, query_bias, key_matrix, key_bias, log_scale], lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps, eta_min=recipe.rate / 1000)
    for step in range(recipe.steps):
        queries, keys = pairs[int(torch.randint(len(pairs), (), generator=chance))]
        length = keys.shape[1]
        first = min(SINK + WINDOW + 1, length - 1)
        positions = torch.randint(first, length, (recipe.rows,), generator=chance)
        if step % 4 == 0:  # retrieval depends on the questions, which are at a text's end
            positions = torch.arange(max(first, length - recipe.rows), length)
        picked = queries[:, positions - 1]
        reachable = ranked_keys(positions, length)
        target = _scores(picked, keys, dim**-0.5).masked_fill(~reachable, NEVER).softmax(-1)
        steepness = 1 + 2 * (step / recipe.steps)
        query_signs = _soft_sign(picked @ query_matrix + query_bias, steepness)
        key_signs = _soft_sign(keys @ key_matrix + key_bias, steepness)
        logits = _scores(query_signs, key_signs) * log_scale.exp()
        loss = -(target * logits.masked_fill(~reachable, NEVER).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    trained = (query_matrix, query_bias[:, 0], key_matrix, key_bias[:, 0])
    return {part: [tensor.detach().half()] for part, tensor in zip(PARTS, trained, strict=True)}


def ranked_keys(positions: Tensor, length: int) -> Tensor:
    """The keys between sink and window for each query position: bool (rows, length)."""
    keys = torch.arange(length)
    return (keys >= SINK) & (keys <= positions.unsqueeze(-1) - WINDOW)


def _scores(queries: Tensor, keys: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling * q.k of queries (H, rows, D) and keys (Hkv, n, D): (H, rows, n)."""
    return group_scores(queries.unsqueeze(0), keys.unsqueeze(0), scaling)[0]


def _soft_sign(x: Tensor, steepness: float) -> Tensor:
    """sign(x) with the gradient of tanh(steepness * x)."""
    soft = torch.tanh(steepness * x)
    return soft + (torch.sign(x) - soft).detach()


@torch.no_grad()
def mass_at(layer: Layer, queries: Tensor, keys: Tensor, share: float = 0.05) -> tuple[float, float]:
    """Attention mass on the top `share` of the ranked keys, later half of the text: (by signature, by score)."""
    queries, keys = queries.float().cpu(), keys.float().cpu()
    length = keys.shape[1]
    positions = torch.arange(length // 2, length)
    picked = queries[:, positions - 1]
    reachable = ranked_keys(positions, length)
    by_score = _scores(picked, keys, keys.shape[2] ** -0.5).masked_fill(~reachable, NEVER)
    query_signs, key_signs = (
        torch.sign(x @ layer[f"{side}_matrix"][0].float() + layer[f"{side}_bias"][0].float().unsqueeze(1))
        for x, side in ((picked, "query"), (keys, "key"))
    )
    by_signature = _scores(query_signs, key_signs) + torch.arange(length) / length  # ties: the latest key
    by_signature = by_signature.masked_fill(~reachable, NEVER)
    mass = by_score.softmax(-1)
    last = (share * reachable.sum(-1)).long().clamp(min=1).view(1, -1, 1).expand(mass.shape[0], -1, 1) - 1
    reached, best = (
        float(mass.gather(-1, rank.argsort(-1, descending=True)).cumsum(-1).gather(-1, last).mean())
        for rank in (by_signature, by_score)
    )
    return reached, best


def train(recordings: list[Recording], recipe: Recipe) -> dict[int, Layer]:
    """Weights of all layers. The last recording is held out; the quality on it is printed."""
    *learned, held_out = recordings
    weights, masses = {}, []
    for layer, pair in held_out.items():
        weights[layer] = train_layer([recording[layer] for recording in learned], recipe)
        reached, best = mass_at(weights[layer], *pair)
        masses.append((reached, best))
        print(f"layer {layer}: {reached:.3f} of the attention mass on 5% of the keys, {best:.3f} at best", flush=True)
    reached, best = (sum(column) / len(masses) for column in zip(*masses, strict=True))
    print(f"mean: {reached:.3f}, {best:.3f} at best", flush=True)
    return weights


#: The only functions and classes that a pickle of plain containers and tensors needs.
_PERMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    # A tensor's storage, read by torch's own restricted reader.
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True),
}


class _Restricted(pickle.Unpickler):
    """Loads a pickle without running anything in it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not need")
        return _PERMITTED[module, name]


def convert(source: str) -> dict[int, Layer]:
    """Weights {layer: {part: [tensors]}} from a pickle or a torch.save file. UserError for other content."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"the pickle to convert must be an existing file, got {source!r}")
    try:
        if zipfile.is_zipfile(path):
            record = torch.load(path, map_location="cpu", weights_only=True)
        else:
            record = _Restricted(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source} cannot be converted: {reason}") from None
    if not isinstance(record, dict) or not record:
        raise UserError(f"{source} must hold a dict of layers, got {type(record).__name__}")
    weights: dict[int, Layer] = {}
    for index, layer in record.items():
        if not str(index).isdecimal() or not isinstance(layer, dict) or not set(PARTS) <= set(layer):
            raise UserError(f"{source}: entry {index!r} must be a layer number with {', '.join(PARTS)}")
        for part in PARTS:
            if not isinstance(layer[part], list | tuple) or not all(isinstance(t, Tensor) for t in layer[part]):
                raise UserError(f"{source}: {part} of layer {index} must be a list of tensors")
        weights[int(index)] = {part: [tensor.detach().cpu() for tensor in layer[part]] for part in PARTS}
    return weights


def main(arguments: Sequence[str] | None = None) -> int:
    """`train` and `convert`; without either, draw the masker's mask as every masker module does."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not {"train", "convert", "-h", "--help"} & set(given):
        from ..maskers.drawing import main as draw_main

        draw_main("hash_attention", given)
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention_hub.maskers.hash_attention",
        description="Train or convert weights. Without a command: draw the masker's mask to --out, a PNG file.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train", help="learn the weights of a model")
    add_model_arguments(learn, 'a text file to learn on, 2 texts or more separated by lines of "---" (default: generated)')
    learn.add_argument("--out", required=True, help="the safetensors file to write")
    learn.add_argument("--texts", type=int, default=8, help="generated texts, the last for testing (default: %(default)s)")
    learn.add_argument("--bits", type=int, default=Recipe.bits, help="bits of a signature (default: %(default)s)")
    learn.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps per layer (default: %(default)s)")
    learn.add_argument("--seed", type=int, default=Recipe.seed)
    change = commands.add_parser("convert", help="turn a pickle of weights into safetensors, running nothing that is in it")
    change.add_argument("source", help="pickle of {layer: {query_matrix, query_bias, key_matrix, key_bias: lists of tensors}}")
    change.add_argument("out", help="the safetensors file to write")
    change.add_argument("--activation", default="silu", help="the networks' activation, kept as a note (default: %(default)s)")
    options = parser.parse_args(given)
    print_any_text()
    try:
        check_writable(options.out)
        weights = convert(options.source) if options.command == "convert" else _train_command(options)
        write_hat_weights(weights, options.out, options.activation if options.command == "convert" else "silu")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: hash weights of {len(weights)} layers")
    return 0


def _train_command(options: argparse.Namespace) -> dict[int, Layer]:
    for name in ("bits", "steps", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be >= 1, got {getattr(options, name)}")
    texts = read_texts(options.text) if options.text else sample_texts(max(2, options.texts), options.seed)
    if len(texts) < 2:
        raise UserError('--text must hold 2 texts or more, separated by lines of "---", got 1')
    recordings = []
    for recording in record(load_asked_model(options), texts, options.tokens):
        recordings.append({layer: (q.half().cpu(), k.half().cpu()) for layer, (q, k) in recording.items()})
        print(f"recorded text {len(recordings)} of {len(texts)}", flush=True)
    return train(recordings, Recipe(bits=options.bits, steps=options.steps, seed=options.seed))
