"""Traces: one dense run of a sample, recorded so that any sparse attention can be tried on it without the model.

A trace is a folder: `layer_NNN.safetensors` for every recorded layer and `trace.json`, written last, with what made it and
the SHA-256 of each file. A layer is read on its own, so replaying holds one layer in memory however long the context.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attention import dense_attention
from ..maskers.shared_states import SharedStates
from ..replay import spread_rows
from .load import LanguageModel, head_shape

if TYPE_CHECKING:
    from .session import Prefilled

FORMAT = 1
META = "trace.json"


@dataclass(frozen=True)
class TraceLayer:
    """One layer of a trace: queries (1, H, R, D) after RoPE of the last R positions, keys and values (1, Hkv, N, D) of the
    context and those rows, dense (1, R, H, D) float32 the dense attention output of the same inputs."""

    layer_idx: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    dense: Tensor
    scaling: float


class Trace:
    """A recorded dense run. `rows` query rows (question and answer, up to EOS) follow `context_length` context tokens."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.key: str = meta["key"]
        self.layers: list[int] = meta["layers"]
        self.context_length: int = meta["context_length"]
        self.rows: int = meta["rows"]
        self.question_ids: list[int] = meta["question_ids"]
        self.answer_ids: list[int] = meta["answer_ids"]
        self.nbytes: int = meta["bytes"]

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
            tensors = {name: stored.get_tensor(name) for name in ("queries", "keys", "values", "dense")}
        return TraceLayer(layer_idx, scaling=self.meta["scaling"][str(layer_idx)], **tensors)

    def prefilled(self, lm: LanguageModel, room: int, states: SharedStates | None = None) -> Prefilled | None:
        """The context's KV cache rebuilt from the trace, instead of prefilling again; None if the trace lacks layers, thinned
        out or with a sliding window. states: masker states to share with replays of this trace."""
        from .cache import SharedPrefixCache
        from .session import Prefilled

        if len(self.layers) != lm.num_layers:
            return None
        cache = SharedPrefixCache(lm.num_layers, self.context_length + room)
        for index, layer in enumerate(cache.layers):
            stored = self.layer(index, lm.device)
            layer.update(stored.keys[:, :, : self.context_length], stored.values[:, :, : self.context_length])
        return Prefilled(cache, self.context_length, 0.0, learned=SharedStates() if states is None else states, name=self.key)


def trace_key(lm: LanguageModel, context_ids: list[int], question_ids: list[int], max_new_tokens: int, sparse_from: str) -> str:
    """A hash of everything that determines a trace but the layers kept."""
    device = [str(lm.dtype), lm.device.type, lm.dense_backend]
    parts = [FORMAT, lm.weights_fingerprint, device, context_ids, question_ids, max_new_tokens, sparse_from]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def layer_bytes(lm: LanguageModel, tokens: int, rows: int) -> int:
    """Bytes of one layer of a trace: keys and values of `tokens`, queries and float32 dense outputs of `rows` of them."""
    heads, kv_heads, dim = head_shape(lm.model.config.get_text_config(decoder=True))
    number = lm.dtype.itemsize
    return dim * (2 * kv_heads * tokens * number + heads * rows * (number + 4))


def thinned_layers(num_layers: int, fit: int) -> list[int]:
    """`fit` of the layers, evenly spread; all of them if they fit."""
    return spread_rows(num_layers, fit)


def record_trace(
    lm: LanguageModel,
    context_ids: list[int],
    question_ids: list[int],
    max_new_tokens: int,
    folder: Path,
    *,
    sparse_from: str = "question",
    layers: list[int] | None = None,
) -> Trace:
    """Answer a sample densely and record it under `folder`. Recording stops at EOS.

    layers: which to keep; None = all that can be sparse. Under "decode" only answer rows are recorded: the question is dense
    there, and an answer of one token has no row (`rows` is 0, and there is no layer). UserError if no layer can be sparse.
    Half-written traces of a killed run are removed: no other process may be recording this one.
    """
    from .session import answer, prefill, sparse_layers

    recorder = _TraceRecorder(set(sparse_layers(lm) if layers is None else layers), skip_question=sparse_from == "decode")
    prefilled = prefill(lm, context_ids, len(question_ids) + max_new_tokens)
    reply = answer(lm, prefilled, question_ids, None, max_new_tokens, recorder=recorder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        meta = {
            "format": FORMAT,
            "key": trace_key(lm, context_ids, question_ids, max_new_tokens, sparse_from),
            **recorder.write(building, prefilled),
            "model": lm.id,
            "dtype": str(lm.dtype),
            "context_length": len(context_ids),
            "question_ids": question_ids,
            "answer_ids": reply.token_ids,
            "answer": reply.text,
            "stopped": reply.stopped,
            "sparse_from": sparse_from,
        }
        (building / META).write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Trace(folder, meta)


class _TraceRecorder:
    """Collects queries, new keys and new values of a dense answer; the context's keys stay in the cache until `write`."""

    def __init__(self, layers: set[int], skip_question: bool) -> None:
        self._layers, self._skip_question = layers, skip_question
        self._calls: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._scaling: dict[int, float] = {}

    def __call__(
        self, *, layer_idx: int, result: Any, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, step: int
    ) -> None:
        if layer_idx not in self._layers:
            return
        new = queries.shape[2]
        if step == 0 and self._skip_question:
            queries = queries[:, :, :0]
        self._calls.setdefault(layer_idx, []).append((queries.clone(), keys[:, :, -new:].clone(), values[:, :, -new:].clone()))
        self._scaling[layer_idx] = scaling

    def write(self, folder: Path, prefilled: Prefilled) -> dict[str, Any]:
        """Save the layers that have queries, with one layer in memory at a time; returns what `trace.json` says about them."""
        about: dict[str, Any] = {"files": {}, "scaling": {}, "bytes": 0, "rows": 0, "layers": []}
        for layer_idx in sorted(self._calls):
            queries, *new = (torch.cat(parts, 2) for parts in zip(*self._calls[layer_idx], strict=True))
            if queries.shape[2] == 0:
                continue
            keys, values = (torch.cat(parts, 2) for parts in zip(prefilled.context_keys(layer_idx), new, strict=True))
            dense = dense_attention(queries, keys, values, scaling=self._scaling[layer_idx]).float()
            tensors = {"queries": queries, "keys": keys, "values": values, "dense": dense}
            path = folder / _layer_file(layer_idx)
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
            about["files"][path.name] = _sha256(path)
            about["scaling"][str(layer_idx)] = self._scaling[layer_idx]
            about["layers"].append(layer_idx)
            about["bytes"] += path.stat().st_size
            about["rows"] = queries.shape[2]
        return about


def _layer_file(layer_idx: int) -> str:
    return f"layer_{layer_idx:03d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
