"""Starting Ray, or reaching a cluster, alike for both phases. Ray is imported here and nowhere before."""

from __future__ import annotations

import logging
import os
from typing import Any

from sparse_attention_hub.errors import UserError


def start_ray(address: str | None, num_cpus: int | None = None) -> bool:
    """Connect to `address` ("local" or None = a cluster of its own on this machine). False if Ray ran already.

    Raises UserError where no cluster answers.
    """
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
    if address in (None, "local"):
        options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if address in (None, "local"):
            raise
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({error}); start one or leave it out") from None
    return True
