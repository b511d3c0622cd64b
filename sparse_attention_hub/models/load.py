"""Load a model and its tokenizer: a hub id, a local folder, or the embedded model. Every failure is one line to act
on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .embedded import EMBEDDED_MODEL, embedded_folder, is_embedded
from .notices import quiet_transformers

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DENSE_BACKENDS = ("auto", "sdpa", "flash")
_DEBUG = f"or run with --debug, which uses {EMBEDDED_MODEL} and needs no network"
#: Seconds to wait for the hub before it counts as unreachable.
_HUB_TIMEOUT = 8.0


@dataclass
class LanguageModel:
    """A causal language model ready to be asked. dense_backend: transformers' name of the attention that prefills."""

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

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str = "model", dense_backend: str = "auto") -> LanguageModel:
        """Make one of a transformers model already in memory. UserError if its attention is not supported."""
        import inspect

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


def load_model(
    model_id: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    dense_backend: str = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load weights and tokenizer for inference.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", or "sharded" (over all visible GPUs). dtype:
    "auto" (bfloat16 on a GPU, float32 on CPU), "float32", "float16", "bfloat16".
    dense_backend: "auto", "sdpa", "flash".
    UserError, one line, for whatever keeps the model from loading.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    _pick_dense(dense_backend, place, number)  # a wish that cannot be met fails before minutes of loading
    source = _Source(model_id, trust_remote_code)
    with source.explained(), quiet_transformers():
        from transformers import AutoModelForCausalLM

        tokenizer = source.tokenizer()
        options: dict[str, Any] = {"device_map": "auto"} if device == "sharded" else {}
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=number, **options, **source.options)
        if device != "sharded":
            model = model.to(place)  # type: ignore[arg-type]
    return LanguageModel.wrap(model, tokenizer, name=model_id, dense_backend=dense_backend)


