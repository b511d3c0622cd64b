"""The gather kernel gives what the reference gives, and the reference what the formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import attend, attend_output
from sparse_attention_hub.kernels.gather import gather_rows


def tensors(rows: int, kv_heads: int, n: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10 + kv_heads)
    queries = torch.randn(2, 8, rows, 16, generator=generator).to(dtype)
    keys = torch.randn(2, kv_heads, n, 16, generator=generator).to(dtype)
    return queries, keys, torch.randn(2, kv_heads, n, 24, generator=generator).to(dtype)


def make_mask(rows: int, kv_heads: int, held: int, certain: bool, form: str, share: float = 0.2, n: int = 50) -> Mask:
    generator = torch.Generator().manual_seed(held)
    p = torch.rand(2, held, rows, n, generator=generator).clamp(min=0.05)
    p = p * (torch.rand(p.shape, generator=generator) < share)
    if certain:
        p = (p > 0).float()
    dense = Mask.from_dense(p.bool() if certain else p, 8, kv_heads=kv_heads)
    if form == "dense":
        return dense
    indices, probability = dense.rows()
    return Mask.from_indices(indices.flip(-1), dense.shape, None if certain else probability.flip(-1), kv_heads)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("held", ["one", "group", "each"])
@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("form", ["lists", "dense"])
@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_gather_is_the_reference(rows: int, kv_heads: int, held: str, certain: bool, form: str, share: float) -> None:
    mask = make_mask(rows, kv_heads, {"one": 1, "group": kv_heads, "each": 8}[held], certain, form, share)
    args = tensors(rows, kv_heads)
    expected = attend(*args, mask, 0.3, "reference")
    for ours, theirs in zip(attend(*args, mask, 0.3, "gather"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attend_output(*args, mask, 0.3, "gather"), expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("held", [1, 2, 8])
@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_known_scores_spare_the_keys(held: int, share: float) -> None:
    queries, keys, values = tensors(1, 2)
    mask = make_mask(1, 2, held, False, "lists", share)
    expected = attend(queries, keys, values, mask, 0.3, "gather")
    scores = (queries * 0.3) @ keys.repeat_interleave(4, 1).mT
    call = (queries, keys.fill_(float("nan")), values, mask, 0.3, "gather", scores)
    found = attend(*call)
    torch.testing.assert_close(attend_output(*call), expected[0], atol=1e-5, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_reference_is_the_formula() -> None:
    queries, keys, values = (tensor.double() for tensor in tensors(3, 2))
    mask = make_mask(3, 2, 8, False, "dense", 0.5)
    output, lse = attend(queries, keys, values, mask, 0.3, "reference")
    p = mask.inclusion_probability().double()
    for head in range(8):
        logits = 0.3 * queries[:, head] @ keys[:, head // 4].transpose(-1, -2)
        weights = torch.where(p[:, head] > 0, logits.exp() / p[:, head], 0.0)
        expected = weights @ values[:, head // 4] / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(output[:, :, head], expected)
        torch.testing.assert_close(lse[:, head], weights.sum(-1).log())


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_without_keys(backend: str, rows: int) -> None:
    queries, keys, values = tensors(rows, 2)
    for mask in (Mask.empty((2, 8, rows, 50), kv_heads=2), Mask.from_dense(torch.zeros(2, 8, rows, 50, dtype=torch.bool))):
        output, lse = attend(queries, keys, values, mask, 0.3, backend)
        assert output.shape == (2, rows, 8, 24) and not output.any()
        assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_a_huge_key_left_out_does_not_underflow_the_rest(backend: str) -> None:
    queries, keys, values = tensors(1, 2)
    keys[:, :, 7] *= 1e4
    dense = torch.ones(2, 8, 1, 50, dtype=torch.bool)
    dense[..., 7] = False
    output, _ = attend(queries, keys, values, Mask.from_dense(dense, kv_heads=2), 0.3, backend)
    assert output.isfinite().all() and bool(output.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype, rows: int) -> None:
    args = tensors(rows, 2, dtype=dtype)
    mask = make_mask(rows, 2, 8, False, "lists")
    output, lse = attend(*args, mask, 0.3, "gather")
    assert output.dtype == dtype and lse.dtype == torch.float32
    expected, _ = attend(*(tensor.float() for tensor in args), mask, 0.3, "reference")
    torch.testing.assert_close(output, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", [2, 8])
def test_low_precision_without_log_sum_exp(dtype: torch.dtype, held: int) -> None:
    args = tensors(1, 2, dtype=dtype)
    mask = make_mask(1, 2, held, False, "lists", 1.0)
    expected, _ = attend(*(tensor.float() for tensor in args), mask, 0.3, "reference")
    torch.testing.assert_close(attend_output(*args, mask, 0.3, "gather"), expected.to(dtype))


def test_rows_are_gathered_from_the_front_of_a_longer_buffer() -> None:
    buffer = torch.randn(3, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    indices = torch.randint(0, 25, (3, 6, 9), generator=torch.Generator().manual_seed(1))
    expected = buffer.repeat_interleave(3, 1).gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, 8))
    for view in (buffer[:, :, :25], buffer[:, :, :25].contiguous(), buffer.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(gather_rows(view, indices), expected)
    assert torch.equal(gather_rows(buffer[1:, :, 5:], indices[1:]), gather_rows(buffer[1:], indices[1:] + 5))


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    args, mask = tensors(1, 2), make_mask(1, 2, 8, True, "lists")
    with pytest.raises(ValueError, match="attention backend must be one of auto, reference, gather, triton, got 'fast'"):
        attend(*args, mask, 0.3, "fast")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs tensors on a GPU"):
        attend(*args, mask, 0.3, "triton")
    monkeypatch.setenv("SPARSE_ATTENTION_HUB_BACKEND", "reference")
    torch.testing.assert_close(attend(*args, mask, 0.3)[0], attend(*args, mask, 0.3, "gather")[0], atol=1e-5, rtol=1e-4)
