"""Starts Ray or connects to a cluster, for both phases. Ray is not imported before this."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from functools import partial
from pathlib import Path

from sparse_attention_hub.errors import UserError, quoted

CONNECT_SECONDS = 10.0
#: A socket's path has at most 107 bytes; what Ray adds to its folder for temporary files takes 68 of them.
_LONGEST_FOLDER = 36
#: Short folders for Ray's own files, best first.
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def start_ray(address: str | None, num_cpus: int | None = None) -> bool:
    """Connect to `address`; "local" or None starts a cluster on this machine. Returns False if Ray was running already.

    Raises UserError if Ray does not start here, or if no cluster answers: within seconds if nothing listens there, within a
    minute if something else does.
    """
    own = address in (None, "local")
    if not own:
        _check_listens(str(address))
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # default: 20 times, 40 s each
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # a warning of a refused connection is said below
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else workers start through uv in an uploaded copy
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    folder = None
    _give_home()
    if own:
        folder = short_folder()
        _pass_token()
    import ray
    from ray._private import ray_constants

    if getattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False):
        # Ray was imported before and read the setting then: its workers would never start.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if ray.is_initialized():
        return False
    init = partial(ray.init, logging_level=logging.ERROR, log_to_driver=False)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if own:
            init("local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=folder)
        else:
            # Workers on this machine inherit PYTHONPATH, where --plugin adds its folder; those of a cluster are given it.
            path = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
            init(address, runtime_env={"env_vars": path} if path else None)
    except Exception as error:  # of no class of its own where a busy machine takes too long
        if own:
            busy = "timed out" in str(error) or "overloaded" in str(error)
            hint = "make room in its folder, or set RAY_TMPDIR to another short one"
            hint = "the same command resumes; wait until less runs beside it" if busy else hint
            raise UserError(f"Ray does not start on this machine ({quoted(error)}); {hint}") from error
        raise UserError(_no_cluster(str(address), error, listens=True)) from None
    except SystemExit:  # Ray's own handler of SIGTERM
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    return True


def short_folder() -> str | None:
    """A folder for the files of our own Ray if RAY_TMPDIR or TMPDIR is too long for its sockets; None = the one Ray chooses."""
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(wanted)) <= _LONGEST_FOLDER:
        return None
    for folder in _SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            return f"{folder}/ray"
    raise UserError(
        f"{quoted(wanted)} (RAY_TMPDIR or TMPDIR) is too long for the sockets of Ray, and {', '.join(_SHORT_FOLDERS)} cannot be "
        f"written: set RAY_TMPDIR to a folder of at most {_LONGEST_FOLDER} bytes"
    )


def _give_home() -> None:
    """Ray Tune cannot be imported where the user has no home folder: no HOME, and no entry in the list of users."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"  # as container runtimes do; nothing is written there


def _pass_token() -> None:
    """Ray saves the token of a new cluster in the home folder. If that cannot be written, or there is none, pass the token in
    the environment, which the processes of Ray inherit."""
    if (
        os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
        or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    ):
        return
    home = Path(os.path.expanduser("~"))
    saved = home / ".ray"
    if not os.access(saved if saved.exists() else home, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_listens(address: str) -> None:
    """UserError for what is no address, and if nothing listens at a "host:port" or "ray://host:port"; other addresses ("auto")
    are Ray's to look up."""
    if address == "auto" or ("://" in address and not address.startswith("ray://")):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UserError(f"--ray-address must be local, auto, host:port or ray://host:port, got {quoted(address)}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        raise UserError(_no_cluster(address, error, listens=False)) from None


def _no_cluster(address: str, error: Exception, listens: bool) -> str:
    token = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where its head asks for a token, " if listens else ""
    where = f"--ray-address {address[:200]}: no Ray cluster answers there ({quoted(error)})"
    return f"{where}; start one, {token}or leave the flag out"