def load_tokenizer(model_id: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone, without weights. UserError as load_model."""
    source = _Source(model_id, trust_remote_code)
    with source.explained(), quiet_transformers():
        return source.tokenizer()


def check_place(device: str, dtype: str, dense_backend: str) -> None:
    """UserError if this machine lacks the device, or it cannot do what was asked for by name. CUDA is not started."""
    place = pick_device(device)
    _pick_dense(dense_backend, place, likely_dtype(dtype, place))


def load_shape(model_id: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[int, int]:
    """(layers, bytes of keys and values that one token takes in one layer), from the configuration alone. UserError as
    load_model."""
    source = _Source(model_id, trust_remote_code)
    with source.explained(), quiet_transformers():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.path, **source.options).get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    number = likely_dtype(dtype, pick_device("auto"))
    return config.num_hidden_layers, 2 * kv_heads * width * torch.tensor([], dtype=number).element_size()


class _Source:
    """Where a model's files come from, and how a failure to read them is told."""

    def __init__(self, model_id: str, trust_remote_code: bool) -> None:
        self.model_id = model_id
        self.options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self.trusted = trust_remote_code
        if not isinstance(model_id, str) or not model_id.strip():
            raise UserError(f"a model is a hub id, a folder or {EMBEDDED_MODEL}, got {model_id!r}")
        if is_embedded(model_id):
            self.path = str(embedded_folder(model_id))
            self.local = True
        elif Path(model_id).expanduser().is_dir():
            self.path = str(Path(model_id).expanduser())
            self.local = True
            if not (Path(self.path) / "config.json").is_file():
                raise UserError(f"folder {model_id!r} holds no model: config.json is missing")
        elif model_id.startswith((".", "/", "~", os.sep)) or model_id.count("/") > 1 or "\\" in model_id:
            raise UserError(f"no folder {model_id!r}: give a model's folder, a hub id (organisation/name), {_DEBUG}")
        else:
            self.path = model_id
            self.local = False
            self._probe_hub()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, **self.options)

    def _probe_hub(self) -> None:
        """One short request tells what is wrong before the loaders retry for minutes; a cached model needs no hub."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = isinstance(try_to_load_from_cache(self.model_id, "config.json"), str)
            if constants.HF_HUB_OFFLINE:
                if not cached:
                    raise UserError(
                        f"model {self.model_id!r} is not in the local cache and HF_HUB_OFFLINE is set: unset it, {_DEBUG}"
                    )
            else:
                get_hf_file_metadata(hf_hub_url(self.model_id, "config.json"), timeout=_HUB_TIMEOUT)
                return
        except HFValidationError:
            raise UserError(
                f"{self.model_id!r} is neither a folder nor a hub id (organisation/name): correct it, {_DEBUG}"
            ) from None
        except UserError:
            raise
        except Exception as error:
            if not cached:
                raise UserError(self._tell(error)) from None
        self.options["local_files_only"] = True

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what loading raises into one line. Errors of the program itself pass."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"model {self.model_id!r} does not fit into the GPU's memory: take --device cpu or a smaller model"
                ) from None
            raise UserError(self._tell(error)) from error

    def _tell(self, error: BaseException) -> str:
        name = f"model {self.model_id!r}"
        kinds = _kinds(error)
        text = _one_line(error)
        if "trust_remote_code" in str(error):
            return f"{name} brings its own code: read it, then pass --trust-remote-code to run it"
        if not self.local:
            if "GatedRepoError" in kinds or _status(error) == 403:
                return f"{name} is gated: accept its terms on its page and log in with `hf auth login`, {_DEBUG}"
            if "RepositoryNotFoundError" in kinds or _status(error) in (401, 404):
                return f"{name} is unknown to the hub (or private: `hf auth login`): check the name, {_DEBUG}"
            if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
                return f"{name} is no transformers model: its repository has no config.json; take another model, {_DEBUG}"
            if kinds & _NETWORK or "LocalEntryNotFoundError" in kinds or "connect" in text.lower():
                kind = type(error).__name__
                return f"{name} cannot be fetched, the hub is unreachable ({kind}): check the network, {_DEBUG}"
        if "model type" in text and "does not recognize" in text.lower():
            return f"{name} has a model type that this transformers does not know: take another model or update it"
        return f"{name} cannot be loaded ({text}): check its files, {_DEBUG}"


_NETWORK = {
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "NetworkError",
    "TimeoutException",
    "ProxyError",
    "OfflineModeIsEnabled",
    "SSLError",
    "TransportError",
}


def _kinds(error: BaseException) -> set[str]:
    """Class names of an error and its causes: the hub's client changes modules between versions, not names."""
    names: set[str] = set()
    seen: BaseException | None = error
    while seen is not None:
        names |= {kind.__name__ for kind in type(seen).__mro__}
        seen = seen.__cause__ or seen.__context__
    return names


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: instruct models list several."""
    found: set[Any] = set()
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value if isinstance(value, list | tuple | set) else [value])
    return frozenset(int(token) for token in found if token is not None)


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "sharded":
        device = "cuda"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or sharded, got {device!r}") from None
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device} asks for a GPU and torch sees none: use --device cpu or auto")
        if place.index is not None and place.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    elif place.type != "cpu":
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or sharded, got {device!r}")
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def likely_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """As pick_dtype, but a GPU is not asked: that would start CUDA in this process, which only workers may do. Both of
    what "auto" may become there have two bytes."""
    if dtype == "auto" and device.type == "cuda":
        return torch.bfloat16
    return pick_dtype(dtype, device)


def _pick_dense(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that prefills, by transformers' name. UserError if flash was asked for by name and cannot be
    had."""
    if wanted not in DENSE_BACKENDS:
        raise UserError(f"--dense-backend must be {', '.join(DENSE_BACKENDS)}, got {wanted!r}")
    if wanted == "sdpa":
        return "sdpa"
    reason = None
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
        raise UserError(f"--dense-backend flash: {reason}; use --dense-backend sdpa or auto")
    if device.type == "cuda":
        _log_once(f"dense attention runs on SDPA: {reason}")
    return "sdpa"


_logged: set[str] = set()


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        logger.info(line)
