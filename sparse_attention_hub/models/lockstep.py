"""Batched decoding of one context under several attentions, and the attention function for it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import AttentionResult, ResearchAttention, selector_share
from ..errors import UserError
from ..mask import Mask
from ..maskers.call_cache import CallCache
from ..maskers.inputs import AttentionInputs
from ..maskers.layout import Layout
from ..maskers.state import AttentionState
from .dense import dense_rows
from .grouped_rows import GroupedRows, Totals, can_group
from .load import LanguageModel
from .observer import Observer
from .open_steps import OpenSteps
from .rope import factors_of
from .rules import Rule, layer_rule, refuse_mask
from .step_scores import StepScores
from .switch import SessionAttention, SparseMeans

if TYPE_CHECKING:
    from .session import Prefilled

LOCKSTEP = "sparse_hub_lockstep"

#: Called after each layer's attention of a row, with keyword arguments: layer_idx; result, an
#: AttentionResult, None for a dense row; queries (1, H, Q, D), after RoPE, of the last Q positions; keys,
#: values (1, Hkv, N, D), views of the cache, valid only during the call; scaling; softcap and sinks where the layer
#: has them; step, 0 for the question, 1, 2, ... for the generated tokens (1 for a forced answer that is not fed stepwise).
#: A sparse row with more queries than QUERIES_AT_ONCE calls it for each block of them.
Recorder = Callable[..., None]

#: Queries that a sparse attention takes at once. Scores and choices of one take tens of MiB at 64k keys and 32 heads.
QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class LayerCall:
    """What a layer's attention was called with: its rule, query and kv heads, channels of a key and of a value."""

    rule: Rule
    heads: int
    kv_heads: int
    key_width: int
    value_width: int

    @property
    def token_numbers(self) -> int:
        """Numbers that the cache holds of one token."""
        return self.kv_heads * (self.key_width + self.value_width)


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

    def fork(self, tokens: Sequence[int], length: int) -> Row:
        """A row with this answer so far, which is alike up to here, after `length` keys, and recorded by nobody."""
        forked = copy.copy(self)
        forked.tokens, forked.recorders, forked._later = list(tokens), (), list(self._later or ())
        if self.memory is not None:
            state = self.memory.state.fork(length)
            forked.memory = replace(self.memory, state=state, prepared=set(self.memory.prepared))
        return forked


