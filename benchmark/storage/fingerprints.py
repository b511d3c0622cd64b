"""What a result depends on beside the parameters that are written down: versions of the engine and of maskers, a model's files,
the files that a configuration names."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.storage.results import fingerprint

if TYPE_CHECKING:
    from sparse_attention_hub import ResearchAttentionConfig


def config_key(config: ResearchAttentionConfig | None) -> str:
    """What tells one configuration's answers from another's: a hash of its maskers with all their parameters, and one of what
    lies behind them."""
    parameters = "dense" if config is None else fingerprint(config.to_dict())
    return f"{parameters}-{fingerprint(behind_config(config))}"


def same_parameters(one: str, other: str) -> bool:
    """Whether two keys differ at most in what lies behind the parameters."""
    return one.partition("-")[0] == other.partition("-")[0]


def lacks_a_file(config: ResearchAttentionConfig | None) -> bool:
    """Whether a file that a parameter names ("..._file") is not there: nothing new can be answered."""
    maskers = [] if config is None else config.masker_configs
    named = [getattr(m, f.name) for m in maskers for f in dataclasses.fields(m) if f.name.endswith("_file")]
    return any(isinstance(value, str | Path) and _file(value) is None for value in named)


def behind_config(config: ResearchAttentionConfig | None) -> list[list[str]]:
    """[name, version or digest]: the engine's version, that of each masker of this package, the code of each other masker, and
    every file that a parameter names."""
    from sparse_attention_hub.attention import ENGINE_VERSION
    from sparse_attention_hub.maskers.base import masker_class

    found = [["engine", str(ENGINE_VERSION)]]
    for place, masker in enumerate([] if config is None else config.masker_configs):
        method = masker_class(masker)
        found.append([f"{place} {method.__name__}", str(method.version)])
        for field in dataclasses.fields(masker):
            value = getattr(masker, field.name)
            if isinstance(value, str | Path) and (path := _file(value)) is not None:
                found.append([f"{place} {field.name}", _digest(path, path.stat().st_mtime_ns)])
        own = {file for kind in (type(masker), method) if not _is_ours(kind) and (file := _source(kind))}
        for source in sorted(own):
            found.append([f"{place} {source.name}", _code_digest(source.read_text(encoding="utf-8"))])
    return found


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "sparse_attention_hub"


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


def _file(value: str | Path) -> Path | None:
    """The file of this name, if there is one that can be read. Any text may come here."""
    try:
        path = Path(value).expanduser()
        return path if path.is_file() and os.access(path, os.R_OK) else None
    except (OSError, RuntimeError, ValueError):
        return None


def _source(kind: type) -> Path | None:
    try:
        found = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # made in an interactive session
        return None
    return Path(found) if found is not None and Path(found).is_file() else None


def _code_digest(text: str) -> str:
    """Of a module's code: comments, docstrings and layout do not count."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return fingerprint(ast.dump(tree))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
