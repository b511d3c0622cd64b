"""Replay: what a sparse attention would have done on a recorded dense run. Arithmetic on a trace, no model forward.

All configurations of a call share each layer's scores, exponentials, sorted scores and the codes that maskers make of keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import ResearchAttention, relative_error
from .lists import expand_heads
from .maskers.call_cache import CallCache
from .maskers.inputs import AttentionInputs
from .maskers.layout import Layout
from .maskers.shared_states import SharedStates

if TYPE_CHECKING:
    from .models.trace import HeldLayers, Trace, TraceLayer


@dataclass(frozen=True)
class ReplayResult:
    """Means over rows, heads and layers; errors, densities and kv_shares are per layer and head: float32
    (layers, H), layers in the order replayed.

    kv_fraction: as AttentionResult's, None unless asked for; kv_shares: the keys of a head's group that are read, without
    selectors."""

    error: float
    density: float
    errors: Tensor
    densities: Tensor
    kv_fraction: float | None = None
    kv_shares: Tensor | None = None


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
    kv: bool = False,
    latent: int = 0,
    parts: int = 1,
    held: HeldLayers | None = None,
) -> list[ReplayResult]:
    """(error, density) of each attention on a trace, in the order given.

    rows: the trace's query rows to use (default all). Include the last one: fractions of N are
    fractions of the keys it sees. layers: model layer numbers (default all recorded). seed: of this
    sample. states: masker states to share with other calls. kv: measure the share of KV bytes, too. latent: see
    AttentionInputs. parts: > 1 gives errors, densities and kv_shares of so many parts of the rows, (layers, parts, H). held: layers
    that stay on the device between calls.
    """
    missing = frozenset[str]().union(*(attention.observes for attention in attentions)) - trace.observed
    if missing:
        raise ValueError(f"the trace does not hold {', '.join(sorted(missing))}: record it with observe=attention.observes")
    layers = trace.layers if layers is None else layers
    kept = list(range(trace.rows)) if rows is None else list(rows)
    states = SharedStates() if states is None else states
    layouts: dict[Hashable, Layout] = {}
    errors, densities, kv_shares = list[Tensor](), list[Tensor](), list[Tensor]()  # of each layer, of all attentions
    kv_fractions: list[list[float]] = [[] for _ in attentions]
    for layer_idx in layers:
        stored = trace.layer(layer_idx, device) if held is None else held.layer(trace, layer_idx, device)
        inputs, keys = _layer_inputs(stored, trace.rows, kept, seed, layouts, latent), stored.keys[:, :, : trace.context_length]
        outputs, counts, group_counts = list[Tensor](), list[Tensor](), list[Tensor]()
        for i, attention in enumerate(attentions):
            state = states.of(attention.maskers_of(layer_idx), trace.key, keys, layer_idx, stored.summary)
            result = attention.attend_inputs(inputs, state)
            outputs.append(result.unrounded[0])
            counts.append(expand_heads(result.mask.counts(), inputs.shape[1])[0])
            if kv:
                group_counts.append(expand_heads(result.mask.group_counts(), inputs.shape[1])[0])
                kv_fractions[i].append(result.kv_fraction)
            states.trim()
        lengths = inputs.layout.row_lengths
        errors.append(_row_means(relative_error(torch.stack(outputs), inputs.dense_output()), parts))
        for figures, numbers in ((densities, counts), (kv_shares, group_counts)):
            if numbers:
                figures.append(_row_means((torch.stack(numbers) / lengths).transpose(1, 2), parts))
    results = [
        ReplayResult(float(e.mean()), float(d.mean()), e, d) for e, d in zip(_each(errors), _each(densities), strict=True)
    ]
    if not kv:
        return results
    return [
        replace(result, kv_fraction=fmean(fractions), kv_shares=shares)
        for result, fractions, shares in zip(results, kv_fractions, _each(kv_shares), strict=True)
    ]


def _row_means(figures: Tensor, parts: int) -> Tensor:
    """Means of figures (attentions, rows, H) over the rows: (attentions, H), or (attentions, parts, H) over each part of them."""
    return figures.mean(1) if parts == 1 else torch.stack([part.mean(1) for part in figures.tensor_split(parts, 1)], 1)


def _each(layers: list[Tensor]) -> list[Tensor]:
    """Figures of all layers and attentions as each attention's (layers, ...), on the CPU: one wait for the device."""
    return [own.contiguous() for own in torch.stack(layers, 1).cpu()]


def _layer_inputs(
    stored: TraceLayer, rows: int, kept: list[int], seed: int, layouts: dict[Hashable, Layout], latent: int
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
    inputs = AttentionInputs(
        queries, stored.keys, stored.values, *place, softcap=stored.softcap, sinks=stored.sinks, latent=latent
    )
    inputs.exponentials()  # shared: attention of each configuration reads these, not the keys
    return inputs
