"""HashAttention's weights: their safetensors format, and which models come with some.

Tensors "layers.{L}.{query|key}_{matrix|bias}.{i}", i = layer of the network: matrices (heads, in, out), biases (heads, out),
any float type. Query tensors have one network per query head; key tensors one per query head, or one per kv head.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

Layer = dict[str, list[Tensor]]
PARTS = ("query_matrix", "query_bias", "key_matrix", "key_bias")
SHIPPED = Path(__file__).resolve().parent.parent / "weights"
_NAME = re.compile(rf"layers\.(\d+)\.({'|'.join(PARTS)})\.(\d+)")


def hat_weights_for(model_id: str) -> str | None:
    """Path of the library's own weights for a model; None if there are none."""
    path = SHIPPED / f"hat_{model_id.replace('/', '_')}.safetensors"
    return str(path) if path.is_file() else None


def hat_config_fields(path: str) -> dict[str, int | str]:
    """The config fields hat_bits, hat_mlp_layers, hat_mlp_hidden_size and hat_mlp_activation that fit a file of weights.
    ValueError for a file without any."""
    from safetensors import safe_open

    matrices = next(iter(read_hat_weights(path).values()), {}).get("query_matrix", [])
    if not matrices or any(matrix.dim() != 3 for matrix in matrices):
        raise ValueError("it must hold query matrices (heads, in, out) of each layer; train others or convert them again")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {
        "hat_bits": matrices[-1].shape[2],
        "hat_mlp_layers": len(matrices),
        "hat_mlp_hidden_size": matrices[-1].shape[1] if len(matrices) > 1 else 0,
        "hat_mlp_activation": metadata.get("activation", "silu"),
    }


def read_hat_weights(path: str) -> dict[int, Layer]:
    """{layer: {part: [tensor of each network layer]}}. Raises ValueError for a file that holds something else."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"hat_weight_file must be an existing file, got {path!r}")
    return _read(path, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: str, modified: int) -> dict[int, Layer]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); convert a pickle of hash weights with: "
            "python -m sparse_attention_hub.maskers.hash_attention convert IN.pkl OUT.safetensors"
        ) from None
    found: dict[int, Layer] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):  # network layer 2 before 10
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{path} holds {name!r}, which is no tensor of hash weights")
        found.setdefault(int(match[1]), {}).setdefault(match[2], []).append(tensors[name])
    return found


def write_hat_weights(weights: dict[int, Layer], path: str, activation: str) -> None:
    """Save weights in the format above."""
    from safetensors.torch import save_file

    tensors = {
        f"layers.{layer}.{part}.{i}": tensor.contiguous()
        for layer, parts in weights.items()
        for part, entries in parts.items()
        for i, tensor in enumerate(entries)
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"activation": activation})
    Path(path).chmod(0o644)  # save_file makes files that only their owner may read


def check_weights(weights: dict[int, Layer], bits: int, layers: int, hidden: int) -> None:
    """ValueError if weights do not have the shapes that the config states."""
    if not weights:
        raise ValueError("the hash weights must hold at least one layer, got none")
    for index, layer in weights.items():
        missing = [part for part in PARTS if part not in layer]
        if missing:
            raise ValueError(f"hash weights of layer {index} lack {', '.join(missing)}")
        for side in ("query", "key"):
            matrices, biases = layer[f"{side}_matrix"], layer[f"{side}_bias"]
            if len(matrices) != layers or len(biases) != layers:
                raise ValueError(f"hat_mlp_layers is {layers}, the {side} weights of layer {index} have {len(matrices)}")
            for depth, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
                field, width = ("hat_bits", bits) if depth == layers - 1 else ("hat_mlp_hidden_size", hidden)
                if matrix.dim() != 3 or bias.shape != (matrix.shape[0], matrix.shape[2]):
                    raise ValueError(
                        f"{side} weights of layer {index} must be matrices (heads, in, out) and biases (heads, out), "
                        f"got {tuple(matrix.shape)} and {tuple(bias.shape)}"
                    )
                if matrix.shape[2] != width or (depth and matrix.shape[1] != matrices[depth - 1].shape[2]):
                    raise ValueError(f"{field} is {width}, the {side} weights of layer {index} have {tuple(matrix.shape)}")


def ready_layer(layer: Layer, keys: Tensor) -> Layer:
    """A layer's networks for keys (B, Hkv, N, D), on their device in float32: matrices (Hkv, networks, in, out) and biases
    (Hkv, networks, out). Key networks that are equal for a whole group become one. ValueError if they do not fit."""
    kv_heads, dim = keys.shape[1], keys.shape[3]
    ready: Layer = {}
    for name, tensors in layer.items():
        if any(t.shape[0] % kv_heads for t in tensors) or (name.endswith("matrix") and tensors[0].shape[1] != dim):
            raise ValueError(f"hash weights {name} {tuple(tensors[0].shape)} do not fit {kv_heads} kv heads of {dim} channels")
        ready[name] = [t.to(keys.device, torch.float32).reshape(kv_heads, -1, *t.shape[1:]) for t in tensors]
    if all(bool((t == t[:, :1]).all()) for part in ("key_matrix", "key_bias") for t in ready[part]):
        for part in ("key_matrix", "key_bias"):
            ready[part] = [t[:, :1] for t in ready[part]]
    return ready


def stack_layers(layers: list[Layer]) -> Layer:
    """Networks of several layers, with the layers as the first axis."""
    return {name: [torch.stack(each) for each in zip(*(layer[name] for layer in layers), strict=True)] for name in layers[0]}
