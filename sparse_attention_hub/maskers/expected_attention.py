"""Expected Attention: the context's keys that later queries are expected to attend to (https://arxiv.org/abs/2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TopKConfig, draw_example, register_masker
from .context_summary import SINK_ROWS, ContextSummary
from .eviction import Eviction
from .layout import NEVER


@dataclass
class ExpectedAttentionConfig(TopKConfig):
    """heavy_size: keys of the context that each kv head keeps, int (tokens) or float (fraction of the context)."""


@register_masker(ExpectedAttentionConfig)
class ExpectedAttentionMasker(Eviction[ExpectedAttentionConfig]):
    """Later queries are taken to be normal, with the context's mean and covariance before the rotary embedding, rotated by the mean
    rotation of the next 512 positions: the expected exp(score) of a key k is exp(scaling mean.k + scaling^2 k.cov.k / 2).

    Importance: its share of all keys, mean over the heads of a group, times the norm of the value. The first 4 keys are kept first.
    """

    observes = ("statistics",)

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        assert summary.mean is not None and summary.value_norms is not None
        mean, covariance, turn = summary.mean, summary.covariance(), summary.rotation
        if turn is not None:
            mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        group = mean.shape[1] // keys.shape[1]
        left_out = ~allowed | (allowed.cumsum(-1) <= SINK_ROWS)
        shares = []
        for head in range(mean.shape[1]):
            own = keys[:, head // group] * summary.scaling  # (B, n, D)
            scores = (own @ mean[:, head, :, None])[..., 0] + ((own @ covariance[:, head]) * own).sum(-1) / 2
            shares.append(scores.masked_fill(left_out, NEVER).log_softmax(-1))
        # Logarithms, because most shares are below the smallest float32.
        expected = torch.stack(shares, 1).view(*keys.shape[:2], group, -1).logsumexp(2)
        expected += summary.value_norms[..., : keys.shape[2]].clamp(min=1e-30).log()
        return expected.masked_fill(left_out.unsqueeze(1), float("inf"))


if __name__ == "__main__":
    draw_example("expected_attention")
