"""ResearchAttention: maskers in order, then one attention over the mask they made."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UserError, quoted
from .found import read_json
from .kernels import BACKENDS, Known, attend
from .kernels.reference import group_scores, needs_grad
from .mask import Mask
from .maskers.base import Masker, MaskerConfig, check_int, config_from_dict, config_to_dict, create_masker
from .maskers.call_cache import once
from .maskers.call_parts import blocks_of
from .maskers.inputs import AttentionInputs
from .maskers.state import AttentionState

#: Raise it when something that all maskers share (attention, selection, random numbers, sizes, dense outputs) gives other
#: figures: results of other versions are not reused. tests/test_versions.py notices.
ENGINE_VERSION = 2


@dataclass
class ResearchAttentionConfig:
    """masker_configs: applied in order; an empty list is dense attention. backend: see kernels.attend.

    dense_layers: layer numbers in which every allowed key is attended (Quest's paper keeps the first two dense).
    head_budgets: factors on the maskers' fractional sizes, a row per layer, each of 1, kv heads or query heads numbers > 0:
    see head_budgets.py. A scaled size is at most all keys and at least one.
    fixed: a search evaluates these settings alone, as for a paper's preset. Not part of `to_dict`.
    """

    masker_configs: list[MaskerConfig] = field(default_factory=list)
    backend: str = "auto"
    dense_layers: list[int] = field(default_factory=list)
    head_budgets: list[list[float]] | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        """TypeError for anything but a list of maskers; ValueError for layers that are not numbers from 0 on, or no table."""
        if not isinstance(self.masker_configs, list | tuple):
            raise TypeError(f"masker_configs must be a list of MaskerConfigs, got {type(self.masker_configs).__name__}")
        self.dense_layers = sorted({check_int("dense_layers", layer, 0) for layer in self.dense_layers})
        if self.head_budgets is not None:
            self.head_budgets = check_head_budgets(self.head_budgets)

    def check_layers(self, layers: int) -> None:
        """UserError if the configuration is of a model with another number of layers."""
        if self.head_budgets is not None and len(self.head_budgets) != layers:
            raise UserError(
                f"head_budgets is a table of {len(self.head_budgets)} layers, this model has {layers}: fit a table for this model"
            )
        if self.dense_layers and self.dense_layers[-1] >= layers:
            raise UserError(f"dense_layers must be in 0 .. {layers - 1} for this model, got {self.dense_layers[-1]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, maskers with their types; `from_dict` reads them back."""
        maskers = [config_to_dict(config) for config in self.masker_configs]
        record: dict[str, Any] = {"type": "ResearchAttentionConfig", "masker_configs": maskers}
        if self.dense_layers:
            record["dense_layers"] = self.dense_layers
        if self.head_budgets is not None:
            record["head_budgets"] = self.head_budgets
        return record

    @staticmethod
    def from_file(path: str | Path) -> ResearchAttentionConfig:
        """The configuration in a file that a search or a benchmark wrote (its field `sparse_config`), or in a file of `to_dict`.
        UserError for a file that cannot be read or holds none."""
        record = read_json(path)
        record = record.get("sparse_config", record)
        if not isinstance(record, dict) or "masker_configs" not in record:
            raise UserError(
                f"{path}: has no sparse_config; give a best configuration, such as optimal_configs/run_.../..._10pct.json"
            )
        try:
            return ResearchAttentionConfig.from_dict(record)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: sparse_config does not fit this version ({type(error).__name__}: {quoted(error)})"
            ) from None

    @staticmethod
    def from_dict(record: dict[str, Any]) -> ResearchAttentionConfig:
        """Raises ValueError for an unknown masker type or parameters that do not fit."""
        return ResearchAttentionConfig(
            [config_from_dict(entry) for entry in record["masker_configs"]],
            dense_layers=record.get("dense_layers", []),
            head_budgets=record.get("head_budgets"),
        )


def check_head_budgets(table: Any) -> list[list[float]]:
    """A table as lists of floats > 0, rows of one length; ValueError otherwise."""
    rows = table.tolist() if isinstance(table, Tensor) else table
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, list | tuple) and row for row in rows):
        raise ValueError(f"head_budgets must be a table, a row of factors per layer, got {type(table).__name__}")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"head_budgets must have rows of one length, got {sorted({len(row) for row in rows})}")
    for row in rows:
        for factor in row:
            number = isinstance(factor, numbers.Real) and not isinstance(factor, bool)
            if not number or not 0 < float(factor) < math.inf:
                raise ValueError(f"head_budgets must hold factors > 0, got {factor!r}")
    return [[float(factor) for factor in row] for row in rows]


