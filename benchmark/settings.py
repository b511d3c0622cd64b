"""What a run was asked to do: the command line as typed values, and the named sparse configurations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparse_attention_hub.errors import UserError

if TYPE_CHECKING:
    from sparse_attention_hub import MaskerConfig, ResearchAttentionConfig

DENSE = "dense"
#: A measured density may exceed the budget by a tenth; beyond that a row is marked and not recommended.
BUDGET_SLACK = 1.1
_BUDGET_SUFFIX = re.compile(r"_(\d+(?:\.\d+)?)pct$")


@dataclass(frozen=True)
class Settings:
    """One run. Its fields are named after the flags of `run_full_benchmark.py`."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    phases: tuple[int, ...] = (1, 2)
    debug: bool = False
    seed: int = 0
    sparse_from: Literal["question", "decode"] = "question"
    thinking: Literal["auto", "off", "on"] = "auto"
    device: str = "auto"
    dtype: str = "auto"
    dense_backend: str = "auto"
    attention_backend: str = "auto"
    trust_remote_code: bool = False
    plugin: tuple[str, ...] = ()
    data_dir: Path | None = None
    ray_address: str | None = None
    # Phase 1
    num_samples: int = 50
    search_timeout: float = 900.0
    search_max_new_tokens: int = 20
    search_max_context_length: int = 8192
    search_max_requests: int = 10
    objective: str = "default"
    budget_on: Literal["density", "kv"] = "density"
    head_budgets: Literal["off", "layer", "kv_head", "head"] = "kv_head"
    force_search: bool = False
    trace_budget_gb: float | None = None
    # Phase 2
    config_run: str | None = None
    max_concurrent_benchmarks: int | None = None
    benchmark_timeout: float = 7200.0
    max_new_tokens: int = 200
    max_context_length: int = 64000
    max_requests: int | None = None
    micro_metrics: str = "sample"
    rescore: bool = False
    force_benchmark: bool = False
    # Where things go
    optimal_configs_dir: Path = Path("optimal_configs")
    benchmark_results_dir: Path = Path("benchmark_results")
    ray_results_dir: Path = Path("ray_results")


@dataclass(frozen=True)
class SparseConfig:
    """A named configuration to search for or to run. `config` is a template in Phase 1, the found settings in Phase 2.

    config None = dense attention. masker_classes are the classes of config.masker_configs, in order.
    """

    name: str
    config: ResearchAttentionConfig | None
    masker_classes: tuple[type[MaskerConfig], ...] | None

    @property
    def family(self) -> str:
        """The name without its budget: configurations of one family may share a study."""
        return _BUDGET_SUFFIX.sub("", self.name)

    @property
    def budget(self) -> float | None:
        """Budget as a fraction, from the `_Npct` in the name; None without one."""
        found = _BUDGET_SUFFIX.search(self.name)
        return float(found.group(1)) / 100 if found else None

    @property
    def is_oracle(self) -> bool:
        """Whether a masker reads every key to choose a few."""
        return any(entry.__name__.startswith("Oracle") for entry in self.masker_classes or ())


def as_sparse_configs(
    entries: list[tuple[str, ResearchAttentionConfig | None, list[type[MaskerConfig]] | None]],
) -> list[SparseConfig]:
    """Checked SparseConfigs from the (name, config, classes) triples of get_all_sparse_configs().

    Raises UserError (a ValueError) if classes do not name the config's, two have one name, or a config holds tensors.
    """
    from sparse_attention_hub.maskers.base import unwritable_fields

    configs: list[SparseConfig] = []
    for name, config, classes in entries:
        made_of = [type(entry) for entry in config.masker_configs] if config is not None else []
        if [*(classes or [])] != made_of:
            want, got = ", ".join(c.__name__ for c in made_of), ", ".join(c.__name__ for c in classes or [])
            raise UserError(
                f"configuration {name!r}: its third element must name the maskers of its second ({want}), got ({got})"
            )
        for entry in config.masker_configs if config is not None else []:
            for field in unwritable_fields(entry):
                raise UserError(
                    f"configuration {name!r}: {field} of {type(entry).__name__} holds tensors, which results cannot name: save "
                    "them in a file and name that (for hash weights: write_hat_weights, then hat_weight_file)"
                )
        if any(name == other.name for other in configs):
            raise UserError(f"configuration {name!r} is given twice; names must differ")
        configs.append(SparseConfig(name, config, tuple(classes) if classes else None))
    return configs


def snake_case(class_name: str) -> str:
    """ "HashAttentionTopKMaskerConfig" -> "hash_attention_top_k"."""
    stem = class_name.removesuffix("Config").removesuffix("Masker")
    words = re.findall(r"[A-Z][A-Z0-9]*[A-Z](?=[A-Z][a-z]|$)|[A-Z][a-z0-9]*|[A-Z]", stem)
    return "_".join(word.lower() for word in words)


def hyperparameters(config: ResearchAttentionConfig) -> dict[str, object]:
    """{"<masker>.<field>": value} of every masker of a configuration, for tables."""
    from sparse_attention_hub.maskers.base import config_to_dict

    found: dict[str, object] = {}
    for entry in config.masker_configs:
        prefix = snake_case(type(entry).__name__)
        found.update({f"{prefix}.{field}": value for field, value in config_to_dict(entry)["params"].items()})
    return found
