"""Traces: one dense run of a sample, recorded to try sparse attentions on it without the model.

A trace is a folder: `layer_NNN.safetensors` for every recorded layer and `trace.json`, written last,
with its inputs and the SHA-256 of each file. Layers are read one by one: on a CPU replay holds one in memory.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attention import dense_attention
from ..errors import UserError
from ..maskers.context_summary import ContextSummary
from ..maskers.inputs import AttentionInputs
from ..maskers.shared_states import SharedStates
from .load import LanguageModel
from .observer import Observer

if TYPE_CHECKING:
    from .session import Prefilled

FORMAT = 1
META = "trace.json"
_SEEN = "seen."  # before the names of a summary's tensors
#: {layer: (queries, new keys, new values) of each call}
_Calls = dict[int, list[tuple[Tensor, Tensor, Tensor]]]


@dataclass(frozen=True)
class TraceLayer:
    """One layer of a trace: queries (1, H, R, D), after RoPE, of the last R positions; keys and values
    (1, Hkv, N, D) of the context and those rows; dense (1, R, H, D), their dense output in float32; softcap and sinks (H,): see
    AttentionInputs; summary: what the context's prefill saw, under "decode" with the question."""

    layer_idx: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    dense: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    summary: ContextSummary | None = None


@dataclass(frozen=True)
class TraceLayers:
    """Layers of a trace that are alike, side by side: queries (L, H, R, D), keys and values (L, Hkv, N, D), dense (L, R, H, D); the
    other fields are those of TraceLayer, one for all but for the summaries."""

    layers: tuple[int, ...]
    queries: Tensor
    keys: Tensor
    values: Tensor
    dense: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    summaries: tuple[ContextSummary | None, ...]

    @staticmethod
    def of(each: Sequence[TraceLayer]) -> TraceLayers:
        """Of a single layer the same tensors, else a copy."""
        first, tensors = each[0], zip(*((layer.queries, layer.keys, layer.values, layer.dense) for layer in each), strict=True)
        queries, keys, values, dense = (own[0] if len(own) == 1 else torch.cat(own) for own in tensors)
        layers, summaries = tuple(layer.layer_idx for layer in each), tuple(layer.summary for layer in each)
        return TraceLayers(layers, queries, keys, values, dense, first.scaling, first.softcap, first.sinks, summaries)

    def layer(self, index: int) -> TraceLayer:
        """The layer at this index, as views."""
        queries, keys, values, dense = (
            tensor[index : index + 1] for tensor in (self.queries, self.keys, self.values, self.dense)
        )
        about = self.scaling, self.softcap, self.sinks, self.summaries[index]
        return TraceLayer(self.layers[index], queries, keys, values, dense, *about)


def are_alike(one: TraceLayer, other: TraceLayer) -> bool:
    """Whether two layers can be side by side. Kernels take one number per head as sinks, for all items, and one rule of scores."""
    pairs = (one.queries, other.queries), (one.keys, other.keys), (one.values, other.values)
    same_shapes = all(own.shape == others.shape and own.dtype == others.dtype for own, others in pairs)
    same_rule = (one.scaling, one.softcap) == (other.scaling, other.softcap) and one.sinks is None and other.sinks is None
    return same_shapes and same_rule