class Completes(Protocol):
    """A model that fills in the files of its own that a configuration leaves out: a LanguageModel."""

    id: str

    def complete(self, config: ResearchAttentionConfig) -> ResearchAttentionConfig: ...


@dataclass(eq=False, repr=False)
class AttentionResult:
    """Result of one attention call. Density, KV bytes and errors are computed when first read.

    unrounded: the output as it was summed, (B, Q, H, D), float32 or wider; errors are those of these numbers. mask: the final
    Mask. log_sum_exp: of the attended keys' logits, each term weighted by 1/p: (B, H, Q), float32 or wider. empty_rows: rows
    (over batch, heads and queries) that selected no key and were given their last allowed key; off the CPU maybe a tensor.
    """

    unrounded: Tensor
    log_sum_exp: Tensor
    mask: Mask
    empty_rows: int | Tensor
    _inputs: AttentionInputs
    #: What choosing reads: a share of all keys and values, or of the keys of the mask beside it.
    _selectors: list[tuple[float, Mask | None]]

    @property
    def output(self) -> Tensor:
        """(B, Q, H, D) in the queries' dtype."""
        return self.unrounded.to(self._inputs.queries.dtype)

    @cached_property
    def density_rows(self) -> Tensor:
        """`density` of each query row: float32 (B, Q), NaN without allowed keys."""
        return self.mask.counts().float().mean(1) / self._inputs.layout.row_lengths  # 0 / 0 is NaN

    @property
    def density(self) -> float:
        """Attended / allowed keys, mean over heads and the rows that have allowed keys."""
        return float(self.density_share)

    @cached_property
    def density_share(self) -> float | Tensor:
        """`density`; off the CPU a number on the device, which sums of many calls read once."""
        return self._inputs.layout.share_of_allowed(self.mask.counts())

    @property
    def kv_fraction(self) -> float:
        """Share of the dense KV bytes that is read, selectors included. A key that several query heads of a group attend to is
        read once. With a latent that all heads share it is the latent's bytes: a selector reads all of it at most."""
        return float(self.kv_share)

    @cached_property
    def kv_share(self) -> float | Tensor:
        """`kv_fraction`, as density_share."""
        inputs, mask, selectors = self._inputs, self.mask, selector_share(self._inputs, self._selectors)
        if inputs.latent:
            mask = Mask(mask.shape, 1, lists=mask.lists())
            expanded = inputs.kv_heads * (inputs.keys.shape[3] + inputs.values.shape[3])
            selectors = min(1.0, selectors * expanded / inputs.latent)
        return inputs.layout.share_of_allowed(mask.group_counts()) + selectors

    @cached_property
    def dead_rows(self) -> int:
        """Rows without any allowed key: their output is 0 and they stay out of all averages."""
        return int((self._inputs.layout.row_lengths == 0).sum())

    def error_rows(self) -> Tensor:
        """`relative_error` against dense attention: float32 (B, H, Q), NaN without allowed keys."""
        error = relative_error(self.unrounded, self._inputs.dense_output()).transpose(1, 2)
        if self._inputs.layout.mask is None:  # every row has a key
            return error
        return error.masked_fill((self._inputs.layout.row_lengths == 0).unsqueeze(1), float("nan"))


