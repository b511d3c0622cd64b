"""Loading: the embedded model, local folders, and one line to act on for all that can go wrong."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tiny_models import build

from benchmark.search.spec import device_and_dtype
from benchmark.settings import Settings
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import answer, load_model, load_tokenizer, prefill
from sparse_attention_hub.models.embedded import EMBEDDED_MODEL, cache_root, embedded_folder
from sparse_attention_hub.models.load import _pick_dense, check_place, load_shape, pick_dtype


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_model(EMBEDDED_MODEL, device="cpu")


def one_line(error: Any) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 420
    return text


@pytest.mark.timeout(180)
def test_the_embedded_model_answers(embedded: Any) -> None:
    tokenizer = embedded.tokenizer
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and text.count("<|im_start|>") == 3
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = answer(embedded, prefill(embedded, ids[:-8], 40), ids[-8:], None, 30)
    assert "Paris" in found.text
    assert found.stopped == "eos" and "<|" not in found.text
    assert embedded.tokenizer.convert_tokens_to_ids("<|im_end|>") == found.token_ids[-1]


def test_the_embedded_model_is_whole(embedded: Any) -> None:
    assert (embedded.num_layers, embedded.max_positions, embedded.dtype) == (30, 8192, torch.float32)
    assert embedded.eos_token_ids == {2} and embedded.dense_backend == "sdpa"
    model = embedded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(134.5e6, rel=0.01)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    ids = tokenizer.encode("The  number is  4821.\nÜber", add_special_tokens=False)
    assert tokenizer.decode(ids) == "The  number is  4821.\nÜber"
    assert len(tokenizer.encode("4821", add_special_tokens=False)) == 4
    assert tokenizer.encode("x") == tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.model_max_length == 8192


def test_a_second_load_is_quick(embedded: Any) -> None:
    started = time.perf_counter()
    load_model(EMBEDDED_MODEL, device="cpu")
    assert time.perf_counter() - started < 5


def test_a_damaged_cache_is_made_anew(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_attention_hub.models.embedded as module

    made = []

    def convert(source: Path, folder: Path) -> None:
        made.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text("whole")
        (folder / "manifest.json").write_text(json.dumps({"weights": 5}))

    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_convert", convert)
    folder = embedded_folder()
    assert embedded_folder() == folder and len(made) == 1 and folder.is_relative_to(tmp_path)
    (folder / "weights").write_text("torn")
    embedded_folder()
    assert len(made) == 2
    shutil.rmtree(folder)
    embedded_folder()
    assert len(made) == 3


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_attention_hub.models.embedded as module

    def fail(source: Path, folder: Path) -> None:
        (folder / "part").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(UserError) as error:
        embedded_folder()
    assert "No space left" in one_line(error) and "SPARSE_ATTENTION_HUB_CACHE" in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "embedded"]


def test_cache_root_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_ATTENTION_HUB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/sparse-attention-hub")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root().name == "sparse-attention-hub" and cache_root().is_absolute()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with the embedded model's tokenizer and tiny random weights."""
    build("llama", vocab_size=49152).save_pretrained(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder() / name, tmp_path / "tiny" / name)
    return tmp_path / "tiny"


def test_a_local_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    lm = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert lm.id == str(folder) and lm.dtype == torch.bfloat16 and lm.eos_token_ids == {2}
    assert len(answer(lm, prefill(lm, list(range(3, 40)), 20), [5, 6], None, 4).token_ids) == 4
    assert load_model(str(folder), device="cpu").dtype == torch.float32


def test_broken_folders_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path / "empty"))
    assert "config.json is missing" in one_line(error)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError) as error:
        load_model(str(folder), device="cpu")
    assert "cannot be loaded" in one_line(error)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_model(str(folder), device="cpu")
    assert "safetensors" in one_line(error)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UserError) as error:
        load_model(str(folder), device="cpu")
    assert "model type" in one_line(error)
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    )
    with pytest.raises(UserError) as error:
        load_model(str(folder), device="cpu")
    assert error.value.parameter == "trust_remote_code" and "brings its own code" in one_line(error)


