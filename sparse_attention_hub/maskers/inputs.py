"""What a masker sees of one attention call: tensors, allowed keys, positions, scores, random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Known, dot, log_mass
from ..kernels.reference import group_scores
from ..kernels.select import Order, choose, choose_mass, lowest, order_of
from ..lists import KeyLists, expand_heads
from ..mask import Mask
from .call_cache import CallCache, once
from .layout import NEVER
from .state import MaskerState
from .uniforms import keyed_uniforms


class AttentionInputs:
    """One attention call as maskers see it.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D), H a multiple of Hkv. `allowed` is bool (B, 1, Q, N): what the
    causal and padding masks permit. seeds: one an item, of the uniforms. cache: values to share with other calls.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        layer_idx: int = 0,
        seeds: list[int] | None = None,
        cache: CallCache | None = None,
    ) -> None:
        _check(queries, keys, values, attention_mask)
        self.queries, self.keys, self.values = queries, keys, values
        #: (B, H, Q, N)
        self.shape: tuple[int, int, int, int] = (*queries.shape[:3], keys.shape[2])
        self.scaling = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.layer_idx = layer_idx
        self.seeds = seeds if seeds is not None else [0] * queries.shape[0]
        self.cache = CallCache() if cache is None else cache
        #: What follows from shapes and attention mask alone.
        self.layout = self.cache.layout(self.shape, keys.shape[1], queries.device, attention_mask)
        self.state: MaskerState | None = None

    def for_masker(self, state: MaskerState | None) -> AttentionInputs:
        """The same call with one masker's own state; all cached values stay shared."""
        view = object.__new__(AttentionInputs)  # copy.copy takes ten times as long, and this is done for every masker
        view.__dict__.update(self.__dict__)
        view.state = state
        return view

    # -- sizes and positions -----------------------------------------------------------------------------------------

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
        """Position of each key among the keys its item may use, counted without padding: int64 (B, N), -1 on padding."""
        return self.layout.key_positions

    def resolve(self, size: int | float) -> list[int]:
        """A size in tokens (int) or as a fraction of N (float, floored, at least 1), for each item: B integers."""
        return self.layout.resolve(size)

    # -- masks -------------------------------------------------------------------------------------------------------

    def mask(self, chosen: Tensor | KeyLists, apart_from: Mask | None = None) -> Mask:
        """A mask of flags (bool, or float inclusion probabilities, (B, h, Q, N)) or lists; h = 1, kv heads or H.

        apart_from: a mask with which the lists are known to share no key.
        """
        if isinstance(chosen, KeyLists):
            return Mask(self.shape, self.kv_heads, lists=chosen, apart_from=apart_from)
        return Mask.from_dense(chosen, self.shape[1], self.kv_heads)

    def choose_top(self, scores: Tensor, mask: Mask, size: int | float) -> Mask:
        """The highest-scored allowed keys of each row that `mask` has not; of keys that tie the most recent.

        scores: float (B, h, Q, N), h = 1, kv heads or H. size: int (tokens) or float (fraction of N). Rows with fewer keys take
        all of them.
        """
        own = scores is self.cache.call.get("scores")  # these mark what is not allowed
        order = self.order() if own and self.cache.keeps_order else None
        allowed = None if own or self.layout.all_allowed else self.allowed
        return self.mask(choose(scores, mask, self.resolve(size), order, allowed), mask)

    def choose_mass(self, mask: Mask, share: float) -> Mask:
        """The fewest keys, by falling score, that hold more than a share of the attention mass that `mask` left."""
        return self.mask(choose_mass(self.scores(), self.known().terms, self.order(), mask, share), mask)

    def draw(self, mask: Mask, size: int | float | Tensor) -> Mask:
        """Allowed keys drawn without replacement from those that `mask` has not, p = size / keys left.

        size: int (tokens), float (fraction of N), or int64 (B, h, Q). Query heads of a group draw in the same random order.
        """
        order = once(self.cache.draws, "order", self._random_order) if self.cache.keeps_order else None
        lists = choose(self.random_ranks(), mask, size if isinstance(size, Tensor) else self.resolve(size), order)
        left = self.left(mask)
        rate = lists.counts / expand_heads(left, lists.heads).clamp(min=1)
        return self.mask(lists._replace(probability=rate.unsqueeze(-1).expand(lists.indices.shape).contiguous()), mask)

    def left(self, mask: Mask) -> Tensor:
        """How many allowed keys of each row `mask` has not: int64 (B, h, Q)."""
        return self.layout.row_lengths.unsqueeze(1) - mask.counts()

    # -- scores ------------------------------------------------------------------------------------------------------

    def scores(self) -> Tensor:
        """Scaled logits plus additive bias, float32 (B, H, Q, N), -inf where not allowed."""
        return once(self.cache.call, "scores", lambda: self.layout.biased(group_scores(self.queries, self.keys, self.scaling)))

    def sorted_scores(self) -> tuple[Tensor, Tensor]:
        """(values, key indices) of the scores in falling order, each (B, H, Q, N); of equal ones the most recent first."""
        indices = self.order().indices.long()
        return self.scores().gather(-1, indices), indices

    def order(self) -> Order:
        """The keys by falling score."""
        return once(self.cache.call, "order", lambda: order_of(self.scores(), self.layout.row_lengths))

    def highest(self) -> Tensor:
        """The highest score of each row, float32 (B, H, Q), 0 where nothing is allowed."""

        def make() -> Tensor:
            top = self.scores().amax(-1)
            return top.masked_fill_(top == NEVER, 0.0)

        return once(self.cache.call, "highest", make)

    def exponentials(self) -> Tensor:
        """exp(score - highest score of the row), float32 (B, H, Q, N), 0 where not allowed."""
        return once(self.cache.call, "exponentials", lambda: (self.scores() - self.highest().unsqueeze(-1)).exp_())

    def known(self) -> Known:
        """What was computed of the scores so far: kernels need not read the keys then. A bias is in the scores alone."""
        scores = self.scores() if self.layout.bias is not None else self.cache.call.get("scores")
        terms = self.cache.call.get("exponentials")
        highest = None if terms is None else self.highest()
        return Known(scores, terms, highest, self.layout.bias is not None)  # type: ignore[arg-type]

    def scores_at(self, mask: Mask) -> Tensor:
        """Scores of the mask's keys in the order of its lists: float32 (B, H, Q, K), -inf on padding."""
        known = self.known().scores
        if known is None:
            return dot(self.queries, self.keys, mask, self.scaling)
        indices = expand_heads(mask.lists().indices, self.shape[1])
        return known.gather(-1, indices.clamp(min=0).long()).masked_fill_(indices < 0, NEVER)

    def log_mass(self, mask: Mask) -> Tensor:
        """Log of the sum of exp(score) / p over the mask's keys: float32 (B, H, Q), -inf for none."""
        return log_mass(self.queries, self.keys, mask, self.scaling, known=self.known())

    @property
    def usable_values(self) -> Tensor:
        """The values with zeros where no row may look: weights of 0 would keep NaN there."""
        return self._usable("usable_values", self.values)

    @property
    def usable_keys(self) -> Tensor:
        """The keys with zeros where no row may look."""
        return self._usable("usable_keys", self.keys)

    def _usable(self, name: str, tensor: Tensor) -> Tensor:
        unusable = self.layout.unusable
        if unusable is None:
            return tensor
        return once(self.cache.call, name, lambda: tensor.masked_fill(unusable[:, None, :, None], 0.0))

    # -- random numbers ----------------------------------------------------------------------------------------------

    def uniform(self) -> Tensor:
        """Uniforms in [0, 1) that depend on (seed, layer, query position, kv head, key position) alone: (B, Hkv, Q, N).

        The query heads of a group share them, so that what they sample overlaps.
        """
        return once(
            self.cache.draws,
            "uniform",
            lambda: keyed_uniforms(self.seeds, self.layer_idx, self.kv_heads, self.layout.row_positions, self.key_positions),
        )

    def random_ranks(self) -> Tensor:
        """The random order in which keys are drawn, as scores: int64 (B, Hkv, Q, N), the first key has the highest.

        By uniforms, equal ones by position; the lowest number where a key is not allowed.
        """

        def make() -> Tensor:
            place = (self.uniform() * 2**24).long() << 32 | torch.arange(self.shape[3], device=self.device)
            return place.neg_().masked_fill_(~self.allowed, lowest(torch.int64))

        return once(self.cache.draws, "ranks", make)

    def _random_order(self) -> Order:
        return order_of(self.random_ranks(), self.layout.row_lengths)


def _check(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """ValueError for tensors that do not fit, or a mask that would be misread."""
    shapes = f"{tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
    if queries.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
        raise ValueError(f"queries must be (B, H, Q, D), keys and values (B, Hkv, N, D), got {shapes}")
    if queries.shape[1] % keys.shape[1] or queries.shape[0] != keys.shape[0] or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"query heads must be a multiple of kv heads and batches equal, got queries, keys, values {shapes}")
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys must have one width, got {queries.shape[-1]} and {keys.shape[-1]}")
    batch, rows, total = queries.shape[0], queries.shape[2], keys.shape[2]
    if mask is None:
        if rows > total:
            raise ValueError(f"{rows} queries cannot be the last of {total} keys; pass attention_mask")
        return
    shape = tuple(mask.shape)
    fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[1] == 1 and shape[2] in (1, rows) and shape[3] >= total
    # A mask of integers says 0 and 1, as tokenizers do: it would be added.
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"attention_mask must be bool (True = may be attended) or floating (added to scores), of shape "
            f"({batch}, 1, {rows}, {total}), got {mask.dtype} {shape}"
        )
