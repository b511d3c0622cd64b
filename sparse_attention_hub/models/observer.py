"""Records what maskers want to know of the context's dense prefill, while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..attention import ResearchAttention
from ..errors import UserError
from ..maskers.context_summary import ContextSummary
from ..maskers.inputs import AttentionInputs
from .rotation import Rotation


class Observer:
    """Summaries of each layer. parts: see context_summary.PARTS. before: summaries to continue, which stay as they are.

    problem: why the statistics of queries are not recorded although they are wanted.
    """

    def __init__(self, model: Any, parts: Collection[str], before: dict[int, ContextSummary] | None = None) -> None:
        self.parts = frozenset(parts)
        self.summaries = {layer: summary.copy() for layer, summary in (before or {}).items()}
        self.problem: str | None = None
        self._rotation: Rotation | None = None
        if "statistics" in parts:
            try:
                self._rotation = Rotation(model)
            except UserError as error:
                self.problem, self.parts = str(error), self.parts - {"statistics"}

    def see(self, inputs: AttentionInputs) -> None:
        """The next rows of a layer, with all keys so far."""
        layer_idx, end = inputs.layer_idx, inputs.shape[3]
        summary = self.summaries.setdefault(layer_idx, ContextSummary(self.parts))
        if self._rotation is None:
            summary.add(inputs)
        else:
            queries = inputs.queries
            unrotated = self._rotation.undo(queries, layer_idx, end - queries.shape[2])
            summary.add(inputs, unrotated, self._rotation.to_come(layer_idx, end, queries))

    def named(self, question_ids: list[int]) -> dict[int, ContextSummary]:
        """The summaries, as those of a context and this question."""
        for summary in self.summaries.values():
            summary.question = tuple(question_ids)
        return self.summaries


def observed_by(attentions: Iterable[ResearchAttention | None]) -> frozenset[str]:
    """What these attentions choose by, of the context's prefill."""
    return frozenset(part for attention in attentions if attention is not None for part in attention.observes)
