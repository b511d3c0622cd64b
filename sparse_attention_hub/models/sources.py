"""Where a model's files are: a hub id, a local folder or the embedded model; and why they cannot be used, in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .embedded import EMBEDDED_MODEL, embedded_folder
from .notices import quiet_transformers

_OFFLINE = f"or take {EMBEDDED_MODEL}, which needs no network"
#: Seconds to wait for the hub before it counts as unreachable.
_HUB_TIMEOUT = 8.0
#: Names of the hub client's error classes, or of their base classes, that mean a network problem.
_NETWORK = {"ConnectionError", "NetworkError", "TimeoutException", "TransportError", "ProxyError", "SSLError"}


@contextmanager
def model_files(model_id: str, trust_remote_code: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder or hub id, and the options, for `from_pretrained`. Errors inside become UserErrors."""
    if not isinstance(model_id, str) or not model_id.strip():
        raise UserError(f"a model is a hub id, a folder or {EMBEDDED_MODEL}, got {model_id!r}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    folder = _local_folder(model_id)
    if folder is None and not _hub_has(model_id):
        options["local_files_only"] = True
    try:
        with quiet_transformers():
            yield folder or model_id, options
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise UserError(
            f"model {model_id!r} does not fit into the GPU's memory: take the cpu or a smaller model", "device"
        ) from None
    except Exception as error:
        raise _explain(error, model_id, from_hub=folder is None) from error


def _local_folder(model_id: str) -> str | None:
    """The folder of a local or the embedded model; None for a hub id."""
    if model_id.startswith("embedded/"):
        return str(embedded_folder(model_id))
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"folder {model_id!r} holds no model: config.json is missing")
        return str(folder)
    if model_id.startswith((".", "/", "~", os.sep)) or model_id.count("/") > 1 or "\\" in model_id:
        raise UserError(f"no folder {model_id!r}: give a model's folder, a hub id (organisation/name), {_OFFLINE}")
    return None


def _hub_has(model_id: str) -> bool:
    """Whether the hub has a model; False: only the local cache has it. UserError if neither has it.

    One short request: the loaders would retry for minutes.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    except HFValidationError:
        raise UserError(f"{model_id!r} is neither a folder nor a hub id (organisation/name): correct it, {_OFFLINE}") from None
    if constants.HF_HUB_OFFLINE:
        if not cached:
            raise UserError(f"model {model_id!r} is not in the local cache and HF_HUB_OFFLINE is set: unset it, {_OFFLINE}")
        return False
    try:
        get_hf_file_metadata(hf_hub_url(model_id, "config.json"), timeout=_HUB_TIMEOUT)
    except Exception as error:
        if not cached:
            raise _explain(error, model_id, from_hub=True) from None
        return False
    return True


def _explain(error: Exception, model_id: str, from_hub: bool) -> UserError:
    """Why a model could not be loaded, and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return UserError(f"model {model_id!r} brings its own code: read it, then let it run", "trust_remote_code")
    return UserError(_reason(error, text, f"model {model_id!r}", from_hub))


def _reason(error: Exception, text: str, name: str, from_hub: bool) -> str:
    if from_hub:
        kinds: set[str] = set()  # names, because the hub's client moves its classes between versions
        cause: BaseException | None = error
        while cause is not None:
            kinds |= {kind.__name__ for kind in type(cause).__mro__}
            cause = cause.__cause__ or cause.__context__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if "GatedRepoError" in kinds or status == 403:
            return f"{name} is gated: accept its terms on its page and log in with `hf auth login`, {_OFFLINE}"
        if "RepositoryNotFoundError" in kinds or status in (401, 404):
            return f"{name} is unknown to the hub (or private: `hf auth login`): check the name, {_OFFLINE}"
        if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            return f"{name} is no transformers model: its repository has no config.json; take another model, {_OFFLINE}"
        if kinds & _NETWORK or "LocalEntryNotFoundError" in kinds or "connect" in text.lower():
            return f"{name} cannot be fetched, the hub is unreachable ({type(error).__name__}): check the network, {_OFFLINE}"
    if "for this kind of AutoModel" in text:
        return f"{name} is no causal language model: take another model"
    if "model type" in text and "does not recognize" in text.lower():
        return f"{name} has a model type that this transformers does not know: take another model or update it"
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{name} cannot be loaded ({text}): check its files, {_OFFLINE}"
