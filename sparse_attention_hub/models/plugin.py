"""The transformers plug-in: a loaded model, its own caches and `generate`, with sparse attention for a while.

    output = model(context_ids, past_key_values=cache)                      # dense prefill, as the model was loaded
    with sparse_attention(model, attention, seed=0) as session:
        model.generate(prompt_ids, past_key_values=cache, max_new_tokens=32)  # question and answer are sparse
    session.density

A forward pass that finds the cache empty is a prefill and stays dense (without a cache, every pass is); whatever comes
after is sparse, the later chunks of a prefill in chunks too. The cache is never changed. Each item of a batch is attended to by itself on its real keys: left padding is cut off, and of a
StaticCache's slots only the filled ones are seen. Layers with a sliding window stay dense. Custom attention functions
return no attention weights, so `output_attentions=True` yields None. For many attentions on one context `answer_many`
is faster.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError
from ..maskers.layout import FORBIDDEN_BIAS
from .switch import attention_configs, check_call, check_supported, switched, window_of

if TYPE_CHECKING:
    from ..attention import ResearchAttention

#: The name under which transformers knows this attention. Names with "flash", "sdpa" or "/" have meanings there.
PLUGIN = "sparse_hub"


@dataclass
class _Item:
    """One batch item's masker state in one layer. seen: (Hkv, length), a channel of the keys it knows, to notice
    another text."""

    state: Any
    seen: Tensor
    fitted: int


@dataclass
class _View:
    """What one forward pass's mask (B, 1, Q, N) says. spans: (first, end) of each item's real keys; causal: nothing
    else is masked."""

    mask: Tensor
    prefill: bool
    spans: list[tuple[int, int]]
    causal: list[bool]


@dataclass
class SparseSession:
    """Counts what happened inside `sparse_attention`. calls: all attention calls; sparse_calls: those that were
    sparse; windowed_calls: those of layers with a sliding window, which stay dense."""

    attention: ResearchAttention
    seeds: int | Sequence[int]
    dense_prefill: bool
    calls: int = 0
    sparse_calls: int = 0
    windowed_calls: int = 0
    _weight: float = 0.0
    _density: float = 0.0
    _kv_fraction: float = 0.0
    _items: dict[tuple[int, int], _Item] = field(default_factory=dict)
    _seen_mask: Tensor | None = None
    _view: _View | None = None

    @property
    def density(self) -> float | None:
        """Mean over items, sparse layers and query rows; None before the first sparse call."""
        return self._density / self._weight if self._weight else None

    @property
    def kv_fraction(self) -> float | None:
        return self._kv_fraction / self._weight if self._weight else None

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
        check_call(kwargs)
        if mask is None:
            raise UserError(
                "no attention mask reached the sparse attention, so padding and order are unknown: "
                "this model builds its own masks, take another model"
            )
        if window_of(module, kwargs) is not None:
            self.windowed_calls += 1
            return self._dense(module, queries, keys, values, mask, scaling)
        batch = queries.shape[0]
        view = self._look(mask, batch, queries.shape[2])
        if view.prefill and self.dense_prefill:
            return self._dense(module, queries, keys, values, mask, scaling)
        self.sparse_calls += 1
        return torch.cat([self._attend_item(i, module.layer_idx, queries, keys, values, view, scaling) for i in range(batch)])

    def _attend_item(
        self, i: int, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, view: _View, scaling: float | None
    ) -> Tensor:
        first, end = view.spans[i]
        own_keys, own_values = keys[i : i + 1, :, first:end], values[i : i + 1, :, first:end]
        own_mask = None if view.causal[i] else view.mask[i : i + 1, :, :, first:end]
        item = self._item(i, layer_idx, own_keys, max(0, end - first - queries.shape[2]))
        result = self.attention(
            queries[i : i + 1],
            own_keys,
            own_values,
            attention_mask=own_mask,
            scaling=scaling,
            layer_idx=layer_idx,
            state=item.state,
            seeds=self._seed(i, queries.shape[0]),
        )
        item.seen = own_keys[0, :, :, 0].clone()
        rows = int((~result.density_rows.isnan()).sum())  # rows of padding are measured nowhere
        if rows:
            self._weight += rows
            self._density += result.density * rows
            self._kv_fraction += result.kv_fraction * rows
        return result.output.to(queries.dtype)

    def _seed(self, i: int, batch: int) -> int:
        if isinstance(self.seeds, int):
            return self.seeds
        if len(self.seeds) != batch:
            raise UserError(f"seed must be one number, or one for each of the {batch} items, got {len(self.seeds)}")
        return self.seeds[i]

    def _item(self, i: int, layer_idx: int, keys: Tensor, past: int) -> _Item:
        """The item's state, knowing exactly the `past` keys: rewound if the cache was cropped, learned anew if the
        text is another one (a new sequence, or beams that changed places)."""
        item = self._items.get((layer_idx, i))
        known = keys[0, :, :past, 0]
        if item is not None and item.fitted <= past <= item.seen.shape[1] and torch.equal(known, item.seen[:, :past]):
            if past < item.seen.shape[1]:
                item.state.rewind(past)
            return item
        item = _Item(self.attention.new_state(), known, past)
        if past > 0:
            self.attention.prepare(keys[:, :, :past], layer_idx, item.state)
        self._items[(layer_idx, i)] = item
        return item

    def _look(self, mask: Tensor, batch: int, length: int) -> _View:
        """Read a mask (B, 1, Q, N) once a forward pass: all layers are handed the same one."""
        if self._seen_mask is mask and self._view is not None:
            return self._view
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise UserError(f"the attention mask must be (B, 1, Q, N), the same for all heads, got {tuple(mask.shape)}")
        full = mask.expand(batch, -1, -1, -1)
        allowed = full if mask.dtype == torch.bool else full > FORBIDDEN_BIAS
        last = allowed[:, 0, -1]
        slots = torch.arange(last.shape[-1], device=last.device)
        first = torch.where(last, slots, last.shape[-1]).amin(dim=-1).tolist()
        end = torch.where(last, slots + 1, 0).amax(dim=-1).tolist()
        # An item whose last row may see nothing is all padding: it keeps all slots and its mask.
        spans = [(a, b) if a < b else (0, last.shape[-1]) for a, b in zip(first, end, strict=True)]
        causal = [self._is_causal(full[i, 0], allowed[i, 0], a, b, length) for i, (a, b) in enumerate(spans)]
        self._seen_mask = mask
        self._view = _View(full, all(b - a <= length for a, b in spans), spans, causal)
        return self._view

    @staticmethod
    def _is_causal(mask: Tensor, allowed: Tensor, first: int, end: int, length: int) -> bool:
        """Whether the mask (Q, N) of one item is plain causal order on the keys [first, end), without holes or
        biases."""
        if end - first < length:
            return False
        expected = torch.ones(length, end - first, dtype=torch.bool, device=mask.device).tril(end - first - length)
        own, outside = allowed[:, first:end], int(allowed.sum()) - int(allowed[:, first:end].sum())
        unbiased = mask.dtype == torch.bool or not bool(mask[:, first:end][own].any())
        return outside == 0 and unbiased and torch.equal(own, expected)

    def _dense(self, module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
        # With a mask in hand transformers' own function aligns nothing by itself.
        output, _ = sdpa_attention_forward(module, queries, keys, values, mask, scaling=scaling, is_causal=False)
        return output


_ACTIVE: ContextVar[SparseSession | None] = ContextVar("sparse_hub_session", default=None)


def _plugin_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, Q, D) -> ((B, Q, H, D), None)."""
    session = _ACTIVE.get()
    if session is None:
        raise RuntimeError(
            f"attention {PLUGIN!r} works inside `with sparse_attention(...)` only, in the thread that entered it"
        )
    return session.attend(module, query, key, value, attention_mask, scaling, kwargs), None


