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
#: Steps that the same rows take before a graph is made of one: making it takes as long as two.
STEPS_BEFORE = 2


class StepGraphs:
    """The steps of a batch that decodes. While its rows stay the same, a graph of one step serves all: the step is open, it runs as
    it is for any number of tokens (maskers/open_layout.py). A graph is used only if it gave again what its step gave.

    Steps stay as they are on a CPU, with SPARSE_ATTENTION_HUB_CUDA_GRAPHS=0 in the environment, and for batches that
    `_can_be_open` refuses.
    """

    #: A graph failed in this process: no more are made.
    failed = False

    def __init__(self, batch: Lockstep) -> None:
        self.batch = batch
        self._rows: list[Row] = []
        self._steps = 0  # of these rows
        self._graph: _StepGraph | None = None
        self._open = False

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (rows, 1, V) of ids (rows, 1), valid until the next call."""
        batch, known = self.batch, {id(row) for row in self._rows}
        if [id(row) for row in batch.rows] != [id(row) for row in self._rows]:
            # The first step of a row is closed: it adds codes that the row's states lack.
            self._open = known.issuperset(map(id, batch.rows)) and _can_be_open(batch)
            self._rows, self._steps, self._graph = list(batch.rows), 0, None
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
        if batch.open_steps is None:
            batch.open(OpenSteps(batch, torch.tensor(cache.get_seq_length(), device=ids.device)))
        assert batch.open_steps is not None
        if self._graph is not None:
            logits, totals, layers = self._graph.run(ids)
        else:
            logits, totals, layers = batch.step_open(ids), batch.totals, batch.open_steps.layers
            if self._steps == STEPS_BEFORE:
                self._graph = _make_graph(batch, ids, logits)
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
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"), outside:
            self._logits = batch.step_open(self._ids)
        assert batch.open_steps is not None
        self._totals, self._layers, self._read = batch.totals, batch.open_steps.layers, outside.tensors

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


def _make_graph(batch: Lockstep, ids: Tensor, logits: Tensor) -> _StepGraph | None:
    """A graph of the step that just gave these logits for these ids; None if there is none that gives them again."""
    assert batch.open_steps is not None
    end = batch.open_steps.end.clone()
    try:
        graph = _StepGraph(batch, ids)
        batch.open_steps.end -= 1
        again = graph.run(ids)[0]
        scale = float(logits.abs().max())
        if torch.allclose(again, logits, rtol=1e-3, atol=1e-3 * scale):
            return graph
        problem = f"its logits differ by {float((again - logits).abs().max()):.3g} of {scale:.3g}"
    except torch.OutOfMemoryError:
        batch.open_steps.end.copy_(end)
        return None
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    batch.open_steps.end.copy_(end)
    StepGraphs.failed = True
    logger.warning("a CUDA graph of a decode step failed, steps are done without one (%s)", problem)
    return None


def _can_be_open(batch: Lockstep) -> bool:
    """Whether nothing in the batch's steps depends on a number of the host: several sparse rows, of maskers with `in_graphs`,
    recorded by Meters alone; layers on one device; positions that the model is given."""
    lm, cache = batch.lm, batch.prefilled.cache
    if StepGraphs.failed or os.environ.get(SWITCH) == "0" or lm.device.type != "cuda":
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
