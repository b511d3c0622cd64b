"""What a dense prefill saw of one layer: recorded once, for all maskers that choose keys by the queries of the context."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import group_scores
from .call_parts import blocks_of, rows_of
from .inputs import AttentionInputs
from .layout import NEVER

#: What can be recorded: the last queries (costs nothing), the statistics of all queries (cheap), the attention that each key
#: received (as much arithmetic as dense attention, without its fused kernels).
PARTS = ("queries", "statistics", "attention")
#: Rows whose queries are kept.
LAST_ROWS = 64
#: The first rows of a text stay out of the statistics: attention sinks have queries unlike all others.
SINK_ROWS = 4


@dataclass
class ContextSummary:
    """parts: those of PARTS that are recorded. Tensors are float32 but for the queries; those of other parts are None.

    length: keys seen. scaling, softcap: of the scores. question: token ids of a question that was seen after the context.
    queries (B, H, w, D): of the last w <= 64 rows, as attention uses them; denominators (B, H, w): the log of their softmax
    denominators. counted (B,): rows in the statistics; mean (B, H, D), scatter (B, H, D, D): of the queries without their rotary
    embedding, scatter = covariance * counted; rotation (D, D): the mean rotation of the positions that follow, None = none.
    value_norms (B, Hkv, N). received (B, Hkv, N): attention summed over rows and the heads of a group; watchers (B, N): rows that
    may attend to a key.
    """

    parts: frozenset[str]
    length: int = 0
    scaling: float = 1.0
    softcap: float | None = None
    question: tuple[int, ...] = ()
    queries: Tensor | None = None
    denominators: Tensor | None = None
    counted: Tensor | None = None
    mean: Tensor | None = None
    scatter: Tensor | None = None
    rotation: Tensor | None = None
    value_norms: Tensor | None = None
    received: Tensor | None = None
    watchers: Tensor | None = None

    @staticmethod
    def of(inputs: AttentionInputs, parts: Collection[str] = PARTS) -> ContextSummary:
        """The summary of one call whose queries are the context's."""
        summary = ContextSummary(frozenset(parts))
        summary.add(inputs)
        return summary

    def tensors(self) -> dict[str, Tensor]:
        """The recorded tensors, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def copy(self) -> ContextSummary:
        """An independent summary: `add` replaces tensors and changes none."""
        return copy.copy(self)

    @torch.no_grad()
    def add(self, inputs: AttentionInputs, unrotated: Tensor | None = None, rotation: Tensor | None = None) -> None:
        """The next rows of the text, with all keys so far. unrotated: their queries without rotary embedding, default as they are."""
        before, rows = self.length, inputs.shape[2]
        self.length = inputs.shape[3] - inputs.rows_after
        self.scaling, self.softcap = inputs.scaling, inputs.softcap
        if "queries" in self.parts:
            last = rows_of(inputs, max(0, rows - LAST_ROWS), rows)
            self.queries = _join(self.queries, last.queries)[:, :, -LAST_ROWS:].clone()
            self.denominators = _join(self.denominators, _denominators(last))[:, :, -LAST_ROWS:].clone()
        if "statistics" in self.parts:
            norms = torch.linalg.vector_norm(inputs.values[:, :, before : self.length].float(), dim=-1)
            self.value_norms, self.rotation = _join(self.value_norms, norms), rotation
            self._add_statistics(inputs.queries if unrotated is None else unrotated, inputs.layout.row_positions >= SINK_ROWS)
        if "attention" in self.parts:
            self._add_attention(inputs)

    def _add_statistics(self, queries: Tensor, counts: Tensor) -> None:
        """Join mean and scatter with those of further queries (B, H, Q, D). counts: bool (B, Q), rows that count."""
        left_out = ~counts[:, None, :, None]
        queries = queries.float().masked_fill(left_out, 0.0)
        added = counts.sum(-1).float()[:, None, None]
        mean = queries.sum(2) / added.clamp(min=1)
        centred = (queries - mean.unsqueeze(2)).masked_fill(left_out, 0.0)
        scatter = centred.transpose(2, 3) @ centred
        if self.mean is not None and self.scatter is not None and self.counted is not None:
            earlier = self.counted[:, None, None]
            total, shift = (earlier + added).clamp(min=1), mean - self.mean
            mean = self.mean + shift * (added / total)
            scatter = (
                self.scatter + scatter + (shift.unsqueeze(3) * shift.unsqueeze(2)) * (earlier * added / total).unsqueeze(3)
            )
            added = earlier + added
        self.counted, self.mean, self.scatter = added[:, 0, 0], mean, scatter

    def _add_attention(self, inputs: AttentionInputs) -> None:
        """Add the attention of these rows, a block of rows at a time: a matrix of rows by keys is never whole."""
        batch, kv_heads = inputs.shape[0], inputs.kv_heads
        received = torch.zeros((batch, kv_heads, self.length), device=inputs.device)
        watchers = torch.zeros((batch, self.length), device=inputs.device)
        if self.received is not None and self.watchers is not None:
            received[..., : self.received.shape[2]] = self.received
            watchers[:, : self.watchers.shape[1]] = self.watchers
        for block in blocks_of(inputs):
            weights = (block.scores() - _denominators(block).unsqueeze(-1)).exp_()
            keys = weights.shape[3]
            received[..., :keys] += weights.view(batch, kv_heads, -1, keys).sum(2)
            watchers[:, :keys] += block.allowed[:, 0].sum(1)
        self.received, self.watchers = received, watchers

    # -- what maskers read ---------------------------------------------------------------------------------------------

    def last_attention(self, keys: Tensor, rows: int) -> tuple[Tensor, int]:
        """(attention (B, H, n) of the last rows to the context's keys (B, Hkv, n, D), mean over the rows; how many rows these are:
        at most `rows`, and as many as were recorded)."""
        assert self.queries is not None and self.denominators is not None
        rows = min(rows, self.queries.shape[2])
        total = torch.zeros((*self.queries.shape[:2], keys.shape[2]), device=keys.device)
        positions = torch.arange(keys.shape[2], device=keys.device)
        for row in range(-rows, 0):
            scores = group_scores(self.queries[:, :, row, None], keys, self.scaling, self.softcap)[:, :, 0]
            # A row of an attention mask with holes may hide a key whose score is above the row's denominator.
            weights = (scores - self.denominators[:, :, row, None]).exp().clamp_(max=1.0)
            total += weights.masked_fill_(positions > self.length + row, 0.0)
        return total / rows, rows

    def covariance(self) -> Tensor:
        """Of the queries, without their rotary embedding: (B, H, D, D)."""
        assert self.scatter is not None and self.counted is not None
        return self.scatter / self.counted.clamp(min=1).view(-1, 1, 1, 1)

    def received_per_row(self) -> Tensor:
        """Attention that each key received, mean over the rows that may attend to it and summed over a group: (B, Hkv, N)."""
        assert self.received is not None and self.watchers is not None
        return self.received / self.watchers.clamp(min=1).unsqueeze(1)


def _denominators(inputs: AttentionInputs) -> Tensor:
    """Log of each row's softmax denominator: (B, H, Q), 0 for a row that may attend to nothing."""
    found = inputs.scores().logsumexp(-1)
    if inputs.sinks is not None:
        found = torch.logaddexp(found, inputs.sinks.to(found.dtype).view(1, -1, 1))
    return found.masked_fill(found == NEVER, 0.0)


def _join(earlier: Tensor | None, new: Tensor) -> Tensor:
    return new if earlier is None else torch.cat([earlier, new], 2)
