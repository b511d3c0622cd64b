"""Decode steps of a batch on a GPU as one CUDA graph: the host starts it, in place of thousands of operations."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..micro_metrics import Meter
from .grouped_rows import Totals, can_group
from .lockstep import Lockstep, Row
from .open_steps import OpenLayerStep, OpenSteps

logger = logging.getLogger(__name__)

#: The environment variable that switches them off, if it is 0.
SWITCH = "SPARSE_ATTENTION_HUB_CUDA_GRAPHS"
#: Steps that the same rows take before a graph is made of one. Making it takes as long as two; so the number is doubled, up to the
#: most, whenever rows change before a graph has done as many.
STEPS_BEFORE, MOST_BEFORE = 2, 16
#: Tokens that open steps have room for, before they are opened again and get another graph. All scores are made for the room, too.
ROOM = 512


class StepGraphs:
    """The steps of a batch that decodes. While its rows stay the same, a graph of one step serves all: the step is open, it runs as
    it is for any number of tokens (maskers/open_layout.py). A graph is used once it gave what two steps gave, that which it was made
    of and the next one: then no number of the host is in it that changes.

    Steps stay as they are on a CPU, with SPARSE_ATTENTION_HUB_CUDA_GRAPHS=0 in the environment, and for batches that
    `_can_be_open` refuses.
    """

    def __init__(self, batch: Lockstep) -> None:
        self.batch = batch
        self._rows: list[Row] = []
        self._steps = 0  # of these rows, with this room
        self._before = STEPS_BEFORE
        self._graph: _StepGraph | None = None
        self._open = False

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (rows, 1, V) of ids (rows, 1), valid until the next call."""
        batch, known = self.batch, {id(row) for row in self._rows}
        if [id(row) for row in batch.rows] != [id(row) for row in self._rows]:
            # The first step of a row is closed: it adds codes that the row's states lack.
            self._open = known.issuperset(map(id, batch.rows)) and _can_be_open(batch)
            self._rows = list(batch.rows)
            if self._graph is not None and self._steps - self._before < self._before:
                self._before = min(2 * self._before, MOST_BEFORE)
            self._steps, self._graph = 0, None
        elif self._steps == 1 and not self._open:
            self._open = _can_be_open(batch)
        self._steps += 1
        return self._step_open(ids) if self._open else self._step_closed(ids)

    def _step_closed(self, ids: Tensor) -> Tensor:
        if self.batch.open_steps is not None:
            self.batch.open(None)
        return self.batch.forward(ids, 1)

    def _step_open(self, ids: Tensor) -> Tensor:
        batch, cache = self.batch, self.batch.prefilled.cache
        is_full = batch.open_steps is not None and cache.attention[0].total == cache.get_seq_length()
        if is_full:
            self._steps, self._graph = 1, None
        if batch.open_steps is None or is_full:
            batch.open(OpenSteps(batch, torch.tensor(cache.get_seq_length(), device=ids.device)), ROOM)
        assert batch.open_steps is not None
        if self._graph is not None and self._graph.is_tried:
            logits, totals, layers = self._graph.run(ids)
        else:
            logits, totals, layers = batch.step_open(ids), batch.totals, batch.open_steps.layers
            if self._graph is not None or self._steps == self._before:
                self._graph = _try_graph(self._graph, batch, ids, logits)
                self._open = self._graph is not None
        for layer in cache.attention:
            layer.tail_length += 1
        batch.count(totals)
        batch.open_steps.record(layers)
        return logits


class _StepGraph:
    """A graph of an open step: from ids, counts and keys that stay at their places, to logits and totals at theirs."""

    def __init__(self, batch: Lockstep, ids: Tensor) -> None:
        self._ids, self._graph, outside = ids.clone(), torch.cuda.CUDAGraph(), _Outside()
        stream = torch.cuda.Stream(ids.device)  # torch's own is one of the current device
        with (
            torch.cuda.device(ids.device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            outside,
        ):
            self._logits = batch.step_open(self._ids)
        assert batch.open_steps is not None
        self._totals, self._layers = batch.totals, batch.open_steps.layers
        self._read = outside.tensors, dict(batch.grouped.tables)  # the kernels read these
        self.is_tried = False

    def run(self, ids: Tensor) -> tuple[Tensor, list[Totals], list[OpenLayerStep]]:
        self._ids.copy_(ids)
        self._graph.replay()
        kept = (own._replace(densities=own.densities.clone(), kv_fractions=own.kv_fractions.clone()) for own in self._totals)
        return self._logits, list(kept), self._layers


class _Outside(TorchDispatchMode):
    """Collects the tensors that operations read and did not make. A graph knows where they lie and no more: they must stay alive,
    constants too that a cache of the library would drop."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[int, Tensor] = {}
        self._mark = object()  # of what is made inside; not this object, which constants that are kept would keep alive

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if getattr(tensor, "_made_in", None) is not self._mark:
                self.tensors[id(tensor)] = tensor
        found = function(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            if id(tensor) not in self.tensors:  # else it was changed in place
                tensor._made_in = self._mark  # type: ignore[attr-defined]
        return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _try_graph(graph: _StepGraph | None, batch: Lockstep, ids: Tensor, logits: Tensor) -> _StepGraph | None:
    """A new graph of the step that just gave these logits for these ids, or the one that was made of the step before. None if it
    does not give them again."""
    if not bool(logits.isfinite().all()):
        return None  # which is reported by who reads them
    assert batch.open_steps is not None
    end, is_new = batch.open_steps.end.clone(), graph is None
    try:
        graph = _StepGraph(batch, ids) if graph is None else graph
        batch.open_steps.end -= 1
        again = graph.run(ids)[0]
        scale, share = float(logits.abs().max()), max(1e-3, 4 * torch.finfo(logits.dtype).eps)
        if torch.allclose(again, logits, rtol=0, atol=share * scale):
            graph.is_tried = not is_new
            return graph
        problem = f"its logits differ by {float((again - logits).abs().max()):.3g} of {scale:.3g}"
    except torch.OutOfMemoryError:
        batch.open_steps.end.copy_(end)
        return None
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    batch.open_steps.end.copy_(end)
    batch.lm.graphs_failed = True
    logger.warning("a CUDA graph of a decode step failed, steps are done without one (%s)", problem)
    return None


def _can_be_open(batch: Lockstep) -> bool:
    """Whether nothing in the batch's steps depends on a number of the host: several sparse rows, of maskers with `in_graphs`,
    recorded by Meters alone; layers on one device; positions that the model is given."""
    lm, cache = batch.lm, batch.prefilled.cache
    if lm.graphs_failed or os.environ.get(SWITCH) == "0" or lm.device.type != "cuda":
        return False
    sparse = [row.memory.attention for row in batch.rows if row.memory is not None]
    layers = [(cache.layers[layer_idx], call.rule) for layer_idx, call in batch.layers.items()]
    return (
        len(sparse) > 1
        and all(isinstance(recorder, Meter) for row in batch.rows for recorder in row.recorders)
        and all(masker.in_graphs for attention in sparse for masker in attention.maskers)
        and not cache.recurrent
        and lm.keeps_logits
        and lm.takes_positions
        and not lm.length_dependent
        and all(layer.device == lm.device for layer, _ in layers)
        and all(
            can_group(attention.config.backend, layer.tails()[0][:, :, :1], layer, rule)
            for layer, rule in layers
            for attention in sparse
        )
    )
