"""What a decode step costs on a GPU may not grow: waits, operations and kernel launches, counted on the pretended device.

`python tests/gpu/test_budgets.py` counts them again, and writes budgets.json and the table of docs/gpu.md: after a change that
lowers them, after a new masker, or where a rise is worth its price.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines import NAMES, example, families, small_model
from pretend import PretendedGPU
from tiny_models import tokens

from sparse_attention_hub.maskers.call_cache import CallCache
from sparse_attention_hub.maskers.drawing import DIM, HEADS
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.layout import Layout
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.micro_metrics import MetricRecorder
from sparse_attention_hub.models import answer_many, prefill, step_graphs
from sparse_attention_hub.models.step_graphs import STEPS_BEFORE
from sparse_attention_hub.models.switch import SparseMeans
from sparse_attention_hub.models.trace import record_trace
from sparse_attention_hub.replay import replay

FILE, PAGE = Path(__file__).parent / "budgets.json", Path(__file__).parents[2] / "docs" / "gpu.md"
KEYS = 256
Counts = dict[str, int]


def of_call(name: str, rows: int) -> Counts:
    """One layer of one configuration: `rows` queries, with its share in the answer's density. A first layer has paid for what
    all layers of a pass share; 20 keys came since the state was fitted."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, rows), (1, KEYS), (1, KEYS))
    with PretendedGPU() as gpu, torch.no_grad():
        tensors = gpu.move([torch.randn(1, heads, length, DIM, generator=generator) for heads, length in shapes])
        attention, means = example(name), SparseMeans()
        state = attention.new_state()
        attention.prepare(tensors[1][:, :, : KEYS - 20], 0, state)
        layouts: dict[Hashable, Layout] = {}
        for _ in range(2):
            gpu.clear()
            inputs = AttentionInputs(*tensors, cache=CallCache(layouts=layouts))
            means.add(attention.attend_inputs(inputs, state), rows)
        return gpu.totals()


def of_step(ways: int, **about: bool) -> Counts:
    """A step of a model of 32 layers, see `of_step_of_layers`."""
    one, two = (
        of_step_of_layers(layers, ways, **about) for layers in (1, 2)
    )  # each further layer costs what the second one does
    return {kind: one[kind] + 31 * (two[kind] - one[kind]) for kind in one}


def of_step_of_layers(layers: int, ways: int, as_graphs: bool = True, measured: bool = False) -> Counts:
    """A decode step of dense attention and eight families in lockstep, of a model with so many layers; for more rows the families
    again. as_graphs: one of those that a graph does, else the open one that a graph is made of. measured: each call's error, too."""
    attentions = [None, *itertools.chain(*(families(layers) for _ in range(0, ways, 8)))][:ways]
    steps = (5, 5, 6) if as_graphs else (3, 3, 4)
    before = STEPS_BEFORE if as_graphs else 99
    with PretendedGPU() as gpu, mock.patch.object(step_graphs, "STEPS_BEFORE", before):
        lm = small_model(gpu, layers=layers)
        prefilled = prefill(lm, tokens(KEYS), 20)
        totals = []
        for length in steps:  # the first fits the states
            gpu.clear()
            recorders = [MetricRecorder("full") if measured else None for _ in attentions]
            answer_many(lm, prefilled, tokens(5, 2), attentions, length, recorders=recorders)
            totals.append(gpu.totals())
    return {kind: totals[2][kind] - totals[1][kind] for kind in totals[0]}


def without_graphs() -> Counts:
    with mock.patch.dict(os.environ, {step_graphs.SWITCH: "0"}):
        return of_step(9)


def of_replay(layers: int = 32) -> Counts:
    """A replay of eight families on so many layers, their states fitted. The layers are few enough keys to be one call."""
    attentions, states = families(layers), SharedStates()
    with tempfile.TemporaryDirectory() as folder:
        trace = record_trace(small_model(None, layers=layers), tokens(KEYS), tokens(5, 2), 6, Path(folder) / "trace")
        with PretendedGPU() as gpu:
            for _ in range(2):
                gpu.clear()
                replay(trace, attentions, device="cuda", states=states)
            return gpu.totals()


MEASURES: dict[str, Callable[[], Counts]] = {
    **{f"decode {name}": lambda name=name: of_call(name, 1) for name in NAMES},  # type: ignore[misc]
    "32 layers: step of a dense row": lambda: of_step(1),
    "32 layers: step of 9 rows": lambda: of_step(9),
    "32 layers: step of 41 rows": lambda: of_step(41),
    "32 layers: step of 41 rows, all errors measured": lambda: of_step(41, measured=True),
    "32 layers: a graph of 9 rows, inside": lambda: of_step(9, as_graphs=False),
    "32 layers: step of 9 rows without a graph": without_graphs,
    "32 layers: replay of 8 configurations": of_replay,
    **{f"question of 5 {name}": lambda name=name: of_call(name, 5) for name in NAMES},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_step_costs_more(name: str) -> None:
    budgets: dict[str, Any] = json.loads(FILE.read_text())
    assert name in budgets, f"{name} has no budget: count it, python {Path(__file__).name}"
    found = MEASURES[name]()
    grown = {kind: (number, budgets[name][kind]) for kind, number in found.items() if number > budgets[name][kind]}
    assert not grown, f"{name}: more than its budget (found, budget): {grown}"


def table(budgets: dict[str, Counts]) -> str:
    """The budgets as docs/gpu.md shows them."""
    shown = {name: cost for name, cost in budgets.items() if not name.startswith("question")}
    head = "| one layer of | waits | operations | launches |\n|---|---|---|---|\n"
    rows = (f"| {name} | {cost['waits']} | {cost['operations']} | {cost['launches']} |\n" for name, cost in shown.items())
    return f"<!-- counts -->\n{head}{''.join(rows)}<!-- /counts -->"


def test_the_page_shows_the_budgets() -> None:
    assert table(json.loads(FILE.read_text())) in PAGE.read_text(), f"python {Path(__file__).name} writes the table"


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = {name: measure() for name, measure in MEASURES.items()}
    FILE.write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(cost)}" for name, cost in counts.items()) + "\n}\n")
    page = PAGE.read_text()
    start, end = page.index("<!-- counts -->"), page.index("<!-- /counts -->") + len("<!-- /counts -->")
    PAGE.write_text(page[:start] + table(counts) + page[end:])
