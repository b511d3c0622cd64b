"""Prefill a context once, then ask it many times, under dense and sparse attentions side by side.

A `Prefilled` holds the KV cache of a context. `answer_many` generates greedily under several
attentions: linear layers run as one batch (one read of the weights per step), attention runs per row
on the shared prefix and the row's private tail, and a finished row leaves the batch. `forced_many`
scores a given answer, `forced_and_answered` does both in one pass. All leave the `Prefilled` as they found it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention import ResearchAttention
from ..errors import UserError
from ..maskers.context_summary import ContextSummary
from ..maskers.shared_states import SharedStates
from .cache import SharedPrefixCache
from .decoding import Answer, Forced, answer_of, check_finite, decode, forced_of, predicted
from .heap import trim_heap
from .load import LanguageModel
from .lockstep import Lockstep, Memory, Recorder, Row
from .observer import Observer, observed_by
from .probe import continues, layer_calls
from .probe import sparse_layers as sparse_layers  # re-exported
from .switch import switched

SparseFrom = Literal["question", "decode"]

#: Tokens of a context that go through the layers at once: activations stay small beside the cache.
_CHUNKS = {"cpu": 512, "gpu": 8192}


@dataclass
class Prefilled:
    """A context's KV cache, and the masker states fitted on its keys. name: of the context in `learned`. text_length: tokens of
    context, question and answer; rotary factors that depend on the length are those of so many. summaries: what the prefill saw, by
    layer; observed: its parts; problem: why one that was wanted is missing."""

    cache: SharedPrefixCache
    context_length: int
    seconds: float
    states: dict[tuple[ResearchAttention, int], Memory] = field(default_factory=dict)
    learned: SharedStates = field(default_factory=SharedStates)
    name: str = ""
    text_length: int = 0
    summaries: dict[int, ContextSummary] = field(default_factory=dict)
    observed: frozenset[str] = frozenset()
    problem: str | None = None

    @property
    def room(self) -> int:
        """Tokens of question and answer that fit after the context."""
        return self.cache.get_max_length() - self.context_length

    def context_keys(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, context, D) of a layer, views."""
        keys, values = self.cache.layers[layer_idx].view(0)
        return keys[:, :, : self.context_length], values[:, :, : self.context_length]

    def nbytes(self) -> int:
        """Bytes held: by the cache, and by the codes that maskers keep."""
        parts = {id(part): part for memory in self.states.values() for part in memory.state.parts()}
        return self.cache.nbytes() + sum(part.nbytes for part in parts.values())

    def forget(self) -> None:
        """Drop what maskers learned, to free memory. It is learned again when needed."""
        self.states.clear()
        self.learned.forget(self.name)


def prefill(
    lm: LanguageModel, context_ids: list[int], room: int, observe: Collection[str] = (), text_length: int | None = None
) -> Prefilled:
    """Run the context through the model once, densely and without the LM head; `room` tokens can follow.

    observe: what to record of the context's queries, for attentions that choose by it: `attention.observes`.
    text_length: tokens of context, question and answer, by default context and room together: for models whose rotary factors depend
    on it ("longrope", "dynamic").
    UserError for an empty context or one longer than the model's positions.
    """
    if not context_ids:
        raise UserError("the context has no tokens: give one at least (the BOS token)")
    if room < 1:
        raise ValueError(f"room must be >= 1, got {room}")
    length = len(context_ids)
    if lm.max_positions is not None and length > lm.max_positions:
        raise UserError(f"the context has {length} tokens, {lm.id} takes {lm.max_positions}: shorten it", "max_context_length")
    started = time.perf_counter()
    cache = lm.new_cache(length + room)
    prefilled = Prefilled(cache, length, 0.0, text_length=text_length or length + room)
    ids = torch.tensor([context_ids], device=lm.device)
    batch = Lockstep(lm, prefilled, [Row()])
    observer = Observer(lm.model, observe)
    prefilled.summaries, prefilled.observed, prefilled.problem = observer.summaries, observer.parts, observer.problem
    batch.observer = observer if observer.parts else None
    if observer.parts or lm.dense_backend == "sdpa" or not _fused(lm):
        for part in torch.split(ids, length if not continues(lm) else prefill_chunk(lm), dim=1):
            batch.fill(part)
            trim_heap()
    else:
        with switched(lm.attention_configs, lm.dense_backend), batch.factors(), torch.no_grad():
            lm.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    if cache.get_seq_length() != length:
        raise UserError(f"model {lm.id!r} does not keep its keys in the cache it is given: take another model")
    cache.save()
    prefilled.seconds = time.perf_counter() - started
    return prefilled


