"""What a result depends on beside parameters that are written down: a model's files, the files that a configuration names, the
code of its maskers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.results import fingerprint

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig


def config_key(config: ResearchAttentionConfig | None) -> str:
    """What tells one configuration's answers from another's: its maskers with all their parameters, and what lies behind
    them."""
    if config is None:
        return "dense"
    return fingerprint([config.to_dict(), behind_config(config)])


def behind_config(config: ResearchAttentionConfig) -> list[list[str]]:
    """[name, digest] of every file that a parameter names, and of the files that its maskers and their configs are written in.
    Comments and empty lines do not count; modules that a masker imports are not seen."""
    from sparse_attention_hub.maskers.base import masker_class

    found: dict[str, str] = {}
    for masker in config.masker_configs:
        name = type(masker).__name__
        for field in dataclasses.fields(masker):
            value = getattr(masker, field.name)
            if isinstance(value, str | Path) and (path := Path(value).expanduser()).is_file():
                found[f"{name}.{field.name}"] = _digest(path, path.stat().st_mtime_ns)
        for source in sorted({file for kind in (type(masker), masker_class(masker)) if (file := _source(kind))}):
            found[f"{name} in {source.name}"] = _code_digest(source.read_text(encoding="utf-8"))
    return [[name, digest] for name, digest in sorted(found.items())]


def weights_stamp(model: str) -> list[list[Any]] | None:
    """Names, sizes and times of a local model's files, so that new weights or another template in the old folder are
    noticed."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (".md", ".log", ".lock")
    ]
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files]


def _source(kind: type) -> Path | None:
    try:
        found = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # made in an interactive session
        return None
    return Path(found) if found is not None and Path(found).is_file() else None


def _code_digest(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines()]
    return fingerprint([line for line in lines if line and not line.lstrip().startswith("#")])


@functools.lru_cache(maxsize=64)
def _digest(path: Path, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
