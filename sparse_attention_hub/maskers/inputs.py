"""What a masker sees of one attention call, with the sums that maskers share computed once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..kernels.gather import gather_rows
from ..mask import expand_heads
from .uniforms import keyed_uniforms

if TYPE_CHECKING:
    from .state import MaskerState

T = TypeVar("T")

# An additive mask forbids a key where it is at most this; smaller penalties are a bias, which is added to the scores.
FORBIDDEN_BIAS = -1e4
NEVER = float("-inf")
# Below this share of a row's mass, exponentials relative to the row's highest score have lost too many bits.
LEAST_SHARED_MASS = 1e-12
# Numbers in a block of weights that stays in a core's cache.
_BLOCK = 2**18


class AttentionInputs:
    """One attention call as maskers see it.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D), H a multiple of Hkv. `allowed` is bool (B, 1, Q, N): what the
    causal and padding masks permit. Everything memoised here is shared by the maskers of a call, and by all
    configurations that are replayed on the same call.

    positions: a dictionary that calls with equal attention masks may share, common: one for those whose layer and seeds are
    the same too. What follows from these alone (positions and what is chosen by them; random order) is then computed once for
    all calls of one shape.
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
        common: dict[Hashable, object] | None = None,
        positions: dict[Hashable, dict[Hashable, object]] | None = None,
    ) -> None:
        if queries.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
            raise ValueError(
                "queries must be (B, H, Q, D), keys and values (B, Hkv, N, D), "
                f"got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if queries.shape[1] % keys.shape[1] or queries.shape[0] != keys.shape[0] or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"query heads must be a multiple of kv heads and batches equal, got queries {tuple(queries.shape)}, "
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
            )
        if queries.shape[-1] != keys.shape[-1]:
            raise ValueError(f"queries and keys must have one width, got {queries.shape[-1]} and {keys.shape[-1]}")
        if attention_mask is not None:
            _check_mask(attention_mask, queries.shape[0], queries.shape[2], keys.shape[2])
        if attention_mask is None and queries.shape[2] > keys.shape[2]:
            raise ValueError(f"{queries.shape[2]} queries cannot be the last of {keys.shape[2]} keys; pass attention_mask")
        self.queries, self.keys, self.values = queries, keys, values
        #: (B, H, Q, N)
        self.shape: tuple[int, int, int, int] = (*queries.shape[:3], keys.shape[2])
        self.scaling = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.layer_idx = layer_idx
        self.state: MaskerState | None = None
        self.seeds = seeds if seeds is not None else [0] * queries.shape[0]
        #: How many configurations look at this call: sums that pay only when shared are made from a few on.
        self.viewers = 1
        self._attention_mask = attention_mask
        self._memo: dict[Hashable, object] = {}
        self._common: dict[Hashable, object] = {} if common is None else common
        self._positions: dict[Hashable, object] = {}
        if positions is not None:
            self._positions = positions.setdefault((self.shape, self.kv_heads, self.device), {})

    def for_masker(self, state: MaskerState | None) -> AttentionInputs:
        """The same call with one masker's own state; all memoised sums stay shared."""
        view = object.__new__(AttentionInputs)  # copy.copy takes ten times as long, and this is done for every masker
        view.__dict__.update(self.__dict__)
        view.state = state
        return view

    def memo(self, name: Hashable, make: Callable[[], T]) -> T:
        """`make()` the first time, its value ever after; shared by all maskers and configurations of this call."""
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]  # type: ignore[return-value]

    def by_position(self, name: Hashable, make: Callable[[], T]) -> T:
        """`memo` for what follows from shape and attention mask alone."""
        if name not in self._positions:
            self._positions[name] = make()
        return self._positions[name]  # type: ignore[return-value]

    def _for_all(self, name: Hashable, make: Callable[[], T]) -> T:
        """`memo` for what follows from shape, attention mask, layer and seeds alone."""
        if name not in self._common:
            self._common[name] = make()
        return self._common[name]  # type: ignore[return-value]

    # -- sizes -------------------------------------------------------------------------------------------------------

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
        return self.by_position("allowed", self._make_allowed)

    @property
    def all_allowed(self) -> bool:
        """True if every query may attend to every key (plain decoding)."""
        if self._attention_mask is None:
            return self.shape[2] == 1
        return self.by_position("all_allowed", lambda: bool(self.allowed.all()))

    @property
    def n_allowed(self) -> list[int]:
        """N of each item: the allowed keys of its last query row. Sizes given as a fraction are fractions of it."""
        if self._attention_mask is None:
            return [self.shape[3]] * self.shape[0]
        return self.by_position("n_allowed", lambda: self.allowed[:, 0, -1].sum(-1).tolist())

    @property
    def has_bias(self) -> bool:
        """Whether the attention mask adds something to the scores of allowed keys, beside forbidding others."""
        mask = self._attention_mask
        if mask is None or mask.dtype == torch.bool:
            return False
        return self.by_position("has_bias", lambda: bool(self._bias.any()))

    @property
    def key_positions(self) -> Tensor:
        """Position of each key among the keys its item may use, counted without padding: int64 (B, N), -1 on padding."""

        def make() -> Tensor:
            if self._attention_mask is None:
                return torch.arange(self.shape[3], device=self.device).expand(self.shape[0], -1)
            # Under causality the last row sees what any row sees; a banded mask hides early keys from it.
            usable = self.allowed[:, 0].any(1)
            return (usable.cumsum(-1) - 1).masked_fill(~usable, -1)

        return self.by_position("key_positions", make)

    @property
    def row_positions(self) -> Tensor:
        """Position of each query row, that of the last key it may attend to: int64 (B, Q), -1 without allowed keys."""

        def make() -> Tensor:
            if self._attention_mask is None:
                return self.key_positions[:, self.shape[3] - self.shape[2] :]
            return self.key_positions.unsqueeze(1).masked_fill(~self.allowed[:, 0], -1).amax(-1)

        return self.by_position("row_positions", make)

    @property
    def row_lengths(self) -> Tensor:
        """Allowed keys of each query row: int64 (B, Q)."""
        return self.by_position("row_lengths", lambda: self.allowed[:, 0].sum(-1))

    def share_of_allowed(self, counts: Tensor) -> float:
        """Keys counted for each row, (B, h, Q), over those it may attend to: mean over heads, and over rows that may attend
        to anything; NaN if none may."""
        if self.all_allowed:
            return float(counts.sum()) / (counts.numel() * self.shape[3])
        lengths = self.row_lengths.float()
        shares = counts.float().mean(1) / lengths.masked_fill(lengths == 0, float("nan"))
        return float(shares.nanmean())

    def resolve(self, size: int | float) -> list[int]:
        """A size in tokens (int) or as a fraction of N (float, floored, at least 1), for each item: B integers."""
        if isinstance(size, int):
            return [min(size, n) for n in self.n_allowed]
        return [min(n, max(1, int(size * n))) for n in self.n_allowed]

    # -- shared sums -------------------------------------------------------------------------------------------------

    def scores(self) -> Tensor:
        """Scaled logits plus additive bias, float32 (B, H, Q, N), -inf where not allowed."""
        return self.memo("scores", lambda: self.biased(group_scores(self.queries, self.keys, self.scaling)))

    def sorted_scores(self) -> tuple[Tensor, Tensor]:
        """(values, key indices) of the scores in falling order, each (B, H, Q, N)."""
        return self.memo("sorted_scores", lambda: self.scores().sort(dim=-1, descending=True))

    def ranked(self, scores: Tensor) -> Tensor:
        """Scores (B, h, Q, N) in rising order along the keys; those of the call itself are sorted once."""

        def make() -> Tensor:
            if scores.is_cuda or scores.dtype not in (torch.float32, torch.float64):
                return scores.sort(dim=-1).values
            return torch.from_numpy(np.sort(scores.numpy(), axis=-1))  # several times faster than torch on a CPU

        return self.memo("ranked", make) if scores is self._memo.get("scores") else make()

    def highest(self) -> Tensor:
        """The highest score of each row, float32 (B, H, Q), -inf where nothing is allowed."""
        return self.memo("highest", lambda: self.scores().amax(-1))

    def exponentials(self) -> Tensor:
        """exp(score - highest score of the row), float32 (B, H, Q, N), 0 where not allowed."""

        def make() -> Tensor:
            top = self.highest().unsqueeze(-1)
            return (self.scores() - top.masked_fill(top == NEVER, 0.0)).exp_()

        return self.memo("exponentials", make)

    @property
    def needs_grad(self) -> bool:
        """Whether the output must carry gradients, which sums in NumPy cannot."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.queries, self.keys, self.values))

    @property
    def has_scores(self) -> bool:
        """Whether all scores of this call are known already."""
        return "scores" in self._memo

    def exponentials_where(self, chosen: Tensor) -> Tensor:
        """Sums of a row's exponentials where chosen (B, h, Q, N): float32 (B, H, Q). On a CPU."""
        exponentials = self.exponentials().numpy()
        sums = np.empty(self.shape[:3], dtype=exponentials.dtype)
        for place, flags in self.weight_blocks(lambda _, out, at: np.copyto(out, at(chosen))):
            sums[place] = np.vecdot(flags.numpy(), exponentials[place])
        return torch.from_numpy(sums)

    def exponentials_in_order(self, width: int) -> Tensor:
        """The exponentials of the first `width` keys of the random order, (B, H, Q, width): for all configurations read once."""
        batch, heads, rows, keys = self.shape
        known = self._memo.get("exponentials_in_order")
        if not isinstance(known, Tensor) or known.shape[-1] < width:
            wide = min(keys, 1 << (width - 1).bit_length())  # some more, for those that follow
            order = self.random_order()[..., None, :, :wide].expand(-1, -1, self.group_size, -1, -1)
            grouped = self.exponentials().view(batch, self.kv_heads, -1, rows, keys)
            known = self._memo["exponentials_in_order"] = grouped.gather(-1, order).view(batch, heads, rows, -1)
        return known[..., :width]

    def weight_blocks(
        self, weigh: Callable[[np.ndarray, np.ndarray, Callable[[Tensor], np.ndarray]], object]
    ) -> Iterator[tuple[tuple[int, slice, slice], Tensor]]:
        """The exponentials as weights, some rows of one kv head at a time, so that they stay in a core's cache; on a CPU.

        weigh(exponentials, out, at) fills out, (heads, rows, N); at(tensor) is the part of a (B, h, Q, n) tensor that belongs
        there. Yields ((item, heads, rows), weights); the weights are overwritten by the next.
        """
        batch, heads, rows, keys = self.shape
        exponentials = self.exponentials().numpy()
        wide = self.group_size if self.group_size * rows * keys <= _BLOCK else 1
        step = min(rows, max(32, _BLOCK // keys))
        scratch = np.empty((wide, step, keys), dtype=exponentials.dtype)
        for item, head, start in itertools.product(range(batch), range(0, heads, wide), range(0, rows, step)):
            place = (item, slice(head, head + wide), slice(start, min(rows, start + step)))

            def at(tensor: Tensor, place: tuple[int, slice, slice] = place) -> np.ndarray:
                held = tensor.shape[1]
                own = place[1] if held == heads else place[1].start * held // heads
                return tensor.numpy()[place[0], own, ...][..., place[2], :]

            part = exponentials[place]
            out = scratch[:, : part.shape[1]]
            weigh(part, out, at)
            yield place, torch.from_numpy(out)

    @property
    def usable_values(self) -> Tensor:
        """The values with zeros where no row may look: weights of 0 would keep NaN there."""
        return self._usable("usable_values", self.values)

    @property
    def usable_keys(self) -> Tensor:
        """The keys with zeros where no row may look."""
        return self._usable("usable_keys", self.keys)

    def _usable(self, name: str, tensor: Tensor) -> Tensor:
        def make() -> Tensor:
            unusable = self.key_positions < 0
            return tensor.masked_fill(unusable[:, None, :, None], 0.0) if bool(unusable.any()) else tensor

        return tensor if self._attention_mask is None else self.memo(name, make)

    def scores_at(self, indices: Tensor) -> Tensor:
        """Scaled logits of some keys only: indices (B, h, Q, K), h = 1, kv heads or H, to float32 (B, H, Q, K).

        Padding (-1) gives -inf. Lists that the heads of a group share are read once.
        """
        batch, heads, rows, keys = self.shape
        padded = expand_heads(indices < 0, heads)
        if indices.shape[-1] == 0:
            return torch.zeros(padded.shape, device=self.device)
        # Over several rows the lists together are longer than the keys are.
        if rows > 1 or "scores" in self._memo:
            out = self.scores().gather(-1, expand_heads(indices.clamp(min=0), heads))
        else:
            lists = self.kv_heads if indices.shape[1] in (1, self.kv_heads) else heads
            safe = expand_heads(indices.clamp(min=0), lists)
            picked = gather_rows(self.keys, safe[:, :, 0]).float()
            grouped = (self.queries.float() * self.scaling).view(batch, lists, heads // lists, -1)
            out = (grouped @ picked.transpose(-1, -2)).view(batch, heads, 1, -1)
            if not self.all_allowed:
                forbidden = ~self.allowed.expand(-1, lists, -1, -1).gather(-1, safe)
                padded = padded | expand_heads(forbidden, heads)
            if self.has_bias:
                out = out + expand_heads(self._bias.expand(-1, lists, -1, -1).gather(-1, safe), heads)
        return out.masked_fill(padded, NEVER)

    def uniform(self) -> Tensor:
        """Uniforms in [0, 1) that depend on (seed, layer, query position, kv head, key position) alone: (B, Hkv, Q, N).

        The query heads of a group share them, so that what they sample overlaps.
        """
        return self._for_all(
            "uniform",
            lambda: keyed_uniforms(self.seeds, self.layer_idx, self.kv_heads, self.row_positions, self.key_positions),
        )

    def random_order(self) -> Tensor:
        """All keys in the order of their uniforms, equal ones by position: int64 (B, Hkv, Q, N)."""

        def make() -> Tensor:
            # One integer a key, uniform first and index below: sorting is exact, and quick with NumPy's vectorised sort.
            ranks = (self.uniform() * 2**24).long() << 32 | torch.arange(self.shape[3], device=self.device)
            if ranks.is_cuda:
                ranks = ranks.sort(dim=-1).values
            else:
                ranks.numpy().sort(axis=-1)
            return ranks & 0xFFFFFFFF

        return self._for_all("random_order", make)

    def random_places(self) -> np.ndarray:
        """Each key's place in the random order, (B, Hkv, Q, N), uint16 or uint32 with the highest bit free. On a CPU only."""

        def make() -> np.ndarray:
            keys = self.shape[3]
            signed = torch.int16 if keys < 2**15 else torch.int32
            order = self.random_order()
            places = torch.empty(order.shape, dtype=signed)
            places.scatter_(-1, order, torch.arange(keys, dtype=signed).expand(order.shape))
            return places.numpy().view(np.uint16 if keys < 2**15 else np.uint32)

        return self._for_all("random_places", make)

    def _make_allowed(self) -> Tensor:
        batch, _, rows, keys = self.shape
        mask = self._attention_mask
        if mask is None:
            position = torch.arange(keys, device=self.device)
            causal = position <= position[keys - rows :].unsqueeze(-1)
            return causal.expand(batch, 1, rows, keys)
        mask = mask[..., :keys]
        allowed = mask if mask.dtype == torch.bool else mask > FORBIDDEN_BIAS
        return allowed.expand(batch, 1, rows, keys)

    @property
    def _bias(self) -> Tensor:
        """What the attention mask adds to the scores of allowed keys: float32 (B, 1, Q, N), 0 elsewhere."""

        def make() -> Tensor:
            mask = self._attention_mask
            if mask is None or mask.dtype == torch.bool:
                return torch.zeros((1, 1, 1, 1), device=self.device).expand(self.allowed.shape)
            bias = mask[..., : self.shape[3]].float().expand(self.allowed.shape)
            return bias.masked_fill(~self.allowed, 0.0)

        return self.by_position("bias", make)

    def biased(self, scores: Tensor) -> Tensor:
        """scores (B, H, Q, N) plus the attention mask's bias, -inf where not allowed; changed in place."""
        if self.has_bias:
            scores += self._bias
        if not self.all_allowed:
            # Filled, not added: what stands on padding may be anything, NaN too.
            start, forbidden = self.by_position("forbidden", self._forbidden)
            scores[..., start:].masked_fill_(forbidden, NEVER)
        return scores

    def only_allowed(self, flags: Tensor) -> Tensor:
        """Flags bool (B, h, Q, N), False where not allowed; changed in place."""
        if not self.all_allowed:
            start, forbidden = self.by_position("forbidden", self._forbidden)
            flags[..., start:].logical_and_(~forbidden)
        return flags

    def _forbidden(self) -> tuple[int, Tensor]:
        """(the first key that some row may not attend to, which keys from there on each row may not: bool (B, 1, Q, n))."""
        seen_by_all = self.allowed.all(2).all(0).flatten()
        start = int(seen_by_all.to(torch.uint8).argmin()) if seen_by_all.numel() else 0
        return start, ~self.allowed[..., start:]


def _check_mask(mask: Tensor, batch: int, rows: int, keys: int) -> None:
    """ValueError for a mask that would be misread. One of integers says 0 and 1, as tokenizers do: it would be added."""
    shape = tuple(mask.shape)
    fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[1] == 1 and shape[2] in (1, rows) and shape[3] >= keys
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"attention_mask must be bool (True = may be attended) or floating (added to scores), of shape "
            f"({batch}, 1, {rows}, {keys}), got {mask.dtype} {shape}"
        )


def group_scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """scaling * q.k for all pairs without repeating keys over the heads of a group: float32 (or wider) (B, H, Q, N)."""
    batch, heads, rows, dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    grouped = (queries.to(wide) * scaling).reshape(batch, keys.shape[1], -1, dim)
    return (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, rows, keys.shape[2])


def count_true(flags: np.ndarray) -> np.ndarray:
    """How many of the last axis are True: int64."""
    narrow = np.uint16 if flags.shape[-1] < 2**16 else np.uint32  # sums twice as many at a time
    counts: np.ndarray = flags.view(np.uint8).sum(-1, dtype=narrow).astype(np.int64)
    return counts


def end_of_allowed(allowed: Tensor) -> int:
    """One past the last allowed key of the item where it comes first. allowed: bool (B, N)."""
    ends = allowed.shape[-1] - allowed.flip(-1).to(torch.uint8).argmax(-1)
    return int(ends.masked_fill(~allowed.any(-1), allowed.shape[-1]).min())
