"""What maskers keep between decode steps: a fit on the context, and codes of every key so far."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class MaskerState:
    """One masker's memory of one layer.

    `fitted`: what `Masker.fit` made of the context's keys; frozen from then on.
    The buffer of codes grows by an eighth, so that most decode steps copy their own codes only. A code
    belongs to one key; a masker that codes whole pages sets `keys_per_code` and `offset` (keys before
    the first page) as it fits. Only complete pages have a code: rewinding into a page drops its code.
    """

    def __init__(self) -> None:
        self.fitted: Any = None
        self.fit_length = 0
        self.length = 0
        self.keys_per_code = 1
        self.offset = 0
        self._buffer: Tensor | None = None
        self._is_fork = False  # the buffer is another state's

    @property
    def is_fitted(self) -> bool:
        return self.fit_length > 0

    def check(self, total: int) -> None:
        """Raises ValueError if a call brings fewer keys than the state has seen."""
        if total < self.length:
            raise ValueError(f"the state holds {self.length} keys but the call brings {total}: call state.rewind({total})")

    def count(self, length: int) -> int:
        """Codes that the first `length` keys have."""
        return max(0, length - self.offset) // self.keys_per_code

    def codes(self) -> Tensor:
        """Codes of the first `length` keys, (B, Hkv, length, ...), or of their complete pages."""
        assert self._buffer is not None
        return self._buffer[:, :, : self.count(self.length)]

    def append(self, codes: Tensor, length: int | None = None) -> None:
        """Add the next codes, (B, Hkv, n, ...). length: keys seen now, default one more for each code."""
        held = self.count(self.length)
        needed = held + codes.shape[2]
        frozen = self._buffer is not None and self._buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self._buffer is None or frozen or self._is_fork or needed > self._buffer.shape[2]:
            grown = codes.new_empty((*codes.shape[:2], needed + max(64, held // 8), *codes.shape[3:]))
            if self._buffer is not None:
                grown[:, :, :held] = self.codes()
            self._buffer, self._is_fork = grown, False
        self._buffer[:, :, held:needed] = codes
        self.length = self.length + codes.shape[2] if length is None else length

    def rewind(self, length: int) -> None:
        """Forget keys past `length`. Below what was fitted on, the fit is forgotten too."""
        self.length = min(self.length, length)
        if length < self.fit_length:
            self.fitted, self.fit_length, self.length, self._buffer = None, 0, 0, None

    def fork(self, length: int) -> MaskerState:
        """An independent state of the first `length` keys; its codes are copied when it first appends."""
        forked = copy.copy(self)
        forked._is_fork = True
        forked.rewind(length)
        return forked

    def bytes(self) -> int:
        """Memory held by the codes, in bytes."""
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()


class AttentionState:
    """The memory of all maskers of one ResearchAttention, per layer and per masker instance."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], MaskerState] = {}

    def entry(self, layer_idx: int, position: int) -> MaskerState:
        """The memory of the masker at `position` of the pipeline in layer `layer_idx`."""
        return self._entries.setdefault((layer_idx, position), MaskerState())

    def adopt(self, layer_idx: int, position: int, entry: MaskerState) -> None:
        """Use a state that is held elsewhere too."""
        self._entries[layer_idx, position] = entry

    def rewind(self, length: int) -> None:
        """Follow the KV cache back to `length` keys. Raises ValueError for a negative length."""
        if length < 0:
            raise ValueError(f"length must be >= 0, got {length}")
        for entry in self._entries.values():
            entry.rewind(length)