class Trace:
    """A recorded dense run. `rows` query rows (question and answer, up to EOS) follow `context_length` context tokens."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.key: str = meta["key"]
        self.layers: list[int] = meta["layers"]
        self.context_length: int = meta["context_length"]
        self.rows: int = meta["rows"]
        self.answer_ids: list[int] = meta["answer_ids"]
        self.nbytes: int = meta["bytes"]
        self.observed: frozenset[str] = frozenset(meta.get("observed", ()))

    @staticmethod
    def open(folder: Path) -> Trace | None:
        """The trace in a folder, every file checked against its hash; None if there is none or it is damaged."""
        try:
            meta = json.loads((folder / META).read_text())
            intact = meta["format"] == FORMAT and all(
                _sha256(folder / name) == digest for name, digest in meta["files"].items()
            )
            return Trace(folder, meta) if intact else None
        except (OSError, ValueError, KeyError):
            return None

    def layer(self, layer_idx: int, device: torch.device | str = "cpu") -> TraceLayer:
        """Read one layer; on a CPU its tensors are views of the mapped file."""
        with safe_open(self.folder / _layer_file(layer_idx), framework="pt", device=str(device)) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        scaling, softcap = self.meta["scaling"][str(layer_idx)], self.meta.get("softcap", {}).get(str(layer_idx))
        recorded = {name.removeprefix(_SEEN): tensors.pop(name) for name in list(tensors) if name.startswith(_SEEN)}
        summary = None
        if self.observed:
            seen = tuple(self.meta["question_ids"] if self.meta["sparse_from"] == "decode" else ())
            summary = ContextSummary(self.observed, self.context_length + len(seen), scaling, softcap, seen, **recorded)
        return TraceLayer(layer_idx, scaling=scaling, softcap=softcap, summary=summary, **tensors)

    def side_by_side(
        self,
        layers: Sequence[int],
        device: torch.device | str,
        at_once: Callable[[TraceLayer], int],
        rule: Callable[[int], object],
        held: HeldLayers | None = None,
    ) -> Iterator[TraceLayers]:
        """The layers in this order. Those that follow each other, are alike and have equal rules come side by side, at most
        `at_once(the first)` of them."""
        group, limit = list[TraceLayer](), 1

        def joined() -> TraceLayers:
            together = TraceLayers.of(group) if held is None else held.together(self, group)
            group.clear()  # what was read need not stay beside its copy
            return together

        for layer_idx in layers:
            layer = self.layer(layer_idx, device) if held is None else held.layer(self, layer_idx, device)
            if group and not (are_alike(group[0], layer) and rule(group[0].layer_idx) == rule(layer_idx)):
                yield joined()
            limit = limit if group else at_once(layer)
            group.append(layer)
            del layer  # the caller's group is all that stays
            if len(group) >= limit:
                yield joined()
        if group:
            yield joined()

    def prefilled(self, lm: LanguageModel, room: int, states: SharedStates | None = None) -> Prefilled | None:
        """The context's KV cache rebuilt from the trace, instead of prefilling again; None if the trace
        lacks layers. states: masker states to share with replays of this trace."""
        from .session import Prefilled

        if len(self.layers) != lm.num_layers:
            return None
        cache, summaries = lm.new_cache(self.context_length + room), {}
        for index, layer in enumerate(cache.layers):
            stored = self.layer(index, lm.device)
            if stored.summary is not None:
                summaries[index] = stored.summary
            layer.update(stored.keys[:, :, : self.context_length], stored.values[:, :, : self.context_length])
        learned = SharedStates() if states is None else states
        about = {"name": self.key, "text_length": self.meta.get("text_length", 0), "observed": self.observed}
        return Prefilled(cache, self.context_length, 0.0, learned=learned, summaries=summaries, **about)


class HeldLayers:
    """Layers of traces that stay on a device from one replay to the next, as many as `limit_bytes` hold.

    A search reads the same layers in the same order in each pass, so what is held is never dropped for what comes later: a cache of
    the latest ones would hold nothing that the next pass begins with. Layers that are read side by side are held so; by itself, each
    of them is a view.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._held: dict[tuple[Trace, int], TraceLayer] = {}
        self._together: dict[tuple[Trace, tuple[int, ...]], TraceLayers] = {}

    def layer(self, trace: Trace, layer_idx: int, device: torch.device | str) -> TraceLayer:
        """As `Trace.layer`."""
        name = trace, layer_idx
        if name in self._held:
            return self._held[name]
        found, size = trace.layer(layer_idx, device), (trace.folder / _layer_file(layer_idx)).stat().st_size
        if size <= self._left:
            self._left -= size
            self._held[name] = found
        return found

    def together(self, trace: Trace, layers: Sequence[TraceLayer]) -> TraceLayers:
        """As `TraceLayers.of`. Held layers stay side by side from then on, unless one of them is so with others."""
        numbers = tuple(layer.layer_idx for layer in layers)
        if (trace, numbers) in self._together:
            return self._together[trace, numbers]
        found = TraceLayers.of(layers)
        taken = {number for other, known in self._together if other is trace for number in known}
        several = 1 < len(numbers) == len(set(numbers))
        if several and taken.isdisjoint(numbers) and all((trace, number) in self._held for number in numbers):
            self._together[trace, numbers] = found
            self._held |= {(trace, number): found.layer(index) for index, number in enumerate(numbers)}
        return found


def trace_key(lm: LanguageModel, context_ids: list[int], question_ids: list[int], max_new_tokens: int, sparse_from: str) -> str:
    """A hash of everything that determines a trace except the layers kept."""
    device = [str(lm.dtype), lm.device.type, lm.dense_backend]
    parts = [FORMAT, lm.weights_fingerprint, device, context_ids, question_ids, max_new_tokens, sparse_from]
    if lm.length_dependent:
        parts.append("rotary factors of the whole text")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def layer_bytes(lm: LanguageModel, tokens: int, rows: int) -> int:
    """Bytes of one layer of a trace with keys and values of `tokens`, queries and outputs of `rows`."""
    from .probe import layer_calls

    number = lm.dtype.itemsize
    return max(
        call.token_numbers * tokens * number + call.heads * rows * (call.key_width * number + call.value_width * 4)
        for call in layer_calls(lm).values()
        if not call.rule.limited
    )


