"""A pretended GPU: CPU tensors that claim to be CUDA tensors.

    gpu = PretendedGPU()
    with gpu:
        keys = gpu.move(keys)  # keys.is_cuda, keys.device == cuda:0
        ...
    gpu.totals()  # {"waits": ..., "operations": ..., "launches": ...}

Code takes its CUDA branches, and what a GPU refuses raises an error: NumPy, and operations on tensors of both devices. Numbers are
computed on the CPU. Counted are

- waits, by file and line: what makes the host wait for the device. Reading a number or a list, boolean indices, copies from the
  host's memory or to it. (`torch.cuda.set_sync_debug_mode` warns of the same.)
- operations: aten operations that start work on the device, by name. Views and uninitialised tensors start none.
- launches of the Triton kernels, by name. A stand-in of each computes what the kernel computes, from the same arguments.

A CUDA graph is recorded as on a GPU: what it holds is not done before it is replayed, and then with the same tensors and numbers. A
replay counts as one operation. See recorded_graph.py.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from recorded_graph import RecordedGraph
from safetensors import safe_open
from stand_ins import merge, uniforms, walk_forks, walk_groups, walk_rows
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda", 0)
ROOT, GIB = Path(__file__).resolve().parents[2], 2**30
_IS_CUDA, _IS_CPU, _DEVICE, _SET_DATA = (
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "device")),
    Tensor.data.__set__,
)
#: Operations that start no work on a device: views, uninitialised memory, and reading a number, which is a wait.
_FREE = {
    *("view", "_unsafe_view", "expand", "slice", "select", "as_strided", "unsqueeze", "squeeze", "transpose", "permute", "t"),
    *("alias", "detach", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "_reshape_alias", "lift", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "resize_", "is_same_size"),
    *("_local_scalar_dense", "view_as_real", "is_pinned"),
}
#: Operations whose result has a size, or a value, that the host must know.
_WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"),
    "is_nonzero",
}


class PretendedGPU:
    """A context manager; see the top of this file. Counts go on over several uses; `clear` sets them to 0."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._warns = False  # as torch.cuda.set_sync_debug_mode("warn")
        self.recording: RecordedGraph | None = None

    def clear(self) -> None:
        for counter in (self.waits, self.operations, self.launches):
            counter.clear()

    def totals(self) -> dict[str, int]:
        return {name: getattr(self, name).total() for name in ("waits", "operations", "launches")}

    def __enter__(self) -> PretendedGPU:
        from sparse_attention_hub.kernels import triton as kernels
        from sparse_attention_hub.models import dense, trace

        self._stack = ExitStack()
        self._stack.enter_context(mock.patch.object(dense, "causal_lower_right", _unseen_call(dense.causal_lower_right)))
        self._stack.enter_context(mock.patch.object(trace, "safe_open", _OnDevice))
        kinds = {
            "rows_kernel": walk_rows,
            "forks_kernel": walk_forks,
            "groups_kernel": walk_groups,
            "merge_kernel": merge,
            "uniforms_kernel": uniforms,
        }
        for name, stand_in in kinds.items():
            self._stack.enter_context(mock.patch.object(kernels, name, _StandIn(self, name, stand_in)))
        kernels._processors.cache_clear()
        self._stack.callback(kernels._processors.cache_clear)
        for name, function in self._functions().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, function))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Claims(self))
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def move(self, value: Any) -> Any:
        """The same tensor, tensors in lists and dictionaries, or a module, on the device from here on. Counts nothing."""
        if isinstance(value, torch.nn.Module):
            claim([*value.parameters(), *value.buffers()])
        return claim(value)

    def wait(self, kind: str) -> None:
        """Count a wait at the line of the project that caused it."""
        file, line = _place()
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({kind}, {file}:{line})")
        self.waits[f"{file}:{line} {kind}"] += 1
        if self._warns:
            warnings.warn_explicit(f"called a synchronizing CUDA operation ({kind})", UserWarning, file, line)

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """What the project asks of torch.cuda, answered for a card like an H100."""
        facts = SimpleNamespace(name="pretended GPU", multi_processor_count=132, total_memory=80 * GIB, major=9, minor=0)
        return {
            "device_of": lambda tensor: nullcontext(),
            "get_device_properties": lambda device=None: facts,
            "get_device_name": lambda device=None: facts.name,
            "get_device_capability": lambda device=None: (facts.major, facts.minor),
            "current_device": lambda: 0,
            "mem_get_info": lambda device=None: (70 * GIB, 80 * GIB),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device=None: None,
            **dict.fromkeys(("max_memory_allocated", "memory_allocated", "memory_reserved"), lambda device=None: 0),
            "set_sync_debug_mode": self._set_sync_debug_mode,
            "device": lambda device: nullcontext(),
            "Stream": lambda device=None: None,
            "CUDAGraph": lambda: RecordedGraph(self),
            "graph": self._record,
        }

    @contextmanager
    def _record(self, graph: RecordedGraph, **_: Any) -> Iterator[None]:
        """torch.cuda.graph"""
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            with _unseen():
                graph.end()

    def _set_sync_debug_mode(self, mode: str | int) -> None:
        self._warns = mode in ("warn", 1)