@pytest.mark.parametrize(
    ("model_id", "words"),
    [
        ("", "hub id, a folder or"),
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("no such model", "neither a folder nor a hub id"),
        ("embedded/other", "unknown embedded model"),
    ],
)
def test_ids_that_name_nothing(model_id: str, words: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=words) as error:
            load(model_id)
        one_line(error)


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_model("meta-llama/Llama-3.1-8B-Instruct")
    assert time.perf_counter() - started < 10
    assert "hub is unreachable" in one_line(error) and "needs no network" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        (GatedRepoError, 401, "gated.*hf auth login.*needs no network"),
        (GatedRepoError, 403, "gated.*hf auth login.*needs no network"),
        (RepositoryNotFoundError, 401, "unknown to the hub.*needs no network"),
        (RepositoryNotFoundError, 404, "unknown to the hub.*needs no network"),
    ],
)
def test_refusals_of_the_hub_are_told(monkeypatch: pytest.MonkeyPatch, kind: Any, status: int, words: str) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> Any:
        error = kind.__new__(kind)  # the client's own constructors want a response of whatever HTTP library it uses
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer("organisation/name")
    one_line(error)


def test_wishes_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, words in [
        ({"device": "cuda"}, "device cuda asks for a GPU"),
        ({"device": "cuda:3"}, "device cuda:3 asks for a GPU"),
        ({"device": "sharded"}, "asks for a GPU"),
        ({"device": "toaster"}, "device must be"),
        ({"device": "meta"}, "device must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"dense_backend": "flash"}, "dense_backend flash: the device is cpu"),
        ({"dense_backend": "magic"}, "dense_backend must be"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            load_model(EMBEDDED_MODEL, **options)
        one_line(error)


def test_looking_at_a_place_does_not_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA context in the parent would hold memory of the first GPU for the whole run."""

    def start() -> None:
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    monkeypatch.setattr("sparse_attention_hub.models.load._log_once", lambda line: None)
    for device in ("auto", "cuda", "cuda:1", "sharded"):
        check_place(device, "auto", "auto")
    assert device_and_dtype(Settings(models=(), tasks=())) == ["cuda", "torch.bfloat16"]
    assert load_shape(EMBEDDED_MODEL) == (30 * 2 * 3 * 64 * 2, 30, 2 * 3 * 64 * 2)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_emulates_bfloat16_gets_float16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float16)
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16  # asked for by name


@pytest.mark.parametrize(("device", "map_to"), [("cuda:0", {"": torch.device("cuda:0")}), ("sharded", "auto"), ("cpu", None)])
def test_weights_are_read_straight_to_their_device(
    device: str, map_to: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    real, asked = AutoModelForCausalLM.from_pretrained, []

    def watch(*arguments: Any, device_map: Any = None, **options: Any) -> Any:
        asked.append(device_map)
        return real(*arguments, **options)

    place = torch.device("cuda:0" if device == "sharded" else device)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    monkeypatch.setattr("sparse_attention_hub.models.load.pick_device", lambda _: place)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)  # there is no GPU here
    load_model(str(folder), device=device, dtype="float32")
    assert asked == [map_to]


def host_memory() -> int:
    """Bytes of this process that are no file's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of this process from /proc")
def test_weights_on_their_way_to_a_device_take_no_host_memory(folder: Path) -> None:
    """The meta device stands for a GPU: what is left is what the host holds."""
    from transformers import AutoModelForCausalLM

    def look(seen: list[int], done: threading.Event) -> None:
        while not done.wait(0.002):
            seen.append(host_memory())

    model = build("llama", hidden_size=512, intermediate_size=2048, vocab_size=49152)
    model.save_pretrained(folder)
    weights = sum(weight.nbytes for weight in model.parameters()) / 2  # as bfloat16
    peaks = []
    for device_map in (None, {"": torch.device("meta")}):
        seen, done = [before := host_memory()], threading.Event()
        watch = threading.Thread(target=look, args=(seen, done))
        watch.start()
        kept = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.bfloat16)
        done.set()
        watch.join()
        peaks.append((max(seen) - before) / weights)
        del kept
    assert peaks[0] > 0.8 and peaks[1] < 0.3


def test_dense_backend_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import utils

    cuda = torch.device("cuda")
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert [_pick_dense("auto", cuda, torch.bfloat16) for _ in range(3)] == ["sdpa"] * 3
    assert sum("dense attention runs on SDPA" in record.message for record in caplog.records) == 1
    with pytest.raises(UserError, match="flash-attn is not installed"):
        _pick_dense("flash", cuda, torch.bfloat16)
    with pytest.raises(UserError, match="needs float16 or bfloat16"):
        _pick_dense("flash", cuda, torch.float32)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    assert _pick_dense("auto", cuda, torch.bfloat16) == _pick_dense("flash", cuda, torch.float16) == "flash_attention_2"
    assert _pick_dense("sdpa", cuda, torch.bfloat16) == "sdpa"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, sparse_attention_hub.models; print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]
