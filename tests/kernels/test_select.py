"""Choosing keys: by threshold, along an order and in torch alike, ties included; and what is done with lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_hub import Mask, lists
from sparse_attention_hub.kernels.select import (
    Order,
    choose,
    choose_mass,
    count_mass,
    expand_pages,
    extend,
    lowest,
    order_of,
    walk_anywhere,
)
from sparse_attention_hub.lists import KeyLists, to_flags, without_first

NEVER = float("-inf")


@pytest.fixture(params=["loops", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of every function: compiled loops, and the torch operations of other devices."""
    monkeypatch.setattr(lists, "HAS_NUMBA", request.param == "loops")
    return request.param


def flags_of(found: KeyLists | Tensor, keys: int) -> Tensor:
    return found if isinstance(found, Tensor) else to_flags(found, keys)


def both_forms(function):  # type: ignore[no-untyped-def]
    """What compiled loops give and what torch gives."""
    found = []
    for numba in (True, False):
        lists.HAS_NUMBA = numba
        try:
            found.append(function())
        finally:
            lists.HAS_NUMBA = True
    return found


def best_by_hand(scores: Tensor, free: Tensor, sizes: Tensor) -> Tensor:
    """The highest free keys first, of equals the most recent: flags (B, h, Q, N)."""
    keys = scores.shape[-1]
    bottom = lowest(scores.dtype)
    held = scores.masked_fill(~free, bottom).flip(-1)
    order = held.sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.arange(keys) < sizes.unsqueeze(-1)
    flags = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order, wanted.expand(order.shape)).flip(-1)
    return flags & free & (scores != bottom)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 60),
    rows=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    values=st.sampled_from([1, 2, 5, 1000]),
    taken=st.sampled_from(["none", "ends", "scattered", "all"]),
    held=st.sampled_from([1, 2, 4]),
    size=st.integers(0, 70),
    whole=st.booleans(),
)
def test_choose(
    seed: int, keys: int, rows: int, heads: int, values: int, taken: str, held: int, size: int, whole: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (2, heads, rows, keys), generator=generator).float()
    lengths = torch.randint(0, keys + 1, (2, rows), generator=generator)
    allowed = torch.arange(keys) < lengths.unsqueeze(-1)
    scores = scores.masked_fill(~allowed.unsqueeze(1), NEVER)
    if whole:  # ranks: distinct integers
        rank = torch.rand(scores.shape, generator=generator).argsort(-1)
        scores = rank.masked_fill(~allowed.unsqueeze(1), lowest(torch.int64))
    chosen = torch.zeros((2, held, rows, keys), dtype=torch.bool)
    if taken == "ends":
        chosen[..., : keys // 4] = chosen[..., keys - keys // 4 :] = True
    elif taken == "scattered":
        chosen = torch.rand(chosen.shape, generator=generator) < 0.4
    elif taken == "all":
        chosen |= True
    mask = Mask.from_dense(chosen, 4, 2)
    each = torch.randint(0, size + 1, (2, 4, rows), generator=generator)
    for sizes, wide in ((torch.tensor([size, size // 2]).view(2, 1, 1), max(heads, held)), (each, 4)):
        wanted = sizes.expand(2, wide, rows)
        expected = best_by_hand(lists.expand_heads(scores, wide), ~lists.expand_heads(chosen, wide), wanted)
        ordered = order_of(scores, lengths)
        extended = extend(ordered, mask, sizes)
        assert torch.equal(to_flags(extended, keys), expected | lists.expand_heads(chosen, wide))
        for found in (
            *both_forms(lambda sizes=sizes: choose(scores, mask, sizes)),
            without_first(extended, mask.counts()),
            walk_anywhere(ordered, mask, sizes),
        ):
            assert torch.equal(to_flags(found, keys), expected)
            assert torch.equal(found.counts.long(), expected.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_of_any_magnitude(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    scores = torch.tensor([-largest, -1e-30, 3.0, 1e-30, largest, 3.0, -5.0, NEVER], dtype=dtype).view(1, 1, 1, -1)
    empty = Mask.empty((1, 1, 1, 8), torch.device("cpu"), 1)
    for size in range(9):
        found = choose(scores, empty, torch.tensor(size).view(1, 1, 1))
        assert found.indices[0, 0, 0, : found.counts[0, 0, 0]].tolist() == sorted([4, 5, 2, 3, 1, 6, 0][:size])


@pytest.mark.parametrize("size", [0, 1, 30, 400, 799, 800, 900])
def test_choose_from_what_every_16th_score_says(size: int) -> None:
    """The loops guess a threshold from every 16th score, which may be far too high, far too low, or that of all keys."""
    place, chance = torch.arange(800), torch.Generator().manual_seed(0)
    rows = [
        (place % 16 == 0) * 9.0 + torch.randn(800, generator=chance),
        (place % 16 == 0) * -9.0 + torch.randn(800, generator=chance),
        torch.zeros(800),
        place.float(),
        torch.randint(0, 3, (800,), generator=chance).float(),
        torch.randn(800, generator=chance).masked_fill(place % 16 == 0, NEVER),
        torch.full((800,), NEVER),
    ]
    scores = torch.stack(rows).view(1, 1, len(rows), 800)
    free = torch.ones(1, 1, len(rows), 800, dtype=torch.bool)
    free[..., :40] = False
    sizes = torch.full((1, 1, len(rows)), size)
    found = choose(scores, Mask.from_dense(~free), sizes)
    assert torch.equal(flags_of(found, 800), best_by_hand(scores, free, sizes))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 50),
    share=st.sampled_from([0.0, 0.2, 0.7, 0.95]),
    values=st.sampled_from([1, 3, 50]),
    far=st.booleans(),
)
def test_choose_mass(seed: int, keys: int, share: float, values: int, far: bool) -> None:
    """far: the taken keys outweigh all others by more than a float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (1, 4, 3, keys), generator=generator).float() / 3
    taken = torch.rand((1, 2, 3, keys), generator=generator) < 0.3
    if far:
        scores = scores + 200.0 * lists.expand_heads(taken, 4)
    lengths = torch.full((1, 3), keys)
    mask, order = Mask.from_dense(taken, 4, 2), order_of(scores, lengths)
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    masks = [Mask.from_dense(own, 4, 2) for own in taken.split(1, 2)]
    orders = [Order(order.indices[:, :, row : row + 1], order.lengths[:, row : row + 1]) for row in range(3)]
    rows = zip(scores.split(1, 2), orders, masks, strict=True)
    row_by_row = [flags_of(choose_mass(own, falling, closed, share), keys) for own, falling, closed in rows]
    forms = [flags_of(choose_mass(scores, order, mask, share), keys), torch.cat(row_by_row, 2)]
    for known in (None, terms):
        extended = extend(order, mask, count_mass(scores, known, order, mask, share))
        forms.append(to_flags(without_first(extended, mask.counts()), keys))
    free = ~lists.expand_heads(taken, 4)
    for chosen in forms:
        assert not (chosen & ~free).any()
        mass = (scores.double() - (scores.masked_fill(~free, NEVER)).amax(-1, keepdim=True).clamp(min=-1e9)).exp() * free
        whole, part = mass.sum(-1), (mass * chosen).sum(-1)
        lowest_score = scores.masked_fill(~chosen, float("inf")).amin(-1, keepdim=True)
        without = (mass * (chosen & (scores > lowest_score))).sum(-1)
        some = free.any(-1)
        assert bool((chosen.any(-1) == some).all())
        assert bool((part >= share * whole * (1 - 1e-6))[some].all())  # enough
        assert bool((without <= share * whole * (1 + 1e-6))[some].all())  # and no more than needed, ties apart
        assert not ((scores > lowest_score) & free & ~chosen).any()


def test_expand_pages(engine: str) -> None:
    pages = torch.tensor([[[[0, 2, -1]]], [[[1, -1, -1]]]], dtype=torch.int32).expand(2, 2, 1, 3).contiguous()
    counts = torch.tensor([[[2]], [[1]]], dtype=torch.int32).expand(2, 2, 1).contiguous()
    allowed = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    allowed[0, ..., 1] = False
    found = expand_pages(KeyLists(pages, counts), [0, 3], 4, allowed)
    flags = to_flags(found, 11)
    assert flags[0, 0, 0].nonzero().flatten().tolist() == [0, 2, 3, 8, 9, 10]
    assert flags[1, 1, 0].nonzero().flatten().tolist() == [7, 8, 9, 10]
    assert found.counts[:, 0, 0].tolist() == [6, 4]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 30),
    heads=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    uncertain=st.tuples(st.booleans(), st.booleans()),
)
def test_union_and_counts(seed: int, keys: int, heads: tuple[int, int], uncertain: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random_mask(held: int, weighted: bool) -> Mask:
        p = torch.rand((2, held, 3, keys), generator=generator)
        p = p * (torch.rand(p.shape, generator=generator) < 0.4)
        return Mask.from_dense(p if weighted else p > 0, 4, 2)

    masks = [random_mask(*one) for one in zip(heads, uncertain, strict=True)]
    p, q = (mask.inclusion_probability() for mask in masks)

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        first, second = (Mask.from_indices(*_spread(mask), kv_heads=2) for mask in masks)
        union = first.union(second)
        return union.inclusion_probability(), union.counts(), union.group_counts()

    for union, counts, grouped in both_forms(joined):
        torch.testing.assert_close(union, p + q - p * q)
        assert torch.equal(lists.expand_heads(counts, 4).long(), (union > 0).sum(-1))
        by_group = (union > 0).view(2, 2, 2, 3, keys).any(2).sum(-1)
        assert torch.equal(lists.expand_heads(grouped, 2).long(), by_group)


def _spread(mask: Mask) -> tuple[Tensor, tuple[int, int, int, int], Tensor | None]:
    """Indices with padding in front, shape, probability: what a user may give."""
    found = mask.lists()
    return found.indices.flip(-1), mask.shape, None if found.probability is None else found.probability.flip(-1)
