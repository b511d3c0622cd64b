"""Replay: what a sparse attention would have done on a recorded dense run. Arithmetic on a trace, no model forward.

All configurations of a call share each layer's scores, exponentials, sorted scores and the codes that maskers make of keys. Off
the CPU, layers that are alike are the items of one call, which starts fewer operations by as much: docs/gpu.md counts them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import ResearchAttention, relative_error
from .errors import SeveralLayersError
from .lists import WIDE_ENTRIES, expand_heads
from .maskers.call_cache import CallCache
from .maskers.call_parts import items_of
from .maskers.inputs import AttentionInputs
from .maskers.layout import Layout
from .maskers.shared_states import SharedStates

if TYPE_CHECKING:
    from .maskers.context_summary import ContextSummary
    from .models.trace import HeldLayers, Trace, TraceLayer, TraceLayers

#: Share of a GPU's memory that layers replayed at once may take, the largest of their tensors added up. Not of what is free: then
#: the groups, and with them what stays on the device, would change from one replay to the next.
MEMORY_SHARE = 0.1
#: Bytes per head, row and key that the configurations of a call share: scores, their exponentials and order, random ranks and theirs.
SHARED_BYTES = 28


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

    def measure(stored: TraceLayers) -> tuple[Tensor, ...]:
        """Errors and densities, and KV shares and fractions if asked for, (attentions, layers, ...), of some layers."""
        whole = _inputs(stored, trace.rows, kept, seed, layouts, latent)
        found = [_attend(attention, whole, stored.summaries, trace, states, kv) for attention in attentions]
        refused = [place for place, part in enumerate(found) if part is None]
        singles: list[list[tuple[Tensor, ...]]] = [[] for _ in attentions]
        for index in range(len(stored.layers) if refused else 0):
            one = items_of(whole, index, index + 1)
            for place in refused:
                part = _attend(attentions[place], one, stored.summaries[index : index + 1], trace, states, kv)
                assert part is not None
                singles[place].append(part)
        for place in refused:
            found[place] = tuple(torch.cat(own) for own in zip(*singles[place], strict=True))
        outputs, *numbers = (torch.stack(own) for own in zip(*found, strict=True))
        shares = [_row_means((own / whole.layout.row_lengths.unsqueeze(1)).transpose(2, 3), parts) for own in numbers[: 1 + kv]]
        return _row_means(relative_error(outputs, whole.dense_output()), parts), *shares, *numbers[1 + kv :]

    figures, rule = list[tuple[Tensor, ...]](), partial(_rule, attentions, latent)
    at_once = partial(layers_at_once, rows=len(kept), attentions=attentions)
    for stored in trace.side_by_side(layers, device, at_once, rule, held):
        figures.append(measure(stored))
        del stored  # before the next ones are read
    errors, densities, *kv_figures = (_each(list(own)) for own in zip(*figures, strict=True))
    results = [ReplayResult(float(e.mean()), float(d.mean()), e, d) for e, d in zip(errors, densities, strict=True)]
    if not kv:
        return results
    return [
        replace(result, kv_shares=shares, kv_fraction=fmean(fractions.tolist()))
        for result, shares, fractions in zip(results, *kv_figures, strict=True)
    ]


def _attend(
    attention: ResearchAttention,
    inputs: AttentionInputs,
    summaries: Sequence[ContextSummary | None],
    trace: Trace,
    states: SharedStates,
    kv: bool,
) -> tuple[Tensor, ...] | None:
    """What an attention does on some layers: output (L, Q, H, DV), counts of chosen keys (L, H, Q), and if asked for those that a
    head's group reads, and KV fractions, float64 (L,). None if one of its maskers does not take several layers at once."""
    layers, heads = inputs.shape[:2]
    try:
        maskers = attention.maskers_of(inputs.layers[0])
        state = states.of_call(maskers, trace.key, trace.context_length, inputs, summaries)
        result = attention.attend_inputs(inputs, state)
    except SeveralLayersError:
        return None
    finally:
        states.trim()
    found = result.unrounded, expand_heads(result.mask.counts(), heads)
    if not kv:
        return found
    fraction = torch.as_tensor(result.kv_share, dtype=torch.float64, device=inputs.device)
    return *found, expand_heads(result.mask.group_counts(), heads), fraction.expand(layers)


def _row_means(figures: Tensor, parts: int) -> Tensor:
    """Means of figures (attentions, layers, rows, H) over the rows: (attentions, layers, H), or (attentions, layers, parts, H) over
    each part of them."""
    return figures.mean(2) if parts == 1 else torch.stack([part.mean(2) for part in figures.tensor_split(parts, 2)], 2)


def _each(groups: list[Tensor]) -> list[Tensor]:
    """Figures (attentions, layers, ...) of groups of layers as each attention's (layers, ...), on the CPU: one wait for the device."""
    return [own.contiguous() for own in torch.cat(groups, 1).cpu()]


def layers_at_once(first: TraceLayer, rows: int, attentions: Sequence[ResearchAttention]) -> int:
    """How many layers such as the first are replayed as one call. On a CPU one: nothing is waited for to start there, and a layer's
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
        size += codes * (
            2 * first.keys.nbytes + 4 * entries
        )  # codes, hardly larger than the keys, and side by side; scores by them
        size += entries * (SHARED_BYTES + max((masker.score_bytes[0] for masker in maskers), default=0))
        size += 12 * heads * rows * dim * len(attentions)  # outputs, a copy of them, their errors
        most = min(most, int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory) // size)
    return max(1, most)


def _rule(attentions: Sequence[ResearchAttention], latent: int, layer_idx: int) -> object:
    """Equal for layers that all these attentions may take in one call."""

    def of(attention: ResearchAttention) -> object:
        table, is_dense = attention.config.head_budgets, not attention.maskers_of(layer_idx)
        if latent and any(masker.narrows for masker in attention.maskers):
            return layer_idx  # the bytes of a latent that choosing reads have a limit in each layer
        return is_dense, None if is_dense or table is None else table[layer_idx : layer_idx + 1]

    return [of(attention) for attention in attentions]


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
