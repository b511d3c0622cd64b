"""What a masker sees of one attention call: tensors, allowed keys, positions, scores, random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SeveralLayersError
from ..kernels import Known, dot, log_mass
from ..kernels.reference import group_scores, group_sums, weigh
from ..kernels.select import Order, choose, choose_mass, count_mass, count_up, extend, lowest, order_of, walk_anywhere
from ..lists import KeyLists, expand_heads, may_be_wide, uses_loops
from ..mask import Mask
from .call_cache import CallCache, once
from .layout import NEVER, Layout, check_call
from .state import MaskerState
from .uniforms import keyed_uniforms


class AttentionInputs:
    """One attention call as maskers see it.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D), H a multiple of Hkv. attention_mask, rows_after: see Layout.
    scaling: default D ** -0.5. layer_idx: of all items, or one per item, which
    the caller knows to have one rule (see Masker.join_fits). seeds: of `uniform()`, one per item,
    default 0. cache: shared with other calls. softcap: scores are softcap * tanh(score / softcap). sinks (H,): a logit per head that
    joins the softmax's denominator; it is never a key. latent: numbers of the one latent vector per token that all heads' keys and
    values are made of (MLA), 0 without one.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        layer_idx: int | tuple[int, ...] = 0,
        seeds: list[int] | None = None,
        cache: CallCache | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        latent: int = 0,
        rows_after: int = 0,
    ) -> None:
        check_call(queries, keys, values, attention_mask)
        self.softcap, self.sinks, self.latent = softcap, sinks, latent
        self.queries, self.keys, self.values = queries, keys, values
        self.shape: tuple[int, int, int, int] = (*queries.shape[:3], keys.shape[2])  # (B, H, Q, N)
        self.scaling = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
        #: The layer of all items, or one per item.
        self.layers = layer_idx if isinstance(layer_idx, tuple) else (layer_idx,)
        if len(self.layers) not in (1, queries.shape[0]):
            raise ValueError(f"layer_idx must be a number, or one for each of the {queries.shape[0]} items, got {self.layers}")
        self.rows_after = rows_after
        self.seeds = seeds if seeds is not None else [0] * queries.shape[0]
        self.cache = CallCache() if cache is None else cache
        place = (self.shape, keys.shape[1], queries.device)
        self.layout = once(self.cache.layouts, (*place, rows_after), lambda: Layout(*place, attention_mask, rows_after))
        self.state: MaskerState | None = None
        #: Factors on fractional sizes in this layer, float64 (h,), h = 1, kv heads or H: see head_budgets.py.
        self.factors: Tensor | None = None
        #: What was chosen by position before the first selector: a masker that narrows keeps it.
        self.kept: Mask | None = None

    def for_masker(self, state: MaskerState | None) -> AttentionInputs:
        """The same call, cached values included, with one masker's own state."""
        view = object.__new__(AttentionInputs)  # copy.copy takes ten times as long, and this is done for every masker
        view.__dict__.update(self.__dict__)
        view.state = state
        return view

    @property
    def layer_idx(self) -> int:
        """The layer of the call. SeveralLayersError if its items are of several layers: those are in `layers`."""
        if len(self.layers) > 1:
            raise SeveralLayersError(f"the call's items are of the layers {self.layers}: read `layers`, one per item")
        return self.layers[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.queries.shape[1] // self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.queries.device

    @property
    def allowed(self) -> Tensor:
        """bool (B, 1, Q, N)."""
        return self.layout.allowed

    @property
    def key_positions(self) -> Tensor:
        """int64 (B, N), counted without padding, -1 on padding."""
        return self.layout.key_positions

    def resolve(self, size: int | float) -> Tensor:
        """A size, int (tokens) or float (fraction of N), in tokens for each item and, under head budgets, each head:
        int64 (B, h, 1) on the CPU, in an open layout on its device; h = 1, kv heads or H."""
        return self.layout.resolve(size, self.factors)

    def bounded(self, size: int | float) -> tuple[Tensor, int | None]:
        """(`resolve`, the largest that it may be where only the device knows it, else None): how long a list must be."""
        return self.resolve(size), self.layout.most(size, self.factors)

    def share_of(self, counts: Tensor, size: int | float) -> Tensor:
        """A size as a fraction of counts int64 (B, h, Q) instead of N; floored, 0 included."""
        return self.layout.share_of(counts, size, self.factors)

    def mask(self, chosen: Tensor | KeyLists, apart_from: Mask | None = None) -> Mask:
        """A mask of lists or of flags (bool, or float inclusion probabilities, (B, h, Q, N)); h = 1, kv heads or H. apart_from: of
        lists, a mask that has none of these keys."""
        if isinstance(chosen, KeyLists):
            return Mask(self.shape, self.kv_heads, lists=chosen, apart_from=apart_from)
        return Mask.from_dense(chosen, self.shape[1], self.kv_heads)

    def choose_top(self, scores: Tensor, mask: Mask, size: int | float) -> Mask:
        """The `size` highest-scored allowed keys of each row, or all, that `mask` has not; of equals the most recent.

        scores: float (B, h, Q, N), h = 1, kv heads or H. size: int (tokens) or float (fraction of N).
        """
        own = scores is self.cache.call.get("scores")  # which are -inf where not allowed
        if own and self.cache.keeps_order and self._may_walk(scores):
            return self._walk(self.order(), mask, self.resolve(size))
        allowed = None if own or self.layout.all_allowed else self.allowed
        sizes, most = self.bounded(size)
        return self.mask(choose(scores, mask, sizes, allowed, most), mask)

    def choose_mass(self, mask: Mask, share: float) -> Mask:
        """The fewest keys, by falling score, that hold more than a share of the attention mass that `mask` left."""
        scores, order = self.scores(), self.order()
        if uses_loops(scores):
            return self._walk(order, mask, count_mass(scores, self.known().terms, order, mask, share))
        return self.mask(choose_mass(scores, order, mask, share), mask)

    def draw(self, mask: Mask, size: int | float | Tensor, certain: bool = False, most: int | None = None) -> Mask:
        """Allowed keys drawn without replacement from those that `mask` has not, p = size / keys left.

        size: int (tokens), float (fraction of N), or int64 (B, h, Q), all at most `most` if that is given. certain: p = 1. Query
        heads of a group share the order.
        """
        ranks, (sizes, most) = self.random_ranks(), (size, most) if isinstance(size, Tensor) else self.bounded(size)
        unbounded = sizes.device.type != "cpu" and most is None
        if (self.cache.keeps_order or unbounded) and self._may_walk(ranks):
            order = once(self.cache.draws, "order", lambda: order_of(ranks, self.layout.row_lengths))
            return self._walk(order, mask, sizes, drawn=not certain)
        return self._apart(choose(ranks, mask, sizes, most=most), mask, drawn=not certain)

    def _may_walk(self, scores: Tensor) -> bool:
        """Whether a known order of scores serves to choose: off the CPU while lists as wide as the keys are small."""
        return uses_loops(scores) or may_be_wide(*self.shape)

    def _walk(self, order: Order, mask: Mask, sizes: Tensor, drawn: bool = False) -> Mask:
        """The first keys of an order that `mask` has not: see kernels.select.extend."""
        if uses_loops(order.indices):
            return Mask(self.shape, self.kv_heads, apart_from=mask, joined=extend(order, mask, sizes, drawn))
        return self._apart(walk_anywhere(order, mask, sizes), mask, drawn)

    def _apart(self, lists: KeyLists, mask: Mask, drawn: bool) -> Mask:
        """A mask of keys that `mask` has not. drawn: p is their share of what it left, else 1."""
        if not drawn:
            return self.mask(lists, mask)
        rate = lists.counts / expand_heads(self.left(mask), lists.heads).clamp(min=1)
        return self.mask(lists._replace(probability=rate.unsqueeze(-1).expand(lists.indices.shape).contiguous()), mask)

    def left(self, mask: Mask) -> Tensor:
        """How many allowed keys of each row `mask` has not: int64 (B, h, Q)."""
        return self.layout.row_lengths.unsqueeze(1) - mask.counts()

    def scores(self) -> Tensor:
        """Scaled logits plus additive bias, float32 (B, H, Q, N), -inf where not allowed."""

        def make() -> Tensor:
            return self.layout.biased(group_scores(self.queries, self.keys, self.scaling, self.softcap))

        return once(self.cache.call, "scores", self.cache.makers.get("scores", make))

    def dense_output(self) -> Tensor:
        """Dense output of the call, (B, Q, H, D) in float32 or wider: the reference for errors."""

        def make() -> Tensor:
            if self.sinks is None and self.layout.mask is None:  # every row has a key: one pass over the scores in place of two
                return group_sums(self.scores().softmax(-1), self.values)
            return weigh(self.scores(), None, self.usable_values, self.sinks)[0]

        return once(self.cache.call, "dense_output", self.cache.makers.get("dense_output", make))

    def order(self) -> Order:
        """The keys by falling score."""
        return once(self.cache.call, "order", lambda: order_of(self.scores(), self.layout.row_lengths))

    def highest(self) -> Tensor:
        """The highest score of each row, float32 (B, H, Q), 0 where nothing is allowed."""
        return once(self.cache.call, "highest", lambda: self.scores().amax(-1).nan_to_num_(neginf=0.0))

    def exponentials(self) -> Tensor:
        """exp(score - highest score of the row), float32 (B, H, Q, N), 0 where not allowed."""
        return once(self.cache.call, "exponentials", lambda: (self.scores() - self.highest().unsqueeze(-1)).exp_())

    def known(self) -> Known:
        """What is known of the scores so far, so that kernels need not read the keys. Only scores hold a bias."""
        biased, terms = self.layout.bias is not None, self.cache.call.get("exponentials")
        scores = self.scores() if biased else self.cache.call.get("scores")
        return Known(scores, terms, None if terms is None else self.highest(), biased)  # type: ignore[arg-type]

    def scores_at(self, mask: Mask) -> Tensor:
        """Scores of the mask's keys in the order of its lists: float32 (B, H, Q, K), -inf on padding."""
        known = self.known().scores
        if known is None:
            return dot(self.queries, self.keys, mask, self.scaling, self.softcap)
        indices = expand_heads(mask.lists().indices, self.shape[1])
        return known.gather(-1, indices.clamp(min=0).long()).masked_fill_(indices < 0, NEVER)

    def log_mass(self, mask: Mask) -> Tensor:
        """Log of the sum of exp(score) / p over the mask's keys, without the sinks: float32 (B, H, Q), -inf for none."""
        return log_mass(self.queries, self.keys, mask, self.scaling, known=self.known(), softcap=self.softcap)

    @property
    def usable_values(self) -> Tensor:
        """The values, 0 where no row may look: there may be NaN, which a weight of 0 would not remove."""
        return once(self.cache.call, "usable_values", lambda: self.layout.usable(self.values))

    @property
    def usable_keys(self) -> Tensor:
        """The keys, 0 where no row may look."""
        return once(self.cache.call, "usable_keys", lambda: self.layout.usable(self.keys))

    def uniform(self) -> Tensor:
        """Uniforms in [0, 1), float32 (B, Hkv, Q, N): see uniforms.py. The heads of a group sample alike."""
        places = self.layout.row_positions, self.key_positions
        return once(self.cache.draws, "uniform", lambda: keyed_uniforms(self.seeds, self.layers, self.kv_heads, *places))

    def random_ranks(self) -> Tensor:
        """The random order of a row's keys: int64 (B, Hkv, Q, N), highest first, `lowest` where not allowed."""

        def make() -> Tensor:  # by uniforms, equal ones by position
            place = ((self.uniform() * 2**24).long() << 32 | count_up(self.shape[3], self.device)).neg_()
            return place if self.layout.all_allowed else place.masked_fill_(~self.allowed, lowest(torch.int64))

        return once(self.cache.draws, "ranks", make)
