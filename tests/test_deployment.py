"""What pages cost, and whether a method will be faster: benchmark.rounding and benchmark.cost on the sample search."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmark import cost, rounding
from benchmark.storage.results import write_json
from sparse_attention_hub.maskers.hat_weights import hat_config_fields, hat_weights_for

(RUN,) = Path("optimal_configs/sample").glob("run_*")
STEM = "embedded_SmolLM2-135M-Instruct_ruler_1024_niah_single_1_"
TOP_K = RUN / f"{STEM}sink_local_oracle_top_k_10pct.json"


HASH = hat_config_fields(str(hat_weights_for("embedded/SmolLM2-135M-Instruct"))) | {"hat_weight_file": None}


def short(folder: Path, **changes: Any) -> Path:
    """The sample search's top-k with one tuning sample of 320 tokens and a short answer, so that it runs in seconds."""
    record = json.loads(TOP_K.read_text()) | changes
    record["task"] = "ruler/512/niah_single_1"
    record["provenance"] |= {
        "samples": ["ruler/512/niah_single_1:tuning-0@320"],
        "max_new_tokens": 4,
        "max_context_length": 320,
    }
    path = folder / "found_10pct.json"
    write_json(path, record)
    return path


def test_the_table_of_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = short(tmp_path)
    assert rounding.main([str(file), "--ray-results-dir", str(tmp_path / "ray"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
    assert [tuple(row[:2]) for row in rows[1:]] == [("as found", "-")] + [
        (f"{size} keys", share) for size in (1, 8, 16, 64) for share in ("kv head", "layer")
    ]
    figures = {tuple(row[:2]): [float(cell.rstrip("%")) for cell in row[2:]] for row in rows[1:]}
    found, densities = figures["as found", "-"], [figures[f"{size} keys", "kv head"][0] for size in (1, 8, 16, 64)]
    assert found[0] < densities[0] < densities[1] < densities[2] < densities[3], "larger pages read more"
    errors = [figures[f"{size} keys", "kv head"][2] for size in (1, 8, 16, 64)]
    assert found[2] > errors[0] > errors[1] > errors[2] > errors[3], "and err less"
    for size in (1, 8, 16, 64):
        alone, shared = figures[f"{size} keys", "kv head"], figures[f"{size} keys", "layer"]
        assert alone[0] <= shared[0], "one table for all heads reads more"
    assert found[1] == pytest.approx(figures["1 keys", "kv head"][1], abs=0.11), "a group's keys are read once, either way"


def test_other_samples_than_those_of_the_search_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = short(tmp_path)
    record = json.loads(file.read_text())
    record["provenance"]["samples"] = ["another"]
    write_json(file, record)
    assert rounding.main([str(file), "--ray-results-dir", str(tmp_path / "ray"), "--device", "cpu"]) == 2
    assert "was searched on other samples of ruler/512/niah_single_1 than there are now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("maskers", "message"),
    [
        (
            [{"type": "RandomSamplingMaskerConfig", "params": {"sampling_rate": 0.1}}],
            "RandomSamplingMaskerConfig weights the keys that it samples",
        ),
        ([{"type": "RoundToPagesConfig", "params": {}}], "has no maskers, so there is nothing to round"),
    ],
)
def test_what_cannot_be_rounded(maskers: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = short(tmp_path, sparse_config={"type": "ResearchAttentionConfig", "masker_configs": maskers})
    assert rounding.main([str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", [rounding, cost])
def test_another_file_is_one_line(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert module.main([str(tmp_path / "x.json")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "give a best configuration of a search" in shown


def test_a_rounded_configuration_is_compared_with_the_one_below_it(tmp_path: Path) -> None:
    maskers = [
        {"type": "SinkMaskerConfig", "params": {"sink_size": 4}},
        {"type": "RoundToPagesConfig", "params": {"page_size": 8}},
    ]
    file = short(tmp_path, sparse_config={"type": "ResearchAttentionConfig", "masker_configs": maskers, "dense_layers": [1]})
    variants = rounding.page_variants(file)
    assert [type(entry).__name__ for entry in variants[None].masker_configs] == ["SinkMaskerConfig"]
    assert all(config.dense_layers == [1] and len(config.masker_configs) == 2 for key, config in variants.items() if key)


def test_configurations_of_any_page_size_are_made_for_their_names() -> None:
    from benchmark.raytune import configurations
    from benchmark.raytune.run_full_benchmark import get_all_sparse_configs

    assert not any("_pages" in name for name, _, _ in get_all_sparse_configs()), "a run of all configurations stays as it is"
    assert configurations.page_sizes(["dense", "sink_local_*_10pct", "pages_5pct", "a_pages0_5pct"]) == []
    wanted = ["dense", "sink_local_quest_top_k_pages48_10pct", "sink_local_*_pages16_7.5pct"]
    assert configurations.page_sizes(wanted) == [16, 48]
    configs = configurations.choose_configs(get_all_sparse_configs([7.5, 10], configurations.page_sizes(wanted)), wanted)
    names = {config.name: config for config in configs}
    assert "sink_local_pq_cache_pages16_7.5pct" in names and not any("sampling" in name or "magic" in name for name in names)
    found = names["sink_local_quest_top_k_pages48_10pct"]
    assert (found.family, found.budget) == ("sink_local_quest_top_k_pages48", 0.1)
    assert found.config is not None and found.config.masker_configs[-1].page_size == 48  # type: ignore[attr-defined]


def machine() -> cost.Machine:
    return cost.Machine(memory=1e9, link=1e8, capacity=1e9, launch=1e-3)


def model() -> cost.Model:
    """Three layers of 100 bytes a token, one of them with a window of 10 keys."""
    from sparse_attention_hub.models.lockstep import LayerCall
    from sparse_attention_hub.models.rules import Rule

    calls = {i: LayerCall(Rule(window=10) if i == 1 else Rule(), 4, 1, 25, 25) for i in range(3)}
    return cost.Model(weights=1_000_000, calls=calls, itemsize=2)


def test_the_formula() -> None:
    """By hand: 2 requests of 1000 keys; two layers of 200 kB and one of 2 kB; half of the keys and a tenth to choose them."""
    method = cost.Method(keys=0.5, selector=0.1, selectors=1, oracle=False)
    steps = cost.decode_steps(model(), method, machine(), context=1000, batch=2)
    assert vars(steps["dense"]) == pytest.approx({"weights": 1e-3, "keys": 402e-6, "selector": 0.0, "launches": 3e-3})
    launches = 1e-3 * (1 + 2 * (2 + 3))
    assert vars(steps["sparse"]) == pytest.approx({"weights": 1e-3, "keys": 202e-6, "selector": 40e-6, "launches": launches})
    assert steps["dense, offloaded"].keys == pytest.approx(402e-5)
    assert (steps["sparse, offloaded"].keys, steps["sparse, offloaded"].selector) == pytest.approx((202e-5, 40e-6))
    oracle = cost.Method(keys=0.5, selector=0.1, selectors=1, oracle=True)
    offloaded = cost.decode_steps(model(), oracle, machine(), context=1000, batch=2)["sparse, offloaded"]
    assert offloaded.selector == pytest.approx(40e-5), "an oracle reads the keys themselves"
    assert steps["dense"].total == pytest.approx(1e-3 + 402e-6 + 3e-3)


@pytest.mark.parametrize(
    ("kind", "params", "share"),
    [
        ("OracleTopKConfig", {"heavy_size": 0.1}, 0.5),
        ("QuestTopKMaskerConfig", {"heavy_size": 0.1, "page_size": 16}, 1 / 16),
        ("DoubleSparsityTopKMaskerConfig", {"heavy_size": 0.1, "sorted_channel_file": None}, None),  # without its file
        ("HashAttentionTopKMaskerConfig", {"heavy_size": 0.1, **HASH}, None),
    ],
)  # fmt: skip
def test_what_selectors_read_is_known_without_the_model(
    kind: str, params: dict[str, Any], share: float | None, tmp_path: Path
) -> None:
    entry = {"type": kind, "params": params}
    file = short(tmp_path, sparse_config={"type": "ResearchAttentionConfig", "masker_configs": [entry]}, kv_fraction=0.7)
    from benchmark.storage.records import read_record
    from benchmark.storage.search_records import BestConfig

    shape = cost.read_model("embedded/SmolLM2-135M-Instruct", "bfloat16")
    assert (len(shape.calls), shape.weights) == (30, 2 * 134_515_008)
    found = cost.read_method(read_record(file, BestConfig, ""), shape, file)
    assert (found.selectors, found.oracle) == (1, kind.startswith("Oracle"))
    assert 0 < found.selector < 0.6 and (share is None or found.selector == pytest.approx(share))
    assert 0 < found.keys < 0.7


def test_what_narrows_reads_of_the_keys_that_it_was_given(tmp_path: Path) -> None:
    from benchmark.storage.records import read_record
    from benchmark.storage.search_records import BestConfig

    quest = {"type": "QuestTopKMaskerConfig", "params": {"heavy_size": 0.2, "page_size": 16}}
    twilight = {"type": "TwilightConfig", "params": {"top_p": 0.9}}
    file = short(tmp_path, sparse_config={"masker_configs": [quest, twilight]}, kv_fraction=0.125)
    found = cost.read_method(
        read_record(file, BestConfig, ""), cost.read_model("embedded/SmolLM2-135M-Instruct", "bfloat16"), file
    )
    assert found.selector == pytest.approx(1 / 16) and found.keys == pytest.approx(0.125 - 1 / 16)


def test_the_estimate_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main([str(TOP_K), "--gpu", "h100", "--context", "131072", "--batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "step = weights / memory" in out and "assumed: " in out and "3350 GB/s memory, 64 GB/s link" in out
    table = {line[:18].strip(): line[18:].split() for line in out.splitlines() if line.startswith(("dense", "sparse"))}
    assert set(table) >= {"dense", "sparse", "dense, offloaded", "sparse, offloaded"}
    assert float(table["dense, offloaded"][1]) > float(table["dense"][1]) > float(table["sparse"][1])
    assert re.search(r"weights 0.3 GB and KV cache 24.2 GB: fits into 80 GB", out)
    assert cost.main([str(TOP_K), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"steps", "method"}


@pytest.mark.parametrize("flags", [["--context", "0"], ["--batch", "-1"], ["--gpu", "abacus"]])
def test_bad_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cost.main([str(TOP_K), *flags])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_commands_of_the_page_that_need_a_run_work_on_the_sample_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that tests/test_docs.py cannot run: their placeholders become files of the sample search."""
    import shlex

    from examples.generate import main as generate
    from sparse_attention_hub.export import main as export

    text = tmp_path / "report.txt"
    text.write_text("The report was written by Anna Vell. " + "It is long. " * 60)
    page = Path("docs/using_a_result.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("uv run python") and "# needs a run of yours" in line]
    mains = {
        "examples/generate.py": generate,
        "sparse_attention_hub.export": export,
        "benchmark.rounding": rounding.main,
        "benchmark.cost": cost.main,
    }
    for line in lines:
        words = shlex.split(line.partition(" #")[0])[3:]
        name = words[1] if words[0] == "-m" else words[0]
        given = words[2:] if words[0] == "-m" else words[1:]
        file = short(tmp_path) if name == "benchmark.rounding" else TOP_K
        places = {
            "optimal_configs/run_20260131_120000/NAME_10pct.json": str(file),
            "report.txt": str(text),
            "exported": str(tmp_path / "to"),
        }
        more = ["--ray-results-dir", str(tmp_path / "ray")] if name == "benchmark.rounding" else []
        assert mains[name]([places.get(word, word) for word in given] + more) == 0, line
        assert capsys.readouterr().out.strip()
    assert len(lines) == 4
    shutil.rmtree(tmp_path / "to")
