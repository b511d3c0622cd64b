"""Decode steps of a batch on a GPU as one CUDA graph: the host starts it, in place of thousands of operations."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from .grouped_rows import Totals, can_group
from .lockstep import Lockstep, Row

logger = logging.getLogger(__name__)

#: Steps that the same rows take before a graph is made of one: making it takes as long as two.
STEPS_BEFORE = 2


class StepGraphs:
    """The steps of a batch that decodes. While its rows stay the same, a graph of one step serves all: the step is open, it runs as
    it is for any number of tokens (maskers/open_layout.py). A graph is used only if it gave again what its step gave.

    Steps stay as they are on a CPU, with the environment variable SPARSE_ATTENTION_HUB_CUDA_GRAPHS=0, and for batches that
    `_can_be_graphs` refuses.
    """

    #: A graph failed in this process: no more are made.
    failed = False

    def __init__(self, batch: Lockstep) -> None:
        self.batch = batch
        self._rows: list[Row] = []
        self._steps = 0  # of these rows
        self._allowed = False
        self._graph: _StepGraph | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (rows, 1, V) of ids (rows, 1), valid until the next call."""
        batch = self.batch
        first = not self._rows  # it adds the question's codes to states that lack them
        if len(self._rows) != len(batch.rows) or any(a is not b for a, b in zip(self._rows, batch.rows, strict=True)):
            self._rows, self._steps, self._graph = list(batch.rows), 0, None
            self._allowed = not first and _can_be_graphs(batch)
        elif self._steps == 1 and not self._allowed:
            self._allowed = _can_be_graphs(batch)
        self._steps += 1
        if not self._allowed:
            if batch.end is not None:
                batch.open(None)
            return batch.forward(ids, 1)
        if batch.end is None:
            batch.open(torch.tensor(batch.prefilled.cache.get_seq_length(), device=ids.device))
        if self._graph is not None:
            logits, totals = self._graph.run(ids)
        else:
            logits, totals = batch.step_open(ids), batch.totals
            if self._steps > STEPS_BEFORE and not StepGraphs.failed:
                self._graph = _make_graph(batch, ids, logits)
        for layer in batch.prefilled.cache.attention:
            layer.tail_length += 1
        for own in totals:
            own.add_to(batch.rows)
        return logits


class _StepGraph:
    """A graph of an open step: from ids, counts and keys that stay at their places, to logits and totals at theirs."""

    def __init__(self, batch: Lockstep, ids: Tensor) -> None:
        self._ids, self._graph = ids.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = batch.step_open(self._ids)
        self._totals = batch.totals

    def run(self, ids: Tensor) -> tuple[Tensor, list[Totals]]:
        self._ids.copy_(ids)
        self._graph.replay()
        kept = (own._replace(densities=own.densities.clone(), kv_fractions=own.kv_fractions.clone()) for own in self._totals)
        return self._logits, list(kept)


def _make_graph(batch: Lockstep, ids: Tensor, logits: Tensor) -> _StepGraph | None:
    """A graph of the step that just gave these logits for these ids; None if there is none that gives them again."""
    assert batch.end is not None
    end = batch.end.clone()
    try:
        graph = _StepGraph(batch, ids)
        batch.end -= 1
        again, _ = graph.run(ids)
        scale = float(logits.abs().max())
        if torch.allclose(again, logits, rtol=1e-3, atol=1e-3 * scale):
            return graph
        problem = f"logits differ by {float((again - logits).abs().max()):.3g} of {scale:.3g}"
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    batch.end.copy_(end)
    StepGraphs.failed = True
    logger.warning("decode steps stay as they are, a CUDA graph of one failed (%s)", problem)
    return None


def _can_be_graphs(batch: Lockstep) -> bool:
    """Whether nothing in the batch's steps depends on a number of the host: several sparse rows, none recorded, of maskers with
    `in_graphs` in all layers; layers that attend to all keys and are on one device; positions that the model is given."""
    lm, cache = batch.lm, batch.prefilled.cache
    if os.environ.get("SPARSE_ATTENTION_HUB_CUDA_GRAPHS") == "0" or StepGraphs.failed or lm.device.type != "cuda":
        return False
    sparse = [row.memory.attention for row in batch.rows if row.memory is not None]
    fits = (
        len(sparse) > 1
        and not any(row.recorders for row in batch.rows)
        and all(masker.in_graphs for attention in sparse for masker in attention.maskers)
        and not any(attention.config.dense_layers or not attention.maskers for attention in sparse)
        and not cache.recurrent
        and lm.keeps_logits
        and lm.takes_positions
        and not lm.length_dependent
    )
    layers = [(cache.layers[layer_idx], call.rule) for layer_idx, call in batch.layers.items()]
    return fits and all(
        layer.device == lm.device
        and layer.forks > 1
        and not rule.limited
        and not rule.latent
        and can_group(attention.config.backend, torch.empty(0, 0, 1, 0, device=lm.device), layer, rule)
        for layer, rule in layers
        for attention in sparse
    )
