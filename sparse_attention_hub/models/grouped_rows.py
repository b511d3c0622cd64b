"""A decode step's sparse rows on a GPU: each chooses its keys, then two kernel launches attend for all of them.

A row by itself would launch two kernels and count what it reads, in every layer. Here the lists of all rows lie side by side. The
kernel reads the shared prefix in place, and the keys that follow it from each row's tail.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import choose_backend
from ..mask import Mask
from ..maskers.call_cache import once
from .cache import SharedPrefixLayer
from .rules import Rule
from .switch import SparseMeans, plus


def can_group(backend: str, queries: Tensor, layer: SharedPrefixLayer, rule: Rule) -> bool:
    """Whether a sparse row of this backend may attend together with others. queries (forks, H, Q, D)."""
    return queries.shape[2] == 1 and layer.forks > 1 and not rule.latent and choose_backend(backend, queries) == "triton"


class Totals(NamedTuple):
    """What the rows of a step read, summed over so many layers. rows: their places in the batch; densities, kv_fractions: float64
    (rows,), the latter without what choosing read: selectors, of each row."""

    rows: tuple[int, ...]
    layers: int
    densities: Tensor
    kv_fractions: Tensor
    selectors: list[float | Tensor]

    def add_to(self, means: Sequence[SparseMeans]) -> None:
        """Give each row of the batch its own."""
        for place, row in enumerate(self.rows):
            means[row].add_later(self.densities, self.kv_fractions, place, self.layers, self.selectors[place])


class GroupedRows:
    """The rows of one decode step. Rows are known by their places in the batch; all have one query and N keys.

    What they read stays on the device until their answers are done.
    """

    def __init__(self) -> None:
        self.tables: dict[Hashable, tuple[Tensor, Tensor]] = {}
        #: By the rows that were called together, of each layer: chosen keys (Hkv, G, rows), and distinct ones (Hkv, rows).
        self._counts: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        #: What choosing read: a share of all KV bytes, summed over layers.
        self._selectors: dict[int, float | Tensor] = {}

    def attend(
        self,
        rows: tuple[int, ...],
        masks: Sequence[Mask],
        queries: Tensor,
        layer: SharedPrefixLayer,
        scaling: float,
        rule: Rule,
        counted: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(output (R, 1, H, DV), log-sum-exp (R, H, 1)), float32, of R rows of the batch, whose queries are (forks, H, 1, D). counted:
        what they read is part of their densities."""
        from ..kernels.triton import ForkLists, attend_forks

        heads, (_, _, _, keys), kv_heads = queries.shape[1], masks[0].shape, masks[0].kv_heads
        group = kv_heads, heads // kv_heads
        lists = [mask.lists() for mask in masks]
        indices = torch.cat([_by_group(own.indices, group) for own in lists], -1)
        probability, widths = None, tuple(own.indices.shape[-1] for own in lists)
        if any(own.probability is not None for own in lists):
            certain = queries.new_ones((1, 1, 1, 1), dtype=torch.float32)
            each = [certain.expand_as(own.indices) if own.probability is None else own.probability for own in lists]
            probability = torch.cat([_by_group(own, group) for own in each], -1)
        table, firsts = once(
            self.tables, (rows, widths, keys, indices.device), lambda: _table(rows, widths, keys, indices.device)
        )
        found = attend_forks(
            queries,
            layer.shared(),
            layer.tails(),
            ForkLists(indices, probability, table, max(widths)),
            scaling,
            rule.softcap,
            rule.sinks,
        )
        if not counted:
            return found
        # A flag for each key of each row; the first of a row takes the padding.
        flags = torch.zeros((kv_heads, len(rows) * (keys + 1)), dtype=torch.bool, device=indices.device)
        flags.scatter_(1, (indices + firsts).view(kv_heads, -1), True)
        distinct = flags.view(kv_heads, len(rows), -1)[..., 1:].sum(-1, dtype=torch.int32)
        chosen = torch.cat([_by_group(own.counts.unsqueeze(-1), group) for own in lists], -1)
        self._counts.setdefault(rows, []).append((chosen, distinct))
        return found

    def begin(self) -> None:
        """A step begins: what an earlier one left that was broken off is not counted."""
        self._counts.clear()
        self._selectors.clear()

    def last_counts(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Of the layer that these rows were last called in: chosen keys (Hkv, G, rows), and distinct ones (Hkv, rows)."""
        return self._counts[rows][-1]

    def add_selectors(self, row: int, share: float | Tensor) -> None:
        self._selectors[row] = plus(self._selectors.get(row, 0.0), share, 1)

    def totals(self, keys: int | Tensor) -> list[Totals]:
        """Of the step that is done, by the rows that were called together. keys: how many each row had, maybe on the device."""
        found = []
        for rows, layers in self._counts.items():
            device = layers[0][0].device
            chosen, distinct = (torch.stack([own.to(device) for own in parts]) for parts in zip(*layers, strict=True))
            densities = chosen.sum((0, 1, 2), dtype=torch.float64) / (chosen[0, ..., 0].numel() * keys)
            kv_fractions = distinct.sum((0, 1), dtype=torch.float64) / (distinct.shape[1] * keys)
            selectors = [self._selectors.pop(row, 0.0) for row in rows]  # a row may be in several, with dense layers of its own
            found.append(Totals(rows, len(layers), densities, kv_fractions, selectors))
        if isinstance(keys, int):  # else the next step's are the same, and a graph reads them
            self.tables.clear()
        return found


def _by_group(entries: Tensor, group: tuple[int, int]) -> Tensor:
    """(1, h, 1, K) of all heads, each kv head's or each query head's lists as (Hkv, G, K), a view."""
    own = entries[0, :, 0]
    return own.unflatten(0, group) if len(own) == group[0] * group[1] else own.unsqueeze(1).expand(*group, -1)


def _table(rows: Sequence[int], widths: Sequence[int], keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of ForkLists the table, and for each slot which flag is its row's first key."""
    firsts = [sum(widths[:place]) for place in range(len(rows))]
    flags = [place * (keys + 1) + 1 for place in range(len(rows))]
    table = torch.tensor([rows, firsts, widths, flags]).T.contiguous().to(device, non_blocking=True)
    return table, torch.repeat_interleave(table[:, 3], table[:, 2], output_size=sum(widths))
