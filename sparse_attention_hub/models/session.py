"""Prefill a context once, then ask it many times, under dense and sparse attentions side by side.

A `Prefilled` holds the KV cache of a context. `answer_many` generates greedily under several attentions in lockstep:
all linear layers run as one batch (one read of the weights a step), attention runs for each row on the shared prefix
and the row's private tail, and a finished row leaves the batch. `forced_many` is given the answer instead, and tells
how likely it is. Both leave the `Prefilled` as they found it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..maskers.shared_states import SharedStates
from .cache import SharedPrefixCache
from .load import LanguageModel
from .lockstep import Lockstep, Memory, Recorder, Row, fill, forward, running
from .switch import switched

if TYPE_CHECKING:
    from ..attention import ResearchAttention

SparseFrom = Literal["question", "decode"]


#: Tokens of a context that go through the layers at once: activations then stay small beside the cache.
_CHUNKS = {"cpu": 512, "gpu": 8192}


@dataclass(frozen=True)
class Answer:
    """token_ids end with the EOS token if stopped == "eos"; text leaves special tokens out. seconds: from asking to
    this answer's last token, shared with the other rows of the batch. density and kv_fraction: means over query rows
    and sparse layers (None for dense, and where no row was attended sparsely)."""

    token_ids: list[int]
    text: str
    stopped: Literal["eos", "length"]
    seconds: float
    density: float | None
    kv_fraction: float | None


@dataclass(frozen=True)
class Forced:
    """nll: mean negative log-likelihood of the answer's tokens, in nats. reproduced: every argmax is the answer's
    token."""

    nll: float
    reproduced: bool
    density: float | None
    kv_fraction: float | None


@dataclass
class Prefilled:
    """A context's KV cache, and what the maskers of each attention learned from its keys."""

    cache: SharedPrefixCache
    context_length: int
    seconds: float
    states: dict[ResearchAttention, list[Memory]] = field(default_factory=dict)
    learned: SharedStates = field(default_factory=SharedStates)
    name: str = ""  # of the context, in `learned`

    @property
    def room(self) -> int:
        """Tokens of question and answer that fit after the context."""
        return self.cache.capacity - self.context_length

    def context_keys(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, context, D) of a layer, views."""
        keys, values = self.cache.layers[layer_idx].view(0)
        return keys[:, :, : self.context_length], values[:, :, : self.context_length]

    def forget(self) -> None:
        """Drop what maskers learned, to free memory. It is learned again when needed."""
        self.states.clear()
        self.learned.forget(self.name)


def prefill(lm: LanguageModel, context_ids: list[int], room: int) -> Prefilled:
    """Run the context through the model once, densely and without the LM head; `room` tokens can follow it.

    UserError for an empty context or one longer than the model's positions.
    """
    if not context_ids:
        raise UserError("the context has no tokens: give one at least (the BOS token)")
    if room < 1:
        raise ValueError(f"room must be >= 1, got {room}")
    if lm.max_positions is not None and len(context_ids) > lm.max_positions:
        raise UserError(
            f"the context has {len(context_ids)} tokens, {lm.id} takes {lm.max_positions}: lower --max-context-length"
        )
    started = time.perf_counter()
    cache = SharedPrefixCache(lm.num_layers, len(context_ids) + room)
    ids = torch.tensor([context_ids], device=lm.device)
    if lm.dense_backend == "sdpa":
        session = Lockstep(cache, 0, [Row(None, None, 0, ())])
        with running(lm, session):
            for part in torch.split(ids, _prefill_chunk(lm), dim=1):
                fill(lm, session, part)
    else:
        with switched(lm.attention_configs, lm.dense_backend), torch.no_grad():
            lm.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    if cache.length != len(context_ids):
        raise UserError(f"model {lm.id!r} does not keep its keys in the cache it is given: take another model")
    return Prefilled(cache, len(context_ids), time.perf_counter() - started)


def _prefill_chunk(lm: LanguageModel) -> int:
    return _CHUNKS["cpu"] if lm.device.type == "cpu" else _CHUNKS["gpu"]


def sparse_layers(lm: LanguageModel) -> list[int]:
    """The layers that can be sparse, in order: those without a sliding window. UserError if the model has none.

    Asked of the layers themselves by a forward pass over one token: configurations name their windows in many ways.
    """
    known: list[int] | None = getattr(lm, "_sparse_layers", None)
    if known is None:
        cache = SharedPrefixCache(lm.num_layers, 1)
        session = Lockstep(cache, 0, [Row(None, None, 0, ())])
        with running(lm, session):
            fill(lm, session, torch.tensor([[0]], device=lm.device))
        known = sorted(layer for layer, window in session.windows.items() if window is None)
        object.__setattr__(lm, "_sparse_layers", known)
    if not known:
        raise UserError(
            f"model {lm.id!r} has sliding-window layers only, which stay dense: nothing of it can be sparse, take another model"
        )
    return known


def answer(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    attention: ResearchAttention | None,
    max_new_tokens: int,
    *,
    sparse_from: SparseFrom = "question",
    seed: int = 0,
    recorder: Recorder | None = None,
) -> Answer:
    """Greedy answer to a question on a prefilled context; attention=None is dense. `answer_many` says the rest."""
    return answer_many(
        lm,
        prefilled,
        question_ids,
        [attention],
        max_new_tokens,
        sparse_from=sparse_from,
        seed=seed,
        recorders=[recorder],
    )[0]


def answer_many(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    attentions: Sequence[ResearchAttention | None],
    max_new_tokens: int,
    *,
    sparse_from: SparseFrom = "question",
    seed: int = 0,
    recorders: Sequence[Recorder | None] | None = None,
) -> list[Answer]:
    """Greedy answers under several attentions in lockstep, in the order given.

    sparse_from: "question" (question and answer are sparse) or "decode" (the question is dense, once for all rows). An
    answer ends with EOS or after exactly max_new_tokens tokens, EOS counted.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    with _asked(lm, prefilled, question_ids, attentions, max_new_tokens - 1, sparse_from, seed, recorders) as (
        session,
        rows,
    ):
        started = time.perf_counter()
        tails = len(question_ids) + max_new_tokens
        logits = _ask(lm, session, rows, question_ids, sparse_from, tails)
        tokens: list[list[int]] = [[] for _ in rows]
        stopped: list[Literal["eos", "length"]] = ["length"] * len(rows)
        seconds = [0.0] * len(rows)
        active = list(range(len(rows)))
        while True:
            chosen = logits[:, -1].argmax(dim=-1)
            keep = []
            for place, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
                tokens[row].append(token)
                if token in lm.eos_token_ids:
                    stopped[row] = "eos"
                elif len(tokens[row]) < max_new_tokens:
                    keep.append(place)
                    continue
                seconds[row] = time.perf_counter() - started
            if not keep:
                break
            if len(keep) < len(active):
                session.cache.select(keep)
                chosen = chosen[keep]
                active = [active[place] for place in keep]
                session.rows = [rows[row] for row in active]
            session.step += 1
            logits = forward(lm, session, chosen[:, None], 1)
    return [
        Answer(
            token_ids=tokens[i],
            text=lm.tokenizer.decode(tokens[i], skip_special_tokens=True),
            stopped=stopped[i],
            seconds=seconds[i],
            density=row.density(),
            kv_fraction=row.kv_fraction(),
        )
        for i, row in enumerate(rows)
    ]


