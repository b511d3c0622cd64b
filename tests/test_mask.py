"""Mask: its two forms agree, and joining masks never changes them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_hub import Mask

SHAPE = (2, 4, 3, 20)


def random_mask(seed: int, heads: int, form: str, certain: bool) -> Mask:
    """A mask over SHAPE with 2 kv heads, held in `heads` head rows as index lists or densely."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(SHAPE[0], heads, *SHAPE[2:], generator=generator)
    p = torch.where(torch.rand(p.shape, generator=generator) < 0.3, p.clamp(min=0.05), 0.0)
    if certain:
        p = (p > 0).float()
    if form == "dense":
        return Mask.from_dense(p.bool() if certain else p, SHAPE[1], kv_heads=2)
    order = p.argsort(-1, descending=True)[..., :12]  # at most 12 of 20 are kept, padding included
    values = p.gather(-1, order)
    return Mask.from_indices(order.masked_fill(values == 0, -1), SHAPE, None if certain else values, kv_heads=2)


masks = st.builds(
    random_mask, st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.sampled_from(["lists", "dense"]), st.booleans()
)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def scatter(indices: Tensor, values: Tensor, n: int) -> Tensor:
    out = torch.zeros(*indices.shape[:-1], n)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in indices.shape)):
        where = tuple(place.tolist())
        if indices[where] >= 0:
            out[(*where[:-1], int(indices[where]))] = values[where]
    return out


