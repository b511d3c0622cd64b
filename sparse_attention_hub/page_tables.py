"""Page tables: a choice of whole pages as engines read it, in FlashInfer's layout and as FlexAttention's BlockMask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError, quoted
from .lists import expand_heads
from .mask import Mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_TENSORS = ("indptr", "indices", "last_page_len")
_NUMBERS = ("page_size", "kv_heads", "keys")


class PageTables(NamedTuple):
    """The pages that one layer reads in some decode steps (rows), the last rows of a text.

    A sequence is one row of one kv head, number row * kv_heads + head. indices int32: its pages, ascending, are
    indices[indptr[i] : indptr[i + 1]]; page p holds the keys from p * page_size on. indptr int32 (sequences + 1).
    last_page_len int32 (sequences): keys of a sequence's last page, 1 to page_size; its other pages are full. keys: of the text.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    page_size: int
    kv_heads: int
    keys: int

    @property
    def rows(self) -> int:
        return len(self.last_page_len) // self.kv_heads

    def flags(self) -> Tensor:
        """Which keys are read: bool (kv_heads, rows, keys)."""
        sequences = len(self.last_page_len)
        owner = torch.arange(sequences).repeat_interleave(self.indptr.diff())
        lengths = torch.full((len(self.indices),), self.page_size)
        lengths[self.indptr[1:].long() - 1] = self.last_page_len.long()
        place = torch.arange(self.page_size)
        keys = (self.indices.long() * self.page_size).unsqueeze(-1) + place
        read = place < lengths.unsqueeze(-1)
        flags = torch.zeros((sequences, self.keys), dtype=torch.bool)
        flags[owner.unsqueeze(-1).expand_as(keys)[read], keys[read]] = True
        return flags.view(-1, self.kv_heads, self.keys).transpose(0, 1)

    def mask(self, heads: int) -> Mask:
        """The same as a mask of `heads` query heads."""
        return Mask.from_dense(self.flags().unsqueeze(0), heads, self.kv_heads)

    def block_mask(self, heads: int) -> BlockMask:
        """The same for `flex_attention(..., enable_gqa=True)`, in blocks of one row and one page."""
        from torch.nn.attention.flex_attention import BlockMask

        flags = self.flags().repeat_interleave(heads // self.kv_heads, 0)
        pages = _pages(flags, self.page_size)
        order = (~pages).to(torch.uint8).argsort(dim=-1, stable=True).int()
        counts = pages.sum(-1, dtype=torch.int32)

        def mask_mod(item: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return flags[head, row, key]

        size, lengths = (1, self.page_size), (self.rows, self.keys)
        return BlockMask.from_kv_blocks(counts[None], order[None], BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=lengths)


def page_tables(mask: Mask, page_size: int) -> PageTables:
    """The page tables of a mask of one item whose rows are the last ones of its text.

    UserError unless each row attends to whole pages, as far as it may see them, that the query heads of a group share.
    """
    batch, heads, rows, keys = mask.shape
    if batch != 1:
        raise UserError(f"page tables are of one item, the mask has {batch}: make one of each")
    flags = expand_heads(mask.chosen(), heads)[0].view(mask.kv_heads, -1, rows, keys)
    chosen = flags[:, 0].transpose(0, 1).reshape(-1, keys)
    pages = _pages(chosen, page_size)
    seen = torch.arange(keys - rows + 1, keys + 1, device=chosen.device).repeat_interleave(mask.kv_heads)
    visible = torch.arange(keys, device=chosen.device) < seen.unsqueeze(-1)
    whole = pages.repeat_interleave(page_size, -1)[:, :keys] & visible
    if not (mask.is_certain and bool((flags == flags[:, :1]).all()) and torch.equal(whole, chosen)):
        raise UserError(
            f"the choice is not made of whole pages of {page_size} keys that the query heads of a kv head share: end the "
            f"configuration with RoundToPagesConfig({page_size})"
        )
    counts = pages.sum(-1)
    if bool((counts == 0).any()):
        raise UserError("a row attends to no key, which a page table cannot say")
    ends = counts.cumsum(0)
    indices = pages.nonzero()[:, 1]
    last = seen - indices[ends - 1] * page_size
    indptr, last = torch.nn.functional.pad(ends, (1, 0)), last.clamp(max=page_size)
    return PageTables(indptr.int().cpu(), indices.int().cpu(), last.int().cpu(), page_size, mask.kv_heads, keys)


def _pages(flags: Tensor, page_size: int) -> Tensor:
    """Flags of keys (..., N) as flags of the pages that hold one of them."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % page_size))
    return padded.view(*padded.shape[:-1], -1, page_size).any(-1)


def write_page_tables(path: Path, tables: dict[int, PageTables]) -> None:
    """One safetensors file: `layer_NNN.indptr`, `.indices`, `.last_page_len`; the numbers stand in its metadata."""
    first = next(iter(tables.values()))
    tensors = {f"layer_{layer:03d}.{name}": getattr(table, name) for layer, table in tables.items() for name in _TENSORS}
    save_file(tensors, path, {name: str(getattr(first, name)) for name in _NUMBERS})


def read_page_tables(path: str | Path) -> dict[int, PageTables]:
    """Layer -> its page tables. UserError for a file that `write_page_tables` did not write."""
    try:
        with safe_open(path, framework="pt") as stored:
            numbers = [int(stored.metadata()[name]) for name in _NUMBERS]
            layers = sorted({int(name.split(".")[0].removeprefix("layer_")) for name in stored.keys()})  # noqa: SIM118
            tensors = {layer: [stored.get_tensor(f"layer_{layer:03d}.{name}") for name in _TENSORS] for layer in layers}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: holds no page tables ({type(error).__name__}: {quoted(error)})") from None
    return {layer: PageTables(*found, *numbers) for layer, found in tensors.items()}
