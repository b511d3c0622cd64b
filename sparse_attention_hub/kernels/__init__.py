"""Kernels: attention over the keys that a mask names, and choosing keys. docs/engine.md explains them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ..lists import uses_loops
from ..mask import Mask
from .reference import Call, Known, attend_reference, attend_torch, dot_torch, group_scores, log_mass_torch, needs_grad

__all__ = ["BACKENDS", "Known", "attend", "choose_backend", "dot", "dot_all", "log_mass"]

HAS_TRITON = find_spec("triton") is not None
BACKENDS = ("auto", "reference", "cpu", "torch", "triton")


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    backend: str = "auto",
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the mask's keys, each term weighted by 1/p in numerator and denominator.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D). softcap: logits become softcap * tanh(logit / softcap). sinks (H,): a
    logit a head that joins the denominator. known: scores that the caller has anyway, softcap and bias included; a kernel then
    need not read the keys.
    Returns (output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider; a row without keys gives 0 and, without a sink,
    -inf.
    backend: "auto" = triton on a GPU, cpu (compiled loops) on a CPU, torch elsewhere and for gradients; the environment variable
    SPARSE_ATTENTION_HUB_BACKEND overrides auto. Raises ValueError for an unknown backend, or one that cannot take these tensors.
    """
    name = choose_backend(backend, queries, keys, values)
    call = Call(queries, keys, values, mask, scaling, softcap, sinks, known or Known())
    if name == "triton" and not call.known.biased:
        from .triton import attend_triton

        return attend_triton(call, output_dtype=torch.float32)
    output, lse = _attend_cpu(call) if name == "cpu" else attend_reference(call) if name == "reference" else attend_torch(call)
    assert output is not None
    return output, lse


def dot(queries: Tensor, keys: Tensor, mask: Mask, scaling: float, softcap: float | None = None) -> Tensor:
    """Scaled logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    call = Call(queries, keys, None, mask, scaling, softcap)
    if choose_backend("auto", queries, keys) == "cpu":
        from .cpu import dot_cpu

        return dot_cpu(call)
    return dot_torch(call)


def dot_all(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scaled logits of all keys, or of codes in their place: float32 or wider (B, H, Q, N). When decoding on a CPU each is read
    once for its group of heads: 1.9x over a matrix product of so few rows."""
    if queries.shape[2] == 1 and choose_backend("auto", queries, keys) == "cpu":
        from .cpu import dot_all_cpu

        return dot_all_cpu(queries, keys, scaling)
    return group_scores(queries, keys, scaling)


def log_mass(
    queries: Tensor, keys: Tensor, mask: Mask, scaling: float, known: Known | None = None, softcap: float | None = None
) -> Tensor:
    """The log-sum-exp of `attend` alone, without reading values: (B, H, Q)."""
    call = Call(queries, keys, None, mask, scaling, softcap, known=known or Known())
    return _attend_cpu(call)[1] if choose_backend("auto", queries, keys) == "cpu" else log_mass_torch(call)


def _attend_cpu(call: Call) -> tuple[Tensor | None, Tensor]:
    from .cpu import attend_cpu  # loads Numba

    return attend_cpu(call)


def choose_backend(backend: str, *tensors: Tensor) -> str:
    """The kernel that `backend` means for these tensors."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    first, gradients = tensors[0], needs_grad(*tensors)
    if backend == "auto":
        chosen = os.environ.get("SPARSE_ATTENTION_HUB_BACKEND", "auto")
        if chosen != "auto":
            return choose_backend(chosen, *tensors)
        if gradients:
            return "torch"
        if first.is_cuda:
            return "triton" if HAS_TRITON and first.element_size() <= 4 else "torch"
        return "cpu" if uses_loops(first) else "torch"
    if backend == "triton" and not first.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("attention backend triton needs tensors on a GPU (or TRITON_INTERPRET=1), got a CPU tensor")
    if backend == "cpu" and not uses_loops(first):
        raise ValueError(f"attention backend cpu needs Numba and tensors on a CPU, got a tensor on {first.device}")
    if backend in ("triton", "cpu") and gradients:
        raise ValueError(f"attention backend {backend} has no gradients: take torch or auto, or torch.no_grad()")
    return backend
