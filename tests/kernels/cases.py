"""Calls of `attend` that every backend must answer alike: random tensors and masks, made from a name alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import attend
from sparse_attention_hub.kernels.reference import Call
from sparse_attention_hub.lists import KeyLists

if TYPE_CHECKING:
    from sparse_attention_hub.kernels.triton import ForkLists


@dataclass(frozen=True)
class Case:
    """form: how the mask is held: "dense", or as lists for each head ("own"), each kv head ("group") or all ("all").

    layout: how keys and values lie in memory: "plain", "cache" (the front of a longer buffer), "offset" (the middle of one, of
    the last of its heads and items), "transposed" (N before heads) or "spread" (every other number of a longer row).
    splits: into how many parts the Triton kernels cut lists. expanded: items and rows share their lists, with strides of 0.
    """

    name: str
    form: str = "dense"
    weighted: bool = False
    heads: int = 4
    kv_heads: int = 2
    rows: int = 1
    keys: int = 110
    dim: int = 32
    batch: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    share: float = 0.4
    softcap: float | None = None
    sinks: bool = False
    splits: int = 2
    expanded: bool = False


HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    Case("decode", form="own"),
    Case("decode weighted", form="own", weighted=True, dim=64),
    Case("decode dense mask", weighted=True, layout="cache"),
    Case("decode group lists", form="group", heads=8, layout="cache"),
    Case("decode group lists weighted", form="group", heads=8, weighted=True, dtype=HALF),
    Case("decode one list", form="all", weighted=True, layout="transposed"),
    Case("decode without groups", form="own", heads=2, dtype=HALF, layout="spread"),
    Case("decode groups of 8", form="own", heads=8, kv_heads=1, weighted=True, dtype=BRAIN, layout="cache"),
    Case("decode 80 dimensions", form="own", dim=80, dtype=BRAIN),
    Case("decode 96 dimensions", form="group", dim=96, weighted=True, dtype=HALF, layout="cache"),
    Case("3 queries", form="own", rows=3, layout="cache"),
    Case("3 queries weighted", form="own", rows=3, weighted=True, dtype=BRAIN, layout="transposed"),
    Case("3 queries without groups", rows=3, heads=2, weighted=True, dim=80, dtype=HALF),
    Case("3 queries group lists", form="group", rows=3, heads=8, weighted=True, batch=1),
    Case("17 queries", rows=17, batch=1, layout="cache"),
    Case("17 queries one list", form="all", rows=17, batch=1, weighted=True, dtype=HALF),
    Case("17 queries groups of 8", form="own", rows=17, batch=1, heads=8, kv_heads=1, weighted=True, share=0.1),
    Case("17 queries bfloat16", rows=17, batch=1, weighted=True, dtype=BRAIN, layout="spread"),
    Case("17 queries of 256 dimensions", rows=17, batch=1, dim=256, keys=70, share=0.05),
    Case("decode Llama's shape", form="own", heads=8, dim=128, dtype=BRAIN, layout="cache"),
    Case(
        "decode Llama's shape, one list per group", form="group", heads=8, dim=128, weighted=True, dtype=BRAIN, layout="cache"
    ),
    Case("5 queries of Llama's shape", form="own", rows=5, heads=8, dim=128, weighted=True, dtype=BRAIN, layout="cache"),
    Case("decode 256 dimensions", form="own", dim=256, keys=70, weighted=True, dtype=HALF),
    Case("decode more than 4096 keys", form="own", heads=2, kv_heads=1, keys=4500, batch=1, share=0.15, layout="cache"),
    Case("decode more than 4096 keys of a group", form="group", keys=4500, batch=1, share=0.1, dtype=HALF, splits=3),
    Case("decode in 20 splits", form="own", heads=2, kv_heads=1, keys=700, share=0.49, weighted=True, sinks=True, splits=20),
    Case("3 queries in 20 splits", form="group", rows=3, keys=1300, batch=1, share=0.4, dtype=HALF, splits=20),
    Case("decode the middle of a buffer", form="own", weighted=True, layout="offset"),
    Case("3 queries on the middle of a buffer", rows=3, layout="offset", dtype=HALF),
    Case("decode with lists that items share", form="group", heads=8, weighted=True, expanded=True),
    Case("3 queries that share their lists", form="own", rows=3, weighted=True, expanded=True, dtype=HALF),
    Case("one key", form="own", rows=3, keys=3, share=0.6),
    Case("decode softcap and sinks", form="own", weighted=True, softcap=2.0, sinks=True),
    Case("decode group lists sinks", form="group", heads=8, sinks=True, dtype=HALF),
    Case("5 queries softcap and sinks", form="own", rows=5, softcap=1.5, sinks=True, dtype=BRAIN),
    Case("nothing, sinks", form="own", share=0.0, sinks=True),
    Case("nothing", form="own", share=0.0),
    Case("nothing, 3 queries", form="group", rows=3, share=0.0),
]


def make_call(case: Case, device: str = "cpu") -> Call:
    """Ragged rows, some of them without keys, -1 anywhere in lists; probabilities from 0.02 to 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(device)

    batch, rows, keys, dim = case.batch, case.rows, case.keys, case.dim
    held = {"group": case.kv_heads, "all": 1}.get(case.form, case.heads)
    shape = (batch, case.heads, rows, keys)
    # Each row has a share of its own; the last row of the first head has no key at all.
    chosen = uniform(batch, held, rows, keys) < case.share * 2 * uniform(batch, held, rows, 1)
    chosen[:, 0, -1] = False
    if case.expanded:
        chosen = chosen[:1, :, -1:].expand(batch, held, rows, keys)
    probability = 0.02 + 0.98 * uniform(batch, held, rows, keys)
    probability[uniform(batch, held, rows, keys) < 0.3] = 1.0
    if case.form == "dense":
        mask = Mask.from_dense((probability * chosen if case.weighted else chosen).to(device), kv_heads=case.kv_heads)
    else:
        order = uniform(batch, held, rows, keys).argsort(-1)
        if case.expanded:
            order = order[:1, :, :1].expand(chosen.shape)
            probability = probability[:1, :, :1].expand(chosen.shape)
        lists = order.masked_fill(~chosen.gather(-1, order), -1)
        weights = probability.gather(-1, order).to(device) if case.weighted else None
        mask = Mask.from_indices(lists.to(device), shape, weights, kv_heads=case.kv_heads)
        if case.expanded:
            mask = _expanded(mask)
    tensors = [_lay_out(normal(batch, case.kv_heads, keys, dim), case.layout) for _ in range(2)]
    sinks = 2 * uniform(case.heads).to(device) if case.sinks else None
    queries = normal(batch, case.heads, rows, dim) * 2
    return Call(queries, tensors[0], tensors[1], mask, dim**-0.5, case.softcap, sinks)


