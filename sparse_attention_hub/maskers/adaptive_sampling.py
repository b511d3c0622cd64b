"""Adaptive sampling (vAttention, https://arxiv.org/abs/2510.05688): as many samples as an error bound asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lists import as_arrays, expand_heads, uses_loops
from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_flag, check_number, check_size, draw_example, register_masker
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
    """Base samples of the residual (kept, p = 1) estimate mean and variance of its terms. They give the number B of
    further samples, drawn without replacement from the rest with p = B / rest.

    B solves t^2 Var(B) = (epsilon Z)^2, rounded up: Var with finite-population correction, t the two-sided Student t
    quantile. One standard error is added to the variance, since a small sample of a heavy tail mostly misses the tail.

    The bound holds with exact moments, and behind a top-k that takes the tail off. Behind a selector that misses
    large terms, or behind none, heavy tails break it: docs/numbers.md.
    """

    is_sampling = True
    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (27, 11)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        if self.config.base_rate_sampling == 0:
            return mask
        if self.config.init_offset:
            mask = mask.union(inputs.layout.first_keys(*inputs.bounded(self.config.init_offset)))
        if self.config.local_offset:
            mask = mask.union(inputs.layout.last_keys(*inputs.bounded(self.config.local_offset)))
        left = inputs.left(mask)
        if left.device.type == "cpu" and int(left.max()) == 0:
            return mask
        wanted = inputs.share_of(left, self.config.base_rate_sampling).clamp(min=2)  # one sample has no spread
        # Not of N: a row before the last may see more keys.
        most = inputs.share_of(torch.tensor([[[inputs.shape[3]]]]), self.config.base_rate_sampling)
        base = inputs.draw(mask, wanted, certain=True, most=max(2, int(most.max())))
        with_base = mask.union(base)
        return with_base.union(inputs.draw(with_base, self._budget(inputs, mask, base, with_base)))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        exact = self.config.use_exact_estimation and self.config.base_rate_sampling
        return 0.5 if exact else 0.0  # exact moments read every key

    def _budget(self, inputs: AttentionInputs, mask: Mask, base: Mask, both: Mask) -> Tensor:
        """Draws that the bound needs of the keys that are neither chosen nor base samples: int64 (B, H, Q)."""
        exact, terms = self.config.use_exact_estimation, inputs.known().terms
        by_loops = terms is not None and uses_loops(terms) and not exact
        estimates = _estimates_by_loops(inputs, mask, both) if by_loops else _estimates(inputs, mask, base, both, exact)
        spread, whole, left, drawn = estimates
        lib: Any = np if isinstance(estimates, np.ndarray) else torch
        at_least: Any = np.maximum if lib is np else torch.clamp
        quantile = _student_t(self.config.delta, None) if exact else _quantiles(self.config.delta, drawn, base)
        # Sampling with replacement would need n0 draws; without, n0 / (1 + n0 / rest) are enough.
        with_replacement = (quantile * spread * left / at_least(self.config.epsilon * whole, 1e-30)) ** 2
        needed = with_replacement / (1 + with_replacement / at_least(left, 1))
        # At least one draw wherever a key is left: otherwise that key could never be attended, a bias.
        draws = lib.minimum(at_least(lib.ceil(lib.nan_to_num(needed)), 1), left)
        return torch.as_tensor(draws).long()


def _estimates(inputs: AttentionInputs, mask: Mask, base: Mask, both: Mask, exact: bool) -> Any:
    """Of each row the terms' standard deviation, the softmax denominator (both relative to the same term), keys left, base
    samples: float64 (4, B, H, Q), on a device four tensors, the samples as integers."""
    heads = inputs.shape[1]
    static, scores = inputs.log_mass(mask), inputs.scores_at(base)
    top = inputs.highest() if exact else torch.maximum(static, scores.amax(-1))
    top = top.masked_fill(top == NEVER, 0.0)
    samples, counts = (scores - top.unsqueeze(-1)).exp_(), expand_heads(base.counts(), heads)
    rest = expand_heads(inputs.left(mask), heads) - counts
    if exact:
        outside = expand_heads(both.residual(inputs.allowed), heads)
        mean, variance, _ = _moments((inputs.scores() - top.unsqueeze(-1)).exp() * outside, outside, rest)
    else:
        mean, variance, error = _moments(samples, scores > NEVER, counts)
        variance = variance + error
    total = (static - top).exp() + samples.sum(-1) + mean * rest
    if inputs.sinks is not None:  # they are part of the denominator, and known exactly
        total = total + (inputs.sinks.to(top.dtype).view(1, -1, 1) - top).clamp(max=80.0).exp()
    estimates = [t.double() for t in (variance.sqrt(), total, rest)]  # in float64 no square overflows
    if top.device.type != "cpu":
        return *estimates, counts
    return torch.stack([*estimates, counts.double()]).numpy()  # a few numbers per row take NumPy a fraction of torch's time


def _estimates_by_loops(inputs: AttentionInputs, mask: Mask, both: Mask) -> np.ndarray:
    """`_estimates` in one walk over the lists, where terms of the scores are known."""
    from ..loops.moments import estimate_mass

    out = np.empty((4, *inputs.shape[:3]))
    sinks = np.full(inputs.shape[1], -np.inf) if inputs.sinks is None else inputs.sinks.double()
    lists = inputs.layout.row_lengths, both.lists()[:2], mask.counts()
    estimate_mass(*as_arrays(*lists, tuple(inputs.known())[:3], sinks, out))
    return out


def _moments(terms: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and the variance's standard error, (B, H, Q), of each row's valid terms.

    terms: (B, H, Q, K), 0 where not valid. counts: valid terms of each row, (B, H, Q).
    """
    count = counts.clamp(min=1)
    mean = terms.sum(-1) / count
    square = (terms - mean.unsqueeze(-1)).mul_(valid).square_()
    variance = square.sum(-1) / (counts - 1).clamp(min=1)
    fourth = square.square_().sum(-1) / count
    return mean, variance, ((fourth - variance.square()).clamp(min=0) / count).sqrt()


def _quantiles(delta: float, samples: Any, base: Mask) -> Any:
    """`_student_t` for numbers of samples (B, H, Q) in lists of a base, often the same for all rows; a tensor if samples are one."""
    if isinstance(samples, Tensor):
        return _table(delta, 1 << base.lists().indices.shape[-1].bit_length(), samples.device)[samples]
    freedoms = samples - 1
    least, most = int(freedoms.min()), int(freedoms.max())
    if least == most:
        return _student_t(delta, max(least, 1))
    known, which = np.unique(freedoms, return_inverse=True)
    return np.array([_student_t(delta, max(int(freedom), 1)) for freedom in known])[which].reshape(freedoms.shape)


@lru_cache(maxsize=64)
def _table(delta: float, length: int, device: torch.device) -> Tensor:
    """`_student_t` for 0 up to length - 1 samples, on the device."""
    from scipy import special

    with torch.inference_mode(False):
        return torch.from_numpy(special.stdtrit(np.arange(-1, length - 1).clip(1), 1 - delta / 2)).to(device)


@lru_cache(maxsize=4096)
def _student_t(delta: float, freedom: int | None) -> float:
    """Two-sided quantile: P(|T| > t) = delta. freedom None = the normal distribution."""
    from scipy import special

    tail = 1 - delta / 2
    return float(special.ndtri(tail) if freedom is None else special.stdtrit(freedom, tail))


if __name__ == "__main__":
    draw_example("adaptive_sampling")
