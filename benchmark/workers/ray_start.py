"""Starts Ray or connects to a cluster, for both phases. Ray is not imported before this."""

from __future__ import annotations

import logging
import os
import socket

from sparse_attention_hub.errors import UserError

CONNECT_SECONDS = 10.0


def start_ray(address: str | None, num_cpus: int | None = None) -> bool:
    """Connect to `address`; "local" or None starts a cluster on this machine. Returns False if Ray was running already.

    Raises UserError if no cluster answers: within seconds if nothing listens there, within a minute if something else does.
    """
    own = address in (None, "local")
    if not own:
        _check_listens(str(address))
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # default: 20 times, 40 s each
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else workers start through uv in an uploaded copy
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray
    from ray._private import ray_constants

    if getattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False):
        # Ray was imported before and read the setting then: its workers would never start.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if ray.is_initialized():
        return False
    try:
        if own:
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
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
    reason = " ".join(str(error).split())
    return f"--ray-address {address}: no Ray cluster answers there ({reason}); start one, or leave the flag out"
