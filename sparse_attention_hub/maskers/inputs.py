"""What a masker sees of one attention call, with the sums that maskers share computed once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..kernels.gather import gather_rows
from ..mask import Mask, expand_heads
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
        if attention_mask is None and queries.shape[2] > keys.shape[2]:
            raise ValueError(f"{queries.shape[2]} queries cannot be the last of {keys.shape[2]} keys; pass attention_mask")
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.layer_idx = layer_idx
        self.state: MaskerState | None = None
        self.seeds = seeds if seeds is not None else [0] * queries.shape[0]
        self._attention_mask = attention_mask
        self._memo: dict[str, object] = {}

    def for_masker(self, state: MaskerState | None) -> AttentionInputs:
        """The same call with one masker's own state; all memoised sums stay shared."""
        view = copy.copy(self)
        view.state = state
        return view

    def memo(self, name: str, make: Callable[[], T]) -> T:
        """`make()` the first time, its value ever after; shared by all maskers and configurations of this call."""
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]  # type: ignore[return-value]

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, N)."""
        return (*self.queries.shape[:3], self.keys.shape[2])

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
        return self.memo("allowed", self._make_allowed)

    @property
    def all_allowed(self) -> bool:
        """True if every query may attend to every key (plain decoding)."""
        if self._attention_mask is None:
            return self.shape[2] == 1
        return self.memo("all_allowed", lambda: bool(self.allowed.all()))

    @property
    def n_allowed(self) -> list[int]:
        """N of each item: the allowed keys of its last query row. Sizes given as a fraction are fractions of it."""
        if self._attention_mask is None:
            return [self.shape[3]] * self.shape[0]
        return self.memo("n_allowed", lambda: self.allowed[:, 0, -1].sum(-1).tolist())

    @property
    def key_positions(self) -> Tensor:
        """Position of each key among the keys its item may use, counted without padding: int64 (B, N), -1 on padding."""

        def make() -> Tensor:
            last = self.allowed[:, 0, -1]
            return (last.cumsum(-1) - 1).masked_fill(~last, -1)

        return self.memo("key_positions", make)

    @property
    def row_lengths(self) -> Tensor:
        """Allowed keys of each query row: int64 (B, Q). A row's own absolute position is one less."""
        return self.memo("row_lengths", lambda: self.allowed[:, 0].sum(-1))

    def resolve(self, size: int | float) -> list[int]:
        """A size in tokens (int) or as a fraction of N (float, floored, at least 1), for each item: B integers."""
        if isinstance(size, int):
            return [min(size, n) for n in self.n_allowed]
        return [min(n, max(1, int(size * n))) for n in self.n_allowed]

    # -- shared sums -------------------------------------------------------------------------------------------------

    def scores(self) -> Tensor:
        """Scaled logits plus additive bias, float32 (B, H, Q, N), -inf where not allowed."""
        return self.memo("scores", self._make_scores)

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

    def exponentials(self) -> Tensor:
        """exp(score - highest score of the row), float32 (B, H, Q, N), 0 where not allowed."""

        def make() -> Tensor:
            top = self.scores().amax(-1, keepdim=True)
            return (self.scores() - top.masked_fill(top == NEVER, 0.0)).exp_()

        return self.memo("exponentials", make)

    @property
    def has_scores(self) -> bool:
        """Whether all scores of this call are known already."""
        return "scores" in self._memo

    def exponentials_where(self, chosen: Tensor) -> Tensor:
        """Sums of a row's exponentials where chosen (B, h, Q, N): float32 (B, H, Q). On a CPU."""
        sums = torch.empty(self.shape[:3], dtype=self.exponentials().dtype)
        for place, block in self.weight_blocks(lambda numbers, out, at: np.multiply(numbers, at(chosen), out=out)):
            sums[place] = block.sum(-1)
        return sums

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
                bias = self._bias().expand(-1, lists, -1, -1).gather(-1, safe)
                out = out + expand_heads(bias, heads)
        return out.masked_fill(padded, NEVER)

    def uniform(self) -> Tensor:
        """Uniforms in [0, 1) that depend on (seed, layer, query position, kv head, key position) alone: (B, Hkv, Q, N).

        The query heads of a group share them, so that what they sample overlaps.
        """
        return self.memo(
            "uniform",
            lambda: keyed_uniforms(self.seeds, self.layer_idx, self.kv_heads, self.row_lengths - 1, self.key_positions),
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

        return self.memo("random_order", make)

    def random_places(self) -> np.ndarray:
        """Each key's place in the random order, (B, Hkv, Q, N), uint16 or uint32 with the highest bit free. On a CPU only."""

        def make() -> np.ndarray:
            keys = self.shape[3]
            signed = torch.int16 if keys < 2**15 else torch.int32
            order = self.random_order()
            places = torch.empty(order.shape, dtype=signed)
            places.scatter_(-1, order, torch.arange(keys, dtype=signed).expand(order.shape))
            return places.numpy().view(np.uint16 if keys < 2**15 else np.uint32)

        return self.memo("random_places", make)

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

    def _bias(self) -> Tensor:
        """Additive float32 (B, 1, Q, N): -inf where not allowed, the mask's finite bias elsewhere."""

        def make() -> Tensor:
            mask = self._attention_mask
            if mask is None or mask.dtype == torch.bool:
                return torch.zeros(self.allowed.shape, device=self.device).masked_fill_(~self.allowed, NEVER)
            bias = mask[..., : self.shape[3]].float().expand(self.allowed.shape)
            return bias.masked_fill(~self.allowed, NEVER)

        return self.memo("bias", make)

    def _make_scores(self) -> Tensor:
        scores = group_scores(self.queries, self.keys, self.scaling)
        return scores if self.all_allowed and self._attention_mask is None else scores.add_(self._bias())

    def biased(self, scores: Tensor) -> Tensor:
        """scores (B, H, Q, N) plus the attention mask's bias, -inf where not allowed."""
        return scores if self.all_allowed and self._attention_mask is None else scores + self._bias()


def group_scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """scaling * q.k for all pairs without repeating keys over the heads of a group: float32 (or wider) (B, H, Q, N)."""
    batch, heads, rows, dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    grouped = (queries.to(wide) * scaling).reshape(batch, keys.shape[1], -1, dim)
    return (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, rows, keys.shape[2])


def choose_top(scores: Tensor, residual: Tensor, sizes: list[int], inputs: AttentionInputs) -> Mask:
    """The `sizes[b]` highest-scored residual keys of every row, as a mask.

    scores: float (B, h, Q, N); residual: bool (B, 1, kv heads or h, Q, N); rows with fewer residual keys take all of them.
    """
    on_cpu = not scores.is_cuda and scores.dtype in (torch.float32, torch.float64)
    if inputs.shape[2] > 1 and len(set(sizes)) == 1 and on_cpu:
        return _choose_above(scores, residual, sizes[0], inputs)
    residual = expand_heads(residual, scores.shape[1]) if residual.shape[1] > 1 else residual
    eligible = scores if inputs.all_allowed and residual is inputs.allowed else scores.masked_fill(~residual, NEVER)
    return Mask.from_indices(top_indices(eligible, sizes), inputs.shape, kv_heads=inputs.kv_heads)


def _choose_above(scores: Tensor, residual: Tensor, size: int, inputs: AttentionInputs) -> Mask:
    """`choose_top` for many rows as one comparison: a key is chosen if its score reaches its row's threshold. In NumPy, whose
    sorting, comparing and masking are several times faster than torch's on a CPU."""
    residual = expand_heads(residual, scores.shape[1]) if residual.shape[1] > 1 else residual
    if scores is inputs.scores() and residual.shape[1] == 1:
        threshold = _threshold_of_shared(scores, inputs.allowed & ~residual, size, inputs)
    else:
        eligible = np.add(scores.numpy(), _forbidding(residual.numpy(), scores))
        place = scores.shape[-1] - min(size, scores.shape[-1])
        threshold = torch.from_numpy(np.partition(eligible, place, axis=-1)[..., place : place + 1])
    threshold = threshold.clamp(min=torch.finfo(scores.dtype).min)  # a score of -inf is never chosen
    chosen = np.greater_equal(scores.numpy(), threshold.numpy())
    chosen &= residual.numpy()
    counts = count_true(chosen)
    if counts.size and counts.max() > size:
        # Of keys that tie for the last places the most recent are taken, as everywhere: the oldest ones go.
        rows = counts > size
        held, limits = scores.numpy()[rows], threshold.numpy()[rows]
        tied = (held == limits) & chosen[rows]
        oldest = tied & (tied.cumsum(-1) <= (counts[rows] - size)[:, None])
        chosen[rows] &= ~oldest
        counts = np.minimum(counts, size)
    return Mask.from_dense(torch.from_numpy(chosen), inputs.shape[1], inputs.kv_heads, counts=torch.from_numpy(counts))


def _threshold_of_shared(scores: Tensor, taken: Tensor, size: int, inputs: AttentionInputs) -> Tensor:
    """The size-th highest score of the keys that are not taken, (B, H, Q, 1), from the sorted scores that all configurations
    of a replay share. taken: bool (B, 1, Q, N).

    Only the taken keys are sorted anew: few, or at least in few columns. The place in the shared order then follows by
    counting how many taken keys lie above it.
    """
    ranked = inputs.ranked(scores)
    columns = np.flatnonzero(taken.numpy().any((0, 1, 2)))
    ends = np.flatnonzero(np.diff(columns, append=-1) != 1)
    starts = np.concatenate([[0], ends[:-1] + 1]) if columns.size else ends[:0]
    parts: list[Any] = (
        [slice(columns[i], columns[j] + 1) for i, j in zip(starts, ends, strict=True)] if ends.size < 9 else [columns]
    )
    held = [np.add(scores.numpy()[..., part], _forbidding(taken.numpy()[..., part], scores)) for part in parts]
    joined = np.concatenate(held, -1) if held else scores.numpy()[..., :0].copy()
    joined.sort(axis=-1)
    above = torch.from_numpy(joined)
    # The place of the size-th key that is not taken, if none above it is taken; each one that is moves it further down.
    highest = ranked.shape[-1] - size
    place = torch.full((*scores.shape[:3], 1), highest)
    while True:
        threshold = ranked.gather(-1, place.clamp(min=0))
        moved = torch.searchsorted(above, threshold).add_(highest - above.shape[-1]) if above.shape[-1] else place
        if torch.equal(moved, place):
            return threshold
        place = moved


def _forbidding(wanted: np.ndarray, scores: Tensor) -> np.ndarray:
    """0 where a key is wanted, -inf elsewhere, in the type of the scores: adding it is the fastest way to mask them."""
    dtype = scores.numpy().dtype.type
    bias: np.ndarray = np.where(wanted, dtype(0.0), dtype(NEVER))
    return bias


def count_true(flags: np.ndarray) -> np.ndarray:
    """How many of the last axis are True: int64."""
    counts: np.ndarray = flags.view(np.uint8).sum(-1, dtype=np.uint32).astype(np.int64)
    return counts


def top_indices(scores: Tensor, sizes: list[int]) -> Tensor:
    """Where the `sizes[b]` highest scores of every row are: float (B, h, Q, N) to int64 (B, h, Q, max size).

    -1 = padding: for items of a smaller size, and where a row has fewer scores above -inf. Of keys that tie for the last
    places the most recent are taken, so that the choice depends neither on padding nor on the machine.
    """
    keys = scores.shape[-1]
    widths = [min(size, keys) for size in sizes]
    if len(set(widths)) == 1:
        return _top_of_rows(scores.reshape(-1, keys), widths[0]).view(*scores.shape[:-1], widths[0])
    out = torch.full((*scores.shape[:-1], max(widths)), -1, dtype=torch.int64, device=scores.device)
    for item, width in enumerate(widths):
        out[item, :, :, :width] = _top_of_rows(scores[item].reshape(-1, keys), width).view(*scores.shape[1:-1], width)
    return out


def _top_of_rows(scores: Tensor, width: int) -> Tensor:
    """`top_indices` for rows (R, N) of one size: int64 (R, width), in any order."""
    keys = scores.shape[-1]
    if width == 0:
        return torch.empty((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    if width == keys:
        indices = torch.arange(keys, device=scores.device).expand(scores.shape)
        return indices.masked_fill(scores == NEVER, -1)
    if scores.is_cuda or scores.dtype not in (torch.float32, torch.float64):
        best, indices = scores.topk(width, dim=-1, sorted=False)
    else:  # NumPy's vectorised partition is several times faster than topk on a CPU
        partitioned = np.argpartition(scores.detach().numpy(), keys - width, axis=-1)[:, keys - width :]
        indices = torch.from_numpy(partitioned.astype(np.int64))
        best = scores.gather(-1, indices)
    last = best.amin(-1, keepdim=True)
    last = last.masked_fill(last == NEVER, float("nan"))  # a row with too few scores has no boundary
    tied = best == last
    row, column = (scores == last).nonzero(as_tuple=True)
    if row.numel() > int(tied.sum()):
        ends = torch.bincount(row, minlength=scores.shape[0]).cumsum(0)
        newer = ends[row] - 1 - torch.arange(row.numel(), device=row.device)
        # Both sides go row by row, and a row has as many places for tied keys on the left as keys on the right.
        indices[tied] = column[newer < tied.sum(-1)[row]]
    return indices.masked_fill(best == NEVER, -1)