class ResearchAttention:
    """A pipeline of maskers and the attention over what they choose.

    Each masker sees the mask of those before it and returns one with its own choice added, or, if it `narrows`, with fewer of
    the keys that selectors chose; at most one may sample, as the last. An instance keeps nothing of its calls: memory across decode steps is in the `state` the caller passes.
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
        self._leading = list(itertools.takewhile(lambda masker: masker.by_position, self.maskers))
        self._leading_name = tuple((type(masker), repr(masker.config)) for masker in self._leading)
        table = config.head_budgets
        self._factors = None if table is None else torch.tensor(table, dtype=torch.float64)

    @staticmethod
    def from_file(path: str | Path, lm: Completes | None = None) -> ResearchAttention:
        """The attention that a search found: see ResearchAttentionConfig.from_file.

        lm: fills in the model's own files where the configuration leaves them out (DoubleSparsity's channels, HashAttention's
        weights). UserError if they are needed and missing, or if the file's head budgets were fitted for another model.
        """
        if lm is not None and not hasattr(lm, "complete"):
            raise TypeError(f"lm must be a LanguageModel, as load_model returns, got {type(lm).__name__}")
        config = ResearchAttentionConfig.from_file(path)
        if config.head_budgets is not None and lm is not None:
            fitted_for = str(read_json(path).get("model") or lm.id)
            if Path(fitted_for).name != Path(lm.id).name:
                raise UserError(f"{path}: head_budgets were fitted for {fitted_for}, this model is {lm.id}: search with it")
        try:
            return ResearchAttention(config if lm is None else lm.complete(config))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def observes(self) -> frozenset[str]:
        """What of the context's prefill its maskers choose by: see context_summary.PARTS."""
        return frozenset(part for masker in self.maskers for part in masker.observes)

    def new_state(self) -> AttentionState:
        """Fresh memory for one sequence (or batch): what maskers keep across decode steps, per layer and masker."""
        return AttentionState()

    def prepare(self, keys: Tensor, layer_idx: int, state: AttentionState, allowed: Tensor | None = None) -> None:
        """Fit the maskers on the context's keys (B, Hkv, N, D), and on what `state.observe` was given; decode steps only extend it.
        allowed: bool (B, N), False on padding; None = no padding."""
        for position, masker in enumerate(self.maskers_of(layer_idx)):
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
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> AttentionResult:
        """queries (B, H, Q, D); keys, values (B, Hkv, N, D); attention_mask additive (or bool, True = allowed),
        broadcastable to (B, 1, Q, N); None = the queries are the last Q positions and attention is causal.

        generator: one torch.Generator, or one an item; each call draws a 64-bit seed an item from it. `seeds` gives the
        seeds themselves instead; with neither, the seed is 0. scaling: default D ** -0.5. softcap, sinks: see AttentionInputs.
        """
        if generator is not None and seeds is not None:
            raise ValueError("pass generator or seeds, not both")
        place = attention_mask, scaling, layer_idx, _draw_seeds(generator, seeds, queries.shape[0])
        return self.attend_inputs(AttentionInputs(queries, keys, values, *place, softcap=softcap, sinks=sinks), state)

    def make_mask(self, inputs: AttentionInputs, state: AttentionState | None = None) -> Mask:
        """The mask of all maskers in order. No masker can make it hold a key that is not allowed."""
        return self._choose(inputs, state)[0]

    def _choose(self, inputs: AttentionInputs, state: AttentionState | None) -> tuple[Mask, dict[int, Mask]]:
        """(the mask of all maskers, by place in the pipeline the mask that each narrowing one was given)."""
        maskers, inputs = self.maskers_of(inputs.layers[0]), self._with_budgets(inputs)
        if not maskers:
            return inputs.layout.everything(), {}

        def choose_by_position() -> Mask:
            mask = Mask.empty(inputs.shape, inputs.device, inputs.kv_heads)
            for masker in self._leading:
                mask = self._select(masker, inputs, mask)
            return mask

        factors = None if inputs.factors is None else tuple(inputs.factors.tolist())
        mask = kept = once(inputs.layout.chosen, (factors, self._leading_name), choose_by_position)
        narrowed: dict[int, Mask] = {}
        for position, masker in enumerate(maskers[len(self._leading) :], len(self._leading)):
            entry = None if state is None else state.entry(inputs.layers[0], position)
            view = inputs.for_masker(entry)
            view.kept = kept
            if masker.narrows:  # without a selector before it, all keys
                mask = narrowed[position] = mask if position > len(self._leading) else inputs.layout.everything()
            mask = self._select(masker, view, mask)
        return mask, narrowed

    def maskers_of(self, layer_idx: int) -> list[Masker[Any]]:
        """The maskers that choose in this layer: none in a dense layer."""
        return [] if layer_idx in self.config.dense_layers else self.maskers

    def _with_budgets(self, inputs: AttentionInputs) -> AttentionInputs:
        """The call with this layer's head budgets. ValueError if the table is of another model."""
        if self._factors is None:
            return inputs
        (layers, heads), layer_idx = self._factors.shape, inputs.layers[0]
        if layer_idx >= layers or heads not in (1, inputs.kv_heads, inputs.shape[1]):
            raise ValueError(
                f"head_budgets is a table of {layers} layers x {heads} heads; this is layer {layer_idx} of a model with "
                f"{inputs.kv_heads} kv heads and {inputs.shape[1]} query heads: fit a table for this model"
            )
        view = inputs.for_masker(None)
        view.factors = self._factors[layer_idx]
        return view

    @staticmethod
    def _select(masker: Masker[Any], inputs: AttentionInputs, mask: Mask) -> Mask:
        mask = masker.select(inputs, mask)
        return mask if masker.keeps_to_allowed or inputs.layout.all_allowed else mask.restrict(inputs.allowed)

    def attend_inputs(self, inputs: AttentionInputs, state: AttentionState | None = None) -> AttentionResult:
        """`__call__` on prepared inputs, which several configurations may share."""
        mask, empty_rows, selectors = self.choose_keys(inputs, state)
        return AttentionResult(*self._attend(inputs, mask), mask, empty_rows, inputs, selectors)

    def choose_keys(self, inputs: AttentionInputs, state: AttentionState | None = None) -> tuple[Mask, int | Tensor, list[Any]]:
        """The first half of `attend_inputs`: mask, empty rows and selectors of an AttentionResult."""
        with torch.no_grad():  # selecting keys is not differentiable
            mask, narrowed = self._choose(inputs, state)
            mask, empty_rows = inputs.layout.fill_empty_rows(mask)
        maskers = enumerate(self.maskers_of(inputs.layers[0]))
        selectors = [(masker.selector_fraction(inputs), narrowed.get(position)) for position, masker in maskers]
        return mask, empty_rows, selectors

    def _attend(self, inputs: AttentionInputs, mask: Mask) -> tuple[Tensor, Tensor]:
        """Attention over a mask: (output (B, Q, H, D), log-sum-exp (B, H, Q)), float32 or wider."""
        known = inputs.known()
        if known.scores is not None and needs_grad(inputs.queries, inputs.keys):
            # The scores that maskers computed have no gradients.
            fresh = inputs.layout.biased(group_scores(inputs.queries, inputs.usable_keys, inputs.scaling, inputs.softcap))
            known = Known(fresh, biased=known.biased)
        keys, values = inputs.keys, inputs.values
        if inputs.shape[2] > 1 or known.scores is not None or self.config.backend == "reference":
            # These read all keys and values: NaN in padding must not reach the output.
            keys, values = inputs.usable_keys, inputs.usable_values
        rule = {"softcap": inputs.softcap, "sinks": inputs.sinks, "known": known}
        return attend(inputs.queries, keys, values, mask, inputs.scaling, self.config.backend, **rule)  # type: ignore[arg-type]