def _full_mask(*args: Any, **kwargs: Any) -> Tensor:
    """A bool mask (B, 1, Q, N) always: None would have to be guessed at."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register(PLUGIN, _plugin_attention)
AttentionMaskInterface.register(PLUGIN, _full_mask)


@contextmanager
def sparse_attention(
    model: Any, attention: ResearchAttention, *, seed: int | Sequence[int] = 0, dense_prefill: bool = True
) -> Iterator[SparseSession]:
    """Switch a transformers model (or a LanguageModel) to sparse attention inside the `with`; nothing is reloaded.

    seed: one for all items of a batch, or one an item. dense_prefill=False attends sparsely from the first token on.
    UserError for a model whose attention is not supported, or which does not use the attention it was told to.
    """
    target = getattr(model, "model", model) if hasattr(model, "attention_configs") else model
    check_supported(target, getattr(target, "name_or_path", "") or type(target).__name__)
    seeds = int(seed) if isinstance(seed, numbers.Integral) else [int(one) for one in seed]  # type: ignore[union-attr]
    session = SparseSession(attention, seeds, dense_prefill)
    counted = 0

    def must_have_been_called(*_: Any) -> None:
        nonlocal counted
        if session.calls == counted:
            raise UserError(
                f"{type(target).__name__} stayed dense: its code does not follow transformers' attention interface, "
                "take another model"
            )
        if session.calls == session.windowed_calls:
            raise UserError(f"{type(target).__name__} has sliding-window layers only, which stay dense: take another model")
        counted = session.calls

    hook = target.register_forward_hook(must_have_been_called)
    generation = getattr(target, "generation_config", None)
    compiles = getattr(generation, "disable_compile", None)
    token = _ACTIVE.set(session)
    try:
        if generation is not None:
            generation.disable_compile = True  # what is attended to depends on the data: nothing to compile
        with switched(attention_configs(target), PLUGIN):
            yield session
    finally:
        _ACTIVE.reset(token)
        hook.remove()
        if generation is not None:
            generation.disable_compile = compiles