class _OnDevice:
    """In place of safetensors' `safe_open`, which reads a file straight to a device."""

    def __init__(self, path: Path, framework: str, device: str) -> None:
        self._opened, self._claims = safe_open(path, framework=framework, device="cpu"), _names_cuda(device)

    def __enter__(self) -> _OnDevice:
        self._stored = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def keys(self) -> Any:
        return self._stored.keys()

    def get_tensor(self, name: str) -> Tensor:
        with _unseen():
            read = self._stored.get_tensor(name)
            return claim(read.clone()) if self._claims else read


class _StandIn:
    """Takes the place of a compiled kernel: `kernel[grid](...)` counts a launch and computes on the CPU."""

    def __init__(self, gpu: PretendedGPU, name: str, compute: Callable[..., None]) -> None:
        self.gpu, self.name, self.compute = gpu, name, compute

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**31 for size in grid) and all(size < 2**16 for size in grid[1:]), grid

        def launch(*arguments: Any, **constants: Any) -> None:
            self.gpu.launches[self.name] += 1
            assert all(is_on_device(tensor) for tensor in _tensors(arguments)), f"{self.name}: a tensor of the host"
            with _unseen():
                self.compute(*arguments, **constants)
                if self.gpu.recording is not None:
                    self.gpu.recording.add_call(lambda: self.compute(*arguments, **constants))

        return launch


class _Claims(TorchFunctionMode):
    """Answers for the device of tensors, and keeps the two devices apart."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if function in (_IS_CUDA, _IS_CPU, _DEVICE):
            claimed = is_on_device(args[0])
            return claimed if function == _IS_CUDA else not claimed if function == _IS_CPU else _device_of(args[0])
        if name == "get_device":
            return 0 if is_on_device(args[0]) else -1
        given = list(_tensors((args, kwargs)))
        on_device = any(map(is_on_device, given))
        if on_device and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({_where()})")
        if on_device and name == "tolist":
            self.gpu.wait(name)
        if name in ("to", "cpu", "cuda"):
            return self._move(name, function, args, kwargs)
        target = kwargs.get("device")
        creates = _names_cuda(target)
        if creates:
            kwargs["device"] = "cpu"
        if on_device and function == F.scaled_dot_product_attention:
            return self._attend(args, kwargs)
        if function == torch.bmm and "out_dtype" in kwargs:  # which torch has for CUDA tensors only
            args, kwargs = tuple(tensor.to(kwargs["out_dtype"]) for tensor in args), {}
        if name == "histc" and not args[0].is_floating_point():  # which torch has for CUDA tensors only, too
            return function(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if on_device and name not in ("__getitem__", "__setitem__", "copy_", "type_as"):
            self._refuse_both(name, given)
        if function in (torch.tensor, torch.as_tensor) and creates:
            self.gpu.wait("copy to the device")
        with _creating(creates):
            found = function(*args, **kwargs)
        if function == _SET_DATA:
            args[0]._on_device = is_on_device(args[1])
        return claim(found) if creates else found

    def _move(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu` and `cuda`: copies between devices, which the host waits for unless they are non_blocking."""
        tensor, target = args[0], kwargs.get("device")
        if name != "to":
            target = "cpu" if name == "cpu" else CUDA
        elif target is None and len(args) > 1 and not isinstance(args[1], torch.dtype):
            target = _device_of(args[1]) if isinstance(args[1], Tensor) else args[1]
        to_device = is_on_device(tensor) if target is None else _names_cuda(target)
        dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
        if not isinstance(tensor, Tensor) or torch.device("meta") in (tensor.device, target):
            return function(*args, **kwargs)
        if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            dtypes = [args[1].dtype]
        moved = tensor if not dtypes else tensor.to(dtypes[0])
        if to_device == is_on_device(tensor):
            return moved.clone() if kwargs.get("copy") and moved is tensor else moved
        if not kwargs.get("non_blocking"):
            self.gpu.wait("copy to the device" if to_device else "copy to the host")
        self.gpu.operations["copy"] += 1
        if self.gpu.recording is not None:
            self.gpu.wait("copy between devices")
        with _unseen():
            moved = moved.detach().clone()
        return claim(moved) if to_device else moved

    def _attend(self, args: Any, kwargs: Any) -> Tensor:
        """One operation, as the fused kernels of a GPU are."""
        self._refuse_both("scaled_dot_product_attention", list(_tensors((args, kwargs))))
        self.gpu.operations["scaled_dot_product_attention"] += 1
        with _unseen():
            args = [own._materialize() if isinstance(own, CausalBias) else own for own in args]
            found: Tensor = claim(F.scaled_dot_product_attention(*args, **kwargs))
            if self.gpu.recording is not None:
                self.gpu.recording.add_call(lambda: found.copy_(F.scaled_dot_product_attention(*args, **kwargs)))
        return found

    def _refuse_both(self, name: str, given: list[Tensor]) -> None:
        """As torch: a number of the host may join, a tensor not."""
        strange = [tuple(t.shape) for t in given if not is_on_device(t) and t.dim() and not isinstance(t, CausalBias)]
        if strange:
            raise RuntimeError(f"expected all tensors to be on the same device ({name}, {_where()}), on the CPU are {strange}")


