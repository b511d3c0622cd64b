"""Recorded masker cases: the same keys and outputs, wherever the right answer is well defined.

Masks are compared on allowed entries only, and only in rows where enough keys were eligible and no tie stood at the
boundary. In rows with a tie, every chosen score must be at least as high as every eligible one left out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import Mask, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.attention import AttentionResult
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.pq_cache import PQFit

from .golden import Case, index


def has_answer(case: Case) -> bool:
    """Three kinds of cases have none: a window recorded as "everything", codes chosen without the causal mask, and key
    norms shared by a batch."""
    names = [name for name, _ in case.maskers]
    several = case.entry["inputs"].startswith("b2")
    return not (
        ("Local" in names and case.entry["full"]) or ("PQCache" in names and several) or ("MagicPig" in names and several)
    )


def run(case: Case, folder: Path) -> tuple[AttentionResult, AttentionInputs, ResearchAttention]:
    attention = ResearchAttention(ResearchAttentionConfig(case.configs(folder)))
    tensors = case.tensors()
    inputs = AttentionInputs(**tensors)
    state = attention.new_state()
    for position, (name, params) in enumerate(case.maskers):
        entry = state.entry(case.entry["layer_idx"], position)
        masker = attention.maskers[position]
        if name == "PQCache":
            entry.fitted, entry.fit_length = PQFit(case.array("centroids").float()), inputs.shape[3]
            codes = case.array("codes").permute(0, 2, 1, 3)
            skipped = codes.new_zeros((*codes.shape[:2], params["init_offset"], codes.shape[3]))
            entry.append(torch.cat([skipped, codes], 2).to(masker.code_dtype))
        if name == "MagicPig":
            fitted = masker.fit(inputs.keys, None, 0)
            entry.fitted = dataclasses.replace(fitted, projections=case.projections(params["lsh_l"], params["lsh_k"]))
            entry.fit_length = inputs.shape[3]
    return attention.attend_inputs(inputs, state), inputs, attention


@pytest.mark.parametrize("name", [name for name in index() if has_answer(Case(name))])
def test_golden(name: str, tmp_path: Path) -> None:
    case = Case(name)
    result, inputs, attention = run(case, tmp_path)
    allowed = inputs.allowed.expand(inputs.shape)
    ours = result.mask.inclusion_probability()
    recorded = case.array("mask").float()
    defined = torch.ones(inputs.shape[:3], dtype=torch.bool)
    for flag, good in (("row_ok", True), ("tie_at_boundary", False)):
        if (found := case.array(flag)) is not None:
            defined &= found == good
    compared = allowed & defined.unsqueeze(-1)
    assert bool(compared.any()) or case.array("scores") is not None, "nothing left to compare"
    if case.entry["empty"]:  # "no mask was built", whose output is dense
        recorded = allowed.float()
    torch.testing.assert_close(ours[compared], recorded[compared], atol=1e-4, rtol=0)
    theirs = case.array("output").transpose(1, 2)
    # The recorded mask may also hold forbidden keys, which weigh nothing.
    torch.testing.assert_close(result.output.transpose(1, 2)[defined], theirs[defined], atol=1e-4, rtol=1e-4)
    assert result.output.isfinite().all()
    if (scores := case.array("scores")) is not None:
        check_ranking(case, scores.float(), ours, inputs, attention)


def check_ranking(case: Case, scores: Tensor, ours: Tensor, inputs: AttentionInputs, attention: ResearchAttention) -> None:
    """No eligible key that was left out scores above a chosen one, and the number chosen is the budget."""
    before = Mask.empty(inputs.shape, inputs.device, inputs.kv_heads)
    for masker in attention.maskers[:-1]:
        before = masker.select(inputs, before)
    residual = before.residual(inputs.allowed).expand(inputs.shape).clone()
    skipped = inputs.shape[3] - scores.shape[-1]
    residual[..., :skipped] = False
    whole = torch.cat([scores.new_zeros((*scores.shape[:3], skipped)), scores], -1)
    chosen = (ours > 0) & residual
    size = case.maskers[-1][1]["heavy_size"]
    assert bool((chosen.sum(-1) == (size if isinstance(size, int) else int(size * inputs.shape[3]))).all())
    lowest = whole.masked_fill(~chosen, float("inf")).amin(-1)
    highest = whole.masked_fill(~residual | chosen, float("-inf")).amax(-1)
    assert bool((lowest >= highest - 1e-4).all())


def test_every_kind_of_case_is_compared() -> None:
    compared = [Case(name) for name in index() if has_answer(Case(name))]
    assert len(compared) >= 130
    kinds = {name for case in compared for name, _ in case.maskers}
    assert kinds == {name for case in index() for name, _ in Case(case).maskers}
