"""Hashes of what a result depends on: parameters, versions of the engine and of maskers, the files of a model and those that a
configuration names."""

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
    """Two hashes that identify a configuration's answers: of its maskers with all their parameters, and of what these depend on
    (`dependency_digests`)."""
    parameters = "dense" if config is None else fingerprint(config.to_dict())
    return f"{parameters}-{fingerprint(dependency_digests(config))}"


def same_parameters(one: str, other: str) -> bool:
    """Whether two keys have equal parameters; versions, code and files may differ."""
    return one.partition("-")[0] == other.partition("-")[0]


def lacks_a_file(config: ResearchAttentionConfig | None) -> bool:
    """Whether a file that a parameter ("..._file") names is missing, so that the configuration cannot be run."""
    maskers = [] if config is None else config.masker_configs
    named = [getattr(m, f.name) for m in maskers for f in dataclasses.fields(m) if f.name.endswith("_file")]
    return any(isinstance(value, str | Path) and _file(value) is None for value in named)


def dependency_digests(config: ResearchAttentionConfig | None) -> list[list[str]]:
    """[name, version or digest] of the engine, of each masker (a user's masker counts by its code) and of each file that a
    parameter names."""
    from sparse_attention_hub.attention import ENGINE_VERSION
    from sparse_attention_hub.maskers.base import masker_class

    found = [["engine", str(ENGINE_VERSION)]]
    for number, masker in enumerate([] if config is None else config.masker_configs):
        method = masker_class(masker)
        found.append([f"{number} {method.__name__}", str(method.version)])
        for field in dataclasses.fields(masker):
            value = getattr(masker, field.name)
            if isinstance(value, str | Path) and (path := _file(value)) is not None:
                found.append([f"{number} {field.name}", _digest(path, path.stat().st_mtime_ns)])
        own = {file for kind in (type(masker), method) if not _is_ours(kind) and (file := _source(kind))}
        for source in sorted(own):
            found.append([f"{number} {source.name}", _code_digest(source.read_bytes())])
    return found


def code_of(kind: type) -> str | None:
    """A digest of the code of a user's class; None for one of this program's."""
    source = None if _is_ours(kind) else _source(kind)
    return None if source is None else _code_digest(source.read_bytes())


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("sparse_attention_hub", "benchmark")


def weights_stamp(model: str) -> list[list[Any]] | None:
    """Names, sizes and times of a local model's files: other weights or another template in the same folder are noticed."""
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
    """The file of this name, if there is a readable one. The value may be any text."""
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


def _code_digest(source: bytes) -> str:
    """Of a module's code: comments, docstrings and layout do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return fingerprint(ast.dump(tree))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
