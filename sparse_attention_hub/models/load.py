"""Load a model and its tokenizer: a hub id, a local folder, or the embedded model. Failures are UserErrors of one line."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .embedded import EMBEDDED_MODEL, embedded_folder
from .notices import quiet_transformers

logger = logging.getLogger(__name__)
_log_once = functools.cache(logger.info)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DENSE_BACKENDS = ("auto", "sdpa", "flash")
_OFFLINE = f"or take {EMBEDDED_MODEL}, which needs no network"
#: Seconds to wait for the hub before it counts as unreachable.
_HUB_TIMEOUT = 8.0
#: Names of the hub client's error classes, or of their base classes, that mean a network problem.
_NETWORK = {"ConnectionError", "NetworkError", "TimeoutException", "TransportError", "ProxyError", "SSLError"}


@dataclass
class LanguageModel:
    """A causal language model ready for inference.

    dense_backend: transformers' name of the attention that prefills. keeps_logits: the model can compute
    logits of the last tokens only. full_layers: those without a sliding window, set by `sparse_layers`.
    """

    id: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    dense_backend: str
    eos_token_ids: frozenset[int]
    num_layers: int
    max_positions: int | None
    attention_configs: list[Any]
    keeps_logits: bool
    full_layers: list[int] | None = None

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str = "model", dense_backend: str = "auto") -> LanguageModel:
        """Wrap a transformers model that is already in memory. UserError if its attention is not supported."""
        from .switch import attention_configs, check_supported

        check_supported(model, name)
        config = model.config.get_text_config(decoder=True)
        embeddings = model.get_input_embeddings().weight
        return cls(
            id=name,
            model=model.eval(),
            tokenizer=tokenizer,
            device=embeddings.device,
            dtype=embeddings.dtype,
            dense_backend=_pick_dense(dense_backend, embeddings.device, embeddings.dtype),
            eos_token_ids=_eos_ids(model, tokenizer),
            num_layers=config.num_hidden_layers,
            max_positions=getattr(config, "max_position_embeddings", None),
            attention_configs=attention_configs(model),
            keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        )

    @functools.cached_property
    def weights_fingerprint(self) -> str:
        """A hash of the model's id and a few numbers of every weight: detects a changed checkpoint."""
        digest = hashlib.sha256(self.id.encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().flatten()[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:20]


def load_model(
    model_id: str, *, device: str = "auto", dtype: str = "auto", dense_backend: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Load weights and tokenizer for inference.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", or "sharded" (over all visible GPUs). dtype: "auto"
    (bfloat16 on a GPU, float32 on CPU), "float32", "float16", "bfloat16". dense_backend: "auto", "sdpa", "flash".
    UserError, one line, if the model cannot be loaded.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    _pick_dense(dense_backend, place, number)  # an impossible choice fails here, before minutes of loading
    with _model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if device == "sharded":
            model = AutoModelForCausalLM.from_pretrained(path, dtype=number, device_map="auto", **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=number, **options).to(place)  # type: ignore[arg-type]
    return LanguageModel.wrap(model, tokenizer, name=model_id, dense_backend=dense_backend)


def load_tokenizer(model_id: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone, without weights. UserError as load_model."""
    with _model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, **options)


def check_place(device: str, dtype: str, dense_backend: str) -> None:
    """UserError if this machine lacks the device, or the device cannot run the dtype or backend. Does not start CUDA."""
    place = pick_device(device)
    _pick_dense(dense_backend, place, likely_dtype(dtype, place))


def load_shape(model_id: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[int, int]:
    """(layers, bytes of one token's keys and values in one layer), without weights. UserError as load_model."""
    with _model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, **options).get_text_config(decoder=True)
    _, kv_heads, dim = head_shape(config)
    return config.num_hidden_layers, 2 * kv_heads * dim * likely_dtype(dtype, pick_device("auto")).itemsize


def head_shape(config: Any) -> tuple[int, int, int]:
    """(query heads, kv heads, channels per head) of a text decoder's config."""
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


@contextmanager
def _model_files(model_id: str, trust_remote_code: bool) -> Iterator[tuple[str, dict[str, Any]]]:
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
    if "model type" in text and "does not recognize" in text.lower():
        return f"{name} has a model type that this transformers does not know: take another model or update it"
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{name} cannot be loaded ({text}): check its files, {_OFFLINE}"


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: instruct models list several."""
    found: set[Any] = set()
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value if isinstance(value, list | tuple | set) else [value])
    return frozenset(int(token) for token in found - {None})


def pick_device(device: str) -> torch.device:
    """The device that a name means; CUDA is not started. UserError if this machine does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device("cuda" if device == "sharded" else device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or sharded, got {device!r}", "device")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device} asks for a GPU and torch sees none: take cpu or auto", "device")
    if place.type == "cuda" and place.index is not None and place.index >= torch.cuda.device_count():
        raise UserError(f"device {device}: there are {torch.cuda.device_count()} GPUs, numbered from 0", "device")
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means on a device. UserError if there is no such dtype."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}", "dtype")
    return DTYPES[dtype]


def likely_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """pick_dtype without starting CUDA, which only workers may do: "auto" is bfloat16 on a GPU (float16 has the same size)."""
    return torch.bfloat16 if dtype == "auto" and device.type == "cuda" else pick_dtype(dtype, device)


def _pick_dense(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """transformers' name of the attention that prefills. UserError if flash is asked for by name and not available."""
    if wanted not in DENSE_BACKENDS:
        raise UserError(f"dense_backend must be {', '.join(DENSE_BACKENDS)}, got {wanted!r}", "dense_backend")
    if wanted == "sdpa":
        return "sdpa"
    if device.type != "cuda":
        reason = f"the device is {device.type}, flash-attn needs CUDA"
    elif dtype == torch.float32:
        reason = "flash-attn needs float16 or bfloat16, the model is float32"
    else:
        from transformers import utils

        if utils.is_flash_attn_2_available():  # type: ignore[attr-defined]
            return "flash_attention_2"
        reason = "flash-attn is not installed (extra `flash`)"
    if wanted == "flash":
        raise UserError(f"dense_backend flash: {reason}; take sdpa or auto", "dense_backend")
    if device.type == "cuda":
        _log_once(f"dense attention runs on SDPA: {reason}")
    return "sdpa"
