"""Adaptive sampling (vAttention, https://arxiv.org/abs/2510.05688): as many samples as an error bound asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_flag, check_number, check_size, register_masker
from .inputs import AttentionInputs
from .layout import NEVER


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
    moments always. Behind a selector that misses large terms, or none, it is broken on heavy tails: docs/numbers.md.
    """

    is_sampling = True
    keeps_to_allowed = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        if self.config.base_rate_sampling == 0:
            return mask
        mask = self._with_offsets(inputs, mask)
        left = inputs.left(mask)
        if int(left.max()) == 0:
            return mask
        drawn = inputs.draw(mask, self._base_size(left))
        base = inputs.mask(drawn.lists()._replace(probability=None), mask)  # kept for certain
        budget = self._budget(inputs, mask, base)
        mask = mask.union(base)
        return mask.union(inputs.draw(mask, budget))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return (
            0.5 if self.config.use_exact_estimation and self.config.base_rate_sampling else 0.0
        )  # exact moments read every key

    def _base_size(self, left: Tensor) -> Tensor:
        """Base samples for each row: at least 2, since one sample has no spread. left: int64 (B, h, Q)."""
        rate = self.config.base_rate_sampling
        wanted = torch.full_like(left, rate) if isinstance(rate, int) else (left * rate).long()
        return wanted.clamp(min=2)

    def _with_offsets(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        """The mask with the keys inside the offsets attended for certain."""
        if self.config.init_offset:
            mask = mask.union(inputs.layout.first_keys(inputs.resolve(self.config.init_offset)))
        if self.config.local_offset:
            mask = mask.union(inputs.layout.last_keys(inputs.resolve(self.config.local_offset)))
        return mask

    def _budget(self, inputs: AttentionInputs, mask: Mask, base: Mask) -> Tensor:
        """How many of the keys that are neither chosen nor base samples must be drawn: int64 (B, H, Q)."""
        heads = inputs.shape[1]
        static, scores = inputs.log_mass(mask), inputs.scores_at(base)
        top = torch.maximum(static, scores.amax(-1))
        if self.config.use_exact_estimation:
            top = inputs.highest()
        top = top.masked_fill(top == NEVER, 0.0)
        samples = _Terms((scores - top.unsqueeze(-1)).exp_(), scores > NEVER, expand_heads(base.counts(), heads))
        rest = expand_heads(inputs.left(mask) - base.counts(), heads)
        exact = None
        if self.config.use_exact_estimation:
            outside = expand_heads(mask.union(base).residual(inputs.allowed), heads)
            exact = _Terms((inputs.scores() - top.unsqueeze(-1)).exp() * outside, outside, rest)
        return self._needed(samples, (static - top).exp(), rest, exact)

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
        total = static + samples.each.sum(-1) + mean * rest
        # A few numbers a row are left, for which NumPy takes a fraction of torch's time; in float64 no square overflows.
        spread, whole, left = (t.cpu().numpy().astype(np.float64) for t in (variance.sqrt(), total, rest))
        # Sampling with replacement would need n0 draws; without, n0 / (1 + n0 / rest) are enough.
        with_replacement = (quantile * spread * left / np.maximum(self.config.epsilon * whole, 1e-30)) ** 2
        needed = with_replacement / (1 + with_replacement / np.maximum(left, 1))
        # At least one draw wherever a key is left: otherwise that key could never be attended, a bias.
        draws = np.minimum(np.maximum(np.ceil(np.nan_to_num(needed)), 1), left)
        return torch.from_numpy(draws.astype(np.int64)).to(rest.device)


class _Terms(NamedTuple):
    """Softmax terms of some keys of each row (B, H, Q, K), 0 where not valid; how many are valid: (B, H, Q)."""

    each: Tensor
    valid: Tensor
    counts: Tensor


def _moments(terms: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and the variance's standard error of each row's terms: (B, H, Q)."""
    count = terms.counts.clamp(min=1)
    mean = terms.each.sum(-1) / count
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
