"""Answers every shared case with the Triton kernels: `python run_triton.py OUTPUT`, for tests that read OUTPUT.

A program of its own because the interpreter must be chosen, by TRITON_INTERPRET=1, before the kernels are imported.
"""

from __future__ import annotations

import sys

import torch
from cases import CASES, FORKS, UNIFORMS, Case, make_call, make_forks
from torch import Tensor

from sparse_attention_hub import Mask
from sparse_attention_hub.kernels.reference import Call
from sparse_attention_hub.kernels.triton import KERNELS, attend_forks, attend_triton, draw_uniforms
from sparse_attention_hub.maskers.uniforms import _halves

Answer = tuple[Tensor, Tensor]


def kernels_for(case: Case) -> list[str]:
    """`rows` is never chosen for many queries, and the interpreter takes long over that many programs."""
    return [kernel for kernel in ("rows", "groups") if kernel == "groups" or case.rows <= 3]


def answer_cases(device: str) -> dict[tuple[str, str], Answer]:
    """(case, kernel) to (float32 output, log-sum-exp); "own choice" leaves kernel, splits and dtype to the function."""
    answers = {}
    for case in CASES:
        call = make_call(case, device)
        answers[case.name, "own choice"] = attend_triton(call)
        for kernel in kernels_for(case):
            answers[case.name, kernel] = attend_triton(call, kernel=kernel, splits=case.splits, output_dtype=torch.float32)
    return {key: (output.cpu(), lse.cpu()) for key, (output, lse) in answers.items()}


def answer_forks(device: str) -> dict[tuple[str, str], Answer]:
    """Rows of different contexts whose first keys are the same, by their place in FORKS."""
    answers = {}
    for place, kind in enumerate(FORKS):
        forks = make_forks(*kind, device=device)
        call = forks.calls[0]
        found = attend_forks(*forks[:4], call.scaling, call.softcap, call.sinks)
        answers["forks", str(place)] = (found[0].cpu(), found[1].cpu())
    return answers


def answer_uniforms(device: str) -> dict[tuple[str, str], Answer]:
    """Random numbers of UNIFORMS, twice."""
    seeds, layer, heads, rows, keys = UNIFORMS
    halves, _ = _halves(seeds, layer, heads, torch.device(device))
    drawn = draw_uniforms(halves.squeeze(-1), rows.to(device), keys.to(device)).cpu()
    return {("uniforms", ""): (drawn, drawn)}


def answer_far_rows(device: str) -> dict[tuple[str, str], Answer]:
    """Rows 2**31 elements into the cache, and the same rows in a short one. Only pages that are touched take memory."""
    torch.manual_seed(0)
    dim, total = 128, 2**24 + 64
    short = torch.randn(1, 1, 64, dim, device=device).half()
    queries = torch.randn(1, 2, 1, dim, device=device).half()
    far = torch.arange(total - 64, total, device=device).view(1, 1, 1, 64)
    answers = {}
    store = torch.empty(total, dim, dtype=torch.float16, device=device).view(1, 1, total, dim)
    store[:, :, -64:] = short
    for kernel in KERNELS:
        answers["far", kernel] = _attend_lists(queries, store, store, far, kernel)
        answers["short", kernel] = _attend_lists(queries, short, short, far - (total - 64), kernel)
    return {key: (output.cpu(), lse.cpu()) for key, (output, lse) in answers.items()}


def answer_all(device: str) -> dict[tuple[str, str], Answer]:
    return answer_cases(device) | answer_far_rows(device) | answer_forks(device) | answer_uniforms(device)


def _attend_lists(queries: Tensor, keys: Tensor, values: Tensor, lists: Tensor, kernel: str) -> Answer:
    mask = Mask.from_indices(lists, (1, 2, 1, keys.shape[2]), kv_heads=1)
    return attend_triton(Call(queries, keys, values, mask, 0.1), kernel=kernel)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(answer_all("cpu"), sys.argv[1])
