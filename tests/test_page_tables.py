"""Page tables in FlashInfer's layout and FlexAttention's BlockMask give the output of the mask that they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    LocalMaskerConfig,
    Mask,
    OracleTopKConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    RoundToPagesConfig,
    SinkMaskerConfig,
    UserError,
)
from sparse_attention_hub.attention import AttentionResult
from sparse_attention_hub.kernels import attend
from sparse_attention_hub.page_tables import PageTables, page_tables, read_page_tables, write_page_tables

HEADS, KV_HEADS, KEYS, ROWS, DIM = 6, 2, 150, 5, 16
SCALING = DIM**-0.5
CHOICES = {
    "top_k": [SinkMaskerConfig(2), LocalMaskerConfig(3), OracleTopKConfig(9)],
    "quest": [QuestTopKMaskerConfig(40, 8)],  # no window: rows whose own page is not chosen
    "few": [OracleTopKConfig(1)],
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (1, HEADS, ROWS, DIM), (1, KV_HEADS, KEYS, DIM), (1, KV_HEADS, KEYS, DIM)
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return queries, keys, values


def rounded(choice: str, page: int, share: str = "kv_head", dense_layers: tuple[int, ...] = ()) -> AttentionResult:
    maskers = [*CHOICES[choice], RoundToPagesConfig(page, share)]
    return ResearchAttention(ResearchAttentionConfig(maskers, dense_layers=list(dense_layers)))(*tensors())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("share", ["kv_head", "layer"])
@pytest.mark.parametrize("page", [1, 8, 16, 64, 150, 200])
def test_tables_give_the_output_of_the_mask(choice: str, share: str, page: int) -> None:
    result = rounded(choice, page, share)
    tables = page_tables(result.mask, page)
    queries, keys, values = tensors()
    output, _ = attend(queries, keys, values, tables.mask(HEADS), SCALING)
    assert torch.allclose(output, result.output, atol=1e-5)
    assert torch.equal(tables.mask(HEADS).inclusion_probability(), result.mask.inclusion_probability())
    assert torch.allclose(paged_decode(tables, queries, keys, values), result.output, atol=1e-5)


def paged_decode(tables: PageTables, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A decode as FlashInfer's BatchDecodeWithPagedKVCacheWrapper reads its arguments: one request per sequence with one kv head,
    caches (pages, page_size, 1, D), `indices` into them; all pages of a request are full but its last."""
    group, size = HEADS // KV_HEADS, tables.page_size
    pages = -(-KEYS // size)

    def pool(tensor: Tensor) -> Tensor:  # a kv head's pages follow each other; what no key fills is NaN
        padded = torch.full((KV_HEADS, pages * size, DIM), float("nan"))
        padded[:, :KEYS] = tensor[0]
        return padded.view(KV_HEADS * pages, size, 1, DIM)

    key_pool, value_pool = pool(keys), pool(values)
    output = torch.empty(1, ROWS, HEADS, DIM)
    assert tables.indptr[0] == 0 and tables.indptr[-1] == len(tables.indices)
    assert {tensor.dtype for tensor in tables[:3]} == {torch.int32}
    assert tables.last_page_len.min() >= 1 and tables.last_page_len.max() <= size
    for sequence in range(ROWS * KV_HEADS):
        row, head = divmod(sequence, KV_HEADS)
        own = tables.indices[tables.indptr[sequence] : tables.indptr[sequence + 1]] + head * pages
        length = (len(own) - 1) * size + int(tables.last_page_len[sequence])
        k, v = (table[own].reshape(-1, DIM)[:length] for table in (key_pool, value_pool))
        for query in range(head * group, (head + 1) * group):
            output[0, row, query] = (k @ queries[0, query, row] * SCALING).softmax(0) @ v
    return output


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("page", [8, 64])
def test_the_block_mask_gives_the_output_of_the_mask(page: int) -> None:
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    result = rounded("top_k", page)
    block_mask = page_tables(result.mask, page).block_mask(HEADS)
    assert block_mask.shape == (1, HEADS, ROWS, KEYS)
    chosen = result.mask.inclusion_probability() > 0
    dense = create_mask(block_mask.mask_mod, 1, HEADS, ROWS, KEYS, device="cpu")
    assert torch.equal(dense, chosen)
    blocks = block_mask.to_dense()[0].bool()  # (H, rows, pages): those without a key are skipped
    padded = torch.nn.functional.pad(chosen[0], (0, -KEYS % page))
    assert torch.equal(blocks, padded.unflatten(-1, (-1, page)).any(-1))
    queries, keys, values = tensors()
    output = flex_attention(queries, keys, values, block_mask=block_mask, enable_gqa=True, scale=SCALING)
    assert torch.allclose(output.transpose(1, 2), result.output, atol=1e-5)


def test_a_dense_layer_has_all_pages() -> None:
    tables = page_tables(rounded("top_k", 16, dense_layers=(0,)).mask, 16)
    assert tables.indptr.diff().tolist() == [10] * ROWS * KV_HEADS  # 146 to 150 keys
    assert tables.last_page_len.tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize(
    "maskers",
    [
        CHOICES["top_k"],  # single keys
        [QuestTopKMaskerConfig(40, 8)],  # each query head has pages of its own
        [OracleTopKConfig(5), RoundToPagesConfig(8, "head")],
        [OracleTopKConfig(5), RoundToPagesConfig(4)],  # other pages
        [RandomSamplingMaskerConfig(0.2)],
    ],
)
def test_what_is_not_whole_shared_pages_is_refused(maskers: list[object]) -> None:
    result = ResearchAttention(ResearchAttentionConfig(maskers))(*tensors())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not made of whole pages of 8 keys"):
        page_tables(result.mask, 8)


def test_they_are_written_and_read(tmp_path: Path) -> None:
    tables = {layer: page_tables(rounded(choice, 16).mask, 16) for layer, choice in ((3, "top_k"), (11, "few"))}
    write_page_tables(tmp_path / "page_tables.safetensors", tables)
    found = read_page_tables(tmp_path / "page_tables.safetensors")
    assert list(found) == [3, 11]
    for layer, table in found.items():
        assert all(torch.equal(one, other) for one, other in zip(table[:3], tables[layer][:3], strict=True))
        assert table[3:] == tables[layer][3:]


@pytest.mark.parametrize("content", [None, b"", b"\x10" * 99])
def test_another_file_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "page_tables.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no page tables") as caught:
        read_page_tables(path)
    assert "\n" not in str(caught.value)


def test_batches_and_empty_rows_are_refused() -> None:
    with pytest.raises(UserError, match="page tables are of one item, the mask has 2"):
        page_tables(Mask.empty((2, 4, 1, 32), kv_heads=2), 8)
    with pytest.raises(UserError, match="a row attends to no key"):
        page_tables(Mask.empty((1, 4, 1, 32), kv_heads=2), 8)