def record_trace(
    lm: LanguageModel,
    context_ids: list[int],
    question_ids: list[int],
    max_new_tokens: int,
    folder: Path,
    *,
    sparse_from: str = "question",
    layers: list[int] | None = None,
    observe: Collection[str] = (),
) -> Trace:
    """Answer a sample densely and record it under `folder`. Recording stops at EOS.

    observe: what to record of the context's queries, see `prefill`; UserError if the model does not permit it.
    layers: which to keep; None = all that can be sparse. Under "decode" only answer rows are recorded; an
    answer of one token then has none: `rows` is 0 and there are no layers. UserError if no layer can be
    sparse. Removes half-written traces: no other process may be recording this one.
    """
    from .session import answer, prefill, sparse_layers

    kept = set(sparse_layers(lm) if layers is None else layers)
    calls: _Calls = defaultdict(list)
    scores: dict[int, dict[str, Any]] = {}
    question: Observer | None = None

    def record(*, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, result: None, step: int, **about: Any) -> None:
        if layer_idx in kept:
            new = slice(-queries.shape[2], None)
            wanted = queries[:, :, :0] if step == 0 and sparse_from == "decode" else queries
            calls[layer_idx].append((wanted.clone(), keys[:, :, new].clone(), values[:, :, new].clone()))
            scores[layer_idx] = about  # scaling, and softcap and sinks where the layer has them
            if question is not None and step == 0:
                question.see(AttentionInputs(queries, keys, values, layer_idx=layer_idx, **about))

    prefilled = prefill(lm, context_ids, len(question_ids) + max_new_tokens, observe)
    if prefilled.problem is not None:
        raise UserError(prefilled.problem)
    if prefilled.observed and sparse_from == "decode":
        question = Observer(lm.model, prefilled.observed, prefilled.summaries)
        prefilled.summaries = question.named(question_ids)
    reply = answer(lm, prefilled, question_ids, None, max_new_tokens, recorder=record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        meta = {
            "format": FORMAT,
            "key": trace_key(lm, context_ids, question_ids, max_new_tokens, sparse_from),
            **_write_layers(building, prefilled, calls, scores),
            "model": lm.id,
            "dtype": str(lm.dtype),
            "context_length": len(context_ids),
            "question_ids": question_ids,
            "answer_ids": reply.token_ids,
            "answer": reply.text,
            "stopped": reply.stopped,
            "sparse_from": sparse_from,
            "text_length": prefilled.text_length,
            "observed": sorted(prefilled.observed),
        }
        (building / META).write_text(json.dumps(meta))
        if folder.exists():  # another process may be reading it: the files that it has open stay readable
            os.replace(folder, building.with_suffix(".old"))
        os.replace(building, folder)
        shutil.rmtree(building.with_suffix(".old"), ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Trace(folder, meta)


def _write_layers(folder: Path, prefilled: Prefilled, calls: _Calls, scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Save the layers that have queries, one at a time in memory; returns their part of `trace.json`."""
    about: dict[str, Any] = {"files": {}, "scaling": {}, "softcap": {}, "bytes": 0, "rows": 0, "layers": []}
    for layer_idx, parts in sorted(calls.items()):
        queries, *new = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
        if queries.shape[2] == 0:
            continue
        keys, values = (torch.cat(pair, 2) for pair in zip(prefilled.context_keys(layer_idx), new, strict=True))
        own = scores[layer_idx]
        dense = dense_attention(queries, keys, values, **own).float()
        tensors = {"queries": queries, "keys": keys, "values": values, "dense": dense}
        if "sinks" in own:
            tensors["sinks"] = own["sinks"]
        if layer_idx in prefilled.summaries:
            tensors |= {_SEEN + name: tensor for name, tensor in prefilled.summaries[layer_idx].tensors().items()}
        path = folder / _layer_file(layer_idx)
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:  # a full disk, which safetensors only has in its text
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from None
        about["files"][path.name] = _sha256(path)
        about["scaling"][str(layer_idx)] = own["scaling"]
        if "softcap" in own:
            about["softcap"][str(layer_idx)] = own["softcap"]
        about["layers"].append(layer_idx)
        about["bytes"] += path.stat().st_size
        about["rows"] = queries.shape[2]
    return about


def _layer_file(layer_idx: int) -> str:
    return f"layer_{layer_idx:03d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
