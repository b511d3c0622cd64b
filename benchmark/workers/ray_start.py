"""Starting Ray, or reaching a cluster, alike for both phases. Ray is imported here and nowhere before."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from sparse_attention_hub.errors import UserError

CONNECT_SECONDS = 10.0


def start_ray(address: str | None, num_cpus: int | None = None) -> bool:
    """Connect to `address` ("local" or None = a cluster of its own on this machine). False if Ray ran already.

    Raises UserError where no cluster answers: within seconds where nothing does, a minute where something else does.
    """
    own = address in (None, "local")
    if not own:
        _check_listens(str(address))
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # by itself Ray tries 20 times, 40 s each
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else workers start through uv in an uploaded copy
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray
    from ray._private import ray_constants

    if getattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False):
        # Somebody imported Ray before us, and it read the setting then: such workers would never start.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if own:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if own:
            raise
        raise UserError(_no_cluster(str(address), error)) from None
    return True


def _check_listens(address: str) -> None:
    """UserError if nothing listens at a "host:port" or "ray://host:port"; other addresses ("auto") are Ray's to look up."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(_no_cluster(address, error)) from None


def _no_cluster(address: str, error: Exception) -> str:
    told = " ".join(str(error).split())
    return f"--ray-address {address}: no Ray cluster answers there ({told}); start one or leave it out"