def selector_share(inputs: AttentionInputs, selectors: list[tuple[float, Mask | None]]) -> float | Tensor:
    """What choosing reads of AttentionResult.kv_share. selectors: those of `choose_keys`."""
    share_of = inputs.layout.share_of_allowed
    return sum(share if kept is None else share * share_of(kept.group_counts()) for share, kept in selectors)


def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Dense attention in float32 (float64 stays): the reference for errors. Arguments as for
    ResearchAttention; returns (B, Q, H, D)."""
    inputs = AttentionInputs(queries, keys, values, attention_mask, scaling, softcap=softcap, sinks=sinks)
    return torch.cat([block.dense_output() for block in blocks_of(inputs)], 1)


def relative_error(output: Tensor, dense: Tensor) -> Tensor:
    """||output - dense|| / ||dense|| over the last dimension."""
    scale: Tensor = torch.linalg.vector_norm(dense, dim=-1).clamp(min=1e-30)
    error: Tensor = torch.linalg.vector_norm(output - dense, dim=-1) / scale
    return error


def _draw_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, seeds: int | Sequence[int] | None, batch: int
) -> list[int]:
    """One 64-bit seed per item: drawn from its generator, or given."""
    given = generator if generator is not None else seeds or 0
    each: list[Any] = list(given) if isinstance(given, Sequence) else [given] * batch
    if len(each) != batch:
        rule = "seeds must hold one seed" if generator is None else "generator must hold one torch.Generator"
        raise ValueError(f"{rule} an item ({batch}), got {len(each)}")
    if generator is None:
        return [int(seed) for seed in each]
    return [int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=source, device=source.device)) for source in each]