@quick
@given(mask=masks)
def test_forms_agree(mask: Mask) -> None:
    p = mask.inclusion_probability()
    assert p.shape == SHAPE and p.dtype == torch.float32
    assert torch.equal(mask.chosen().repeat_interleave(4 // mask.chosen().shape[1], 1), p > 0)
    assert torch.equal(mask.counts().repeat_interleave(4 // mask.counts().shape[1], 1), (p > 0).sum(-1))
    indices, count, log_weight = mask.to_indices()
    assert indices.dtype == torch.int32 and torch.equal(count, (p > 0).sum(-1, dtype=torch.int32))
    listed = torch.arange(indices.shape[-1]) < count.unsqueeze(-1)
    weights = torch.ones(indices.shape) if log_weight is None else (-log_weight).exp()
    kept = scatter(indices.masked_fill(~listed, -1), weights, SHAPE[3])
    torch.testing.assert_close(kept, p)
    if log_weight is not None:
        assert bool((log_weight[~listed] == float("-inf")).all())


@quick
@given(mask=masks)
def test_group_lists_hold_the_union_of_a_groups_rows(mask: Mask) -> None:
    p = mask.inclusion_probability()
    indices, count, log_weight = mask.to_indices(group=True)
    assert indices.shape[:2] == (2, 2) and log_weight.shape == (2, 4, 3, indices.shape[-1])
    for item in range(2):
        for head in range(4):
            own = indices[item, head // 2, : count[item, head // 2]].long()
            assert own.unique().numel() == own.numel()
            union = (p[item, 2 * (head // 2) : 2 * (head // 2) + 2] > 0).any(0).any(0)
            assert torch.equal(own.sort().values, union.nonzero().squeeze(-1))
            weights = torch.where(p[item, head] > 0, 1 / p[item, head], 0.0)
            torch.testing.assert_close(log_weight[item, head, :, : own.numel()].exp(), weights[:, own])


@quick
@given(first=masks, second=masks)
def test_union_is_that_of_independent_coins(first: Mask, second: Mask) -> None:
    p, q = first.inclusion_probability().clone(), second.inclusion_probability().clone()
    joined = first.union(second)
    torch.testing.assert_close(joined.inclusion_probability(), p + q - p * q)
    assert torch.equal(first.inclusion_probability(), p) and torch.equal(second.inclusion_probability(), q)
    indices = joined.lists().indices
    for row in indices.reshape(-1, indices.shape[-1]):
        kept = row[row >= 0]
        assert kept.unique().numel() == kept.numel(), "a key stands twice in a list"


@quick
@given(first=masks, second=masks, seed=st.integers(0, 100))
def test_a_mask_that_was_looked_at_joins_as_one_that_was_not(first: Mask, second: Mask, seed: int) -> None:
    """Masks are shared: the form of what is made of them must not depend on who read them before."""
    fresh = copy.copy(first).union(second)
    allowed = torch.rand(2, 1, 3, 20, generator=torch.Generator().manual_seed(seed)) < 0.6
    first.lists(), first.to_indices(), first.to_indices(group=True), first.residual(allowed), first.residual(~allowed)
    again = first.union(second)
    assert torch.equal(again.lists().indices, fresh.lists().indices)
    assert torch.equal(first.residual(allowed), copy.copy(first).residual(allowed.clone()))


@quick
@given(mask=masks, seed=st.integers(0, 100))
def test_residual_and_restriction(mask: Mask, seed: int) -> None:
    allowed = torch.rand(2, 1, 3, 20, generator=torch.Generator().manual_seed(seed)) < 0.6
    p = mask.inclusion_probability()
    residual = mask.residual(allowed)
    residual = residual.repeat_interleave(4 // residual.shape[1], 1)
    assert torch.equal(residual, allowed & (p == 0))
    torch.testing.assert_close(mask.restrict(allowed).inclusion_probability(), p * allowed)


@quick
@given(mask=masks)
def test_group_counts(mask: Mask) -> None:
    chosen = mask.inclusion_probability() > 0
    groups = chosen.view(2, 2, 2, 3, 20).any(2).sum(-1)
    counts = mask.group_counts()
    assert torch.equal(counts.expand_as(groups), groups)


def test_ranges() -> None:
    ranges = [(0, 0), (0, 3), (2, 5), (5, 20), (17, 20), (0, 20)]
    for first in ranges:
        mask = Mask.from_range(*first, SHAPE, kv_heads=2)
        keys = torch.arange(SHAPE[3])
        expected = (keys >= first[0]) & (keys < first[1])
        assert torch.equal(mask.chosen().expand(SHAPE), expected.expand(SHAPE)) and mask.shape == SHAPE
        for second in ranges:
            both = mask.union(Mask.from_range(*second, SHAPE, kv_heads=2))
            joined = expected | ((keys >= second[0]) & (keys < second[1]))
            assert torch.equal(both.chosen().expand(SHAPE), joined.expand(SHAPE))
            assert bool((both.counts() == joined.sum()).all())
            again = both.union(mask)  # what two ranges made is no range any more
            assert bool((again.counts() == joined.sum()).all())


@quick
@given(mask=masks, seed=st.integers(0, 100))
def test_narrow_keeps_the_named_places_of_the_lists(mask: Mask, seed: int) -> None:
    before, indices = mask.inclusion_probability().clone(), mask.lists().indices
    stays = torch.rand(*SHAPE[:3], indices.shape[-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    narrowed = mask.narrow(stays)
    indices = indices.repeat_interleave(4 // indices.shape[1], 1).masked_fill(~stays, -1)
    kept = scatter(indices, torch.ones(stays.shape), SHAPE[3])
    assert torch.equal(narrowed.inclusion_probability(), before * kept)
    assert torch.equal(narrowed.counts(), (before * kept > 0).sum(-1)) and narrowed.is_certain == mask.is_certain
    assert torch.equal(mask.inclusion_probability(), before)


def test_empty() -> None:
    empty = Mask.empty(SHAPE, kv_heads=2)
    assert empty.is_empty and empty.is_certain and not empty.inclusion_probability().any()
    assert empty.to_indices()[0].shape == (2, 4, 3, 0)
    assert empty.to_indices(group=True)[0].shape == (2, 2, 0)
    other = random_mask(1, 4, "lists", False)
    assert torch.equal(empty.union(other).inclusion_probability(), other.inclusion_probability())
    assert torch.equal(other.union(empty).inclusion_probability(), other.inclusion_probability())
    assert not Mask.from_dense(torch.zeros(SHAPE, dtype=torch.bool)).is_empty, "flags are by construction"


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="cannot be joined"):
        Mask.empty(SHAPE).union(Mask.empty((2, 4, 3, 21)))
    with pytest.raises(ValueError, match=r"indices must be \(B, h, Q, K\)"):
        Mask.from_indices(torch.zeros(2, 4, 5, 1, dtype=torch.long), SHAPE)
    with pytest.raises(ValueError, match=r"indices must have \[1, 2, 4\] heads, got 3"):
        Mask.from_indices(torch.zeros(2, 3, 3, 1, dtype=torch.long), SHAPE, kv_heads=2)
    with pytest.raises(ValueError, match="probability must be"):
        Mask.from_indices(torch.zeros(2, 4, 3, 1, dtype=torch.long), SHAPE, torch.ones(2, 4, 3, 2))
    with pytest.raises(ValueError, match="a dense mask must be"):
        Mask.from_dense(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"a dense mask must have \[1, 4\] heads, got 2"):
        Mask.from_dense(torch.zeros(2, 2, 3, 20), heads=4)
