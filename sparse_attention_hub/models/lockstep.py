"""Batched decoding of one context under several attentions, and the attention function for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import ResearchAttention
from ..errors import UserError
from ..maskers.call_cache import CallCache
from ..maskers.inputs import AttentionInputs
from ..maskers.layout import Layout
from ..maskers.state import AttentionState
from .dense import dense_rows
from .load import LanguageModel
from .switch import SessionAttention, SparseMeans, checked_window

if TYPE_CHECKING:
    from .session import Prefilled

LOCKSTEP = "sparse_hub_lockstep"

#: Called after each layer's attention of a row, with keyword arguments: layer_idx; result, an
#: AttentionResult, None for a dense row; queries (1, H, Q, D), after RoPE, of the last Q positions; keys,
#: values (1, Hkv, N, D), views of the cache, valid only during the call; scaling; step, 0 for the question,
#: 1, 2, ... for the generated tokens (1 for a forced answer that is not fed stepwise).
Recorder = Callable[..., None]


@dataclass
class Memory:
    """Masker states of an attention on one context. prepared: layers whose context keys are fitted."""

    attention: ResearchAttention
    state: AttentionState
    prepared: set[int] = field(default_factory=set)


@dataclass
class Row(SparseMeans):
    """One row of the batch, dense without a memory. tokens: the answer; seconds: until its last token."""

    memory: Memory | None = None
    recorders: Sequence[Recorder] = ()
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Lockstep:
    """Rows that go through the model as one batch, each with its own attention, on one context's cache."""

    def __init__(self, lm: LanguageModel, prefilled: Prefilled, rows: list[Row], seed: int = 0) -> None:
        self.lm, self.prefilled, self.rows, self.seed = lm, prefilled, rows, seed
        self.step = 0
        self.windows: dict[int, int | None] = {}  # sliding window per layer that was called
        self._calls = 0  # of attention, in the current forward pass
        self._filling = False  # the current pass ends before the last layer's attention
        self._layouts: dict[Hashable, Layout] = {}  # shared by all rows and layers of one forward pass

    def forward(self, ids: Tensor, keep: int) -> Tensor:
        """Logits (rows, keep, V) of the last `keep` of ids (rows, Q)."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.lm.keeps_logits else {}
        logits: Tensor = self._run(self.lm.model, ids, **options).logits[:, -keep:]
        return logits

    def fill(self, ids: Tensor) -> None:
        """Put the keys and values of ids (rows, Q) into the cache; skip the rest of the last layer."""
        self._run(self.lm.model.base_model, ids, filling=True)

    @torch.no_grad()
    def _run(self, module: Any, ids: Tensor, filling: bool = False, **options: Any) -> Any:
        """The module's output, None if filling. UserError if a layer did not use this attention."""
        self._layouts.clear()
        self._calls, self._filling, output = 0, filling, None
        with _ATTENTION.used_by(self, self.lm.attention_configs), suppress(_Filled):
            output = module(input_ids=ids, past_key_values=self.prefilled.cache, use_cache=True, **options)
        if self._calls != self.lm.num_layers:
            raise UserError(
                f"model {self.lm.id!r} has {self.lm.num_layers} layers but {self._calls} of them used the attention "
                "that was set: its code does not follow transformers' attention interface, take another model"
            )
        return output

    def attend(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: None,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """queries (rows, H, Q, D) -> (rows, Q, H, D). Keys and values come from each row's view of the cache."""
        layer_idx: int = module.layer_idx
        window = self.windows[layer_idx] = checked_window(module, kwargs)
        scaling = scale if scale is not None else queries.shape[-1] ** -0.5
        self._calls += 1
        if self._filling and self._calls == self.lm.num_layers:
            raise _Filled
        draws: dict[Hashable, object] = {}  # all rows use the same random numbers
        outputs = []
        for index, row in enumerate(self.rows):
            own = queries if len(self.rows) == 1 else queries[index : index + 1]
            keys, values = self.prefilled.cache.layers[layer_idx].view(index)
            result = None
            if row.memory is None or window is not None:
                output = dense_rows(own, keys, values, scaling, window)
            else:
                self._prepare(row.memory, layer_idx, keys[:, :, : self.prefilled.context_length])
                cache = CallCache(draws=draws, layouts=self._layouts)
                inputs = AttentionInputs(own, keys, values, None, scaling, layer_idx, [self.seed], cache)
                result = row.memory.attention.attend_inputs(inputs, row.memory.state)
                output = result.output.to(own.dtype)
                row.add(result, own.shape[2])
            outputs.append(output)
            for recorder in row.recorders if window is None else ():
                recorder(
                    layer_idx=layer_idx, result=result, queries=own, keys=keys, values=values, scaling=scaling, step=self.step
                )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _prepare(self, memory: Memory, layer_idx: int, keys: Tensor) -> None:
        """Fit the maskers on the context's keys, once per layer; attentions with equal codes share the work."""
        if layer_idx in memory.prepared:
            return
        known = self.prefilled.learned.of(memory.attention.maskers, self.prefilled.name, keys, layer_idx)
        for position in range(len(memory.attention.maskers)):
            memory.state.adopt(layer_idx, position, known.entry(layer_idx, position).fork(self.prefilled.context_length))
        memory.prepared.add(layer_idx)
        self.prefilled.learned.trim()


class _Filled(Exception):
    """Ends a forward pass: all keys and values are in the cache."""


# No mask is needed: every row is causal at the lower right, and nothing is padding.
_ATTENTION = SessionAttention(
    LOCKSTEP, "inside answer_many(), forced_many() and prefill() only", make_mask=lambda *_, **__: None
)
