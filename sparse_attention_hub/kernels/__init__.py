"""Kernels: attention over the keys that a mask names, behind one function."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..mask import Mask
from .gather import attend_gather, attend_gather_output
from .reference import attend_reference

BACKENDS = ("auto", "reference", "gather", "triton")


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    backend: str = "auto",
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the mask's keys, each term weighted by 1/p in numerator and denominator.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D). Returns (output (B, Q, H, D) in the queries' dtype, log-sum-exp
    (B, H, Q) in float32 or wider); a row without keys gives 0 and -inf.
    scores: float32 or wider (B, H, Q, N), the scaled logits where they are known anyway: gather then reads no keys for one row.
    backend: "auto" = triton on a GPU, gather elsewhere; the environment variable SPARSE_ATTENTION_HUB_BACKEND overrides auto.
    Raises ValueError for an unknown backend, or triton without a GPU or where gradients are asked for: it has none.
    """
    name = choose_backend(backend, queries, keys, values)
    if name == "triton":
        from .triton import attend_triton

        output, lse = attend_triton(queries, keys, values, mask, scaling)
    elif name == "reference":
        output, lse = attend_reference(queries, keys, values, mask, scaling)
    else:
        output, lse = attend_gather(queries, keys, values, mask, scaling, scores)
    return output.to(queries.dtype), lse


def attend_output(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    backend: str = "auto",
    scores: Tensor | None = None,
) -> Tensor:
    """The output of `attend`, which a CPU has sooner without the log-sum-exp. Of several rows, keys and values must be finite
    also where the mask does not attend."""
    if choose_backend(backend, queries, keys, values) == "gather":
        return attend_gather_output(queries, keys, values, mask, scaling, scores).to(queries.dtype)
    return attend(queries, keys, values, mask, scaling, backend, scores)[0]


def choose_backend(backend: str, queries: Tensor, *others: Tensor) -> str:
    """The kernel that `backend` means for these tensors."""
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, *others))
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = os.environ.get("SPARSE_ATTENTION_HUB_BACKEND", "auto")
        if backend == "auto":
            has_triton = queries.is_cuda and importlib.util.find_spec("triton") is not None
            return "triton" if has_triton and queries.element_size() <= 4 and not needs_grad else "gather"
        return choose_backend(backend, queries, *others)
    if backend == "triton" and not queries.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("attention backend triton needs tensors on a GPU (or TRITON_INTERPRET=1), got a CPU tensor")
    if backend == "triton" and needs_grad:
        raise ValueError("attention backend triton has no gradients: take gather or auto, or torch.no_grad()")
    return backend