def _fused(lm: LanguageModel) -> bool:
    """Whether another attention of transformers can prefill: it knows windows, but not all else that layers may ask."""
    return not any(call.rule.scores or call.rule.latent or call.rule.chunk for call in layer_calls(lm).values())


def prefill_chunk(lm: LanguageModel) -> int:
    """Tokens of a context that go through the layers at once."""
    return _CHUNKS["cpu"] if lm.device.type == "cpu" else _CHUNKS["gpu"]


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
    """Greedy answer under one attention; None is dense. Parameters as of `answer_many`."""
    ways, recorders = [attention], [recorder]
    return answer_many(
        lm, prefilled, question_ids, ways, max_new_tokens, sparse_from=sparse_from, seed=seed, recorders=recorders
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
    """Greedy answers under several attentions, decoded as one batch, in the order given.

    sparse_from: "question" (question and answer are sparse) or "decode" (the question is dense, once for
    all rows). An answer ends with EOS or after exactly max_new_tokens tokens, EOS counted.
    NonFiniteError, which names the attention, if logits are not finite; the other attentions can be asked without it.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    with _asked(lm, prefilled, question_ids, attentions, max_new_tokens, sparse_from, seed, recorders) as (batch, logits):
        rows = batch.rows
        decode(batch, logits, max_new_tokens)
    return [answer_of(lm, row) for row in rows]


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
    """How likely a given answer is under several attentions, as one batch.

    The answer's last token is predicted but never fed, as in generation. stepwise: feed the tokens one by
    one, as slow as generation and equal to it. In one pass, sizes that are a fraction of N use the N of
    the last token, and pages hold tokens that come later. NonFiniteError as answer_many.
    """
    with _asked(lm, prefilled, question_ids, attentions, len(answer_ids), sparse_from, seed, recorders) as (batch, logits):
        rows = batch.rows
        if stepwise:
            predictions, _ = decode(batch, logits, len(answer_ids), given=answer_ids)
            return forced_of(rows, predictions)
        check_finite(logits, batch)
        target = torch.tensor(answer_ids, device=lm.device)
        predictions = [predicted(logits, target[:1])]
        if len(answer_ids) > 1:
            batch.step += 1
            logits = batch.forward(target[:-1].expand(len(rows), -1), len(answer_ids) - 1)
            check_finite(logits, batch)
            predictions.append(predicted(logits, target[1:]))
        return forced_of(rows, predictions)


def forced_and_answered(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    answer_ids: list[int],
    attentions: Sequence[ResearchAttention | None],
    max_new_tokens: int,
    *,
    sparse_from: SparseFrom = "question",
    seed: int = 0,
    recorders: Sequence[Recorder | None] | None = None,
) -> list[tuple[Forced, Answer]]:
    """`forced_many` stepwise and `answer_many` in one pass, for an answer that was generated: it ends with EOS or has
    max_new_tokens tokens.

    A row is both until it would choose another token than the answer's. There it forks: the fork answers on its own, unrecorded.
    """
    ended = bool(answer_ids) and answer_ids[-1] in lm.eos_token_ids
    if len(answer_ids) > max_new_tokens or (len(answer_ids) < max_new_tokens and not ended):
        raise ValueError(
            f"answer_ids must end with EOS or be max_new_tokens ({max_new_tokens}) long, got {len(answer_ids)} tokens without EOS: "
            "take an answer that was generated"
        )
    asked = lm, prefilled, question_ids, attentions, max_new_tokens, sparse_from, seed, recorders
    with _asked(*asked, forks=True) as (batch, logits):
        rows = batch.rows
        predictions, forks = decode(batch, logits, max_new_tokens, given=answer_ids, forking=True)
    for row in rows:
        row.tokens = answer_ids
    answers = [answer_of(lm, forks.get(index, row)) for index, row in enumerate(rows)]
    return list(zip(forced_of(rows, predictions), answers, strict=True))


@contextmanager
def _asked(
    lm: LanguageModel,
    prefilled: Prefilled,
    question_ids: list[int],
    attentions: Sequence[ResearchAttention | None],
    answer_tokens: int,
    sparse_from: SparseFrom,
    seed: int,
    recorders: Sequence[Recorder | None] | None,
    forks: bool = False,
) -> Iterator[tuple[Lockstep, Tensor]]:
    """A batch that has seen the question, and its logits (rows, 1, V). Cache and masker states are rewound
    afterwards. Under "decode" the question is dense and part of the shared prefix. forks: rows may fork."""
    if sparse_from not in ("question", "decode"):
        raise UserError(f"sparse_from must be 'question' or 'decode', got {sparse_from!r}")
    if not question_ids:
        raise UserError("the question has no tokens: an answer needs at least one to start from")
    if isinstance(attentions, ResearchAttention):
        raise TypeError("attentions must be a list, got one ResearchAttention: put it in brackets")
    if not attentions:
        raise ValueError("no attention to answer under: give at least one (None is dense)")
    if answer_tokens < 1:
        raise UserError("the answer has no tokens: nothing to force")
    fed = len(question_ids) + answer_tokens - 1  # the answer's last token is not
    if fed > prefilled.room:
        raise UserError(
            f"the context was prefilled with room for {prefilled.room} tokens, question and answer take {fed}: "
            "prefill with more room"
        )
    missing = observed_by(attentions) - prefilled.observed
    if "statistics" in missing and prefilled.problem is not None:
        raise UserError(prefilled.problem)
    if missing:
        raise UserError(
            f"an attention chooses by what the prefill did not record ({', '.join(sorted(missing))}): "
            "call prefill(..., observe=attention.observes)"
        )
    recorders = recorders if recorders is not None else [None] * len(attentions)
    memories: dict[tuple[ResearchAttention, int], Memory] = {}
    rows = []
    for i, (attention, recorder) in enumerate(zip(attentions, recorders, strict=True)):
        memory = None
        if attention is not None:
            attention.config.check_layers(lm.num_layers)
            memory = Memory(attention, attention.new_state())
            if sparse_from == "question" or not attention.observes:  # else what it is fitted on has the question in it
                key = attention, attentions[:i].count(attention)  # an attention that is given twice has two memories
                memory = memories[key] = prefilled.states.setdefault(key, memory)
        rows.append(Row(memory, () if recorder is None else (recorder,)))
    batch = Lockstep(lm, prefilled, rows, seed)
    question = torch.tensor([question_ids], device=lm.device)
    try:
        if sparse_from == "question":
            prefilled.cache.fork(len(rows), fed + 1, forks)
            logits = batch.forward(question.expand(len(rows), -1), 1)
        else:
            batch.rows = [Row(recorders=[recorder for row in rows if row.memory is None for recorder in row.recorders])]
            batch.observer = _question_observer(lm, prefilled, question_ids, attentions)
            logits = batch.forward(question, 1).expand(len(rows), -1, -1)
            if batch.observer is not None:
                batch.summaries = batch.observer.named(question_ids)
            batch.rows, batch.observer = rows, None
            prefilled.cache.fork(len(rows), fed + 1, forks)
        yield batch, logits
    except BaseException:
        # A layer may be half done: its masker states are not valid.
        for key in memories:
            prefilled.states.pop(key, None)
        raise
    else:
        for memory in memories.values():
            memory.state.rewind(prefilled.context_length)
    finally:
        prefilled.cache.rewind(prefilled.context_length)


def _question_observer(
    lm: LanguageModel, prefilled: Prefilled, question_ids: list[int], attentions: Sequence[ResearchAttention | None]
) -> Observer | None:
    """What adds a dense question to the context's summaries; None if no attention needs it or they have it already."""
    held = {summary.question for summary in prefilled.summaries.values()}
    if not observed_by(attentions) or held == {tuple(question_ids)}:
        return None
    if held - {()}:
        raise ValueError("the context comes from the trace of another question, which its summaries have seen")
    return Observer(lm.model, prefilled.observed, prefilled.summaries)
