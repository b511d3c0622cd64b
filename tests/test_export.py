"""The command that writes policy.json and page tables, on the sample runs and the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_attention_hub.export import STEPS, main
from sparse_attention_hub.page_tables import read_page_tables

(RUN,) = Path("optimal_configs/sample").glob("run_*")
STEM = "embedded_SmolLM2-135M-Instruct_ruler_1024_niah_single_1_"
TOP_K = RUN / f"{STEM}sink_local_oracle_top_k_10pct.json"
RESULT = Path("benchmark_results/sample/embedded_SmolLM2-135M-Instruct/sink_local_oracle_top_k_10pct/ruler_1024_niah_single_1")


def export(folder: Path, file: Path, *flags: object) -> dict[str, Any]:
    assert main([str(file), "--to", str(folder), *map(str, flags)]) == 0
    found: dict[str, Any] = json.loads((folder / "policy.json").read_text())
    return found


def test_the_policy_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, record = export(tmp_path, TOP_K, "--context", 4096), json.loads(TOP_K.read_text())
    assert "does not map onto pages: token granularity" in capsys.readouterr().out
    assert (found["schema"], found["version"], found["context_length"]) == ("sparse-attention-hub/policy", 1, 4096)
    assert (found["name"], found["model"], found["task"]) == (record["masker_name"], record["model"], record["task"])
    assert found["protocol"] == {"sparse_from": "question", "prefill": "dense"}
    sizes = [entry["tokens"] for entry in found["maskers"]]
    heavy = record["sparse_config"]["masker_configs"][2]["params"]["heavy_size"]
    assert sizes == [{"sink_size": 40}, {"window_size": 40}, {"heavy_size": int(heavy * 4096)}]
    assert found["pages"]["why_not"].startswith("token granularity") and found["pages"]["sample"] is None
    assert (found["dense_layers"], found["head_budgets"]) == (
        record["sparse_config"].get("dense_layers", []),
        record["sparse_config"].get("head_budgets"),
    )
    figures = found["figures"]
    assert {name: figures[name] for name in ("error", "density", "kv_fraction", "score", "budget")} == {
        name: record[name] for name in ("error", "density", "kv_fraction", "score", "budget")
    }
    assert (figures["measured_by"], figures["samples"], figures["score_interval"]) == ("search", 2, None)
    assert found["provenance"]["identity"] == record["provenance"]["identity"]


def test_the_policy_of_a_benchmark_has_the_interval_of_its_score(tmp_path: Path) -> None:
    found = export(tmp_path, RESULT / "config.json", "--page-size", 8)
    metrics = json.loads((RESULT / "metrics.json").read_text())
    assert found["figures"]["measured_by"] == "benchmark" and found["figures"]["samples"] == 3
    assert found["figures"]["score"] == metrics["score"] and found["figures"]["score_interval"] == metrics["interval"]
    assert found["figures"]["difference_to_dense"] == metrics["difference_to_dense"]
    assert found["protocol"]["sparse_from"] == "question"
    assert found["pages"] == {"page_size": 8, "share": "kv_head", "why_not": None, "sample": None}


def test_sampling_does_not_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = export(tmp_path, RUN / f"{STEM}sink_local_random_sampling_25pct.json", "--page-size", 16)
    assert found["pages"]["why_not"].startswith("sampling weights: RandomSamplingMaskerConfig")
    assert "does not map onto pages: sampling weights" in capsys.readouterr().out


def test_sizes_and_tables_of_what_a_configuration_holds(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    maskers = [
        {"type": "SinkMaskerConfig", "params": {"sink_size": 128}},
        {"type": "PQCacheConfig", "params": dict(heavy_size=1e-9, pq_group_factor=4, pq_bits=6, kmeans_iter=2, init_offset=4, metric="ip")},
        {"type": "AdaptiveSamplingMaskerConfig", "params": dict(base_rate_sampling=0.5, epsilon=0.2, delta=0.1, init_offset=0, local_offset=0.0)},
    ]  # fmt: skip
    config = {"masker_configs": maskers, "dense_layers": [0, 1], "head_budgets": [[1.0, 0.5]] * 4}
    file.write_text(json.dumps({"sparse_config": config}))
    found = export(tmp_path / "to", file, "--context", 100)
    assert [entry["tokens"] for entry in found["maskers"]] == [
        {"sink_size": 100},
        {"heavy_size": 1, "init_offset": 4},
        {"init_offset": 0, "local_offset": 0},
    ]
    assert found["dense_layers"] == [0, 1] and found["head_budgets"] == config["head_budgets"]
    assert found["figures"]["measured_by"] is None and found["figures"]["error"] is None


def test_page_tables_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The harbour of Vell has nine piers. " * 40 + "The code of the lighthouse is 7431.")
    found = export(tmp_path / "to", TOP_K, "--page-size", 16, "--text", text)
    assert "page tables: " in capsys.readouterr().out
    sample = found["pages"]["sample"]
    assert sample["largest_difference"] < 1e-5 and sample["steps"] == STEPS
    assert 0.1 < sample["density"] < 0.9 and 0 < sample["error"] < 0.2
    tables = read_page_tables(tmp_path / "to" / sample["file"])
    assert list(tables) == list(range(30))
    for table in tables.values():
        assert (table.rows, table.kv_heads, table.page_size, table.keys) == (STEPS, 3, 16, sample["keys"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no.json"], "cannot be read"),
        ([str(TOP_K), "--context", "0"], "context must be an integer >= 1, got 0"),
        ([str(TOP_K), "--page-size", "0"], "page_size must be an integer >= 1, got 0"),
        ([str(TOP_K), "--page-size", "16", "--text", "no.txt"], "no.txt"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--to", str(tmp_path / "to")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown


def test_a_configuration_that_is_rounded_already_or_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    sink = {"type": "SinkMaskerConfig", "params": {"sink_size": 4}}
    pages = {"type": "RoundToPagesConfig", "params": {"page_size": 32, "share": "head"}}
    file.write_text(json.dumps({"sparse_config": {"masker_configs": [sink, pages]}}))
    assert main([str(file), "--to", str(tmp_path), "--page-size", "16"]) == 2
    assert "is rounded to pages of 32 already" in capsys.readouterr().err
    assert export(tmp_path, file)["pages"]["why_not"].startswith("head granularity")
    file.write_text(json.dumps({"sparse_config": {"masker_configs": []}}))
    assert main([str(file), "--to", str(tmp_path)]) == 2
    assert "has no maskers" in capsys.readouterr().err


def test_a_short_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Too short.")
    flags = ["--page-size", "16", "--text", str(tmp_path / "text.txt")]
    assert main([str(TOP_K), "--to", str(tmp_path), *flags]) == 2
    assert "must have 64 tokens or more, got" in capsys.readouterr().err
