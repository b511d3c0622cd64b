"""Masker config classes -> one Ray Tune search space -> ResearchAttentionConfigs.

A parameter of a combination is named `<config class in lower case, without "config">_<field>`, as in
`oracletopk_heavy_size`. Fields without a domain keep the template's value.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from sparse_attention_hub import MaskerConfig, ResearchAttentionConfig
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.search_space import Choice, IntUniform, LogUniform, Uniform


class CombinationSpace:
    """The search space of one template: what may vary, what stays, and how parameters become a configuration."""

    def __init__(self, template: ResearchAttentionConfig, task_name: str) -> None:
        """UserError if a config class names a field it does not have, or the same class comes twice with a space."""
        self.template = template
        self.domains: dict[str, Any] = {}
        self._places: dict[str, tuple[int, str]] = {}
        for place, masker in enumerate(template.masker_configs):
            fields = {field.name for field in dataclasses.fields(masker)}
            for field, domain in type(masker).get_search_space(task_name).items():
                if field not in fields:
                    raise UserError(f"{type(masker).__name__}.get_search_space names {field!r}, which is no field of it")
                name = parameter_name(type(masker), field)
                if name in self._places:
                    name = f"{name}_{place + 1}"
                self.domains[name] = domain
                self._places[name] = (place, field)

    def ray_space(self) -> dict[str, Any]:
        """{parameter: ray.tune domain}."""
        return {name: to_ray_domain(domain) for name, domain in self.domains.items()}

    def build(self, parameters: dict[str, Any]) -> ResearchAttentionConfig:
        """The template with these parameters. Raises ValueError where a masker config refuses its values."""
        maskers = copy.copy(self.template.masker_configs)
        changes: dict[int, dict[str, Any]] = {}
        for name, value in parameters.items():
            place, field = self._places[name]
            changes.setdefault(place, {})[field] = value
        for place, change in changes.items():
            maskers[place] = dataclasses.replace(maskers[place], **change)
        return ResearchAttentionConfig(maskers, self.template.backend)

    def template_values(self, template: ResearchAttentionConfig) -> dict[str, Any]:
        """The parameters of another template of the same maskers, held to the space: where a search starts."""
        return {
            name: nearest(self.domains[name], getattr(template.masker_configs[place], field))
            for name, (place, field) in self._places.items()
        }

    def fixed_fields(self) -> list[dict[str, Any]]:
        """What a template decides for good: its values of the fields without a domain, masker by masker."""
        from sparse_attention_hub.maskers.base import config_to_dict

        free = set(self._places.values())
        records = [config_to_dict(masker) for masker in self.template.masker_configs]
        for place, record in enumerate(records):
            record["params"] = {f: v for f, v in record["params"].items() if (place, f) not in free}
        return records


def parameter_name(config_class: type[MaskerConfig], field: str) -> str:
    """(OracleTopKConfig, "heavy_size") -> "oracletopk_heavy_size"."""
    return f"{config_class.__name__.lower().removesuffix('config')}_{field}"


def to_ray_domain(domain: Any) -> Any:
    """The library's domain as Ray Tune's; a Ray Tune domain stays what it is."""
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
    """The value of a domain (ours or Ray Tune's) that is nearest to `value`; one of another kind gives the domain's first."""
    values = domain.values if isinstance(domain, Choice) else getattr(domain, "categories", None)
    if values is not None:
        if value in values or not all(isinstance(v, int | float) for v in values):
            return value if value in values else values[0]
        return min(values, key=lambda v: abs(v - value)) if isinstance(value, int | float) else values[0]
    low, high = getattr(domain, "low", None), getattr(domain, "high", getattr(domain, "upper", None))
    low = getattr(domain, "lower", low)
    if type(domain).__name__ == "Integer" and type(domain.sampler).__name__ != "Quantized":
        high -= 1  # Ray Tune leaves the upper end of integers out, unless they go in steps
    if low is None or high is None or not isinstance(value, int | float):
        return value
    # A size in tokens cannot be held to a domain of fractions: start from the middle instead.
    if isinstance(value, int) and isinstance(low, float) and not low <= value <= high:
        return (low * high) ** 0.5 if low > 0 else (low + high) / 2
    return type(low)(min(max(value, low), high))
