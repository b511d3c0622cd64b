"""RoPE whose factors depend on the text's length ("longrope", "dynamic"): all passes over one text use the same ones.

transformers chooses them for each forward pass by its highest position, so that a context prefilled in parts would get several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .config_checks import rope_scalings


def length_dependent(model: Any) -> list[Any]:
    """The model's modules whose rotary factors depend on the length."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "inv_freq") or hasattr(module, "rope_type")
        if any(_depends(scaling) for scaling in rope_scalings(getattr(module, "config", None)))
    ]


def _depends(scaling: dict[str, Any]) -> bool:
    kind = str(scaling.get("rope_type", scaling.get("type")))
    return kind == "longrope" or "dynamic" in kind


def factors_key(modules: list[Any], length: int) -> list[int]:
    """Equal for lengths of a text that give it the same rotary factors: a prefill serves texts of one key."""
    found = []
    for config in (module.config for module in modules):
        for scaling in filter(_depends, rope_scalings(config)):
            border = scaling.get("original_max_position_embeddings")
            if border is not None and "longrope" in scaling.values():
                found.append(int(length > border))
            else:
                found.append(max(length, config.max_position_embeddings))
    return found


@contextmanager
def factors_of(modules: list[Any], length: int) -> Iterator[None]:
    """Inside, these rotary modules give what one pass over a text of `length` tokens would give at each position.

    The text's last position is added to those asked for, so that the module itself chooses, and its row is cut off again.
    """
    hooks = []

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _with_last(kwargs["position_ids"], length)}
        return (args[0], _with_last(args[1], length), *args[2:]), kwargs

    def cut(_module: Any, _args: Any, output: Any) -> Any:
        return tuple(part[:, :-1] for part in output) if isinstance(output, tuple) else output[:, :-1]

    for module in modules:
        _forget(module)
        hooks += [module.register_forward_pre_hook(add, with_kwargs=True), module.register_forward_hook(cut)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_last(positions: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([positions, torch.full_like(positions[..., :1], length - 1)], dim=-1)


def _forget(module: Any) -> None:
    """Dynamic factors grow with the longest text ever seen: start from those of a short text."""
    for name, original in list(module.named_buffers(recurse=False)):
        prefix = name.removesuffix("original_inv_freq")
        if prefix != name and hasattr(module, "original_max_seq_len"):
            setattr(module, f"{prefix}inv_freq", original.clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
