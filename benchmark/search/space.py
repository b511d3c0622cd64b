"""Masker config classes -> one Ray Tune search space -> ResearchAttentionConfigs.

A parameter is named `<config class in lower case, without "config">_<field>`, for example `oracletopk_heavy_size`. Fields
without a domain keep the template's value.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.storage.records import Params
from sparse_attention_hub import MaskerConfig, ResearchAttentionConfig
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.search_space import Choice, IntUniform, LogUniform, Uniform

#: parameter -> domain
Domains = dict[str, Any]


class CombinationSpace:
    """The search space of one template.

    domains: parameter -> domain, the library's or Ray Tune's. Where a config class comes twice, parameters of the second one
    end in its position, for example `oracletopk_heavy_size_4`.
    """

    def __init__(
        self, template: ResearchAttentionConfig, task_name: str, starts: Sequence[ResearchAttentionConfig] = ()
    ) -> None:
        """starts: templates of the levels, whose smallest sizes the space holds. UserError if a config class has a search space
        for a field that it does not have."""
        self.template = template
        self.domains: Domains = {}
        self._fields: dict[str, tuple[int, str]] = {}  # parameter -> (index of its masker, field)
        for index, masker in enumerate([] if template.fixed else template.masker_configs):
            fields = {field.name for field in dataclasses.fields(masker)}
            for field, domain in type(masker).get_search_space(task_name).items():
                if field not in fields:
                    raise UserError(
                        f"{type(masker).__name__}.get_search_space names {field!r}, but the class has no such field"
                    )
                name = parameter_name(type(masker), field)
                if name in self._fields:
                    name = f"{name}_{index + 1}"
                self.domains[name] = _reaching(domain, [getattr(start.masker_configs[index], field) for start in starts])
                self._fields[name] = (index, field)

    def ray_space(self) -> Domains:
        """{parameter: ray.tune domain}."""
        return {name: to_ray_domain(domain) for name, domain in self.domains.items()}

    def build(self, params: Mapping[str, Any]) -> ResearchAttentionConfig:
        """The template with these parameters. ValueError where a masker config refuses its values."""
        maskers = copy.copy(self.template.masker_configs)
        for index in {self._fields[name][0] for name in params}:
            changes = {field: params[name] for name, (at, field) in self._fields.items() if at == index and name in params}
            maskers[index] = dataclasses.replace(maskers[index], **changes)
        return dataclasses.replace(self.template, masker_configs=maskers)

    def template_values(self, template: ResearchAttentionConfig) -> Params:
        """The parameters of another template of the same maskers, clipped to the space: where a search starts."""
        return {
            name: nearest(self.domains[name], getattr(template.masker_configs[index], field))
            for name, (index, field) in self._fields.items()
        }

    def fixed_fields(self) -> list[dict[str, object]]:
        """The template as its `to_dict` gives it, with only the fields that are not searched: its maskers, then what else it
        sets."""
        searched = set(self._fields.values())
        record = self.template.to_dict()
        maskers = [
            {"type": entry["type"], "params": {k: v for k, v in entry["params"].items() if (index, k) not in searched}}
            for index, entry in enumerate(record.pop("masker_configs"))
        ]
        del record["type"]
        return [*maskers, record] if record else maskers


def _reaching(domain: Any, starts: list[Any]) -> Any:
    """The domain of a size, begun lower where a template starts below it: at 0.5% sizes are below what 5% needs."""
    lowest = min((start for start in starts if isinstance(start, float)), default=None)
    if isinstance(domain, LogUniform) and lowest is not None and 0 < lowest < domain.low:
        return LogUniform(lowest / 2, domain.high)
    return domain


def parameter_name(config_class: type[MaskerConfig], field: str) -> str:
    """(OracleTopKConfig, "heavy_size") -> "oracletopk_heavy_size"."""
    return f"{config_class.__name__.lower().removesuffix('config')}_{field}"


def to_ray_domain(domain: Any) -> Any:
    """The library's domain as one of Ray Tune's; a Ray Tune domain is returned as it is."""
    from ray import tune

    match domain:
        case Choice(values=values):
            return tune.choice(list(values))
        case Uniform(low=low, high=high):
            return tune.uniform(low, high)
        case LogUniform(low=low, high=high):
            return tune.loguniform(low, high)
        case IntUniform(low=low, high=high):
            return tune.randint(low, high + 1)
    return domain


def nearest(domain: Any, value: Any) -> Any:
    """The value of a domain (the library's or Ray Tune's) nearest to `value`; the first choice where no distance is defined."""
    values = domain.values if isinstance(domain, Choice) else getattr(domain, "categories", None)
    if values is not None:
        if value in values or not all(isinstance(v, int | float) for v in values):
            return value if value in values else values[0]
        return min(values, key=lambda v: abs(v - value)) if isinstance(value, int | float) else values[0]
    low, high = getattr(domain, "low", None), getattr(domain, "high", getattr(domain, "upper", None))
    low = getattr(domain, "lower", low)
    if high is not None and type(domain).__name__ == "Integer" and type(domain.sampler).__name__ != "Quantized":
        high -= 1  # Ray Tune excludes the upper bound of integers, except of quantized ones
    if low is None or high is None or not isinstance(value, int | float):
        return value
    # A size in tokens cannot be clipped to a domain of fractions: start from the middle instead.
    if isinstance(value, int) and isinstance(low, float) and not low <= value <= high:
        return (low * high) ** 0.5 if low > 0 else (low + high) / 2
    return type(low)(min(max(value, low), high))
