"""The principal axes of a model's keys: how they are found, and their file: safetensors "layers.{L}", float32 (h, D, D), columns by
falling variance, h = kv heads, or 1 for all of them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def principal_axes(keys: Tensor) -> Tensor:
    """The principal axes of keys (Hkv, N, D): float32 (Hkv, D, D) on the CPU."""
    centred = keys.double() - keys.double().mean(1, keepdim=True)
    vectors: Tensor = torch.linalg.eigh((centred.transpose(1, 2) @ centred).cpu()).eigenvectors
    return vectors.flip(-1).float()  # eigh sorts by rising variance


def write_axes(axes: dict[int, Tensor], path: Path) -> None:
    """Save {layer: principal axes} so that the file appears whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({f"layers.{layer}": tensor.contiguous() for layer, tensor in axes.items()}, unfinished)
    unfinished.chmod(0o644)  # save_file makes files that only their owner may read
    unfinished.replace(path)


def read_axes(path: str) -> dict[int, Tensor]:
    """{layer: principal axes}, checked; read again only after the file has changed. ValueError for other content."""
    return _read(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: str, modified: int) -> dict[int, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removeprefix("layers.")
        if not layer.isdigit() or tensor.dim() != 3:
            raise ValueError(f"{path} holds {name!r}, which is no layer of principal axes")
        found[int(layer)] = tensor
    return dict(sorted(found.items()))
