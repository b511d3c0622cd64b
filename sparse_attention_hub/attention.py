"""ResearchAttention: maskers in order, then one attention over the mask they made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .kernels import BACKENDS, Known, attend
from .kernels.portable import needs_grad
from .kernels.reference import group_scores, weigh
from .mask import Mask
from .maskers.base import Masker, MaskerConfig, config_from_dict, config_to_dict, create_masker
from .maskers.call_cache import once
from .maskers.inputs import AttentionInputs
from .maskers.state import AttentionState


@dataclass
class ResearchAttentionConfig:
    """masker_configs: applied in order; an empty list is dense attention. backend: see kernels.attend."""

    masker_configs: list[MaskerConfig] = field(default_factory=list)
    backend: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, maskers with their types; `from_dict` reads them back."""
        return {
            "type": "ResearchAttentionConfig",
            "masker_configs": [config_to_dict(config) for config in self.masker_configs],
        }

    @staticmethod
    def from_dict(record: dict[str, Any]) -> ResearchAttentionConfig:
        """Raises ValueError for an unknown masker type or parameters that do not fit."""
        return ResearchAttentionConfig([config_from_dict(entry) for entry in record["masker_configs"]])


class AttentionResult:
    """What one attention call gave. The figures beside the output are computed when asked for.

    output: (B, Q, H, D) in the queries' dtype. mask: the final Mask. log_sum_exp: of the attended keys' logits, each term
    weighted by 1/p: (B, H, Q), float32 or wider. empty_rows: rows (over batch, heads and queries) that attended to nothing and
    were given their last allowed key.
    """

    def __init__(
        self, output: Tensor, log_sum_exp: Tensor, mask: Mask, inputs: AttentionInputs, selector: float, empty_rows: int
    ) -> None:
        self.output, self.log_sum_exp, self.mask, self.empty_rows = output, log_sum_exp, mask, empty_rows
        self._inputs, self._selector = inputs, selector

    @cached_property
    def density_rows(self) -> Tensor:
        """Attended allowed keys / allowed keys of each query row, mean over heads: float32 (B, Q), NaN without allowed keys."""
        counts = self.mask.counts().float().mean(1)
        allowed = self._allowed_counts()
        return counts / allowed.masked_fill(allowed == 0, float("nan"))

    @cached_property
    def density(self) -> float:
        """Attended allowed keys / allowed keys, mean over heads and rows that may attend to anything."""
        return self._inputs.layout.share_of_allowed(self.mask.counts())

    @cached_property
    def kv_fraction(self) -> float:
        """Share of the dense KV bytes that the method reads, its selectors included; a key wanted by several query heads
        of a group is read once."""
        return self._inputs.layout.share_of_allowed(self.mask.group_counts()) + self._selector

    @cached_property
    def dead_rows(self) -> int:
        """Rows without any allowed key: their output is 0 and they stay out of all averages."""
        return int((self._allowed_counts() == 0).sum())

    def error_rows(self, dense: Tensor | None = None) -> Tensor:
        """||O_sparse - O_dense|| / ||O_dense|| per (batch, head, row): float32 (B, H, Q), NaN without allowed keys.

        dense: (B, Q, H, D) dense output of the same inputs, computed if not given.
        """
        if dense is None:
            dense = dense_of(self._inputs)
        difference: Tensor = torch.linalg.vector_norm(self.output.to(dense.dtype) - dense, dim=-1)
        error: Tensor = (difference / torch.linalg.vector_norm(dense, dim=-1).clamp(min=1e-30)).transpose(1, 2)
        return error.masked_fill((self._allowed_counts() == 0).unsqueeze(1), float("nan"))

    def _allowed_counts(self) -> Tensor:
        return self._inputs.layout.row_lengths.float()


