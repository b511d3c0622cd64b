"""Parts of a call: some of its rows, or of its items, as calls of their own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from torch import Tensor

from .call_cache import CallCache
from .inputs import AttentionInputs

BLOCK_SCORES = {"cpu": 2**20, "gpu": 2**25}  # that a block of rows holds at once


def rows_of(inputs: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """The call of query rows [start, stop) alone; without a mask, of the keys up to theirs only."""
    end, mask = inputs.shape[3], inputs.layout.mask
    if mask is None:
        end -= inputs.rows_after + inputs.shape[2] - stop
    elif mask.shape[2] > 1:
        mask = mask[:, :, start:stop]
    keys, values, place = inputs.keys[:, :, :end], inputs.values[:, :, :end], (mask, inputs.scaling, inputs.layers)
    return AttentionInputs(inputs.queries[:, :, start:stop], keys, values, *place, softcap=inputs.softcap, sinks=inputs.sinks)


def blocks_of(inputs: AttentionInputs) -> Iterator[AttentionInputs]:
    """The call in blocks of rows, whose scores fit into memory."""
    batch, heads, rows, keys = inputs.shape
    step = max(1, BLOCK_SCORES["cpu" if inputs.device.type == "cpu" else "gpu"] // (batch * heads * keys))
    for start in range(0, rows, step):
        yield rows_of(inputs, start, min(start + step, rows))


def items_of(inputs: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """The call of items [start, stop) alone, of a call whose items are layers and share their attention mask. What is known of
    their scores is not computed again."""
    own = slice(start, stop)
    known = ((name, inputs.cache.call.get(name)) for name in ("dense_output", "scores", "highest", "exponentials"))
    call: dict[Hashable, object] = {name: value[own] for name, value in known if isinstance(value, Tensor)}
    cache = CallCache(call=call, layouts=inputs.cache.layouts, keeps_order=inputs.cache.keeps_order)
    place = inputs.layout.mask, inputs.scaling, inputs.layers[own], inputs.seeds[own], cache
    queries, keys, values = inputs.queries[own], inputs.keys[own], inputs.values[own]
    return AttentionInputs(queries, keys, values, *place, softcap=inputs.softcap, sinks=inputs.sinks, latent=inputs.latent)