def forced(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    answer_ids: list[int],
    attention: ResearchAttention | None,
    *,
    sparse_from: SparseFrom = "question",
    seed: int = 0,
    recorder: Recorder | None = None,
    stepwise: bool = False,
) -> Forced:
    """How likely this answer is under an attention. `forced_many` says the rest."""
    return forced_many(
        lm,
        prefilled,
        question_ids,
        answer_ids,
        [attention],
        sparse_from=sparse_from,
        seed=seed,
        recorders=[recorder],
        stepwise=stepwise,
    )[0]


def forced_many(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    answer_ids: list[int],
    attentions: Sequence[ResearchAttention | None],
    *,
    sparse_from: SparseFrom = "question",
    seed: int = 0,
    recorders: Sequence[Recorder | None] | None = None,
    stepwise: bool = False,
) -> list[Forced]:
    """How likely a given answer is under several attentions, as one batch: the question, then the answer's tokens.

    The answer's last token is predicted but never fed, as in generation: an answer that ends with EOS has no row after it.
    stepwise: feed the tokens one by one, as generation does, instead of in one pass. It takes as long as generation, and is
    what generation of these tokens would be: in one pass a fraction of N is of what the last token sees, and pages hold
    tokens that come later.
    """
    if not answer_ids:
        raise UserError("the answer has no tokens: nothing to force")
    with _asked(lm, prefilled, question_ids, attentions, len(answer_ids) - 1, sparse_from, seed, recorders) as (
        session,
        rows,
    ):
        target = torch.tensor(answer_ids, device=lm.device)
        tails = len(question_ids) + len(answer_ids)
        told = [_predicted(_ask(lm, session, rows, question_ids, sparse_from, tails), target[:1])]
        done, step = 1, 1 if stepwise else len(answer_ids) - 1
        while done < len(answer_ids):
            session.step += 1
            ids = target[done - 1 : done - 1 + step].expand(len(rows), -1)
            told.append(_predicted(forward(lm, session, ids, step), target[done : done + step]))
            done += step
        losses, hits = (torch.cat(parts, 1) for parts in zip(*told, strict=True))
        return [
            Forced(float(nll), bool(hit), row.density(), row.kv_fraction())
            for row, nll, hit in zip(rows, losses.mean(1), hits.all(1), strict=True)
        ]


