"""Replay: what a sparse attention would have done on a recorded dense run. Arithmetic on a trace, no model forward.

All configurations of a call share each layer's scores, exponentials, sorted scores and the codes that maskers make of keys. Off
the CPU, layers that are alike are the items of one call: 32 short ones take 445 operations in place of 13,083 (docs/gpu.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionResult, ResearchAttention, relative_error
from .errors import SeveralLayersError
from .lists import WIDE_ENTRIES, expand_heads
from .maskers.call_cache import CallCache
from .maskers.call_parts import items_of
from .maskers.inputs import AttentionInputs
from .maskers.layout import Layout
from .maskers.shared_states import SharedStates

if TYPE_CHECKING:
    from .models.trace import HeldLayers, Trace, TraceLayer, TraceLayers

#: Share of a GPU's free memory that layers replayed at once may take: the estimate is of the largest tensors, and layers of traces
#: that stay there need room, too.
MEMORY_SHARE = 0.25
#: Bytes per head, row and key that the configurations of a call share at most: scores and their exponentials; their order, and random
#: ranks and theirs, which are there twice if some configurations take the layers together and others one by one.
SHARED_BYTES = 48


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
    errors, densities, kv_shares = list[Tensor](), list[Tensor](), list[Tensor]()  # of some layers each, of all attentions
    kv_fractions: list[list[float]] = [[] for _ in attentions]
    most = partial(layers_at_once, rows=len(kept), attentions=attentions)
    for stored in trace.side_by_side(layers, device, most, held):
        inputs = _inputs(stored, trace.rows, kept, seed, layouts, latent)
        calls: dict[tuple[int, int], AttentionInputs] = {(0, len(stored.layers)): inputs}
        outputs, counts, group_counts = list[Tensor](), list[Tensor](), list[Tensor]()
        for i, attention in enumerate(attentions):
            own = _results(attention, stored, calls, trace, states)
            outputs.append(_joined([result.unrounded for result in own]))
            counts.append(_joined([expand_heads(result.mask.counts(), inputs.shape[1]) for result in own]))
            if kv:
                group_counts.append(_joined([expand_heads(result.mask.group_counts(), inputs.shape[1]) for result in own]))
                for result in own:
                    kv_fractions[i] += [result.kv_fraction] * result.mask.shape[0]
            states.trim()
        lengths = inputs.layout.row_lengths.unsqueeze(1)
        errors.append(_row_means(relative_error(torch.stack(outputs), inputs.dense_output()), parts))
        for figures, numbers in ((densities, counts), (kv_shares, group_counts)):
            if numbers:
                figures.append(_row_means((torch.stack(numbers) / lengths).transpose(2, 3), parts))
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
    """Means of figures (attentions, layers, rows, H) over the rows: (attentions, layers, H), or (attentions, layers, parts, H) over
    each part of them."""
    return figures.mean(2) if parts == 1 else torch.stack([part.mean(2) for part in figures.tensor_split(parts, 2)], 2)


def _each(groups: list[Tensor]) -> list[Tensor]:
    """Figures (attentions, layers, ...) of groups of layers as each attention's (layers, ...), on the CPU: one wait for the device."""
    return [own.contiguous() for own in torch.cat(groups, 1).cpu()]


def _joined(items: list[Tensor]) -> Tensor:
    return items[0] if len(items) == 1 else torch.cat(items)


def layers_at_once(first: TraceLayer, rows: int, attentions: Sequence[ResearchAttention]) -> int:
    """How many layers such as the first are replayed as one call. On a CPU one: operations start in no time there, and a layer's
    scores may fit into a cache.

    Elsewhere as many as keep the lists of a call small enough to be as wide as the keys, so that none is awaited (past that a
    layer's operations take longer than starting them anyway), and fit into a GPU's memory.
    """
    (_, heads, _, _), (total, dim), device = first.queries.shape, first.values.shape[2:], first.keys.device
    if device.type == "cpu":
        return 1
    entries = heads * rows * total
    most = WIDE_ENTRIES // max(1, entries)
    if device.type == "cuda":
        maskers = [masker for attention in attentions for masker in attention.maskers]
        codes = len({masker.codes_key() for masker in maskers if masker.learns or masker.code_fields is not None})
        size = 2 * (first.keys.nbytes + first.values.nbytes)  # as they are read, and side by side
        size += codes * (first.keys.nbytes + 4 * entries)  # codes are hardly larger than the keys; scores by them
        size += entries * (SHARED_BYTES + max((masker.score_bytes[0] for masker in maskers), default=0))
        size += 8 * heads * rows * dim * len(attentions)  # outputs, and a copy of them
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        most = min(most, int(MEMORY_SHARE * free) // size)
    return max(1, most)


def _results(
    attention: ResearchAttention,
    stored: TraceLayers,
    calls: dict[tuple[int, int], AttentionInputs],
    trace: Trace,
    states: SharedStates,
) -> list[AttentionResult]:
    """An attention's results on some layers, in their order: one of all of them, or several of parts of them.

    calls: by (start, stop) the call of these of the layers, which other attentions share; it has that of all of them.
    """
    whole = calls[0, len(stored.layers)]

    def attend(start: int, stop: int) -> AttentionResult:
        if (start, stop) not in calls:
            calls[start, stop] = items_of(whole, start, stop)
        inputs, maskers = calls[start, stop], attention.maskers_of(stored.layers[start])
        state = states.of_call(maskers, trace.key, trace.context_length, inputs, stored.summaries[start:stop])
        return attention.attend_inputs(inputs, state)

    results, stop = list[AttentionResult](), 0
    for _, alike in itertools.groupby(stored.layers, partial(_rule, attention, latent=whole.latent)):
        start, stop = stop, stop + len(list(alike))
        try:
            results.append(attend(start, stop))
        except SeveralLayersError:
            results += [attend(index, index + 1) for index in range(start, stop)]
    return results


def _rule(attention: ResearchAttention, layer_idx: int, latent: int) -> object:
    """Equal for layers that an attention may take in one call."""
    table, is_dense = attention.config.head_budgets, not attention.maskers_of(layer_idx)
    if latent and any(masker.narrows for masker in attention.maskers):
        return layer_idx  # the bytes of a latent that choosing reads have a limit in each layer
    return is_dense, None if is_dense or table is None else table[layer_idx : layer_idx + 1]


def _inputs(
    stored: TraceLayers, rows: int, kept: list[int], seed: int, layouts: dict[Hashable, Layout], latent: int
) -> AttentionInputs:
    """The call of some layers, as its items, for the kept rows, with the recorded dense output."""
    mask, queries, dense = None, stored.queries, stored.dense
    if len(kept) < rows:
        queries, dense = queries[:, :, kept], dense[:, kept]
        keys = stored.keys.shape[2]
        last = torch.tensor(kept, device=stored.keys.device) + (keys - rows)
        mask = (torch.arange(keys, device=stored.keys.device) <= last[:, None])[None, None]
    cache = CallCache(call={"dense_output": dense}, layouts=layouts, keeps_order=True)
    place = mask, stored.scaling, stored.layers, [seed] * len(stored.layers), cache
    inputs = AttentionInputs(
        queries, stored.keys, stored.values, *place, softcap=stored.softcap, sinks=stored.sinks, latent=latent
    )
    inputs.exponentials()  # shared: attention of each configuration reads these, not the keys
    return inputs
