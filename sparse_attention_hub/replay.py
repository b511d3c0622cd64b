"""Replay: what a sparse attention would have done on a recorded dense run. Arithmetic on a trace, no model forward.

All configurations of a call share each layer's scores, exponentials, sorted scores and the codes that maskers make of keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import ResearchAttention, dense_of, relative_error
from .lists import expand_heads
from .maskers.call_cache import CallCache
from .maskers.inputs import AttentionInputs
from .maskers.layout import Layout
from .maskers.shared_states import SharedStates

if TYPE_CHECKING:
    from .models.trace import Trace, TraceLayer


@dataclass(frozen=True)
class ReplayResult:
    """Means over rows, heads and layers; errors and densities are per layer and head: float32
    (layers, H), layers in the order replayed."""

    error: float
    density: float
    errors: Tensor
    densities: Tensor


def spread(count: int, keep: int) -> list[int]:
    """`keep` of a trace's rows or layers 0 to count - 1, evenly spread, first and last included; all if there are fewer."""
    keep = min(keep, count)
    return [round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep)]


@torch.inference_mode()
def replay(
    trace: Trace,
    attentions: Sequence[ResearchAttention],
    *,
    rows: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    states: SharedStates | None = None,
) -> list[ReplayResult]:
    """(error, density) of each attention on a trace, in the order given.

    rows: the trace's query rows to use (default all). Include the last one: fractions of N are
    fractions of the keys it sees. layers: model layer numbers (default all recorded). seed: of this
    sample. states: masker states to share with other calls.
    """
    layers = trace.layers if layers is None else layers
    kept = list(range(trace.rows)) if rows is None else list(rows)
    states = SharedStates() if states is None else states
    layouts: dict[Hashable, Layout] = {}
    errors: list[list[Tensor]] = [[] for _ in attentions]
    densities: list[list[Tensor]] = [[] for _ in attentions]
    for layer_idx in layers:
        inputs = _layer_inputs(trace.layer(layer_idx, device), trace.rows, kept, seed, layouts)
        for i, attention in enumerate(attentions):
            state = states.of(attention.maskers_of(layer_idx), trace.key, inputs.keys[:, :, : trace.context_length], layer_idx)
            result = attention.attend_inputs(inputs, state)
            counts = expand_heads(result.mask.counts(), inputs.shape[1])[0]
            errors[i].append(relative_error(result.output, dense_of(inputs))[0].mean(0).cpu())
            densities[i].append((counts / inputs.layout.row_lengths).mean(-1).cpu())
            states.trim()
    return [
        ReplayResult(float(e.mean()), float(d.mean()), e, d)
        for e, d in zip(map(torch.stack, errors), map(torch.stack, densities), strict=True)
    ]


def _layer_inputs(
    stored: TraceLayer, rows: int, kept: list[int], seed: int, layouts: dict[Hashable, Layout]
) -> AttentionInputs:
    """One layer's call for the kept rows, with the recorded dense output."""
    mask, queries, dense = None, stored.queries, stored.dense
    if len(kept) < rows:
        queries, dense = queries[:, :, kept], dense[:, kept]
        keys = stored.keys.shape[2]
        last = torch.tensor(kept, device=stored.keys.device) + (keys - rows)
        mask = (torch.arange(keys, device=stored.keys.device) <= last[:, None])[None, None]
    cache = CallCache(call={"dense_output": dense}, layouts=layouts, keeps_order=True)
    place = mask, stored.scaling, stored.layer_idx, [seed], cache
    inputs = AttentionInputs(queries, stored.keys, stored.values, *place, softcap=stored.softcap, sinks=stored.sinks)
    inputs.exponentials()  # shared: attention of each configuration reads these, not the keys
    return inputs
