"""Learning HashAttention's bit signatures for a model, and converting weights learned elsewhere.

    python -m sparse_attention_hub.maskers.hash_attention train --model MODEL --out FILE.safetensors [--text FILE]
    python -m sparse_attention_hub.maskers.hash_attention convert IN.pkl OUT.safetensors

Signatures are linear, sign(x W + b), one network a query head and one a kv head, so that a key is signed once for all query
heads of its group. They learn to rank keys as attention does: the cross-entropy between the attention of the model, and the
softmax of (shared - different bits) times a learned scale, over the keys that a sink and a window would leave out. Signs have
the gradient of tanh. The layers are independent of one another; each takes seconds on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError, check_writable
from ..kernels.reference import group_scores
from ..maskers.hat_weights import Layer, write_hat_weights
from .hat_conversion import convert
from .recording import Recording, read_texts, record, sample_texts

NEVER = -1e30
#: Keys that a sink and a window cover in any sensible pipeline, left out of the ranking to learn.
SINK, WINDOW = 4, 16


@dataclass(frozen=True)
class Recipe:
    """How to train: bits a signature, optimiser steps, query rows a step, learning rate, seed of everything random."""

    bits: int = 32
    steps: int = 500
    rows: int = 64
    rate: float = 0.01
    seed: int = 0


def train_layer(pairs: list[tuple[Tensor, Tensor]], recipe: Recipe) -> Layer:
    """Weights of one layer from recorded (queries (H, n - 1, D), keys (Hkv, n, D)) of several texts."""
    chance = torch.Generator().manual_seed(recipe.seed)
    pairs = [(queries.float().cpu(), keys.float().cpu()) for queries, keys in pairs]
    heads, kv_heads, dim = pairs[0][0].shape[0], pairs[0][1].shape[0], pairs[0][0].shape[2]
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
        if step % 4 == 0:  # the questions, at a text's end, are what retrieval hangs on
            positions = torch.arange(max(first, length - recipe.rows), length)
        picked = queries[:, positions - 1]
        reachable = ranked_keys(positions, length)
        target = group_scores(picked.unsqueeze(0), keys.unsqueeze(0), dim**-0.5)[0].masked_fill(~reachable, NEVER).softmax(-1)
        progress = step / recipe.steps
        signs = [_soft_sign(x, 1 + 2 * progress) for x in (picked @ query_matrix + query_bias, keys @ key_matrix + key_bias)]
        logits = (signs[0].view(kv_heads, -1, recipe.bits) @ signs[1].transpose(1, 2)).view(target.shape) * log_scale.exp()
        loss = -(target * logits.masked_fill(~reachable, NEVER).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return {
        "query_matrix": [query_matrix.detach().half()],
        "query_bias": [query_bias.detach()[:, 0].half()],
        "key_matrix": [key_matrix.detach().half()],
        "key_bias": [key_bias.detach()[:, 0].half()],
    }


def ranked_keys(positions: Tensor, length: int) -> Tensor:
    """The keys before the window and after the sink that each query position sees: bool (rows, length)."""
    keys = torch.arange(length)
    return (keys >= SINK) & (keys <= positions.unsqueeze(-1) - WINDOW)


def _soft_sign(x: Tensor, steepness: float) -> Tensor:
    """sign(x) with the gradient of tanh(steepness * x)."""
    soft = torch.tanh(steepness * x)
    return soft + (torch.sign(x) - soft).detach()


@torch.no_grad()
def mass_at(layer: Layer, queries: Tensor, keys: Tensor, share: float = 0.05) -> tuple[float, float]:
    """Attention mass on the best `share` of the keys to rank, of the later half of the queries: (by signature, by score)."""
    queries, keys = queries.float().cpu(), keys.float().cpu()
    length = keys.shape[1]
    positions = torch.arange(length // 2, length)
    picked = queries[:, positions - 1]
    reachable = ranked_keys(positions, length)
    true = group_scores(picked.unsqueeze(0), keys.unsqueeze(0), keys.shape[2] ** -0.5)[0].masked_fill(~reachable, NEVER)
    mass = true.softmax(-1)
    sides = ((picked, "query"), (keys, "key"))
    signs = [
        torch.sign(x @ layer[f"{side}_matrix"][0].float() + layer[f"{side}_bias"][0].float().unsqueeze(1)) for x, side in sides
    ]
    shared = (signs[0].view(keys.shape[0], -1, signs[0].shape[-1]) @ signs[1].transpose(1, 2)).view(true.shape)
    shared = (shared + torch.arange(length) / length).masked_fill(~reachable, NEVER)
    count = (share * reachable.sum(-1)).long().clamp(min=1).view(1, -1, 1).expand(true.shape[0], -1, 1)
    found = [
        mass.gather(-1, rank.argsort(-1, descending=True)).cumsum(-1).gather(-1, count - 1).mean() for rank in (shared, true)
    ]
    return float(found[0]), float(found[1])


def train(recordings: list[Recording], recipe: Recipe, say: bool = True) -> dict[int, Layer]:
    """Weights of all layers. The last recording is kept out of the training and tells how good they are."""
    *learned, held_out = recordings
    weights, masses = {}, []
    for layer in held_out:
        weights[layer] = train_layer([recording[layer] for recording in learned], recipe)
        masses.append(mass_at(weights[layer], *held_out[layer]))
        if say:
            print(
                f"layer {layer}: {masses[-1][0]:.3f} of the attention mass on 5% of the keys, {masses[-1][1]:.3f} at best",
                flush=True,
            )
    if say:
        reached, best = (sum(column) / len(masses) for column in zip(*masses, strict=True))
        print(f"mean: {reached:.3f}, {best:.3f} at best", flush=True)
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
    learn.add_argument("--model", required=True, help="model id or folder, e.g. embedded/SmolLM2-135M-Instruct")
    learn.add_argument("--out", required=True, help="the safetensors file to write")
    learn.add_argument(
        "--text", help='a text file to learn on, 2 texts or more separated by lines of "---" (default: generated)'
    )
    learn.add_argument("--texts", type=int, default=8, help="generated texts, the last for testing (default: %(default)s)")
    learn.add_argument("--tokens", type=int, default=1024, help="tokens of each text at most (default: %(default)s)")
    learn.add_argument("--bits", type=int, default=Recipe.bits, help="bits of a signature (default: %(default)s)")
    learn.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps a layer (default: %(default)s)")
    learn.add_argument("--seed", type=int, default=Recipe.seed)
    learn.add_argument("--device", default="auto")
    learn.add_argument("--dtype", default="auto")
    learn.add_argument("--trust-remote-code", action="store_true")
    change = commands.add_parser("convert", help="turn a pickle of weights into safetensors, running nothing that is in it")
    change.add_argument("source", help="pickle of {layer: {query_matrix, query_bias, key_matrix, key_bias: lists of tensors}}")
    change.add_argument("out", help="the safetensors file to write")
    change.add_argument("--activation", default="silu", help="the networks' activation, kept as a note (default: %(default)s)")
    options = parser.parse_args(given)
    try:
        check_writable(options.out)
        if options.command == "convert":
            weights = convert(options.source)
            write_hat_weights(weights, options.out, options.activation)
        else:
            weights = _train_command(options)
            write_hat_weights(weights, options.out, "silu")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: hash weights of {len(weights)} layers")
    return 0


def _train_command(options: argparse.Namespace) -> dict[int, Layer]:
    from .load import load_model

    for name in ("bits", "steps", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be >= 1, got {getattr(options, name)}")
    texts = read_texts(options.text) if options.text else sample_texts(max(2, options.texts), options.seed)
    if len(texts) < 2:
        raise UserError('--text must hold 2 texts or more, separated by lines of "---", got 1')
    lm = load_model(options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    recordings = []
    for recording in record(lm, texts, options.tokens):
        recordings.append({layer: (q.half().cpu(), k.half().cpu()) for layer, (q, k) in recording.items()})
        print(f"recorded text {len(recordings)} of {len(texts)}", flush=True)
    return train(recordings, Recipe(bits=options.bits, steps=options.steps, seed=options.seed))
