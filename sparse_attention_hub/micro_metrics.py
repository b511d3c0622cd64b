"""Density, error and KV bytes of each sparse attention call, as one answer is generated.

    recorder = MetricRecorder("sample")
    answer(lm, prefilled, question_ids, attention, 32, recorder=recorder)
    recorder.density, recorder.error
    for record in expand_records(recorder.calls(), sample="ruler/1024/vt:17"): ...   # lines of micro_metrics.jsonl

The error needs a second, dense attention on the same inputs. Mode "full" computes it for all query
rows, "off" for none. "sample" takes every eighth row, shifted by one from layer to layer: all
layers and positions are covered alike, so the mean over these rows estimates the mean over all.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import AttentionResult

Mode = Literal["off", "sample", "full"]

#: Mode "sample" measures one in so many rows.
SAMPLE_EVERY = 8
#: Records kept per answer. At the limit every second one is dropped, so that they still span the
#: whole answer; means count all calls.
MAX_CALLS = {"off": 0, "sample": 64, "full": 16384}
#: Calls whose figures may wait on the device to be read.
MAX_PENDING = 1024


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


class _Call(NamedTuple):
    """length: query rows; measured: those whose error was. figures: density, error and kv_fraction, floats or on the device."""

    layer_idx: int
    step: int
    length: int
    measured: int
    figures: tuple[float | Tensor, ...]
    seconds: float


class Meter(ABC):
    """A recorder of figures alone: it can be given those of a decode step when the step is done."""

    @abstractmethod
    def due(self, layer_idx: int, total: int, length: int) -> list[int]:
        """The rows of a layer's call that are measured, of the last `length` of `total` tokens."""

    @abstractmethod
    def add(self, layer_idx: int, step: int, length: int, measured: int, figures: tuple[float | Tensor, ...]) -> None:
        """Record a call of `length` rows. figures: density, error over the measured rows, kv_fraction; maybe on a device."""


class MetricRecorder(Meter):
    """Records the sparse calls of one answer: pass a new one to each `answer` or `forced` (`recorder=`).

    mode: "off", "sample" or "full"; UserError for another. MAX_CALLS says how many calls are kept as records.
    """

    def __init__(self, mode: Mode = "sample") -> None:
        if mode not in get_args(Mode):
            raise UserError(f"micro_metrics must be off, sample or full, got {mode!r}", "micro_metrics")
        self.mode: Mode = mode
        self.every = 1 if mode == "full" else SAMPLE_EVERY
        self._density, self._error = _Mean(), _Mean()
        self._calls: list[list[Any]] = []
        self._pending: list[_Call] = []
        self._seen = 0
        self._stride = 1  # every so many calls are kept

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
        **scores: Any,
    ) -> None:
        """Record one call. queries: (1, H, Q, D), the last Q positions of keys and values
        (1, Hkv, N, D). result: None for dense attention, which is not recorded. scores: softcap and sinks of the layer."""
        rows = self.due(layer_idx, keys.shape[2], queries.shape[2])
        if result is None or not rows:
            return
        error = _error_of_rows(result.unrounded, queries, keys, values, rows, scaling=scaling, **scores)
        self.add(layer_idx, step, queries.shape[2], len(rows), (result.density_share, error, result.kv_share))

    def due(self, layer_idx: int, total: int, length: int) -> list[int]:
        """Those whose (position + layer) is a multiple of `every`."""
        start = (-(total - length) - layer_idx) % self.every
        return [] if self.mode == "off" else list(range(start, length, self.every))

    def add(self, layer_idx: int, step: int, length: int, measured: int, figures: tuple[float | Tensor, ...]) -> None:
        self._pending.append(_Call(layer_idx, step, length, measured, figures, round(time.time(), 3)))
        if len(self._pending) >= MAX_PENDING:
            self._settle()

    def _settle(self) -> None:
        """Add the calls since the last time. Their figures may be on a GPU: reading them together is one wait for all."""
        pending, self._pending = self._pending, []
        for call, (density, error, kv_fraction) in zip(pending, _read([call.figures for call in pending]), strict=True):
            self._density.add(density, call.length)
            self._error.add(error, call.measured)
            if self._seen % self._stride == 0 and len(self._calls) >= MAX_CALLS[self.mode]:
                self._calls = self._calls[::2]
                self._stride *= 2
            if self._seen % self._stride == 0 and MAX_CALLS[self.mode]:
                finite = [value if math.isfinite(value) else None for value in (density, error, kv_fraction)]
                self._calls.append([call.layer_idx, call.step, *finite, call.seconds])
            self._seen += 1

    @property
    def density(self) -> float | None:
        """Mean over the rows of all recorded calls; None without one."""
        self._settle()
        return self._density.value

    @property
    def error(self) -> float | None:
        """Mean of ||O_sparse - O_dense|| / ||O_dense|| over layers, heads and the rows measured; None without one."""
        self._settle()
        return self._error.value

    def calls(self) -> list[list[Any]]:
        """The calls kept: [layer, step, density, error, kv_fraction, unix time]."""
        self._settle()
        return list(self._calls)


def expand_records(calls: Sequence[Sequence[Any]], sample: str) -> Iterator[dict[str, Any]]:
    """The records of micro_metrics.jsonl, up to three per call: timestamp (ISO, UTC), metric,
    value, metadata.layer_idx, location, sample id and step (0 = the question, then one per token)."""
    location = "sparse_attention_hub.attention.ResearchAttention.__call__"
    for layer_idx, step, *figures, seconds in calls:
        moment = datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="milliseconds")
        call = {"metadata": {"layer_idx": layer_idx}, "location": location, "sample": sample, "step": step}
        for name, value in zip(("density", "output_error", "kv_fraction"), figures, strict=True):
            if value is not None:
                yield {"timestamp": moment, "metric": f"research_attention_{name}", "value": value} | call


def _read(figures: list[tuple[float | Tensor, ...]]) -> list[list[float]]:
    """The figures as floats, with one transfer from a device."""
    from torch import Tensor, stack

    flat = [figure for row in figures for figure in row]
    held = [figure for figure in flat if isinstance(figure, Tensor)]
    found = iter(stack([figure.to(held[0].device) for figure in held]).tolist() if held else [])
    numbers = [next(found) if isinstance(figure, Tensor) else figure for figure in flat]
    return [numbers[start : start + 3] for start in range(0, len(numbers), 3)]


def _error_of_rows(
    output: Tensor, queries: Tensor, keys: Tensor, values: Tensor, rows: list[int], **scores: Any
) -> float | Tensor:
    """Mean relative error of some query rows of output (1, Q, H, D) against dense attention in float32; off the CPU a float64
    number on the device."""
    import torch

    from .attention import dense_attention, relative_error

    length, total = queries.shape[2], keys.shape[2]
    index = torch.tensor(rows, device=queries.device)
    mask = (torch.arange(total, device=queries.device) <= (total - length + index)[:, None])[None, None]
    dense = dense_attention(queries[:, :, index], keys, values, None if length == 1 else mask, **scores)
    error = relative_error(output[:, index], dense).nanmean()
    return float(error) if error.device.type == "cpu" else error.double()
