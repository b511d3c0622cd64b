"""How much memory a prefill and answers under several attentions take, beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attention import ResearchAttention
from ..lists import uses_loops
from ..maskers.base import Masker
from ..maskers.state import MaskerState
from .load import LanguageModel
from .lockstep import QUERIES_AT_ONCE, LayerCall
from .probe import continues, layer_calls
from .session import prefill_chunk

#: Keys that are coded to find out the size of a code.
_TRIAL_KEYS = 256
#: The buffer of codes may be larger than the codes by an eighth.
_SPARE = 9 / 8


def estimate_bytes(
    lm: LanguageModel,
    context_tokens: int,
    room: int,
    attentions: Sequence[ResearchAttention | None],
    asked: Sequence[ResearchAttention | None] = (),
) -> int:
    """Peak memory, without the weights, of a prefill and answers under `attentions` side by side: the KV cache and private tails,
    codes of keys, activations of the larger of the two passes, one row's choice for a block of queries, logits.

    room: tokens of question and answer. asked: attentions that are asked on the same context before or after: their codes stay.
    """
    config, calls = lm.model.config.get_text_config(decoder=True), layer_calls(lm)
    number, total, forks = lm.dtype.itemsize, context_tokens + room, len(attentions)
    token = sum(call.token_numbers for call in calls.values()) * number
    tails: float = forks * room * token if forks > 1 else 0
    sparse = [attention for attention in attentions if attention is not None]
    sizes = [_code_bytes(lm, attention) for attention in (*sparse, *asked) if attention is not None]
    codes = sum({name: size for own in sizes for name, size in own.items()}.values()) * total * _SPARE
    tails += room * sum(sum(own.values()) for own in sizes[: len(sparse)])
    at_once = min(context_tokens, prefill_chunk(lm)) if lm.dense_backend == "sdpa" and continues(lm) else context_tokens
    around, within = 6 * config.hidden_size * number, 3 * _feed_forward(config) * number  # a token's activations
    prefill = at_once * (around + within)
    heads, kind = max(call.heads for call in calls.values()), int(uses_loops(torch.empty(0, device=lm.device)))
    scores = max((masker.score_bytes[kind] for attention in sparse for masker in attention.maskers), default=0)
    block = heads * min(room, QUERIES_AT_ONCE) * total * scores
    wide = max(call.token_numbers for call in calls.values()) * total * 4 if number < 4 else 0  # keys and values in float32
    logits = forks * config.vocab_size * (number + 4)
    step = forks * room * around + max(forks * room * within, block + wide)  # attention and feed-forward take turns
    return int(total * token + max(prefill, tails + codes + step + logits))


def _code_bytes(lm: LanguageModel, attention: ResearchAttention) -> dict[tuple[str, ...], float]:
    """Bytes per key of the codes in all layers, by `codes_key`: attentions with equal keys share their codes."""
    if attention not in lm.code_bytes:
        sizes: dict[tuple[str, ...], float] = {}
        tried: dict[tuple[Any, ...], float] = {}
        for layer_idx, call in layer_calls(lm).items():
            for masker in attention.maskers_of(layer_idx) if not call.rule.limited else ():
                name = masker.codes_key()
                shape = (name, call.kv_heads, call.key_width)
                if shape not in tried:
                    tried[shape] = _try(lm, masker, layer_idx, call)
                sizes[name] = sizes.get(name, 0.0) + tried[shape]
        lm.code_bytes[attention] = sizes
    return lm.code_bytes[attention]


def _try(lm: LanguageModel, masker: Masker[Any], layer_idx: int, call: LayerCall) -> float:
    """Bytes per key that the masker keeps of one layer, from coding a few random keys."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn((1, call.kv_heads, _TRIAL_KEYS, call.key_width), generator=generator).to(lm.device, lm.dtype)
    state = MaskerState()
    try:
        masker.prepare(keys, layer_idx, state)
    except Exception:  # a masker that does not fit the model fails when it answers, with its own message
        return 0.0
    held = state.codes() if state.parts() else state.fitted  # an eviction holds its ranking
    return float(getattr(held, "nbytes", 0)) / _TRIAL_KEYS


def _feed_forward(config: Any) -> int:
    """Channels of a feed-forward layer."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(width) if isinstance(width, list) else int(width)
