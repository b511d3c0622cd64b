"""The machine that a run uses: memory, locks, the files that a result depends on; and the classes of errors."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.storage.fingerprints import _file, config_key, dependency_digests, lacks_a_file, same_parameters, weights_stamp
from benchmark.workers import signals
from benchmark.workers.errors import BrokenDeviceError, check_device, is_out_of_memory
from benchmark.workers.memory import _free_of_group, free_memory
from benchmark.workers.signals import results_lock
from sparse_attention_hub import DoubleSparsityTopKMaskerConfig, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.errors import UserError

MASKER = """
from dataclasses import dataclass
from sparse_attention_hub import Masker, MaskerConfig, register_masker


@dataclass
class OwnConfig(MaskerConfig):
    size: int = 4


@register_masker(OwnConfig)
class Own(Masker[OwnConfig]):
    def select(self, inputs, mask):
        return mask  # {comment}
"""


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(tmp_path: Path, version: int) -> None:
    base, names, line = {
        2: (tmp_path, ("memory.max", "memory.current", "inactive_file 5"), "0::/job/task"),
        1: (
            tmp_path / "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 5"),
            "4:memory:/job/task",
        ),
    }[version]
    for folder, most in ((base / "job" / "task", "max"), (base / "job", "100")):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names[:2], "memory.stat"), (most, "40", names[2]), strict=True):
            (folder / name).write_text(text + "\n")
    own = tmp_path / "own"
    own.write_text(f"1:cpu:/elsewhere\n{line}\n")
    assert _free_of_group(tmp_path, own) == 100 - 40 + 5, "the group above has the limit; cached files can go"
    assert _free_of_group(tmp_path, tmp_path / "absent") is None


def test_workers_share_what_is_free() -> None:
    alone, shared = (free_memory(torch.device("cpu"), workers) for workers in (1, 4))
    assert alone is not None and shared is not None and 0 < shared < alone / 2


@pytest.mark.parametrize(
    ("error", "short", "broken"),
    [
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (ValueError("out of memory is what this test says"), False, False),
    ],
)
def test_short_memory_is_no_broken_device(error: Exception, short: bool, broken: bool) -> None:
    assert is_out_of_memory(error) == short
    if broken:
        with pytest.raises(BrokenDeviceError):
            check_device(error)
    else:
        check_device(error)


def test_a_file_system_without_locks_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(signals.logger, "warning", lambda text, *values: told.append(text % values))

    def flock(code: int) -> Any:
        def refuse(*_: Any) -> None:
            raise OSError(code, "refused")

        return refuse

    monkeypatch.setattr(fcntl, "flock", flock(errno.ENOSYS))
    with results_lock(tmp_path):
        pass
    assert len(told) == 1 and "cannot be locked (refused)" in told[0]
    monkeypatch.setattr(fcntl, "flock", flock(errno.EWOULDBLOCK))
    with pytest.raises(UserError, match="another run"), results_lock(tmp_path):
        pass


def test_new_content_of_a_named_file_is_another_configuration(tmp_path: Path) -> None:
    channels = tmp_path / "channels.json"
    channels.write_text("{}")
    config = ResearchAttentionConfig([DoubleSparsityTopKMaskerConfig(0.1, sorted_channel_file=str(channels))])
    first = config_key(config)
    assert config_key(config) == first
    channels.write_text('{"0": [1]}')
    assert config_key(config) != first
    assert config_key(None).startswith("dense-")
    other = tmp_path / "other.json"
    other.write_text("{}")
    maskers = [DoubleSparsityTopKMaskerConfig(0.1, sorted_channel_file=str(path)) for path in (channels, other)]
    both = ResearchAttentionConfig(maskers)
    before = config_key(both)
    channels.write_text("{}")
    assert config_key(both) != before and same_parameters(config_key(both), before), "two maskers of one class"
    assert not lacks_a_file(both)
    other.unlink()
    assert lacks_a_file(both) and not lacks_a_file(None)
    assert _file("x" * 5000) is None and _file("a\0b") is None and _file(str(tmp_path)) is None


def test_new_code_of_a_masker_is_another_configuration(tmp_path: Path) -> None:
    path = tmp_path / "own_masker.py"

    def key(text: str, encoding: str = "utf-8") -> str:
        path.write_text(text, encoding)
        spec = importlib.util.spec_from_file_location("own_masker", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules["own_masker"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = ResearchAttentionConfig([SinkMaskerConfig(4), module.OwnConfig()])
        assert any("own_masker.py" in name for name, _ in dependency_digests(config))
        return config_key(config)

    try:
        first = key(MASKER)
        assert key(MASKER + "\n\n# a remark\n") == first
        assert key(MASKER, "utf-8-sig") == key("# -*- coding: latin-1 -*-\n# für\n" + MASKER, "latin-1") == first
        assert key(MASKER.replace("return mask", "return mask.union(mask)")) != first
    finally:
        sys.modules.pop("own_masker", None)
        from sparse_attention_hub.maskers import base

        for config in [c for c in base._REGISTRY if c.__module__ == "own_masker"]:
            del base._REGISTRY[config]


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "tokenizer.model", "modeling_own.py"])
def test_every_file_of_a_model_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("a")
    before = weights_stamp(str(tmp_path))
    (tmp_path / name).write_text("another")
    assert weights_stamp(str(tmp_path)) != before
    assert weights_stamp("organisation/name") is None