class ResearchAttention:
    """A pipeline of maskers and the attention over what they choose.

    Each masker sees the mask of those before it and returns one with its own choice added; at most one may sample, as the
    last. An instance keeps nothing of its calls: memory across decode steps is in the `state` the caller passes.
    """

    def __init__(self, config: ResearchAttentionConfig) -> None:
        """Raises TypeError for anything but a ResearchAttentionConfig of MaskerConfigs, ValueError for an unregistered one, a
        sampling masker that is not the last (or a second one), or an unknown backend."""
        if not isinstance(config, ResearchAttentionConfig):
            raise TypeError(f"ResearchAttention takes a ResearchAttentionConfig, got {type(config).__name__}")
        if config.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {config.backend!r}")
        self.config = config
        self.maskers: list[Masker[Any]] = [create_masker(entry) for entry in config.masker_configs]
        sampling = [i for i, masker in enumerate(self.maskers) if masker.is_sampling]
        if len(sampling) > 1:
            names = ", ".join(type(self.maskers[i].config).__name__ for i in sampling)
            raise ValueError(f"at most one sampling masker is allowed, got {len(sampling)}: {names}")
        if sampling and sampling[0] != len(self.maskers) - 1:
            name = type(self.maskers[sampling[0]].config).__name__
            raise ValueError(f"a sampling masker must come last, got {name} at place {sampling[0] + 1}")

    def new_state(self) -> AttentionState:
        """Fresh memory for one sequence (or batch): what maskers keep across decode steps, per layer and masker."""
        return AttentionState()

    def prepare(self, keys: Tensor, layer_idx: int, state: AttentionState, allowed: Tensor | None = None) -> None:
        """Fit the maskers on the context's keys (B, Hkv, N, D) and freeze the fit; decode steps then only extend it.

        allowed: bool (B, N), False on padding; None = no padding.
        """
        for position, masker in enumerate(self.maskers):
            masker.prepare(keys, layer_idx, state.entry(layer_idx, position), allowed)

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        layer_idx: int = 0,
        state: AttentionState | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
    ) -> AttentionResult:
        """queries (B, H, Q, D); keys, values (B, Hkv, N, D); attention_mask additive (or bool, True = allowed),
        broadcastable to (B, 1, Q, N); None = the queries are the last Q positions and attention is causal.

        generator: one torch.Generator, or one an item; each call draws a 64-bit seed an item from it. `seeds` gives the
        seeds themselves instead; with neither, the seed is 0. scaling: default D ** -0.5.
        """
        if generator is not None and seeds is not None:
            raise ValueError("pass generator or seeds, not both")
        drawn = _draw_seeds(generator, seeds, queries.shape[0])
        return self.attend_inputs(AttentionInputs(queries, keys, values, attention_mask, scaling, layer_idx, drawn), state)

    def make_mask(self, inputs: AttentionInputs, state: AttentionState | None = None) -> Mask:
        """The mask of all maskers in order. No masker can make it hold a key that is not allowed."""
        if not self.maskers:
            return inputs.mask(inputs.allowed)
        leading = list(itertools.takewhile(lambda masker: masker.by_position, self.maskers))
        mask = inputs.layout.choose_once(
            tuple((type(masker), repr(masker.config)) for masker in leading), lambda: self._leading_mask(inputs, leading)
        )
        for position, masker in enumerate(self.maskers[len(leading) :], len(leading)):
            entry = None if state is None else state.entry(inputs.layer_idx, position)
            mask = self._select(masker, inputs.for_masker(entry), mask)
        return mask

    def _leading_mask(self, inputs: AttentionInputs, maskers: Sequence[Masker[Any]]) -> Mask:
        """What the first maskers choose, which go by positions."""
        mask = Mask.empty(inputs.shape, inputs.device, inputs.kv_heads)
        for masker in maskers:
            mask = self._select(masker, inputs, mask)
        return mask

    @staticmethod
    def _select(masker: Masker[Any], inputs: AttentionInputs, mask: Mask) -> Mask:
        mask = masker.select(inputs, mask)
        return mask if masker.keeps_to_allowed or inputs.layout.all_allowed else mask.restrict(inputs.allowed)

    def final_mask(self, inputs: AttentionInputs, state: AttentionState | None = None) -> tuple[Mask, int]:
        """(the mask that is attended to, how many rows chose nothing and were given their last allowed key)."""
        return inputs.layout.fill_empty_rows(self.make_mask(inputs, state))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        """What the maskers' selectors read, as a share of the dense KV bytes."""
        return sum(masker.selector_fraction(inputs) for masker in self.maskers)

    def attend_inputs(self, inputs: AttentionInputs, state: AttentionState | None = None) -> AttentionResult:
        """The same for prepared inputs, which several configurations may share."""
        with torch.no_grad():  # choosing keys is no differentiable function
            mask, empty_rows = self.final_mask(inputs, state)
        output, lse = self.attend_mask(inputs, mask)
        return AttentionResult(output, lse, mask, inputs, self.selector_fraction(inputs), empty_rows)

    def attend_mask(self, inputs: AttentionInputs, mask: Mask) -> tuple[Tensor, Tensor]:
        """Attention over a mask: (output (B, Q, H, D), log-sum-exp (B, H, Q))."""
        known = inputs.known()
        if known.scores is not None and needs_grad(
            inputs.queries, inputs.keys
        ):  # scores that maskers asked for have no gradients
            fresh = inputs.layout.biased(group_scores(inputs.queries, inputs.usable_keys, inputs.scaling))
            known = Known(fresh, biased=known.biased)
        keys, values = inputs.keys, inputs.values
        if inputs.shape[2] > 1 or known.scores is not None or self.config.backend == "reference":
            # All keys and values may be read, those that weigh nothing too.
            keys, values = inputs.usable_keys, inputs.usable_values
        return attend(inputs.queries, keys, values, mask, inputs.scaling, self.config.backend, known=known)


def dense_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Dense attention in float32 (float64 stays): the reference for errors. Shapes as in ResearchAttention; (B, Q, H, D)."""
    return dense_of(AttentionInputs(queries, keys, values, attention_mask, scaling))


def dense_of(inputs: AttentionInputs) -> Tensor:
    """Dense output of a call, (B, Q, H, D) in float32 or wider; computed once per call however many ask."""

    return once(inputs.cache.call, "dense_output", lambda: weigh(inputs.scores(), None, inputs.usable_values)[0])


def _draw_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, seeds: int | Sequence[int] | None, batch: int
) -> list[int]:
    """One 64-bit seed an item: drawn from its generator, or given."""
    given = generator if generator is not None else seeds or 0
    each: list[Any] = list(given) if isinstance(given, Sequence) else [given] * batch
    if len(each) != batch:
        rule = "seeds must hold one seed" if generator is None else "generator must hold one torch.Generator"
        raise ValueError(f"{rule} an item ({batch}), got {len(each)}")
    limits = (-(2**63), 2**63 - 1, (1,))
    return [
        int(torch.randint(*limits, generator=source, device=source.device))
        if isinstance(source, torch.Generator)
        else int(source)
        for source in each
    ]
