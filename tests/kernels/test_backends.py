"""All backends give what the reference gives, and the reference what the formula says. (Triton: test_triton.py.)"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, Case, answer, exactly, make_call
from torch import Tensor

from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import Known, attend, dot, dot_all, log_mass
from sparse_attention_hub.kernels.reference import group_scores

BACKENDS = ("cpu", "torch")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_calls() -> list[Case]:
    """Query groups x widths x rows x dtypes, weights and forms in turn; rows are ragged and some are empty."""
    turns = itertools.cycle(itertools.product(("own", "group", "dense", "all"), (True, False), ("cache", "plain")))
    calls = []
    for group, dim, rows in itertools.product((1, 4, 8), (64, 80, 96, 128, 256), (1, 7, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            form, weighted, layout = next(turns)
            name = f"{group} {dim} {rows} {dtype} {form} {weighted} {layout}"
            kind = {"form": form, "weighted": weighted, "layout": layout, "dtype": dtype}
            calls.append(Case(name, heads=8, kv_heads=8 // group, rows=rows, keys=90, dim=dim, **kind))
        next(turns)  # so that a dtype does not always meet the same forms
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*CASES, *random_calls()], ids=lambda case: case.name)
def test_equals_reference(backend: str, case: Case) -> None:
    call = make_call(case)
    expected = exactly(call)
    output, lse = answer(call, backend)
    assert output.dtype == lse.dtype == torch.float32
    tolerance = TOLERANCE.get(case.dtype, 1e-5)
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    empty = call.mask.inclusion_probability().amax(-1) == 0
    assert empty.any() and not output.transpose(1, 2)[empty].any()


def tensors(rows: int, kv_heads: int, n: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10 + kv_heads)
    queries = torch.randn(2, 8, rows, 16, generator=generator).to(dtype)
    keys = torch.randn(2, kv_heads, n, 16, generator=generator).to(dtype)
    return queries, keys, torch.randn(2, kv_heads, n, 24, generator=generator).to(dtype)


def make_mask(rows: int, kv_heads: int, held: int, share: float = 0.2, n: int = 50) -> Mask:
    generator = torch.Generator().manual_seed(held)
    p = torch.rand(2, held, rows, n, generator=generator).clamp(min=0.05)
    return Mask.from_dense(p * (torch.rand(p.shape, generator=generator) < share), 8, kv_heads=kv_heads)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("held", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_known_scores_spare_the_keys(backend: str, held: int, rows: int, softcap: float | None) -> None:
    queries, keys, values = tensors(rows, 2)
    mask, sinks = make_mask(rows, 2, held), torch.linspace(-1, 1, 8)
    expected = attend(queries, keys, values, mask, 0.3, "reference", softcap=softcap, sinks=sinks)
    scores = group_scores(queries, keys, 0.3, softcap)
    mass = attend(queries, keys, values, mask, 0.3, "reference", softcap=softcap)[1]
    top = scores.amax(-1)
    keys.fill_(float("nan"))
    for known in (Known(scores), Known(scores, (scores - top.unsqueeze(-1)).exp(), top)):
        found = attend(queries, keys, values, mask, 0.3, backend, sinks=sinks, known=known)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_mass(queries, keys, mask, 0.3, known), mass)


@pytest.mark.parametrize("rows", [1, 5])
def test_shared_exponentials_that_underflow_are_made_again(rows: int) -> None:
    """A key that nothing attends to outweighs all others by more than a float32 holds."""
    queries, keys, values = tensors(rows, 2)
    chosen = torch.rand(2, 8, rows, 50, generator=torch.Generator().manual_seed(3)) < 0.3
    chosen[..., 7] = False
    scores = group_scores(queries, keys, 0.3)
    scores[..., 7] += 200.0
    top = scores.amax(-1)
    known = Known(scores, (scores - top.unsqueeze(-1)).exp(), top)
    mask = Mask.from_dense(chosen, kv_heads=2)
    expected = attend(queries, keys, values, mask, 0.3, "reference", known=Known(scores))
    for one, other in zip(attend(queries, keys, values, mask, 0.3, "cpu", known=known), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("held", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_logits_of_listed_keys(held: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = tensors(rows, 2)
    mask = make_mask(rows, 2, held)
    loops, total = dot(queries, keys, mask, 0.3, 0.7), log_mass(queries, keys, mask, 0.3)
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_BACKEND", "torch")
    torch.testing.assert_close(loops, dot(queries, keys, mask, 0.3, 0.7))
    torch.testing.assert_close(total, log_mass(queries, keys, mask, 0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "n"), [(1, 0), (2, 1), (8, 3), (2, 4), (4, 9), (2, 4100)])  # the last with two threads
def test_logits_of_all_keys(kv_heads: int, n: int, dtype: torch.dtype) -> None:
    """Of one row by a loop, keys in place in a longer buffer; of several by matrix products."""
    queries, keys, _ = tensors(1, kv_heads, n + 5, dtype)
    exact = group_scores(queries.double(), keys[:, :, 2 : n + 2].double(), 0.3)
    found = dot_all(queries, keys[:, :, 2 : n + 2], 0.3)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    several = dot_all(queries.expand(-1, -1, 3, -1), keys[:, :, 2 : n + 2], 0.3)
    torch.testing.assert_close(several.double(), exact.expand(-1, -1, 3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("share", [0.05, 0.5])  # by lists, and by matrix products
def test_threads_change_nothing(threads: int, share: float) -> None:
    queries, keys, values = (tensor.repeat_interleave(300, 2) for tensor in tensors(1, 2))
    mask = make_mask(300, 2, 8, share, 15000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend(queries, keys, values, mask, 0.3, "cpu")
        first = attend(queries[:, :, :1], keys, values, _first_row(mask), 0.3, "cpu")[0]
        torch.testing.assert_close(found[0][:, :1], first)
    finally:
        torch.set_num_threads(before)


def _first_row(mask: Mask) -> Mask:
    lists = mask.lists()
    return Mask.from_indices(lists.indices[:, :, :1], (2, 8, 1, mask.shape[3]), lists.probability[:, :, :1], 2)


def test_reference_is_the_formula() -> None:
    queries, keys, values = (tensor.double() for tensor in tensors(3, 2))
    mask, sinks = make_mask(3, 2, 8, 0.5), torch.linspace(-1, 1, 8).double()
    output, lse = attend(queries, keys, values, mask, 0.3, "reference", softcap=0.9, sinks=sinks)
    p = mask.inclusion_probability().double()
    for head in range(8):
        logits = 0.9 * torch.tanh(0.3 * queries[:, head] @ keys[:, head // 4].transpose(-1, -2) / 0.9)
        weights = torch.where(p[:, head] > 0, logits.exp() / p[:, head], 0.0)
        total = weights.sum(-1, keepdim=True) + sinks[head].exp()
        torch.testing.assert_close(output[:, :, head], weights @ values[:, head // 4] / total)
        torch.testing.assert_close(lse[:, head], total.squeeze(-1).log())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_without_keys(backend: str, rows: int) -> None:
    queries, keys, values = tensors(rows, 2)
    for mask in (Mask.empty((2, 8, rows, 50), kv_heads=2), Mask.from_dense(torch.zeros(2, 8, rows, 50, dtype=torch.bool))):
        output, lse = attend(queries, keys, values, mask, 0.3, backend)
        assert output.shape == (2, rows, 8, 24) and not output.any()
        assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_huge_key_left_out_does_not_underflow_the_rest(backend: str) -> None:
    queries, keys, values = tensors(1, 2)
    keys[:, :, 7] *= 1e4
    dense = torch.ones(2, 8, 1, 50, dtype=torch.bool)
    dense[..., 7] = False
    output, _ = attend(queries, keys, values, Mask.from_dense(dense, kv_heads=2), 0.3, backend)
    assert output.isfinite().all() and bool(output.any())


@pytest.mark.parametrize("value", [6e-8, 1e-6, -3e-5, 0.0, -1.5, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_are_read_exactly(value: float, dtype: torch.dtype) -> None:
    values = torch.full((1, 1, 1, 8), value).to(dtype)
    mask = Mask.from_range(0, 1, (1, 1, 1, 1))
    output, _ = attend(torch.zeros(1, 1, 1, 8, dtype=dtype), torch.zeros_like(values), values, mask, 1.0, "cpu")
    assert torch.equal(output, values.float())


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    args, mask = tensors(1, 2), make_mask(1, 2, 8)
    known = "auto, reference, cpu, torch, triton"
    with pytest.raises(ValueError, match=f"attention backend must be one of {known}, got 'fast'"):
        attend(*args, mask, 0.3, "fast")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs tensors on a GPU"):
        attend(*args, mask, 0.3, "triton")
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_BACKEND", "reference")
    torch.testing.assert_close(attend(*args, mask, 0.3)[0], attend(*args, mask, 0.3, "cpu")[0], atol=1e-5, rtol=1e-4)
