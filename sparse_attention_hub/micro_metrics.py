"""Density, error and KV bytes of each sparse attention call, as one answer is generated.

    recorder = MetricRecorder("sample")
    answer(lm, prefilled, question_ids, attention, 32, recorder=recorder)
    recorder.error, recorder.layer_means()
    for record in expand_records(recorder.calls(), sample="ruler/1024/vt:17"): ...   # lines of micro_metrics.jsonl

The error needs a second, dense attention on the same inputs. "full" computes it for every query row; "sample" for every eighth
row of each layer, shifted by one from layer to layer, so that all layers and positions are covered alike and the mean over these
rows estimates the mean over all; "off" never.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import AttentionResult

Mode = Literal["off", "sample", "full"]

DENSITY = "research_attention_density"
ERROR = "research_attention_output_error"
KV_FRACTION = "research_attention_kv_fraction"
LOCATION = "sparse_attention_hub.attention.ResearchAttention.__call__"

#: Mode "sample" measures the error of one in so many rows.
SAMPLE_EVERY = 8
#: Calls kept as records of one answer. Above it every second one is dropped, so that all steps stay covered; means count all.
MAX_CALLS = {"off": 0, "sample": 64, "full": 16384}
#: Dense scores held at once: 128 MiB in float32.
_BLOCK_SCORES = 32 * 2**20


@dataclass
class _Mean:
    total: float = 0.0
    weight: int = 0

    def add(self, value: float, weight: int) -> None:
        if not math.isnan(value):  # NaN: no row of the call had an allowed key
            self.total += value * weight
            self.weight += weight

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class MetricRecorder:
    """Records the sparse calls of one answer: pass a new one to each `answer` or `forced` (`recorder=`).

    mode: "off", "sample" or "full". max_calls: calls kept as records, None = MAX_CALLS[mode].
    UserError for an unknown mode, ValueError for a negative bound.
    """

    def __init__(self, mode: Mode = "sample", *, max_calls: int | None = None) -> None:
        if mode not in get_args(Mode):
            raise UserError(f"--micro-metrics must be off, sample or full, got {mode!r}")
        if max_calls is not None and max_calls < 0:
            raise ValueError(f"max_calls must be >= 0, got {max_calls}")
        self.mode: Mode = mode
        self.every = 1 if mode == "full" else SAMPLE_EVERY
        self.max_calls = MAX_CALLS[mode] if max_calls is None else max_calls
        self._thin = 1  # every so many calls are kept
        self._calls: list[tuple[int, list[Any]]] = []
        self._seen = 0
        #: Means of density, error and KV fraction: of a layer, and of all.
        self._layers: defaultdict[int, tuple[_Mean, ...]] = defaultdict(_three_means)
        self._all = _three_means()

    def __call__(
        self,
        *,
        layer_idx: int,
        result: AttentionResult | None,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        step: int,
    ) -> None:
        """One call: queries (1, H, Q, D), the last Q positions of keys and values (1, Hkv, N, D). result None = dense."""
        if result is None or self.mode == "off":
            return
        length, total = queries.shape[2], keys.shape[2]
        start = (-(total - length) - layer_idx) % self.every  # rows whose (position + layer) is a multiple of `every`
        rows = list(range(start, length, self.every))
        if not rows:
            return
        error = _error_of_rows(result.output, queries, keys, values, scaling, rows)
        figures = (result.density, error, result.kv_fraction)
        weights = (length, len(rows), length)
        for mean, layer, value, weight in zip(self._all, self._layers[layer_idx], figures, weights, strict=True):
            mean.add(value, weight)
            layer.add(value, weight)
        finite = [value if math.isfinite(value) else None for value in figures]
        self._keep([layer_idx, step, *finite, round(time.time(), 3)])

    @property
    def density(self) -> float | None:
        """Mean over the rows of all recorded calls; None without one."""
        return self._all[0].value

    @property
    def error(self) -> float | None:
        """Mean of ||O_sparse - O_dense|| / ||O_dense|| over layers, heads and the rows measured; None without one."""
        return self._all[1].value

    @property
    def kv_fraction(self) -> float | None:
        return self._all[2].value

    def layer_means(self) -> dict[int, dict[str, float | None]]:
        """{layer: {"density", "error", "kv_fraction"}}."""
        return {
            layer: {"density": density.value, "error": error.value, "kv_fraction": kv_fraction.value}
            for layer, (density, error, kv_fraction) in sorted(self._layers.items())
        }

    def calls(self) -> list[list[Any]]:
        """The calls kept: [layer, step, density, error, kv_fraction, unix time], which `expand_records` expands."""
        return [call for _, call in self._calls]

    def _keep(self, call: list[Any]) -> None:
        number = self._seen
        self._seen += 1
        if len(self._calls) >= self.max_calls and number % self._thin == 0:
            self._thin *= 2
            self._calls = [entry for entry in self._calls if entry[0] % self._thin == 0]
        if self.max_calls and number % self._thin == 0:
            self._calls.append((number, call))


def _three_means() -> tuple[_Mean, ...]:
    return _Mean(), _Mean(), _Mean()


def expand_records(calls: Sequence[Sequence[Any]], sample: str) -> Iterator[dict[str, Any]]:
    """The records of micro_metrics.jsonl, up to three per call: timestamp (ISO, UTC), metric, value, metadata.layer_idx,
    location, and the sample's id and step (0 = the question, then one per token)."""
    for layer_idx, step, density, error, kv_fraction, seconds in calls:
        moment = datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="milliseconds")
        call = {"metadata": {"layer_idx": layer_idx}, "location": LOCATION, "sample": sample, "step": step}
        for metric, value in ((DENSITY, density), (ERROR, error), (KV_FRACTION, kv_fraction)):
            if value is not None:
                yield {"timestamp": moment, "metric": metric, "value": value} | call


def _error_of_rows(output: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, rows: list[int]) -> float:
    """Mean relative error of some query rows of output (1, Q, H, D) against dense attention in float32."""
    import torch

    from .attention import dense_attention

    length, total = queries.shape[2], keys.shape[2]
    at_once = max(1, _BLOCK_SCORES // (queries.shape[1] * total))
    positions = torch.arange(total, device=queries.device)
    errors = []
    for first in range(0, len(rows), at_once):
        index = torch.tensor(rows[first : first + at_once], device=queries.device)
        mask = None if length == 1 else (positions <= (total - length + index)[:, None])[None, None]
        dense = dense_attention(queries.index_select(2, index), keys, values, mask, scaling)
        difference = (output.index_select(1, index).to(dense.dtype) - dense).norm(dim=-1)
        errors.append((difference / dense.norm(dim=-1).clamp(min=1e-30)).flatten())
    return float(torch.cat(errors).nanmean())
