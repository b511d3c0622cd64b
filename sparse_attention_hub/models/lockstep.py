"""The batch that answers in lockstep: its rows, and the attention function that transformers calls for all of them at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import UserError
from ..maskers.call_cache import CallCache
from ..maskers.inputs import AttentionInputs
from ..maskers.layout import Layout
from ..maskers.shared_states import SharedStates
from ..maskers.state import AttentionState
from .cache import SharedPrefixCache
from .dense import dense_rows
from .load import LanguageModel
from .switch import check_call, switched, window_of

if TYPE_CHECKING:
    from ..attention import AttentionResult, ResearchAttention

#: The name under which transformers knows this attention. Names with "flash", "sdpa" or "/" have meanings there.
LOCKSTEP = "sparse_hub_lockstep"


class Recorder(Protocol):
    """Called after each layer's attention of a row. result is None for a dense row.

    queries (1, H, Q, D), after RoPE, of the last Q positions; keys, values (1, Hkv, N, D), views of the cache that
    are valid only during the call; step 0 is the question, 1, 2, ... the generated tokens (1 for a forced answer as a whole,
    unless it is fed stepwise).
    """

    def __call__(
        self,
        *,
        layer_idx: int,
        result: AttentionResult | None,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        step: int,
    ) -> None: ...


@dataclass
class Memory:
    """One attention's masker state on one context. prepared: layers whose maskers have seen the context's keys."""

    state: AttentionState
    prepared: set[int] = field(default_factory=set)


class Row:
    """One line of the batch: its attention, and what was measured."""

    def __init__(
        self, attention: ResearchAttention | None, memory: Memory | None, seed: int, recorders: Sequence[Recorder]
    ) -> None:
        self.attention, self.memory, self.seed, self.recorders = attention, memory, seed, recorders
        self.weight = 0
        self.density_sum = 0.0
        self.kv_sum = 0.0

    def density(self) -> float | None:
        return self.density_sum / self.weight if self.weight else None

    def kv_fraction(self) -> float | None:
        return self.kv_sum / self.weight if self.weight else None


class Lockstep:
    """What the attention function needs beyond its arguments, for the time of one call to answer_many or
    forced_many."""

    def __init__(
        self,
        cache: SharedPrefixCache,
        context_length: int,
        rows: list[Row],
        learned: SharedStates | None = None,
        context: str = "",
    ) -> None:
        """learned: what maskers know of this context, which goes by the name `context` there."""
        self.cache, self.context_length, self.rows = cache, context_length, rows
        self.learned, self.context = learned if learned is not None else SharedStates(), context
        self.layouts: dict[Hashable, Layout] = {}  # of all rows and layers of one forward pass
        self.step = 0
        self.calls = 0
        self.windows: dict[int, int | None] = {}  # what each layer that was called says of itself
        self.last_call: int | None = None  # the call of attention whose output nobody wants

    def attend(self, module: Any, queries: Tensor, scaling: float, window: int | None) -> Tensor:
        """queries (rows, H, Q, D) -> (rows, Q, H, D)."""
        self.calls += 1
        layer_idx: int = module.layer_idx
        self.windows[layer_idx] = window
        if self.calls == self.last_call:
            raise _Filled
        layer = self.cache.layers[layer_idx]
        draws: dict[int, dict[Hashable, object]] = {}  # of the rows of each seed, whose calls differ in their tensors alone
        outputs = []
        for index, row in enumerate(self.rows):
            keys, values = layer.view(index)
            own = queries if len(self.rows) == 1 else queries[index : index + 1]
            cache = CallCache(draws=draws.setdefault(row.seed, {}), layouts=self.layouts)
            outputs.append(self._attend_row(row, layer_idx, own, keys, values, scaling, window, cache))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_row(
        self,
        row: Row,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        window: int | None,
        cache: CallCache,
    ) -> Tensor:
        result: AttentionResult | None = None
        if row.attention is None or row.memory is None or window is not None:
            output = dense_rows(queries, keys, values, scaling, window)
        else:
            if layer_idx not in row.memory.prepared:
                self._prepare(row.attention, row.memory, layer_idx, keys[:, :, : self.context_length])
            inputs = AttentionInputs(queries, keys, values, None, scaling, layer_idx, [row.seed], cache)
            result = row.attention.attend_inputs(inputs, row.memory.state)
            output = result.output.to(queries.dtype)
            length = queries.shape[2]
            row.weight += length
            row.density_sum += result.density * length
            row.kv_sum += result.kv_fraction * length
        if window is None:
            for recorder in row.recorders:
                recorder(
                    layer_idx=layer_idx,
                    result=result,
                    queries=queries,
                    keys=keys,
                    values=values,
                    scaling=scaling,
                    step=self.step,
                )
        return output

    def _prepare(self, attention: ResearchAttention, memory: Memory, layer_idx: int, keys: Tensor) -> None:
        """Give a row what its maskers learn of the context's keys; rows whose codes are equal learn it once."""
        known = self.learned.of(attention.maskers, self.context, keys, layer_idx)
        for position in range(len(attention.maskers)):
            memory.state.adopt(layer_idx, position, known.entry(layer_idx, position).fork(self.context_length))
        memory.prepared.add(layer_idx)
        self.learned.trim()


class _Filled(Exception):
    """Ends a forward pass: all keys and values are in the cache."""


_ACTIVE: ContextVar[Lockstep | None] = ContextVar("sparse_hub_lockstep", default=None)


def _lockstep_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (rows, H, Q, D) -> ((rows, Q, H, D), None)."""
    session = _ACTIVE.get()
    if session is None:
        raise RuntimeError(f"attention {LOCKSTEP!r} works inside answer(), forced() and prefill() only")
    check_call(kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return session.attend(module, query, scale, window_of(module, kwargs)), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Every row is causal at the lower right and nothing is padding: the attention function knows that without a
    mask."""
    return None


AttentionInterface.register(LOCKSTEP, _lockstep_attention)
AttentionMaskInterface.register(LOCKSTEP, _no_mask)


@contextmanager
def running(lm: LanguageModel, session: Lockstep) -> Iterator[None]:
    token = _ACTIVE.set(session)
    try:
        with switched(lm.attention_configs, LOCKSTEP), torch.no_grad():
            yield
    finally:
        _ACTIVE.reset(token)


def forward(lm: LanguageModel, session: Lockstep, ids: Tensor, keep: int) -> Tensor:
    """Logits (rows, keep, V) of the last `keep` of ids (rows, Q)."""
    before = session.calls
    session.layouts.clear()
    kwargs = {"logits_to_keep": keep} if lm.keeps_logits else {}
    logits: Tensor = lm.model(input_ids=ids, past_key_values=session.cache, use_cache=True, **kwargs).logits[:, -keep:]
    _check_calls(lm, session, before)
    return logits


def fill(lm: LanguageModel, session: Lockstep, ids: Tensor) -> None:
    """Put the keys and values of ids (rows, Q) into the cache. What the last layer does after these is left out."""
    before = session.calls
    session.last_call = before + lm.num_layers
    with suppress(_Filled):
        lm.model.base_model(input_ids=ids, past_key_values=session.cache, use_cache=True)
    _check_calls(lm, session, before)


def _check_calls(lm: LanguageModel, session: Lockstep, before: int) -> None:
    if session.calls - before != lm.num_layers:
        raise UserError(
            f"model {lm.id!r} has {lm.num_layers} layers but {session.calls - before} of them used the attention "
            "they were told to: its code does not follow transformers' attention interface, take another model"
        )
