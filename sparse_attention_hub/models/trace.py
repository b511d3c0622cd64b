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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attention import dense_attention
from ..maskers.shared_states import SharedStates

if TYPE_CHECKING:
    from .load import LanguageModel
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
            if meta["format"] != FORMAT:
                return None
            intact = all(_sha256(folder / name) == digest for name, digest in meta["files"].items())
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
    place = [str(lm.dtype), lm.device.type, lm.dense_backend]
    parts = [FORMAT, weights_fingerprint(lm), place, context_ids, question_ids, max_new_tokens, sparse_from]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def weights_fingerprint(lm: LanguageModel) -> str:
    """A hash of the model's id and of a few numbers of every weight: a changed checkpoint under an old name is noticed."""
    known: str | None = getattr(lm, "_weights_fingerprint", None)
    if known is None:
        digest = hashlib.sha256(lm.id.encode())
        for name, weight in lm.model.named_parameters():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().flatten()[:8].float().cpu().numpy().tobytes())
        known = digest.hexdigest()[:20]
        object.__setattr__(lm, "_weights_fingerprint", known)
    return known


def layer_bytes(lm: LanguageModel, tokens: int, rows: int) -> int:
    """Bytes of one layer of a trace: keys and values of `tokens`, queries and float32 dense outputs of `rows` of them."""
    config = lm.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    number = torch.tensor([], dtype=lm.dtype).element_size()
    return int(width * (2 * kv_heads * tokens * number + heads * rows * (number + 4)))


def thinned_layers(num_layers: int, fit: int) -> list[int]:
    """`fit` of the layers, evenly spread; all of them if they fit."""
    if fit >= num_layers:
        return list(range(num_layers))
    return sorted({round(i * (num_layers - 1) / max(fit - 1, 1)) for i in range(fit)})


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
    there, and an answer of one token has no row (`rows` is 0, and there is no layer). Raises UserError if no layer can be
    sparse. Half-written traces that a kill left are removed: nobody else may be recording this one.
    """
    from .session import answer, prefill, sparse_layers

    recorder = _TraceRecorder(set(sparse_layers(lm) if layers is None else layers), skip_question=sparse_from == "decode")
    prefilled = prefill(lm, context_ids, len(question_ids) + max_new_tokens)
    reply = answer(lm, prefilled, question_ids, None, max_new_tokens, recorder=recorder)
    key = trace_key(lm, context_ids, question_ids, max_new_tokens, sparse_from)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        meta: dict[str, Any] = {
            "format": FORMAT,
            "key": key,
            "files": {},
            "scaling": {},
            "bytes": 0,
            "rows": 0,
            "layers": [],
        }
        for layer_idx, tensors, scaling in recorder.finish(prefilled):
            path = building / _layer_file(layer_idx)
            save_file(tensors, path)
            meta["files"][path.name] = _sha256(path)
            meta["scaling"][str(layer_idx)] = scaling
            meta["layers"].append(layer_idx)
            meta["bytes"] += path.stat().st_size
            meta["rows"] = tensors["queries"].shape[2]
        meta.update(
            model=lm.id,
            dtype=str(lm.dtype),
            context_length=len(context_ids),
            question_ids=question_ids,
            answer_ids=reply.token_ids,
            answer=reply.text,
            stopped=reply.stopped,
            sparse_from=sparse_from,
        )
        (building / META).write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return Trace(folder, meta)


class _TraceRecorder:
    """Collects each layer's queries and new keys of a dense answer; the context's keys stay in the cache until the end."""

    def __init__(self, layers: set[int], skip_question: bool) -> None:
        self._layers, self._skip_question = layers, skip_question
        self._queries: dict[int, list[Tensor]] = {}
        self._tails: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._scaling: dict[int, float] = {}

    def __call__(
        self, *, layer_idx: int, result: Any, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, step: int
    ) -> None:
        if layer_idx not in self._layers:
            return
        new = queries.shape[2]
        self._tails.setdefault(layer_idx, []).append((keys[:, :, -new:].clone(), values[:, :, -new:].clone()))
        self._scaling[layer_idx] = scaling
        if step > 0 or not self._skip_question:
            self._queries.setdefault(layer_idx, []).append(queries.clone())

    def finish(self, prefilled: Prefilled) -> Iterator[tuple[int, dict[str, Tensor], float]]:
        """(layer, tensors, scaling) one layer at a time, so that the trace is never in memory as a whole."""
        for layer_idx in sorted(self._queries):
            keys, values = prefilled.context_keys(layer_idx)
            keys = torch.cat([keys, *(k for k, _ in self._tails[layer_idx])], 2)
            values = torch.cat([values, *(v for _, v in self._tails[layer_idx])], 2)
            queries = torch.cat(self._queries[layer_idx], 2)
            scaling = self._scaling[layer_idx]
            dense = dense_attention(queries, keys, values, scaling=scaling)
            tensors = {"queries": queries, "keys": keys, "values": values, "dense": dense.float()}
            yield layer_idx, {name: t.contiguous().cpu() for name, t in tensors.items()}, scaling


def _layer_file(layer_idx: int) -> str:
    return f"layer_{layer_idx:03d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
