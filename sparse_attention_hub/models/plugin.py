"""The transformers plug-in: sparse attention for a loaded model, its own caches and `generate`.

    output = model(context_ids, past_key_values=cache)                      # dense prefill, as the model was loaded
    with sparse_attention(model, attention, seed=0) as session:
        model.generate(prompt_ids, past_key_values=cache, max_new_tokens=32)  # question and answer are sparse
    session.density

A forward pass that finds the cache empty is a prefill and stays dense (without a cache, every pass
is); all later passes are sparse, also the later chunks of a chunked prefill. The cache is never changed.
Each item of a batch is computed on its real keys only, without left padding and the empty slots of a
StaticCache. Evictions that choose by the context's queries need the prefill inside the `with`; after an earlier one, the queries of the
first sparse pass are taken instead. Layers with a sliding window stay dense. Attention weights are not returned:
`output_attentions=True` yields None. For many attentions on one context `answer_many` is faster.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention import ResearchAttention
from ..errors import UserError
from ..maskers.context_summary import ContextSummary
from ..maskers.inputs import AttentionInputs
from ..maskers.layout import FORBIDDEN_BIAS
from .dense import dense_with_mask
from .load import LanguageModel
from .observer import Observer
from .rules import Rule, layer_rule
from .switch import SessionAttention, SparseMeans, attention_configs, check_supported

PLUGIN = "sparse_hub"


@dataclass
class _Item:
    """One batch item's masker state in one layer."""

    state: Any
    seen: Tensor  # (Hkv, length): one channel of the keys that the state knows, to notice another text
    fitted: int  # number of keys that the maskers were fitted on


class _View:
    """A forward pass's mask (B, 1, Q, N), per item (full). spans: (first, end) of the real keys; causal:
    nothing else is masked; prefill: no keys precede the queries."""

    def __init__(self, mask: Tensor, batch: int, length: int) -> None:
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise UserError(f"the attention mask must be (B, 1, Q, N), the same for all heads, got {tuple(mask.shape)}")
        self.mask, self.full = mask, mask.expand(batch, -1, -1, -1)
        allowed = self.full if mask.dtype == torch.bool else self.full > FORBIDDEN_BIAS
        last = allowed[:, 0, -1]
        total = last.shape[-1]
        slots = torch.arange(total, device=last.device)
        first = torch.where(last, slots, total).amin(dim=-1).tolist()
        end = torch.where(last, slots + 1, 0).amax(dim=-1).tolist()
        # An item whose last row may see nothing is all padding: it keeps all slots and its mask.
        self.spans = [(a, b) if a < b else (0, total) for a, b in zip(first, end, strict=True)]
        self.causal = [_is_causal(self.full[i, 0], allowed[i, 0], a, b) for i, (a, b) in enumerate(self.spans)]
        self.prefill = all(b - a <= length for a, b in self.spans)


def _is_causal(mask: Tensor, allowed: Tensor, first: int, end: int) -> bool:
    """Whether an item's mask (Q, N) is plain causal order on the keys [first, end), without holes or biases."""
    length = mask.shape[0]
    expected = torch.ones_like(allowed).tril(end - length)
    expected[:, :first] = False
    unbiased = mask.dtype == torch.bool or not bool(mask[allowed].any())
    return end - first >= length and unbiased and torch.equal(allowed, expected)