class _Operations(TorchDispatchMode):
    """Counts operations on the device, and makes their results tensors of the device."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operations; in inference mode torch leaves that to us
                found = function.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        given = list(_tensors((args, kwargs)))
        recording = self.gpu.recording if _CREATING[-1] or any(map(is_on_device, given)) else None
        if recording is not None:
            recording.before(function, args, kwargs or {})
        found = function(*args, **(kwargs or {}))
        if recording is not None:
            recording.add(function, args, kwargs or {}, found)
        if not (_CREATING[-1] or any(map(is_on_device, given))):
            return found
        name = function.overloadpacket.__name__
        indices = list(_tensors(args[1])) if name in ("index", "index_put_", "index_put") else []
        if name in _WAITING or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self.gpu.wait(name)
        elif any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.gpu.wait("boolean index")
        elif any(not is_on_device(index) for index in indices) or (
            name == "copy_" and is_on_device(given[0]) != is_on_device(given[1])
        ):
            self.gpu.wait("copy between devices")
        if name not in _FREE:
            self.gpu.operations[name] += 1
        return found if name == "copy_" and not is_on_device(given[0]) else claim(found)


_CREATING = [False]


@contextmanager
def _creating(creates: bool) -> Iterator[None]:
    """Inside, operations without arguments make tensors of the device."""
    _CREATING.append(creates)
    try:
        yield
    finally:
        _CREATING.pop()


@contextmanager
def _unseen() -> Iterator[None]:
    """Inside, nothing is counted or claimed."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _unseen_call(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _unseen():
            return function(*args, **kwargs)

    return call


def is_on_device(tensor: Any) -> bool:
    return getattr(tensor, "_on_device", False) is True


def claim(value: Any) -> Any:
    """The same value, its tensors on the device."""
    for tensor in _tensors(value):
        tensor._on_device = True  # type: ignore[attr-defined]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _device_of(tensor: Tensor) -> torch.device:
    return CUDA if is_on_device(tensor) else _DEVICE(tensor)


def _names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _place() -> tuple[str, int]:
    """File, from the package's name on, and line of the innermost frame in the project."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "sparse_attention_hub") or file.is_relative_to(ROOT / "benchmark"):
            return str(file.relative_to(ROOT)), frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere", 0


def _where() -> str:
    return "{}:{}".format(*_place())
