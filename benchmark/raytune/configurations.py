"""The configurations of a run: the budgets of --levels, presets, those of plugins, and which of all are chosen."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import inspect
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from benchmark.settings import DENSE, Settings, SparseConfig, as_sparse_configs
from sparse_attention_hub.errors import UserError, quoted


def check_levels(levels: Sequence[float]) -> list[float]:
    """Budgets in percent without repeats. UserError for one that is not from 0.01 to 100."""
    for level in levels:
        if not 0.01 <= level <= 100:
            raise UserError(f"--levels must be percentages from 0.01 to 100, got {level:g}")
    return list(dict.fromkeys(float(f"{level:g}") for level in levels))


def at_levels(names: list[str] | None, levels: Sequence[float]) -> list[str] | None:
    """Configurations of a run at other budgets: the same combinations, each at all of these levels."""
    if names is None:
        return None
    families = dict.fromkeys(SparseConfig(name, None, None).family for name in names)
    return [name for family in families for name in ([family] if family in names else [f"{family}_{p:g}pct" for p in levels])]


def page_sizes(names: Sequence[str]) -> list[int]:
    """The page sizes that names of configurations ask for: 16 for sink_local_pq_cache_pages16_10pct."""
    return sorted({int(size) for name in names for size in re.findall(r"_pages(\d{1,6})(?=_|$)", name) if int(size)})


def pages_of(entries: list[tuple[str, Any, Any]], page_sizes: Sequence[int]) -> list[tuple[str, Any, Any]]:
    """Configurations at four times the budget whose choice is rounded to whole pages: the rest of each page takes the difference.
    Without those that sample: their keys cannot be rounded."""
    import sparse_attention_hub as hub
    from sparse_attention_hub.maskers.base import masker_class

    configs = []
    for name, config, classes in entries:
        family, _, level = name.rpartition("_")
        if config is None or masker_class(config.masker_configs[-1]).is_sampling:
            continue
        for size in page_sizes:
            maskers = [*config.masker_configs, hub.RoundToPagesConfig(size)]
            budget = 4 * float(level.removesuffix("pct"))
            rounded = hub.ResearchAttentionConfig(masker_configs=maskers)
            configs.append((f"{family}_pages{size}_{budget:g}pct", rounded, [*classes, hub.RoundToPagesConfig]))
    return configs


def configs_of_plugin(plugin: ModuleType, levels: Sequence[float]) -> list[tuple[str, Any, Any]]:
    """The configurations of a plugin. Its get_all_sparse_configs takes the levels, or nothing."""
    make = getattr(plugin, "get_all_sparse_configs", None)
    if make is None:
        return []
    try:
        found = list(make(levels) if inspect.signature(make).parameters else make())
    except Exception as error:  # a plugin may raise anything
        raise UserError(
            f"{plugin.__name__}: get_all_sparse_configs() failed ({type(error).__name__}: {quoted(error)})"
        ) from error
    for entry in found:
        if not isinstance(entry, tuple) or len(entry) != 3 or not isinstance(entry[0], str):
            raise UserError(
                f"{plugin.__name__}: a configuration is a (name, template, masker classes) triple, got {quoted(entry)}"
            )
        if (entry[1] is None) != (entry[0] == DENSE):
            raise UserError(f"{plugin.__name__}: {quoted(entry[0])}: the configuration without a template is called {DENSE!r}")
    return found


def take_presets(options: argparse.Namespace) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    """(the configurations that --configs names as preset:PAPER or preset:PAPER:BUDGET, a note on their protocol).

    In `options` their names take the place of these words, and their protocol that of --sparse-from where it is not given.
    UserError for a preset that there is not, or for presets of two protocols without --sparse-from.
    """
    from sparse_attention_hub.presets import preset

    presets, names = [], []
    for word in options.configs or ():
        kind, _, rest = word.partition(":")
        if kind == "preset":
            paper, _, budget = rest.partition(":")
            try:
                presets.append(preset(paper, **({"budget": _number(budget)} if budget else {})))
            except UserError as error:
                raise UserError(f"--configs {quoted(word)}: {error}") from None
        names.append(f"preset_{presets[-1].name}" if kind == "preset" else word)
    if not presets:
        return [], []
    options.configs = names
    protocols = {found.sparse_from: found.name for found in presets}
    notes = []
    if options.sparse_from is None:
        if len(protocols) > 1:
            by_paper = ", ".join(f"{protocol} in {name}" for protocol, name in protocols.items())
            raise UserError(f"--configs: presets of two protocols ({by_paper}): give --sparse-from, or run them one at a time")
        (options.sparse_from,) = protocols
        notes.append(f"--sparse-from {options.sparse_from}, the protocol of {', '.join(found.name for found in presets)}")
    unique = {found.name: found.config for found in presets}
    entries = [
        (f"preset_{name}", config, [type(masker) for masker in config.masker_configs]) for name, config in unique.items()
    ]
    return entries, notes


def _number(text: str) -> int | float | str:
    """A budget as an int or a float; other text as it is, for the preset to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def leave_out_oracles(configs: list[SparseConfig], settings: Settings) -> tuple[list[SparseConfig], list[str]]:
    """(the configurations that can meet their budget, a note on the others). On KV bytes an oracle cannot: it reads all keys,
    half of the bytes, to choose a few."""
    if settings.budget_on == "density":
        return configs, []
    reachable = [config for config in configs if not (config.is_oracle and config.budget is not None and config.budget <= 0.5)]
    names = ", ".join(config.name for config in configs if config not in reachable)
    if not names:
        return configs, []
    return reachable, [
        f"left out {names}: an oracle reads every key to choose, half of the KV bytes, so it cannot meet this budget"
    ]


def choose_configs(entries: list[tuple[str, Any, Any]], wanted: list[str] | None) -> list[SparseConfig]:
    """The named configurations, in the list's order; names may be patterns. UserError for a name that matches none."""
    configs = as_sparse_configs(entries)
    if not wanted:
        return configs
    names = [config.name for config in configs]
    chosen: set[str] = set()
    for pattern in wanted:
        matches = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern[:100], names, n=3, cutoff=0.4) or names[:5]
            raise UserError(
                f"--configs: unknown configuration {quoted(pattern)}; near: {', '.join(near)}; --configs list shows all"
            )
        chosen.update(matches)
    return [config for config in configs if config.name in chosen]
