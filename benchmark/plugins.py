"""Modules given with --plugin: maskers, benchmarks and configurations that are not in this package.

A plugin registers its maskers when it is imported (`register_masker`). It may define what a module of benchmark/tasks does
(`make_tasks`, and `find_task`, `expand`), and `get_all_sparse_configs()` or `get_all_sparse_configs(levels)`, whose configurations join the script's.
docs/plugins.md has an example.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from benchmark.tasks import register_benchmarks
from sparse_attention_hub.errors import UserError, quoted


def load_plugins(names: Iterable[str]) -> list[ModuleType]:
    """Import plugins, each a .py file or the name of a module; later calls in a process change nothing.

    Every worker calls it before its first job. UserError for one that cannot be imported.
    """
    return [_load(name) for name in dict.fromkeys(names)]


def _load(name: str) -> ModuleType:
    module, file = name, None
    if name.endswith(".py"):
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"--plugin {quoted(name)}: no such file")
        module = file.stem
        _check_folder(name, file)
        _add_to_path(str(file.parent))
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        raise UserError(f"--plugin {quoted(name)}: cannot be imported ({type(error).__name__}: {quoted(error)})") from error
    if file is not None and Path(found.__file__ or "").resolve() != file:
        raise UserError(f"--plugin {quoted(name)}: another module is called {module!r} ({found.__file__}): rename the file")
    if hasattr(found, "make_tasks"):
        try:
            register_benchmarks(found)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--plugin {quoted(name)}: make_tasks() failed ({type(error).__name__}: {quoted(error)})"
            ) from error
    return found


def _check_folder(name: str, file: Path) -> None:
    """UserError if modules beside the plugin would hide others of their names in the workers of a search, where the folder comes
    first."""
    for beside in sorted(file.parent.iterdir()) if os.access(file.parent, os.R_OK) else ():
        module = beside.stem if beside.suffix == ".py" else beside.name if (beside / "__init__.py").is_file() else None
        own = (
            module in ("benchmark", "sparse_attention_hub")
            and beside != Path(sys.modules[module].__file__ or "").resolve().parent
        )
        if beside != file and (own or module in sys.stdlib_module_names - {"test"}):
            raise UserError(
                f"--plugin {quoted(name)}: {beside.name} beside it would hide another module of its name in the search's workers: "
                "rename it, or keep the plugin in a folder of its own"
            )


def _add_to_path(folder: str) -> None:
    """Modules in the folder can be imported here and in the worker processes, which read PYTHONPATH: there it comes before the
    installed modules, see `_check_folder`."""
    if folder not in sys.path:
        sys.path.append(folder)
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if folder not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([*known, folder])
