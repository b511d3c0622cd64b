"""The environment of a run: Ray without a home or with long folders, addresses, errors of devices, locks."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from benchmark.progress import Progress
from benchmark.workers import ray_start
from benchmark.workers.errors import BrokenDeviceError, check_device, is_out_of_memory, is_transient
from benchmark.workers.ray_start import short_folder, start_ray
from benchmark.workers.signals import INTERRUPTED, ends_within, results_lock
from sparse_attention_hub.errors import NonFiniteError, UserError
from sparse_attention_hub.models.embedded import embedded_folder
from sparse_attention_hub.models.model_files import channels_for

ROOT = Path(__file__).resolve().parents[2]

ADDRESSES = [
    ":",
    "::",
    "a",
    "host:",
    ":6379",
    "host:port",
    "host:-1",
    "host:65536",
    "host:" + "9" * 5000,
    "host:６３７９",
    "ray://",
    "ray://host",
    "",
]


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda text: repr(text[:12]))
def test_what_is_no_address_is_one_line(address: str) -> None:
    with pytest.raises(UserError, match="must be local, auto, host:port or ray://host:port, got") as raised:
        start_ray(address)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "host", ["a..b", "x" * 64, ".".join(["x" * 40] * 10), "[::1", "a b", "ä" * 70], ids=lambda text: text[:8]
)
def test_a_label_that_is_no_host_name_is_one_line(host: str) -> None:
    with pytest.raises(UserError, match="--ray-address .*no Ray cluster answers there") as raised:
        start_ray(f"{host}:1")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379"),  # all that a head says that asks for a token
        ray.exceptions.AuthenticationError("Token authentication is enabled but no authentication token was found"),
    ],
    ids=["no token", "no token in a file"],
)
def test_a_cluster_that_may_ask_for_a_token_is_told_by_name(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray_start, "_check_listens", lambda address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match="no Ray cluster answers.*RAY_AUTH_MODE=token and RAY_AUTH_TOKEN") as raised:
        start_ray("127.0.0.1:6379")
    assert "\n" not in str(raised.value)


def test_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Ray gives up with an Exception of no class of its own."""

    def give_up(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because the GCS has become overloaded.")

    monkeypatch.setattr(ray, "init", give_up)
    with pytest.raises(UserError, match="Ray does not start on this machine .*timed out.*the same command resumes") as raised:
        start_ray("local", 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_sockets_get_a_short_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    assert short_folder() is None
    monkeypatch.setenv(name, "/tmp/short")
    assert short_folder() is None
    monkeypatch.setenv(name, "/tmp/" + "long/" * 20)
    assert short_folder() == "/tmp/ray"
    monkeypatch.setattr(ray_start, "_SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError, match="set RAY_TMPDIR to a folder of at most"):
        short_folder()


def test_without_a_place_for_the_cache_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPARSE_ATTENTION_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    lm: Any = SimpleNamespace(weights_fingerprint="abc")
    for place in (None, "/proc/nobody", "~nobody-of-this-name/x"):
        if place is not None:
            monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", place)
        for keep in (embedded_folder, lambda: channels_for(lm)):
            with pytest.raises(UserError, match="set SPARSE_ATTENTION_HUB_CACHE to a writable folder") as raised:
                keep()
            assert "\n" not in str(raised.value)


def test_a_user_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME and no entry in the list of users: Ray Tune cannot be imported."""

    def unknown(_: int) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "/some/home")
    ray_start._give_home()
    assert os.environ["HOME"] == "/some/home"
    del os.environ["HOME"]
    ray_start._give_home()
    assert Path.home() == Path("/")


def test_a_token_that_cannot_be_saved_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ray_start._pass_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nobody")
    ray_start._pass_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


STUCK = """
import signal, time
from benchmark.workers.signals import ends_within
signal.signal(signal.SIGTERM, lambda *_: None)  # as where no handler is run
with ends_within(0.2):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_sigterm_ends_a_program_that_waits_for_ray() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == INTERRUPTED
    process.stdout.close()


TWICE = """
import subprocess, sys, time
from benchmark.workers.signals import Interrupts
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
worker = subprocess.Popen(sleep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with Interrupts(lambda: None, lambda: [worker.pid]):
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_the_second_signal_kills_the_workers_and_ends_the_program() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", TWICE], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stderr is not None
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "press Ctrl-C again to stop now" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == INTERRUPTED
    process.stdout.close(), process.stderr.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # its parent is gone: the system collects it
            os.kill(worker, 0)
            time.sleep(0.1)


def test_a_program_that_stops_in_time_is_not_ended() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with ends_within(0.05):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)


DEVICE_ERRORS = [
    "CUDA error: an illegal memory access was encountered",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Triton Error [CUDA]: misaligned address",
    "Triton Error [CUDA]: unspecified launch failure",
    "CUDA driver error: unknown error",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
    "cuBLAS: CUBLAS_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: device-side assert triggered",
    "an illegal memory access was encountered",
]


@pytest.mark.parametrize("text", DEVICE_ERRORS)
def test_errors_of_a_device_end_its_worker(text: str) -> None:
    with pytest.raises(BrokenDeviceError):
        check_device(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text)) and not is_transient(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ValueError("a masker says: cuda error"),
        NonFiniteError("logits are not finite"),
        RuntimeError("shapes differ"),
    ],
    ids=str,
)
def test_other_errors_do_not(error: Exception) -> None:
    check_device(error)


def test_a_lock_names_the_flag_of_its_folder(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="choose another --ray-results-dir")
    with results_lock(tmp_path), refused, results_lock(tmp_path, "--ray-results-dir"):
        pass


def test_what_is_printed_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Phase 2", 1) as progress:
        progress.say("an answer: \x1b[2J\x07done")
        progress.update(1, 1, ["worker-0: \x1b]0;title\x07"])
    told = capsys.readouterr().err
    assert "an answer:  [2J done" in told and "\x1b" not in told and "\x07" not in told
