"""SOCKET: the keys with the most soft collisions in hash tables, times their values' norms (https://arxiv.org/abs/2602.06283)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_flag, check_int, check_number, draw_example, register_masker
from .codes import sum_codes
from .inputs import AttentionInputs
from .magic_pig import BLOCK, pack_tables


@dataclass
class SocketConfig(TopKConfig):
    """heavy_size: see TopKConfig. lsh_l: hash tables. lsh_k: bits per table, 1 to 12: a query scores 2^lsh_k buckets of each.

    tau: temperature > 0; the smaller, the closer to a count of equal buckets. value_norm: multiply by ||v||, as the paper does.
    seed: of the projections; the layer's number is added.
    """

    lsh_l: int = 60
    lsh_k: int = 10
    tau: float = 0.4
    value_norm: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lsh_l = check_int("lsh_l", self.lsh_l, 1)
        self.lsh_k = check_int("lsh_k", self.lsh_k, 1, 12)
        self.tau = check_number("tau", self.tau, 0.0, 100.0, open_low=True)
        self.value_norm = check_flag("value_norm", self.value_norm)
        self.seed = check_int("seed", self.seed, 0)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        codes = {"lsh_l": Choice([20, 40, 60]), "lsh_k": Choice([6, 8, 10]), "tau": Choice([0.05, 0.1, 0.2, 0.4])}
        return super().get_search_space(task_name) | codes | {"value_norm": Choice([True, False])}


@register_masker(SocketConfig)
class SocketMasker(Masker[SocketConfig]):
    """In each table W a key k lies in the bucket of the signs of W k, b in {-1, 1}^lsh_k. A query q spreads a probability of 1
    over the buckets of a table: softmax over b of tanh(W q) . b / (tau sqrt(D)). A key's score is the sum over tables of its
    buckets' probabilities, times ||v||. Per query head and row, the `heavy_size` residual keys of highest score.

    The factor 1 / sqrt(D) is that of the authors' program, to which their values of tau belong. With a large tau the collisions of
    all keys are alike, and ||v|| decides: then `value_norm` = False may be better.
    The state holds a bucket per key and table. Norms of values are read from the values; a cache would hold one per key.
    """

    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("lsh_l", "lsh_k", "seed")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.choose_top(self._scores(inputs), mask, self.config.heavy_size))

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> Tensor:
        """The projections (D, lsh_l * lsh_k), table after table: of the seed and the layer alone."""
        generator = torch.Generator().manual_seed(self.config.seed + layer_idx)
        return torch.randn((keys.shape[3], self.config.lsh_l * self.config.lsh_k), generator=generator).to(keys.device)

    def join_fits(self, fits: list[Tensor]) -> Tensor:
        return torch.stack(fits).unsqueeze(1)

    def encode(self, keys: Tensor, fitted: Tensor, layer_idx: int) -> Tensor:
        """Buckets of keys (B, Hkv, n, D): (B, Hkv, n, L)."""
        step = max(1, BLOCK // (keys.shape[0] * keys.shape[1] * fitted.shape[-1]))
        parts = [pack_tables(part.float() @ fitted > 0, self.config.lsh_k) for part in torch.split(keys, step, 2)]
        return torch.cat(parts, 2)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = inputs.keys.element_size()
        bytes_per_key = self.config.lsh_l * self.config.lsh_k / 8 + (width if self.config.value_norm else 0)
        return bytes_per_key / (width * (inputs.keys.shape[3] + inputs.values.shape[3]))

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Soft collisions times ||v||, float32 (B, H, Q, N), -inf where not allowed."""
        projections, buckets = self.codes(inputs)
        batch, heads, rows, total = inputs.shape
        tables, bits, dim = self.config.lsh_l, self.config.lsh_k, inputs.queries.shape[3]
        queries = inputs.queries.float().reshape(batch, inputs.kv_heads, -1, dim)
        step = max(1, BLOCK // (batch * inputs.kv_heads * tables * 2**bits))  # rows whose tables fit into one temporary
        collisions = []
        for part in torch.split(queries, step, 2):
            soft = torch.tanh(part @ projections) / (self.config.tau * dim**0.5)
            collisions.append(sum_codes(bucket_probabilities(soft.unflatten(-1, (tables, bits))), buckets))
        scores = torch.cat(collisions, 2).view(batch, heads, rows, total)
        if self.config.value_norm:
            scores = scores * expand_heads(inputs.values.float().norm(dim=-1), heads).unsqueeze(2)
        return scores.masked_fill(~inputs.allowed, -torch.inf)


def bucket_probabilities(logits: Tensor) -> Tensor:
    """softmax over b in {-1, 1}^K of logits . b: (..., K) to (..., 2^K). Bit j of a bucket's number is 1 where b_j = 1.

    The softmax is a product over bits, as the exponential of a sum is: bit j is 1 with probability sigmoid(2 logits_j).
    """
    ones = torch.sigmoid(2 * logits)
    table = torch.ones_like(logits[..., :1])
    for bit in range(logits.shape[-1]):
        one = ones[..., bit : bit + 1]
        table = torch.cat([table * (1 - one), table * one], -1)
    return table


if __name__ == "__main__":
    draw_example("socket_lsh")
