"""Loops are compiled once for a machine, wherever that can be kept, and only where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
USE = """
import torch
from sparse_attention_hub.lists import from_flags
print(from_flags(torch.tensor([[[[True, False, True]]]])).indices.tolist())
"""
NOTICE = "compiling CPU kernels"


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def test_two_at_once_then_never_again(tmp_path: Path) -> None:
    cache = {"SPARSE_ATTENTION_HUB_CACHE": str(tmp_path)}
    results = [finish(process) for process in [start(USE, **cache) for _ in range(2)]]
    assert all(out == "[[[[0, 2]]]]" for out, _ in results)
    notices = [err for _, err in results if err]  # the later one may find what the first has compiled
    assert notices and all(NOTICE in err and err.count("\n") == 0 for err in notices)  # one line
    assert finish(start(USE, **cache)) == ("[[[[0, 2]]]]", "")


@pytest.mark.parametrize("place", ["/proc/no/such/folder", "a file"])
def test_a_folder_that_cannot_be_written_is_no_error(place: str, tmp_path: Path) -> None:
    if place == "a file":
        place = str(tmp_path / "file")
        Path(place).write_text("")
    out, err = finish(start(USE, SPARSE_ATTENTION_HUB_CACHE=place))
    assert out == "[[[[0, 2]]]]" and NOTICE in err


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import pathlib\ndef none(): raise RuntimeError('no home')\npathlib.Path.home = none\n"
    for name in ("SPARSE_ATTENTION_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert finish(start(code + USE))[0] == "[[[[0, 2]]]]"


def test_a_folder_of_numbas_own_is_respected(tmp_path: Path) -> None:
    finish(start(USE, NUMBA_CACHE_DIR=str(tmp_path / "own"), SPARSE_ATTENTION_HUB_CACHE=str(tmp_path / "ours")))
    assert list((tmp_path / "own").rglob("*.nbi")) and not list((tmp_path / "ours").rglob("*.nbi"))


@pytest.mark.parametrize(
    "code",
    [
        "import sparse_attention_hub",
        "from sparse_attention_hub import ResearchAttention, Mask, SinkMaskerConfig",
        "import runpy; sys.argv = ['tasks', 'list']; runpy.run_module('benchmark.tasks', run_name='__main__')",
        "sys.argv = ['run_full_benchmark', '--help']; import benchmark.raytune.run_full_benchmark as r; r.main()",
    ],
)
def test_what_imports_no_numba(code: str) -> None:
    code = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nassert 'numba' not in sys.modules"
    finish(start(code))


def test_all_units_are_done_whatever_the_threads() -> None:
    from sparse_attention_hub.loops.compiled import in_threads

    for units in (1, 2, 7):
        for threads in (1, 2, 5):
            seen = np.zeros(units)

            def count(first: int, last: int, seen: np.ndarray = seen) -> None:
                seen[first:last] += 1

            in_threads(count, units, threads)
            assert (seen == 1).all()


def test_an_error_in_a_thread_is_not_lost() -> None:
    from sparse_attention_hub.loops.compiled import in_threads

    def fail(first: int, last: int) -> None:
        if first == 0:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        in_threads(fail, 4, 2)
