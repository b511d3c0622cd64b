"""What a CUDA graph does, on the pretended device: operations with the tensors and numbers that they had when they were recorded.

Recording computes, so that shapes are known; at its end all that was there before has its old contents again, since a GPU does
nothing while it records. A replay computes into the tensors of the recording: what the host had computed by itself, or decided by
a number, stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self._calls: list[Callable[[], Any]] = []
        self._made: dict[int, Tensor] = {}  # memory of the graph's own, kept alive
        self._before: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # (tensor of all of a memory, its contents) of others, before they change

    def before(self, function: Any, args: Any, kwargs: Any) -> None:
        """Remember what an operation is about to change."""
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._remember(kwargs[argument.name])

    def _remember(self, value: Any) -> None:
        for tensor in _tensors(value):
            place = tensor.untyped_storage().data_ptr()
            if place not in self._made and place not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[place] = whole, whole.clone()

    def add(self, function: Any, args: Any, kwargs: Any, found: Any) -> None:
        """An operation that gave `found`."""
        results, given = _tensors(found), {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        is_view = not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in given for t in results)
        for tensor in results:
            if tensor.untyped_storage().data_ptr() not in given:
                self._made[tensor.untyped_storage().data_ptr()] = tensor
        if is_view or function.overloadpacket.__name__.startswith(("empty", "new_empty")):
            return

        def call() -> None:
            for result, tensor in zip(_tensors(function(*args, **kwargs)), results, strict=True):
                if result is not tensor:
                    tensor.copy_(result)

        self._calls.append(call)

    def add_call(self, call: Callable[[], Any]) -> None:
        """A kernel that writes into tensors that the graph has made."""
        self._calls.append(call)

    @torch.no_grad()
    def end(self) -> None:
        for whole, contents in self._before.values():
            whole.copy_(contents)

    @torch.no_grad()
    def replay(self) -> None:
        from pretend import _unseen

        self.gpu.operations["graph"] += 1
        with _unseen():
            for call in self._calls:
                call()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