class Lockstep:
    """Rows that go through the model as one batch, each with its own attention, on one context's cache."""

    def __init__(self, lm: LanguageModel, prefilled: Prefilled, rows: list[Row], seed: int = 0) -> None:
        self.lm, self.prefilled, self.rows, self.seed = lm, prefilled, rows, seed
        self.step, self._started = 0, time.perf_counter()
        self.observer: Observer | None = None  # of a pass with one dense row
        self.summaries = prefilled.summaries  # what maskers are fitted on, beside the keys
        self.layers: dict[int, LayerCall] = {}  # of those that were called
        self._called: set[int] = set()  # layers that called attention in the current forward pass
        self._filling = False  # the current pass ends before the last layer's attention
        self._layouts: dict[Hashable, Layout] = {}  # shared by all rows and layers of one forward pass
        self.grouped = GroupedRows()
        self.totals: list[Totals] = []  # of the last forward pass
        self.open_steps: OpenSteps | None = None  # those that follow are open

    def elapsed(self) -> float:
        """Seconds since the batch was made."""
        return time.perf_counter() - self._started

    def forward(self, ids: Tensor, keep: int) -> Tensor:
        """Logits (rows, keep, V) of the last `keep` of ids (rows, Q)."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.lm.keeps_logits else {}
        if self.prefilled.cache.get_seq_length() and ids.shape[1] > 1 and self.lm.continues is False:
            # The recurrent layers of this model ignore their earlier state in every pass of several tokens.
            logits = [self._run(self.lm.model, part, **options).logits[:, -1:] for part in ids.split(1, dim=1)]
            return torch.cat(logits[-keep:], 1)
        last: Tensor = self._run(self.lm.model, ids, **options).logits[:, -keep:]
        return last

    def fill(self, ids: Tensor) -> None:
        """Put the keys and values of ids (rows, Q) into the cache; skip the rest of the last layer."""
        self._run(self.lm.model.base_model, ids, filling=not self.prefilled.cache.recurrent)

    def open(self, steps: OpenSteps | None, room: int = 0) -> None:
        """From here on steps are open, for so many tokens; None ends that."""
        self.open_steps = steps
        for layer in self.prefilled.cache.attention:
            layer.open(None if steps is None else steps.end, room)

    def step_open(self, ids: Tensor) -> Tensor:
        """Logits (rows, 1, V) of ids (rows, 1), in an open step; `totals` are not added to the rows."""
        assert self.open_steps is not None
        self.open_steps.layers = []
        logits: Tensor = self._pass(self.lm.model, ids, logits_to_keep=1).logits
        self.open_steps.end += 1
        return logits

    def _run(self, module: Any, ids: Tensor, **options: Any) -> Any:
        """`_pass`, and what it read is added to the rows."""
        output = self._pass(module, ids, **options)
        self.count(self.totals)
        return output

    def count(self, totals: list[Totals]) -> None:
        """Add what a step read to the rows. Dense ones are not counted."""
        for own in totals:
            own.add_to([row if row.memory is not None else SparseMeans() for row in self.rows])

    @torch.no_grad()
    def _pass(self, module: Any, ids: Tensor, filling: bool = False, **options: Any) -> Any:
        """The module's output, None if filling. UserError if a layer did not use this attention."""
        cache, expected = self.prefilled.cache, len(self.prefilled.cache.attention)
        end = None if self.open_steps is None else self.open_steps.end
        self._layouts.clear()
        self.grouped.begin()
        self._called, self._filling, output = set(), filling, None
        if self.lm.takes_positions:  # a few models count from 0 in every pass
            held = cache.get_seq_length()
            counted = torch.arange(held, held + ids.shape[1], device=ids.device) if end is None else end.view(1)
            options["position_ids"] = counted[None]
        cache.defer(True)
        try:
            with _ATTENTION.used_by(self, self.lm.attention_configs), self.factors(), suppress(_Filled):
                output = module(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        finally:
            cache.defer(False)
        self.totals = self.grouped.totals(cache.get_seq_length() if end is None else end + 1)
        if len(self._called) != expected:
            raise UserError(
                f"this model has {expected} attention layers but {len(self._called)} of them used the attention "
                "that was set: its code does not follow transformers' attention interface, take another model"
            )
        return output

    def factors(self) -> AbstractContextManager[None]:
        """The rotary factors of the whole text, where they depend on its length."""
        modules, length = self.lm.length_dependent, self.prefilled.text_length
        return factors_of(modules, length) if modules and length else nullcontext()

    def attend(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """queries (rows, H, Q, D), new keys and values (rows, Hkv, Q, D) -> (rows, Q, H, D). The earlier keys and values come
        from each row's view of the cache."""
        refuse_mask(mask)
        layer_idx: int = module.layer_idx
        if layer_idx in self._called:
            raise UserError(
                "this model calls its attention more than once per layer, which is not supported: take another model"
            )
        self._called.add(layer_idx)
        rule, layer = layer_rule(module, kwargs), self.prefilled.cache.layers[layer_idx]
        scaling = scale if scale is not None else queries.shape[-1] ** -0.5
        layer.append(keys, values)
        self.layers[layer_idx] = LayerCall(rule, queries.shape[1], keys.shape[1], keys.shape[3], values.shape[3])
        if self.observer is not None and not rule.limited:
            keys, values = layer.view(0)
            about = {"scaling": scaling, "layer_idx": layer_idx, "cache": CallCache(layouts=self._layouts), **rule.scores}
            self.observer.see(AttentionInputs(queries, keys, values, **about))
        if self._filling and len(self._called) == len(self.prefilled.cache.attention):
            raise _Filled
        if self.open_steps is not None:
            return self.open_steps.attend(layer_idx, queries, scaling, rule, self._layouts)
        each = [queries] if len(self.rows) == 1 else queries.split(1)
        outputs: list[list[Tensor]] = [[] for _ in self.rows]
        for index, row in enumerate(self.rows):
            if row.memory is None or rule.limited:
                keys, values = layer.view(index)
                outputs[index].append(dense_rows(each[index], keys, values, scaling, rule))
                self._record(row, None, layer_idx, each[index], keys, values, scaling, rule)
        length, together = queries.shape[2], None
        if length == 1 < len(self.rows) and queries.device.type == "cpu":
            together = StepScores(queries, layer, scaling, rule)
        grouped = self._groupable(layer_idx, queries, rule)
        if grouped:
            attended = self._attend_grouped(grouped, layer_idx, queries, scaling, rule)
            for place, index in enumerate(grouped):
                outputs[index].append(attended[place : place + 1])
        for start in range(0, length, QUERIES_AT_ONCE):
            block = slice(start, min(length, start + QUERIES_AT_ONCE))
            draws: dict[Hashable, object] = {}  # all rows use the same random numbers
            for index, row in enumerate(self.rows):
                if row.memory is not None and not rule.limited and index not in grouped:
                    keys, values = layer.view(index)
                    makers = {} if together is None else together.made_of(index)
                    cache = CallCache(draws=draws, layouts=self._layouts, makers=makers)
                    call = layer_idx, each[index][:, :, block], keys, values, scaling, rule, length - block.stop, cache
                    outputs[index].append(self._attend_sparsely(row, row.memory, self._inputs(row.memory, *call), rule))
        rows = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in outputs]
        return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)  # some models call `view` on it

    def _attend_sparsely(self, row: Row, memory: Memory, inputs: AttentionInputs, rule: Rule) -> Tensor:
        """Output (1, Q, H, DV) of a block of a row's queries. Nobody else holds the inputs: their scores are freed at its end."""
        result = memory.attention.attend_inputs(inputs, memory.state)
        row.add(result, inputs.shape[2])
        seen = inputs.shape[3] - inputs.rows_after
        about = inputs.queries, inputs.keys[:, :, :seen], inputs.values[:, :, :seen], inputs.scaling, rule
        self._record(row, result, inputs.layer_idx, *about)
        return result.output

    def _groupable(self, layer_idx: int, queries: Tensor, rule: Rule) -> tuple[int, ...]:
        """Sparse rows that attend together: all but those that are dense in this layer. A single one gains nothing."""
        if rule.limited or queries.device.type == "cpu":
            return ()
        layer = self.prefilled.cache.layers[layer_idx]
        rows = [(index, row.memory.attention) for index, row in enumerate(self.rows) if row.memory]
        found = tuple(
            index
            for index, attention in rows
            if attention.maskers_of(layer_idx) and can_group(attention.config.backend, queries, layer, rule)
        )
        return found if len(found) > 1 else ()

    def _attend_grouped(self, rows: tuple[int, ...], layer_idx: int, queries: Tensor, scaling: float, rule: Rule) -> Tensor:
        """Output (R, 1, H, DV) of R sparse rows of the batch. queries (forks, H, 1, D)."""
        layer, draws = self.prefilled.cache.layers[layer_idx], dict[Hashable, object]()
        choices = []
        for index in rows:
            choices.append(self.choose(index, layer_idx, queries, scaling, rule, draws))
            if not self.rows[index].recorders:
                choices[-1][0].cache.call.clear()  # scores of many rows are large
        outputs, sums = self.grouped.attend(rows, [choice[1] for choice in choices], queries, layer, scaling, rule)
        for place, index in enumerate(rows):
            inputs, mask, empty_rows, selectors = choices[place]
            output, lse = (part[place : place + 1] for part in (outputs, sums))
            self.grouped.add_selectors(index, selector_share(inputs, selectors))
            if self.rows[index].recorders:
                result = AttentionResult(output, lse, mask, empty_rows, inputs, selectors)
                keys, values = layer.view(index)
                self._record(self.rows[index], result, layer_idx, inputs.queries, keys, values, scaling, rule)
        return outputs.to(queries.dtype)

    def choose(
        self, index: int, layer_idx: int, queries: Tensor, scaling: float, rule: Rule, draws: dict[Hashable, object]
    ) -> tuple[AttentionInputs, Mask, int | Tensor, list[Any]]:
        """The call of a sparse row of the batch, and the keys that it chooses. draws: shared by all rows of a layer."""
        row, (keys, values) = self.rows[index], self.prefilled.cache.layers[layer_idx].view(index)
        assert row.memory is not None
        cache = CallCache(draws=draws, layouts=self._layouts)
        inputs = self._inputs(row.memory, layer_idx, queries[index : index + 1], keys, values, scaling, rule, 0, cache)
        return inputs, *row.memory.attention.choose_keys(inputs, row.memory.state)

    def _inputs(
        self,
        memory: Memory,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        rule: Rule,
        after: int,
        cache: CallCache,
    ) -> AttentionInputs:
        """The call of a sparse row's queries, which `after` others follow; its maskers are fitted."""
        self._prepare(memory, layer_idx, keys[:, :, : self.prefilled.context_length])
        place = None, scaling, layer_idx, [self.seed], cache
        return AttentionInputs(queries, keys, values, *place, **rule.scores, latent=rule.latent, rows_after=after)

    def _record(
        self,
        row: Row,
        result: AttentionResult | None,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        rule: Rule,
    ) -> None:
        seen = {"queries": queries, "keys": keys, "values": values, "scaling": scaling, **rule.scores}
        for recorder in () if rule.limited else row.recorders:
            recorder(layer_idx=layer_idx, result=result, step=self.step, **seen)

    def _prepare(self, memory: Memory, layer_idx: int, keys: Tensor) -> None:
        """Fit the maskers on the context's keys, once per layer; attentions with equal codes share the work."""
        if layer_idx in memory.prepared:
            return
        maskers = memory.attention.maskers_of(layer_idx)
        known = self.prefilled.learned.of(maskers, self.prefilled.name, keys, layer_idx, self.summaries.get(layer_idx))
        for position in range(len(maskers)):
            memory.state.adopt(layer_idx, position, known.entry(layer_idx, position).fork(self.prefilled.context_length))
        memory.prepared.add(layer_idx)
        self.prefilled.learned.trim()


class _Filled(Exception):
    """Ends a forward pass: all keys and values are in the cache."""


# No mask is needed: every row is causal at the lower right, and nothing is padding.
_ATTENTION = SessionAttention(
    LOCKSTEP, "inside answer_many(), forced_many() and prefill() only", make_mask=lambda *_, **__: None
)