@dataclass
class SparseSession(SparseMeans):
    """Counts attention calls inside `sparse_attention`: all, sparse ones, and those of layers with a sliding
    window, which stay dense. density and kv_fraction: means over items, sparse layers and query rows, None
    before the first sparse call. Rows that `generate` feeds an item behind its EOS, while others continue, are in them."""

    attention: ResearchAttention
    seeds: int | Sequence[int]
    dense_prefill: bool
    make_observer: Callable[[], Observer]
    context_length: int | None = None
    calls: int = 0
    sparse_calls: int = 0
    windowed_calls: int = 0
    _items: dict[tuple[int, int], _Item] = field(default_factory=dict)
    #: What the last prefill saw, and one channel of its keys, by layer and item.
    _prefills: dict[tuple[int, int], tuple[ContextSummary, Tensor]] = field(default_factory=dict)
    _view: _View | None = None

    def attend(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """queries (B, H, Q, D), keys and values (B, Hkv, N, D) -> (B, Q, H, D)."""
        self.calls += 1
        rule = layer_rule(module, kwargs)
        self.windowed_calls += rule.limited
        if mask is None:
            raise UserError(
                "no attention mask reached the sparse attention, so padding and order are unknown: "
                "this model builds its own masks, take another model"
            )
        view = self._view
        if not rule.limited and (view is None or view.mask is not mask):  # all layers of a pass share one mask
            view = self._view = _View(mask, batch=queries.shape[0], length=queries.shape[2])
        if rule.limited or view is None or (view.prefill and self.dense_prefill):
            for i in range(len(queries)):  # a new text begins
                self._items.pop((module.layer_idx, i), None)
            if self.attention.observes and view is not None and not rule.limited:
                self._observe(view, module.layer_idx, queries, keys, values, scaling, rule)
            if rule.scores:
                return dense_with_mask(queries, keys, values, mask, scaling, rule)
            # With a mask given, transformers' own function aligns nothing by itself.
            return sdpa_attention_forward(module, queries, keys, values, mask, scaling=scaling, is_causal=False)[0]
        seeds = [self.seeds] * len(queries) if isinstance(self.seeds, int) else self.seeds
        if len(seeds) != len(queries):
            raise UserError(f"seed must be one number, or one for each of the {len(queries)} items, got {len(seeds)}")
        self.sparse_calls += 1
        outputs = []
        for i in range(len(queries)):
            inputs = _inputs(view, i, module.layer_idx, queries, keys, values, scaling, rule, int(seeds[i]))
            item = self._item(i, module.layer_idx, inputs.keys, max(0, inputs.shape[3] - inputs.shape[2]))
            result = self.attention.attend_inputs(inputs, item.state)
            item.seen = inputs.keys[0, :, :, 0].clone()
            rows = int((~result.density_rows.isnan()).sum())  # rows of padding do not count
            if rows:
                self.add(result, rows)
            outputs.append(result.output.to(queries.dtype))
        return torch.cat(outputs)

    def _observe(
        self, view: _View, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None, rule: Rule
    ) -> None:
        """Record what the attention chooses by, of a dense prefill."""
        for i in range(len(queries)):
            inputs = _inputs(view, i, layer_idx, queries, keys, values, scaling, rule)
            observer = self.make_observer()
            observer.see(inputs)
            self._prefills[layer_idx, i] = observer.summaries[layer_idx], inputs.keys[0, :, :, 0].clone()

    def _item(self, i: int, layer_idx: int, keys: Tensor, past: int) -> _Item:
        """The item's state after `past` keys: rewound to those that it knows, after a crop or where a beam moved; new for another
        text."""
        item = self._items.get((layer_idx, i))
        known = keys[0, :, :past, 0]
        if item is not None:
            alike = _alike(known, item.seen)
            if item.fitted <= alike and (item.fitted > 0 or alike == past):
                item.state.rewind(alike)
                return item
        fitted = past if self.context_length is None else min(past, self.context_length)
        item = _Item(self.attention.new_state(), known, fitted)
        if past > 0:
            summary, seen = self._prefills.get((layer_idx, i), (None, known))
            if summary is not None and torch.equal(known, seen):
                item.state.observe(layer_idx, summary)
            self.attention.prepare(keys[:, :, :fitted], layer_idx, item.state)
        self._items[(layer_idx, i)] = item
        return item


def _alike(one: Tensor, other: Tensor) -> int:
    """How many leading columns of two tensors (Hkv, n) are equal."""
    length = min(one.shape[1], other.shape[1])
    one, other = one[:, :length], other[:, :length]
    return length if torch.equal(one, other) else int((one == other).all(0).long().cumprod(0).sum())


def _inputs(
    view: _View,
    i: int,
    layer_idx: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    rule: Rule,
    seed: int = 0,
) -> AttentionInputs:
    """The call of one item, on its real keys only."""
    own, real = slice(i, i + 1), slice(*view.spans[i])
    mask = None if view.causal[i] else view.full[own, :, :, real]
    place = mask, scaling, layer_idx, [seed]
    return AttentionInputs(queries[own], keys[own, :, real], values[own, :, real], *place, **rule.scores, latent=rule.latent)


def _full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A bool mask (B, 1, Q, N), also where transformers would pass None, which could mean any order."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


_ATTENTION = SessionAttention(PLUGIN, "inside `with sparse_attention(...)` only, in the thread that entered it", _full_mask)


@contextmanager
def sparse_attention(
    model: Any,
    attention: ResearchAttention,
    *,
    seed: int | Sequence[int] = 0,
    dense_prefill: bool = True,
    context_length: int | None = None,
) -> Iterator[SparseSession]:
    """Switch a transformers model (or a LanguageModel) to sparse attention inside the `with`.

    seed: one for all items of a batch, or one per item. dense_prefill=False: sparse from the first token. context_length: what a
    method learns of a text as a whole, it learns of so many of its first tokens; None = of all that are prefilled densely. With a
    context's length, `generate` on context and question answers as the benchmark does under --sparse-from decode.
    UserError for a model whose attention is not supported or cannot be switched.
    """
    if not isinstance(attention, ResearchAttention):
        raise TypeError(
            f"attention must be a ResearchAttention, got {type(attention).__name__}: ResearchAttention(config) makes one"
        )
    if context_length is not None and context_length < 1:
        raise ValueError(f"context_length must be >= 1, got {context_length}")
    target = model.model if isinstance(model, LanguageModel) else model
    kind = type(target).__name__
    check_supported(target, getattr(target, "name_or_path", "") or kind)
    seeds = int(seed) if isinstance(seed, numbers.Integral) else [int(one) for one in seed]  # type: ignore[union-attr]
    attention.config.check_layers(target.config.get_text_config(decoder=True).num_hidden_layers)
    session = SparseSession(attention, seeds, dense_prefill, lambda: Observer(target, attention.observes), context_length)
    problem = session.make_observer().problem
    if problem is not None:
        raise UserError(problem)
    counted = 0

    def must_have_been_called(*_: Any) -> None:
        nonlocal counted
        if session.calls == counted:
            raise UserError(f"{kind} stayed dense: its code ignores transformers' attention interface, take another model")
        if session.calls == session.windowed_calls:
            raise UserError(f"{kind} has sliding-window layers only, which stay dense: take another model")
        counted = session.calls

    hook = target.register_forward_hook(must_have_been_called)
    generation = getattr(target, "generation_config", None) or SimpleNamespace()
    compiles = getattr(generation, "disable_compile", None)
    generation.disable_compile = True  # control flow depends on the data: nothing to compile
    try:
        with _ATTENTION.used_by(session, attention_configs(target)):
            yield session
    finally:
        hook.remove()
        generation.disable_compile = compiles
