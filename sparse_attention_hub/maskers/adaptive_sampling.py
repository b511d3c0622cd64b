"""Adaptive sampling (vAttention, https://arxiv.org/abs/2510.05688): as many samples as an error bound asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_flag, check_number, check_size, register_masker
from .draws import OrderedResidual, draw_without_replacement, draws_by_comparison
from .inputs import LEAST_SHARED_MASS, NEVER, AttentionInputs


@dataclass
class AdaptiveSamplingMaskerConfig(MaskerConfig):
    """The bound: P(|Z' - Z| > epsilon Z) <= delta for the softmax denominator Z of every row.

    base_rate_sampling: base samples that estimate the moments, int or float (fraction of the residual keys); 0 = off.
    epsilon, delta: in (0, 1). init_offset, local_offset: keys at the start and end that are attended for certain, int or
    float (fraction of N). use_exact_estimation: take the moments from all residual keys (an oracle, for study).
    """

    base_rate_sampling: int | float
    epsilon: float
    delta: float
    init_offset: int | float
    local_offset: int | float
    use_exact_estimation: bool = False

    def __post_init__(self) -> None:
        self.base_rate_sampling = check_size("base_rate_sampling", self.base_rate_sampling, zero=True)
        if isinstance(self.base_rate_sampling, float) and self.base_rate_sampling >= 1.0:
            raise ValueError(f"base_rate_sampling as a fraction must be in [0, 1), got {self.base_rate_sampling}")
        self.epsilon = check_number("epsilon", self.epsilon, 0.0, 1.0, open_low=True, open_high=True)
        self.delta = check_number("delta", self.delta, 0.0, 1.0, open_low=True, open_high=True)
        self.init_offset = check_size("init_offset", self.init_offset, zero=True)
        self.local_offset = check_size("local_offset", self.local_offset, zero=True)
        self.use_exact_estimation = check_flag("use_exact_estimation", self.use_exact_estimation)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {
            "base_rate_sampling": LogUniform(0.005, 0.1),
            "epsilon": LogUniform(0.02, 0.5),
            "delta": LogUniform(0.02, 0.5),
        }


@register_masker(AdaptiveSamplingMaskerConfig)
class AdaptiveSamplingMasker(Masker[AdaptiveSamplingMaskerConfig]):
    """Base samples of the residual (kept, p = 1) give mean and spread of its terms; from them the number B of further
    samples follows, drawn without replacement from the rest with p = B / rest.

    B solves t^2 Var(B) = (epsilon Z)^2 with the variance of sampling without replacement (finite-population correction)
    and the two-sided Student t quantile of the base samples' degrees of freedom, rounded up. The variance of the terms is
    the base samples' plus one standard error of it, since a small sample of a heavy tail mostly misses the tail.

    The bound holds where the base samples see the tail, that is behind a top-k that takes the tail off, and with exact
    moments always. Share of rows past epsilon over 400 seeds, 512 keys, 64 base samples behind a top-k of 2%, by the standard
    deviation of the scores (`python -m tests.maskers.test_sampling`); the mean denominator ratio is 1 within 0.006 throughout:

        (epsilon, delta)                 (0.1, 0.1)          (0.05, 0.05)        (0.2, 0.1)
        deviation of the scores          1     2     3       1     2     3       1     2     3
        OracleTopK                      .07   .07   .09     .03   .03   .06     .06   .07   .08
        HashAttention, random weights   .08   .15   .28     .04   .09   .19     .08   .15   .27
        PQCache, 4 x 4 bits             .08   .19   .30     .05   .10   .15     .08   .19   .36
        no top-k                        .08   .15   .19     .04   .07   .06     .08   .16   .25
        no top-k, 24 base samples       .10   .22   .32     .06   .12   .13     .10   .23   .39
        no top-k, exact moments         .10   .08   .06     .05   .05   .03     .10   .09   .09

    Behind a selector that misses large terms, or none, the bound is thus broken on heavy tails.
    """

    is_sampling = True
    keeps_to_allowed = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        if self.config.base_rate_sampling == 0:
            return mask
        mask = self._with_offsets(inputs, mask)
        residual = mask.residual(inputs.allowed)
        if draws_by_comparison(inputs, mask) and not self.config.use_exact_estimation:
            compared = self._select_by_comparison(inputs, mask, residual)
            if compared is not None:
                return compared
        left = residual.sum(-1)
        if int(left.max()) == 0:
            return mask
        base_size = self._base_size(left)
        base = draw_without_replacement(inputs, residual, base_size)
        # Kept for certain: no weights.
        base = Mask(base.shape, indices=base.rows()[0], kv_heads=base.kv_heads, counts=base.counts())
        budget = self._budget(inputs, mask, base, residual, expand_heads(left, inputs.shape[1]))
        mask = mask.union(base, disjoint=True)
        if int(budget.max()) == 0:
            return mask
        return mask.union(draw_without_replacement(inputs, residual, budget, skip=base_size), disjoint=True)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return (
            0.5 if self.config.use_exact_estimation and self.config.base_rate_sampling else 0.0
        )  # exact moments read every key

    def _select_by_comparison(self, inputs: AttentionInputs, mask: Mask, residual: Tensor) -> Mask | None:
        """The same for many rows, with what all configurations of a replay share: the exponentials and the random order.

        None where a row's chosen keys and base samples have too small a share of its mass for the shared exponentials.
        """
        heads = inputs.shape[1]
        order = OrderedResidual(inputs, residual)
        base_size = torch.minimum(self._base_size(order.left), order.left)
        base, meant = order.listed(base_size)
        valid = expand_heads(meant, heads)
        terms = inputs.exponentials_in_order(base.shape[-1]) * valid
        samples = _Terms(terms, valid, expand_heads(base_size, heads), terms.sum(-1))
        static = inputs.exponentials_where(mask.chosen())
        if float((static + samples.total).min()) < LEAST_SHARED_MASS:
            return None
        rest = expand_heads(order.left - base_size, heads)
        budget = self._needed(samples, static, rest)
        sure = expand_heads(mask.chosen(), base.shape[1]).clone(memory_format=torch.contiguous_format)
        sure.scatter_(-1, base, sure.gather(-1, base).logical_or_(meant))
        drawn = order.first(samples.counts + budget, without=sure)
        rate = (budget / rest.clamp(min=1)).float().unsqueeze(-1)
        counts = expand_heads(mask.counts(), heads) + samples.counts + budget
        return Mask.from_draw(sure, drawn, rate, heads, inputs.kv_heads, counts)

    def _base_size(self, left: Tensor) -> Tensor:
        """Base samples for each row: at least 2, since one sample has no spread. left: int64 (B, h, Q)."""
        rate = self.config.base_rate_sampling
        wanted = torch.full_like(left, rate) if isinstance(rate, int) else (left * rate).long()
        return wanted.clamp(min=2)

    def _with_offsets(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        """The mask with the keys inside the offsets attended for certain."""
        sizes = [
            inputs.resolve(size) if size else [0] * inputs.shape[0]
            for size in (self.config.init_offset, self.config.local_offset)
        ]
        if not any(map(any, sizes)):
            return mask
        first, last = (torch.tensor(size, device=inputs.device).view(-1, 1, 1, 1) for size in sizes)
        positions = inputs.key_positions[:, None, None, :]
        age = inputs.row_positions[:, None, :, None] - positions
        inside = ((positions < first) | (age < last)) & mask.residual(inputs.allowed)
        return mask.union(Mask.from_dense(inside, inputs.shape[1], inputs.kv_heads))

    def _budget(self, inputs: AttentionInputs, mask: Mask, base: Mask, residual: Tensor, left: Tensor) -> Tensor:
        """How many of the keys that are neither chosen nor base samples must be drawn: int64 (B, H, Q).

        left: residual keys of each row, base samples included, int64 (B, H, Q).
        """
        heads = inputs.shape[1]
        base_scores = inputs.scores_at(base.rows()[0])
        base_indices = expand_heads(base.rows()[0], heads)
        static_indices, static_probability = mask.rows()
        static_scores = inputs.scores_at(static_indices)
        if static_probability is not None:
            static_scores = static_scores - expand_heads(static_probability, heads).clamp(min=1e-30).log()
        top = torch.cat([base_scores, static_scores], -1).amax(-1, keepdim=True)
        if self.config.use_exact_estimation:
            top = inputs.scores().amax(-1, keepdim=True)
        top = top.masked_fill(top == NEVER, 0.0)
        terms, valid = (base_scores - top).exp(), base_indices >= 0
        samples = _Terms(terms, valid, valid.sum(-1), terms.sum(-1))
        static = (static_scores - top).exp().sum(-1)
        rest = left - samples.counts
        exact = None
        if self.config.use_exact_estimation:
            outside = expand_heads(residual, heads) & ~expand_heads(base.chosen(), heads)
            terms = (inputs.scores() - top).exp() * outside
            exact = _Terms(terms, outside, rest, terms.sum(-1))
        return self._needed(samples, static, rest, exact)

    def _needed(self, samples: _Terms, static: Tensor, rest: Tensor, exact: _Terms | None = None) -> Tensor:
        """Draws that the bound asks for, int64 (B, H, Q), at most `rest` (B, H, Q).

        static: the chosen keys' sum, (B, H, Q), on the scale of the base samples. exact: the rest's own terms, where known.
        """
        mean, variance, error = _moments(samples if exact is None else exact)
        if exact is not None:
            quantile: float | np.ndarray = _student_t(self.config.delta, None)
        else:
            # One standard error on top: of heavy tails, a small sample more often shows too little spread than too much.
            variance = variance + error
            quantile = _quantiles(self.config.delta, samples.counts - 1)
        total = static + samples.total + mean * rest
        # A few numbers a row are left, for which NumPy takes a fraction of torch's time; in float64 no square overflows.
        spread, whole, left = (t.cpu().numpy().astype(np.float64) for t in (variance.sqrt(), total, rest))
        # Sampling with replacement would need n0 draws; without, n0 / (1 + n0 / rest) are enough.
        with_replacement = (quantile * spread * left / np.maximum(self.config.epsilon * whole, 1e-30)) ** 2
        needed = with_replacement / (1 + with_replacement / np.maximum(left, 1))
        # At least one draw wherever a key is left: otherwise that key could never be attended, a bias.
        draws = np.minimum(np.maximum(np.ceil(np.nan_to_num(needed)), 1), left)
        return torch.from_numpy(draws.astype(np.int64)).to(rest.device)


class _Terms(NamedTuple):
    """Softmax terms of some keys of each row (B, H, Q, K), 0 where not valid; how many are, and their sum: (B, H, Q)."""

    each: Tensor
    valid: Tensor
    counts: Tensor
    total: Tensor


def _moments(terms: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and the variance's standard error of each row's terms: (B, H, Q)."""
    count = terms.counts.clamp(min=1)
    mean = terms.total / count
    square = (terms.each - mean.unsqueeze(-1)).mul_(terms.valid).square_()
    variance = square.sum(-1) / (terms.counts - 1).clamp(min=1)
    fourth = square.square_().sum(-1) / count
    return mean, variance, ((fourth - variance.square()).clamp(min=0) / count).sqrt()


def _quantiles(delta: float, freedoms: Tensor) -> float | np.ndarray:
    """`_student_t` for degrees of freedom (B, H, Q), which are often the same for all rows."""
    least, most = (int(freedom) for freedom in freedoms.aminmax())
    if least == most:
        return _student_t(delta, max(least, 1))
    known, which = np.unique(freedoms.cpu().numpy(), return_inverse=True)
    return np.array([_student_t(delta, max(freedom, 1)) for freedom in known.tolist()])[which].reshape(freedoms.shape)


@lru_cache(maxsize=4096)
def _student_t(delta: float, freedom: int | None) -> float:
    """Two-sided quantile: P(|T| > t) = delta. freedom None = the normal distribution."""
    from scipy import special

    tail = 1 - delta / 2
    return float(special.ndtri(tail) if freedom is None else special.stdtrit(freedom, tail))


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("adaptive_sampling")