class Forks(NamedTuple):
    """Rows whose first keys are the same: what `attend_forks` is given, and each row's own call."""

    queries: Tensor
    shared: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    lists: ForkLists
    calls: list[Call]


def make_forks(weighted: bool, softcap: float | None, sinks: bool, dtype: torch.dtype, device: str = "cpu") -> Forks:
    """Three of five forks, 150 keys shared and 7 of each, lists of 40, 100 and 157 slots with -1 anywhere, one of them empty."""
    from sparse_attention_hub.kernels.triton import ForkLists

    generator = torch.Generator().manual_seed(7)
    heads, kv_heads, dim, common, own_keys, rows, widths = 4, 2, 32, 150, 7, [1, 3, 4], [40, 100, 157]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    queries = normal(5, heads, 1, dim) * 2
    shared = [normal(1, kv_heads, common + 9, dim)[:, :, :common] for _ in range(2)]
    own = [normal(5, kv_heads, own_keys + 4, dim) for _ in range(2)]
    order = torch.rand(3, heads, common + own_keys, generator=generator).argsort(-1)
    order[torch.rand(order.shape, generator=generator) < 0.4] = -1
    order[1, 2] = -1
    lists = torch.cat([order[row, :, :width] for row, width in enumerate(widths)], -1).to(device)
    probability = 0.02 + 0.98 * torch.rand(lists.shape, generator=generator).to(device)
    firsts = [sum(widths[:row]) for row in range(3)]
    table = torch.tensor([rows, firsts, widths, [0] * 3]).T.contiguous().to(device)
    grouped = [part.view(kv_heads, -1, sum(widths)) for part in (lists.int(), probability)]
    sink = 2 * torch.rand(heads, generator=generator).to(device) if sinks else None
    calls = []
    for row, first, width in zip(rows, firsts, widths, strict=True):
        keys, values = (torch.cat([a, b[row : row + 1, :, :own_keys]], 2) for a, b in zip(shared, own, strict=True))
        part, shape = slice(first, first + width), (1, heads, 1, common + own_keys)
        weights = probability[None, :, None, part] if weighted else None
        mask = Mask.from_indices(lists[None, :, None, part], shape, weights, kv_heads=kv_heads)
        calls.append(Call(queries[row : row + 1], keys, values, mask, 0.2, softcap, sink))
    held = ForkLists(grouped[0], grouped[1] if weighted else None, table, max(widths))
    return Forks(queries, (shared[0], shared[1]), (own[0], own[1]), held, calls)


#: Arguments of `keyed_uniforms`.
UNIFORMS = (5, -7), (3,), 3, torch.tensor([[3, -1, 900], [0, 1, 2]]), torch.arange(-1, 2500).repeat(2, 1)
#: Arguments of `make_forks`.
FORKS = [(False, None, False, torch.float32), (True, 2.0, True, torch.float32), (True, None, False, BRAIN)]


def answer(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """What `attend` makes of the call."""
    assert call.values is not None
    options = {"softcap": call.softcap, "sinks": call.sinks}
    return attend(call.queries, call.keys, call.values, call.mask, call.scaling, backend, **options)


def exactly(call: Call) -> tuple[Tensor, Tensor]:
    """What the reference makes of the call in float64; NaN in values, where nothing attends to them, count as 0."""
    assert call.values is not None
    doubles = {"queries": call.queries.double(), "keys": call.keys.double(), "values": call.values.nan_to_num().double()}
    return answer(call._replace(**doubles), "reference")


def _expanded(mask: Mask) -> Mask:
    """The same mask, its lists with strides of 0 for items and rows."""
    found = mask.lists()
    wide = found.indices.shape
    parts = [None if part is None else part[:1, :, :1].expand(wide[: part.dim()]) for part in found]
    return Mask(mask.shape, mask.kv_heads, lists=KeyLists(*parts))


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers; what lies between them is NaN, which shows if a kernel reads it."""
    batch, heads, keys, dim = tensor.shape
    if layout == "cache":
        view = tensor.new_full((batch, heads, keys + 37, dim), float("nan"))[:, :, :keys]
    elif layout == "offset":
        view = tensor.new_full((batch + 1, heads + 1, keys + 50, dim), float("nan"))[1:, 1:, 13 : 13 + keys]
    elif layout == "transposed":
        view = tensor.new_full((batch, keys, heads, dim), float("nan")).transpose(1, 2)
    elif layout == "spread":
        view = tensor.new_full((batch, heads, keys, 2 * dim), float("nan"))[..., ::2]
    else:
        return tensor
    return view.copy_(tensor)
