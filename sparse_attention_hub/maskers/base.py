"""The base of every masker: a dataclass config, and one class that overrides `select`."""

from __future__ import annotations

import dataclasses
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import SeveralLayersError
from ..mask import Mask
from ..search_space import LogUniform
from .call_cache import once
from .inputs import AttentionInputs
from .layout import end_of_allowed
from .state import MaskerState


@dataclass
class MaskerConfig:
    """Base of all masker configs. Subclasses are dataclasses; bad values raise ValueError in `__post_init__`."""

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        """{field: domain} of what may be tuned on this task; empty = nothing."""
        return {}


@dataclass
class TopKConfig(MaskerConfig):
    """heavy_size: keys chosen beside those already chosen, int (tokens) or float (fraction of N)."""

    heavy_size: int | float

    def __post_init__(self) -> None:
        self.heavy_size = check_size("heavy_size", self.heavy_size)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"heavy_size": LogUniform(0.005, 0.5)}


ConfigT = TypeVar("ConfigT", bound=MaskerConfig)
T = TypeVar("T")


class Masker(ABC, Generic[ConfigT]):
    """One way of choosing keys. An instance holds only its config; a MaskerState holds what it learns.

    Override `select`. A masker that summarises keys also overrides `encode` (per-key codes) and, if the summary needs
    the context as a whole, `fit`; `codes(inputs)` then returns both, cached across decode steps.
    """

    #: True for maskers that sample: at most one in a pipeline, and it comes last.
    is_sampling = False
    #: True if `select` never returns a key outside inputs.allowed; else the pipeline removes such keys.
    keeps_to_allowed = False
    #: True if `select` reads shapes, positions and inputs.allowed only. The choice of the leading maskers
    #: of this kind is computed once for all calls of equal positions.
    by_position = False
    #: True if `select` may also drop keys that selectors before it chose; those of `inputs.kept` stay. In a pipeline without a
    #: selector it is given all allowed keys.
    narrows = False
    #: True if `select` also takes an OpenLayout, with which nothing waits for the device: then decode steps can be CUDA graphs.
    in_graphs = False
    #: True if how many keys it chooses depends on the layer by design: a search does not judge it by a few layers.
    varies_by_layer = False
    #: Bytes that choosing holds at most for each head, query and key, on a GPU and by compiled loops, measured at 5 to 45% of the
    #: keys: memory is estimated by it.
    score_bytes = (24, 9)
    #: Raise it when the method chooses differently for the same config: results of other versions are not reused.
    version = 1
    #: Config fields that `fit` and `encode` depend on, None = all. Equal fields share codes.
    code_fields: tuple[str, ...] | None = None
    #: What of the context's prefill it chooses by: see context_summary.PARTS. Recorded only if a configuration asks for it.
    observes: tuple[str, ...] = ()

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def learns(self) -> bool:
        """Whether anything of the context's keys or its prefill is kept for it."""
        own = type(self)
        return own.encode is not Masker.encode or own.prepare is not Masker.prepare or bool(self.observes)

    @abstractmethod
    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        """The mask with this masker's choice added, or narrowed (see `narrows`). Never changes `mask`; never chooses a key
        outside inputs.allowed."""

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> Any:
        """Learn from the context's keys (B, Hkv, N, D). allowed: bool (B, N), False on padding; None = all."""
        return True

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        """Codes of keys (B, Hkv, n, D): (B, Hkv, n, ...), for each key by itself given `fitted`."""
        raise TypeError(f"{type(self).__name__} asks for codes of keys but does not override encode()")

    def join_fits(self, fits: list[Any]) -> Any:
        """What `fit` made of several layers, as a fit whose items are these layers: see SharedStates.of_call. Overridden by maskers
        that keep more than codes: a fit, a summary, a `prepare` of their own. Without it their layers are replayed one by one."""
        if type(self).prepare is not Masker.prepare or self.observes or any(fit is not True for fit in fits):
            raise SeveralLayersError(f"{type(self).__name__} does not join the fits of layers")
        return True

    def codes_key(self) -> tuple[str, ...]:
        """Equal for maskers whose codes of the same keys are equal."""
        names = [f.name for f in dataclasses.fields(self.config)] if self.code_fields is None else self.code_fields
        return (type(self).__name__, *(f"{name}={getattr(self.config, name)!r}" for name in names))

    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        """Fit on the context's keys and code them, so that decode steps only add their own."""
        if type(self).encode is not Masker.encode:
            self._extend(keys, layer_idx, state, allowed)

    def codes(self, inputs: AttentionInputs) -> tuple[Any, Tensor]:
        """(fitted, codes of all keys (B, Hkv, N, ...)), from inputs.state if there is one, else fitted on these keys."""
        state, end = inputs.state if inputs.state is not None else MaskerState(), inputs.layout.length
        if end is not None:
            new = inputs.keys.index_select(2, end.view(1) - 1)
            return state.fitted, state.put(self.encode(new, state.fitted, inputs.layer_idx), end.view(1) - 1, inputs.shape[3])
        if state.length != inputs.shape[3]:
            self._extend(inputs.keys, inputs.layer_idx, state, inputs.layout.known_keys)
        codes, unfilled = state.codes(), inputs.keys[:, :, state.length :]
        if unfilled.shape[2]:
            codes = torch.cat([codes, self.encode(unfilled, state.fitted, inputs.layer_idx)], 2)
        return state.fitted, codes

    def shared(self, inputs: AttentionInputs, make: Callable[[], T]) -> T:
        """`make()` once for all maskers of this call with equal code fields and the same state."""
        return once(inputs.cache.call, (self.codes_key(), inputs.state), make)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        """Bytes that choosing reads, as a share of all keys and values: 0.5 = all keys, none of the values. Of a masker that
        narrows: as if it were given all keys; it reads of those that it is given."""
        return 0.0

    def _extend(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None) -> None:
        """Code the new keys. Slots past the last allowed key (caches of fixed size) are not coded yet."""
        state.check(keys.shape[2])
        total = keys.shape[2] if allowed is None else max(state.length, end_of_allowed(allowed))
        if not state.is_fitted:
            state.fitted, state.fit_length = self.fit(keys, allowed, layer_idx), total
        if total > state.length:
            state.append(self.encode(keys[:, :, state.length : total], state.fitted, layer_idx))


