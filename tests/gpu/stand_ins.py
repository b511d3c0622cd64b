"""What the Triton kernels compute, in torch: from the arguments of a launch, into its result tensors.

All keys of a list are handled in the first split; the others stay empty, as they are for lists that are padding there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEVER = float("-inf")


def walk_rows(*arguments: Any, **constants: Any) -> None:
    """rows_kernel: lists (B, H, Q, K), a program per row and split."""
    queries, keys, values, lists, weights, partial, top, total = arguments[:8]
    group, width, _, scaling, softcap = arguments[-5:]
    assert lists.shape[3] == width and group == queries.shape[1] // keys.shape[1]
    places = lists.clamp(min=0).long()
    every = keys.float().repeat_interleave(group, 1).unsqueeze(2).expand(-1, -1, places.shape[2], -1, -1)
    own = torch.gather(every, 3, places.unsqueeze(-1).expand(*places.shape, keys.shape[3]))
    scores = (queries.float().unsqueeze(3) * own).sum(-1) * scaling
    scores = _finished(scores, softcap, weights if constants["WEIGHTED"] else None).masked_fill(lists < 0, NEVER)
    every = values.float().repeat_interleave(group, 1).unsqueeze(2).expand(-1, -1, places.shape[2], -1, -1)
    own = torch.gather(every, 3, places.unsqueeze(-1).expand(*places.shape, values.shape[3]))
    _store(scores, own, partial, top, total)


def walk_forks(*arguments: Any, **constants: Any) -> None:
    """forks_kernel: lists (Hkv, G, slots) of rows side by side, whose later keys are in tails (forks, Hkv, n, D)."""
    queries, keys, values, own_keys, own_values, lists, probability, table = arguments[:8]
    slots, heads, group, shared, _, scaling, softcap = arguments[-7:]
    assert lists.shape == (heads // group, group, slots) and lists.is_contiguous() and shared == keys.shape[2]
    for row, (fork, first, width, _) in enumerate(table.tolist()):
        every_key, every_value = (
            torch.cat([common, own[fork : fork + 1]], 2) for common, own in ((keys, own_keys), (values, own_values))
        )
        places = lists.view(1, heads, 1, slots)[..., first : first + width]
        weights = places
        if constants["WEIGHTED"]:
            weights = -probability.view(1, heads, 1, slots)[..., first : first + width].clamp(min=1e-30).log()
        results = [part[row * heads : (row + 1) * heads] for part in arguments[8:11]]
        call = queries[fork : fork + 1], every_key, every_value, places, weights, *results
        walk_rows(*call, group, width, 0, scaling, softcap, **constants)


def walk_groups(*arguments: Any, **constants: Any) -> None:
    """groups_kernel: lists (B, Hkv, K), log weights (B, H, Q, K)."""
    queries, keys, values, lists, weights, partial, top, total = arguments[:8]
    group, _, width, _, _, scaling, softcap = arguments[-7:]
    assert lists.shape[2] == width and group == queries.shape[1] // keys.shape[1]
    places = lists.clamp(min=0).long().unsqueeze(-1)  # (B, Hkv, K, 1)
    own_keys, own_values = (
        tensor.float().gather(2, places.expand(-1, -1, -1, tensor.shape[3])).repeat_interleave(group, 1)
        for tensor in (keys, values)
    )
    scores = queries.float() @ own_keys.transpose(2, 3) * scaling
    scores = _finished(scores, softcap, weights if constants["WEIGHTED"] else None)
    scores = scores.masked_fill((lists < 0).repeat_interleave(group, 1).unsqueeze(2), NEVER)
    _store(scores, own_values.unsqueeze(2), partial, top, total)


def uniforms(low: Tensor, high: Tensor, queries: Tensor, keys: Tensor, out: Tensor, *_: int, **constants: Any) -> None:
    """uniforms_kernel, by what other devices do."""
    from sparse_attention_hub.maskers.uniforms import FACTORS, _in_torch

    halves = torch.stack([low, high]).unsqueeze(-1)
    out.copy_(_in_torch((halves, torch.tensor(FACTORS, dtype=torch.int32).view(2, 1, 1, 1)), queries, keys))


def merge(*arguments: Any, **constants: Any) -> None:
    """merge_kernel: splits of the rows joined."""
    partial, top, total, sink, output, lse, heads, rows, splits = arguments
    assert partial.shape[1] == splits
    highest = top.amax(1)
    if constants["SINKS"]:
        own = sink.repeat_interleave(rows).repeat(len(highest) // (heads * rows))
        highest = torch.maximum(highest, own)
    base = highest.masked_fill(highest == NEVER, 0.0)
    shrink = (top - base.unsqueeze(1)).exp()
    whole = (total * shrink).sum(1)
    if constants["SINKS"]:
        whole = whole + (own - base).exp()
    divisor = whole.masked_fill(whole == 0, 1.0)
    found = (partial * shrink.unsqueeze(2)).sum(1) / divisor.unsqueeze(1)
    output.copy_(found.view(-1, heads, rows, found.shape[1]).transpose(1, 2))
    lse.copy_((divisor.log() + base).masked_fill(whole == 0, NEVER).view(lse.shape))


def _finished(scores: Tensor, softcap: float, weights: Tensor | None) -> Tensor:
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return scores if weights is None else scores + weights


def _store(scores: Tensor, values: Tensor, partial: Tensor, top: Tensor, total: Tensor) -> None:
    """Partial results of rows (B, H, Q) in the first split: scores (B, H, Q, K), values (B, H, Q or 1, K, DV)."""
    highest = scores.amax(-1)
    terms = (scores - highest.masked_fill(highest == NEVER, 0.0).unsqueeze(-1)).exp()
    summed = (terms.unsqueeze(-2) @ values).squeeze(-2)
    for result, first, rest in ((partial, summed, 0.0), (top, highest, NEVER), (total, terms.sum(-1), 0.0)):
        result.fill_(rest)
        result[:, 0] = first.reshape(result[:, 0].shape)
