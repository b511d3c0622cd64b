"""Reading hash weights from a pickle without running what is in it."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..maskers.hat_weights import PARTS, Layer


def _load_storage(data: bytes) -> Any:
    """What a tensor pickled by itself holds inside, read by torch's own restricted reader."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


#: All that a pickle of plain containers and tensors may name.
_PERMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which weights have no use for")
        return _PERMITTED[module, name]


def convert(source: str) -> dict[int, Layer]:
    """The weights in a pickle, or a file of torch.save. UserError if it holds anything but tensors in plain containers, or
    is not {layer: {query_matrix, query_bias, key_matrix, key_bias: [tensor of each network layer]}}."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"the pickle to convert must be an existing file, got {source!r}")
    try:
        if zipfile.is_zipfile(path):
            record = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with path.open("rb") as file:
                record = _Restricted(file).load()
    except Exception as error:  # a broken pickle can fail in any way
        raise UserError(
            f"{source} cannot be converted: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return _checked(record, source)


def _checked(record: Any, source: str) -> dict[int, Layer]:
    if not isinstance(record, dict) or not record:
        raise UserError(f"{source} must hold a dict of layers, got {type(record).__name__}")
    weights: dict[int, Layer] = {}
    for index, layer in record.items():
        if not str(index).isdecimal() or not isinstance(layer, dict) or not set(PARTS) <= set(layer):
            raise UserError(f"{source}: entry {index!r} must be a layer number with {', '.join(PARTS)}")
        weights[int(index)] = {}
        for part in PARTS:
            entries = layer[part]
            if not isinstance(entries, list | tuple) or not all(isinstance(t, Tensor) for t in entries):
                raise UserError(f"{source}: {part} of layer {index} must be a list of tensors")
            weights[int(index)][part] = [t.detach().cpu() for t in entries]
    return weights