_REGISTRY: dict[type[MaskerConfig], type[Masker[Any]]] = {}
MaskerT = TypeVar("MaskerT", bound=type[Masker[Any]])


def register_masker(config_class: type[MaskerConfig]) -> Callable[[MaskerT], MaskerT]:
    """Class decorator: `@register_masker(MyConfig)` makes ResearchAttention build this masker for a MyConfig. ValueError for the
    name of a configuration of the library, which files hold without its module."""
    if not (isinstance(config_class, type) and issubclass(config_class, MaskerConfig)):
        raise TypeError(f"register_masker needs a MaskerConfig class, got {config_class!r}")
    for known in _REGISTRY:
        if known.__name__ == config_class.__name__ and _is_ours(known) and not _is_ours(config_class):
            raise ValueError(
                f"there is a {known.__name__} in {known.__module__}: give {config_class.__module__}'s another name"
            )

    def register(masker_class: MaskerT) -> MaskerT:
        _REGISTRY[config_class] = masker_class
        return masker_class

    return register


def _is_ours(config_class: type) -> bool:
    # `python -m` makes a second copy of a module, named __main__
    return config_class.__module__.partition(".")[0] in (__name__.partition(".")[0], "__main__")


def create_masker(config: MaskerConfig) -> Masker[Any]:
    """The masker of a config. TypeError for anything but a MaskerConfig, ValueError for a config without a masker."""
    return masker_class(config)(config)


def masker_class(config: MaskerConfig) -> type[Masker[Any]]:
    """The class that is registered for a config. Errors as create_masker."""
    if not isinstance(config, MaskerConfig):
        raise TypeError(f"masker_configs must hold MaskerConfig objects, got {type(config).__name__}")
    found = _REGISTRY.get(type(config))
    if found is None:
        known = ", ".join(sorted(c.__name__ for c in _REGISTRY))
        raise ValueError(f"no masker is registered for {type(config).__name__}; registered: {known}")
    return found


def registered_configs() -> dict[str, type[MaskerConfig]]:
    """Config classes by name. Of equal names the latest, but never the copy that `python -m` makes of a module."""
    return {c.__name__: c for c in sorted(_REGISTRY, key=lambda c: c.__module__ != "__main__")}


def config_to_dict(config: MaskerConfig) -> dict[str, Any]:
    """{"type": class name, "params": {field: value}} for `config_from_dict`, without `unwritable_fields`."""
    params = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    return {"type": type(config).__name__, "params": {k: v for k, v in params.items() if not _holds_tensor(v)}}


def unwritable_fields(config: MaskerConfig) -> list[str]:
    """Fields that hold tensors, which `config_to_dict` leaves out."""
    return [f.name for f in dataclasses.fields(config) if f.init and _holds_tensor(getattr(config, f.name))]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(v) for v in value.values())
    return any(_holds_tensor(v) for v in value) if isinstance(value, list | tuple) else isinstance(value, Tensor)


def config_from_dict(record: dict[str, Any]) -> MaskerConfig:
    """ValueError for an unknown type or parameters that do not fit."""
    known = registered_configs()
    if not isinstance(record, dict) or record.get("type") not in known:
        name = record.get("type") if isinstance(record, dict) else record
        raise ValueError(f"unknown masker type {name!r}; registered: {', '.join(sorted(known))}")
    try:
        return known[record["type"]](**record["params"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"parameters of {record['type']} do not fit: {error}") from None


def draw_example(name: str) -> None:
    """What `python -m sparse_attention_hub.maskers.{name}` does: draw the mask on a small example."""
    from .drawing import main  # imports all maskers

    main(name)


def check_size(name: str, value: Any, *, zero: bool = False) -> int | float:
    """A size as an int > 0 (tokens) or a float in (0, 1] (fraction of N), ValueError otherwise; `zero` permits 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be an int (tokens) or a float (fraction), got {value!r}")
    is_tokens = isinstance(value, numbers.Integral)
    size: int | float = int(value) if is_tokens else float(value)  # type: ignore[call-overload]
    if not (size >= 0 if zero else size > 0) or not (is_tokens or size <= 1):
        least, interval = (">= 0", "[0, 1]") if zero else ("> 0", "(0, 1]")
        raise ValueError(f"{name} must be {least}{'' if is_tokens else f'; as a fraction in {interval}'}, got {value}")
    return size


def check_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> float:
    """A float in the interval, ValueError otherwise."""
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) <= high
    if not fits or (open_low and value == low) or (open_high and value == high):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return float(value)


def check_file(name: str, value: str | None, what: str, module: str) -> str:
    """The name of a file that a masker needs. ValueError for None, with the command that makes one."""
    if value is None:
        command = f"python -m sparse_attention_hub.maskers.{module} --model MODEL --out FILE"
        raise ValueError(f"{name} must name a file of {what}, got None; make one with: {command}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False, ValueError otherwise."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An int in [low, high], ValueError otherwise."""
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an integer {bound}, got {value!r}")
    return int(value)