def _predicted(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihoods float32 (rows, n), whether the argmax is the token, bool (rows, n)) of the n target tokens
    under logits (rows, n, V), which are large: a row at a time, and kept no longer than this."""
    target = target.to(logits.device)
    losses = [torch.nn.functional.cross_entropy(scores.float(), target, reduction="none") for scores in logits]
    return torch.stack(losses), logits.argmax(dim=-1) == target


@contextmanager
def _asked(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    attentions: Sequence[ResearchAttention | None],
    answer_rows: int,
    sparse_from: str,
    seed: int,
    recorders: Sequence[Recorder | None] | None,
) -> Iterator[tuple[Lockstep, list[Row]]]:
    """The rows of a batch, ready to be asked; cache and masker states are rewound to the context afterwards."""
    if sparse_from not in ("question", "decode"):
        raise UserError(f"sparse_from must be 'question' or 'decode', got {sparse_from!r}")
    if not question_ids:
        raise UserError("the question has no tokens: an answer needs at least one to start from")
    if not attentions:
        raise ValueError("no attention to answer under: give at least one (None is dense)")
    if len(question_ids) + answer_rows > prefilled.room:
        raise UserError(
            f"the context was prefilled with room for {prefilled.room} tokens, question and answer take "
            f"{len(question_ids) + answer_rows}: prefill with more room"
        )
    recorders = recorders if recorders is not None else [None] * len(attentions)
    memories = _memories(prefilled, attentions)
    rows = [
        Row(attention, memory, seed, () if recorder is None else (recorder,))
        for attention, memory, recorder in zip(attentions, memories, recorders, strict=True)
    ]
    session = Lockstep(prefilled.cache, prefilled.context_length, rows, prefilled.learned, prefilled.name)
    try:
        with running(lm, session):
            yield session, rows
    except BaseException:
        # A layer may have been left half-way: what was learned is learned again.
        for attention in attentions:
            if attention is not None:
                prefilled.states.pop(attention, None)
        raise
    else:
        for memory in memories:
            if memory is not None:
                memory.state.rewind(prefilled.context_length)
    finally:
        prefilled.cache.rewind(prefilled.context_length)


def _memories(prefilled: Prefilled, attentions: Sequence[ResearchAttention | None]) -> list[Memory | None]:
    """One memory a sparse row, kept from question to question; an attention asked for twice has two."""
    used: dict[ResearchAttention, int] = {}
    memories: list[Memory | None] = []
    for attention in attentions:
        if attention is None:
            memories.append(None)
            continue
        known = prefilled.states.setdefault(attention, [])
        place = used.get(attention, 0)
        used[attention] = place + 1
        if place == len(known):
            known.append(Memory(attention.new_state()))
        memories.append(known[place])
    return memories


def _ask(lm: LanguageModel, session: Lockstep, rows: list[Row], ids: list[int], sparse_from: str, tails: int) -> Tensor:
    """Feed the question to all rows; logits (rows, 1, V). Under "decode" the question is dense and part of the
    prefix."""
    batch = torch.tensor([ids], device=lm.device)
    if sparse_from == "question":
        session.cache.fork(len(rows), tails)
        return forward(lm, session, batch.expand(len(rows), -1), 1)
    dense_recorders = [recorder for row in rows if row.attention is None for recorder in row.recorders]
    session.rows = [Row(None, None, 0, dense_recorders)]
    logits = forward(lm, session, batch, 1).expand(len(rows), -1, -1)
    session.rows = rows
    session.cache.fork(len(rows), tails)
    return logits


def estimate_bytes(lm: LanguageModel, context_tokens: int, room: int, forks: int) -> int:
    """Memory that prefilling a context and answering under `forks` attentions takes beside the weights, roughly: KV
    cache, private tails, activations of the larger of the two passes, and one row's attention scores at a time."""
    config = lm.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    number = torch.tensor([], dtype=lm.dtype).element_size()
    token = 2 * lm.num_layers * kv_heads * width * number
    tails = forks * room * token if forks > 1 else 0
    row = (6 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)) * number
    at_once = context_tokens if lm.dense_backend != "sdpa" else min(context_tokens, _prefill_chunk(lm))
    activations = max(at_once, forks * room) * row
    scores = 4 * heads * min(room, 64) * (context_tokens + room) * 4
    logits = forks * config.vocab_size * (number + 4)
    return int((context_tokens + room) * token + tails + activations + scores + logits)
