"""Decode steps as CUDA graphs, on the pretended device: they give what steps give that the host starts one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pipelines import families, small_model
from pretend import PretendedGPU
from tiny_models import tokens

from sparse_attention_hub.models import answer_many, prefill

CONTEXT, QUESTION = tokens(150), tokens(5, 2)


def answers(
    gpu: PretendedGPU | None, length: int = 40, stop: frozenset[int] = frozenset(), **about: Any
) -> list[tuple[list[int], float | None, float | None]]:
    """Tokens, density and share of KV bytes of dense attention and eight families."""
    lm = small_model(gpu)
    lm.eos_token_ids = stop
    prefilled = prefill(lm, CONTEXT, 50)
    found = answer_many(lm, prefilled, QUESTION, [None, *families(2)], length, seed=3, **about)
    return [(one.token_ids, one.density, one.kv_fraction) for one in found]


def check(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        for number, wanted in zip(one[1:], other[1:], strict=True):
            assert number == pytest.approx(wanted, rel=1e-4, abs=1e-5) if wanted is not None else number is None


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_a_graph_serves_all_steps(sparse_from: str) -> None:
    expected = answers(None, sparse_from=sparse_from)
    with PretendedGPU() as gpu:
        check(answers(gpu, sparse_from=sparse_from), expected)
    assert gpu.operations["graph"] == 36 + 1  # all but the first three of 39 steps, and one to compare
