"""Every masker module draws its mask, and runs as a program without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attention_hub.maskers import drawing
from sparse_attention_hub.maskers.base import registered_configs
from sparse_attention_hub.maskers.drawing import draw, example_configs

NAMES = [
    "adaptive_sampling",
    "causal",
    "clusters",
    "double_sparsity",
    "expected_attention",
    "h2o",
    "key_diff",
    "knorm",
    "snap_kv",
    "tova",
    "duo_attention",
    "hash_attention",
    "landmarks",
    "local",
    "loki",
    "magic_pig",
    "oracle_top_k",
    "oracle_top_p",
    "pq_cache",
    "quest",
    "random_sampling",
    "round_to_pages",
    "sink",
    "socket_lsh",
    "sparq",
    "twilight",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_masker_draws(name: str, tmp_path: Path) -> None:
    draw(example_configs(name, tmp_path), tmp_path / "mask.png", name)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_no_masker_is_forgotten(tmp_path: Path) -> None:
    drawn = {type(example_configs(name, tmp_path)[-1]).__name__ for name in NAMES}
    assert drawn == {
        name for name, config in registered_configs().items() if config.__module__.startswith("sparse_attention_hub")
    }


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_attention_hub.maskers.quest", "--out", str(tmp_path / "quest.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "" and (tmp_path / "quest.png").is_file()


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [
        ("key_norm", "mask.png", "example_configs"),
        ("sink", "mask.foo", "PNG"),
        ("sink", "no/such/folder/mask.png", "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    name: str, out: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        drawing.main(name, ["--out", str(tmp_path / out)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and words in told and len(told.splitlines()) == 1
