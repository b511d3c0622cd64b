"""Decode steps that run as they are for any number of tokens before them: only the device counts these. A CUDA graph holds one."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..attention import relative_error, selector_share
from ..maskers.call_cache import once
from ..maskers.layout import Layout, on_device
from ..maskers.open_layout import OpenLayout
from ..micro_metrics import Meter
from .rules import Rule
from .step_scores import StepScores

if TYPE_CHECKING:
    from .lockstep import Lockstep


class OpenLayerStep(NamedTuple):
    """What one layer did in a step, for recorders. queries (rows, H, 1, D); outputs (rows, 1, H, DV), float32; chosen (Hkv, G, rows)
    and distinct (Hkv, rows) keys; selectors: shares that choosing read, float64 (rows,)."""

    layer_idx: int
    rule: Rule
    scaling: float
    queries: Tensor
    outputs: Tensor
    chosen: Tensor
    distinct: Tensor
    selectors: Tensor


class OpenSteps:
    """The open steps of a batch. end: tokens before the current one, int64 without dimensions. All rows attend to lists, dense ones
    to one of all keys. `layers`: of the step that is done, those that recorders may ask about."""

    def __init__(self, batch: Lockstep, end: Tensor) -> None:
        self.batch, self.end = batch, end
        self.layers: list[OpenLayerStep] = []

    def attend(self, layer_idx: int, queries: Tensor, scaling: float, rule: Rule, layouts: dict[Hashable, Layout]) -> Tensor:
        """Output (rows, 1, H, DV) for queries (rows, H, 1, D), whose keys the cache has. layouts: of this forward pass."""
        batch, layer, draws = self.batch, self.batch.prefilled.cache.layers[layer_idx], dict[Hashable, object]()
        place = (1, queries.shape[1], 1, layer.total), layer.shared()[0].shape[1], queries.device
        # Under this name AttentionInputs look for it.
        layout = once(layouts, (*place, 0), lambda: OpenLayout(*place, self.end + 1))
        assert isinstance(layout, OpenLayout)
        masks = []
        shares: list[float | Tensor] = []
        for index, row in enumerate(batch.rows):
            share: float | Tensor = 0.0
            if rule.limited:
                width = min(layout.shape[3], rule.window or rule.chunk or 0)
                reach = partial(layout.keys_from, rule.first_key(layout.row_positions.view(1)).clamp(min=0), width)
                mask = once(layout.chosen, (rule.window, rule.chunk), reach)
            elif row.memory is None:
                mask = once(layout.chosen, "all", layout.everything)
            else:
                inputs, mask, _, selectors = batch.choose(index, layer_idx, queries, scaling, rule, draws)
                inputs.cache.call.clear()  # scores of many rows are large
                share = selector_share(inputs, selectors)
                batch.grouped.add_selectors(index, share)
            masks.append(mask)
            shares.append(share)
        rows = tuple(range(len(masks)))
        outputs, _ = batch.grouped.attend(rows, masks, queries, layer, scaling, rule, counted=not rule.limited)
        if not rule.limited and any(row.recorders for row in batch.rows):
            each = [
                share if isinstance(share, Tensor) else on_device((share,), torch.float64, queries.device)[0]
                for share in shares
            ]
            counts = batch.grouped.last_counts(rows)
            self.layers.append(OpenLayerStep(layer_idx, rule, scaling, queries, outputs, *counts, torch.stack(each)))
        return outputs.to(queries.dtype)

    def record(self, layers: list[OpenLayerStep]) -> None:
        """Give the rows' recorders their figures of a step that is done, and of which the host knows the length."""
        batch, cache = self.batch, self.batch.prefilled.cache
        total = cache.get_seq_length()
        recorders = [(place, one) for place, row in enumerate(batch.rows) if row.memory is not None for one in row.recorders]
        for own in layers:
            due = [(place, one) for place, one in recorders if one.due(own.layer_idx, total, 1)]  # type: ignore[attr-defined]
            if not due:
                continue
            with cache.layers[own.layer_idx].closed():
                dense = StepScores(own.queries, cache.layers[own.layer_idx], own.scaling, own.rule).dense
            errors = relative_error(own.outputs, dense).nanmean((1, 2)).double()
            densities = own.chosen.sum((0, 1), dtype=torch.float64) / (own.queries.shape[1] * total)
            kv_shares = own.distinct.sum(0, dtype=torch.float64) / (own.distinct.shape[0] * total) + own.selectors
            for place, one in due:
                assert isinstance(one, Meter)
                one.add(own.layer_idx, batch.step, 1, 1, (densities[place], errors[place], kv_shares[place]))
