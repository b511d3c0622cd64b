"""Load a model and its tokenizer: a hub id, a local folder, or the embedded model. Failures are UserErrors of one line."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..errors import UserError
from .config_checks import ATTENTION_KINDS, HYBRID_KINDS, check_raw_config, layer_kinds, max_positions
from .prompts import render_chat
from .rope import length_dependent
from .sources import model_files

if TYPE_CHECKING:
    from ..attention import ResearchAttention, ResearchAttentionConfig
    from .cache import SharedPrefixCache
    from .lockstep import LayerCall

logger = logging.getLogger(__name__)
_log_once = functools.cache(logger.info)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DENSE_BACKENDS = ("auto", "sdpa", "flash")


@dataclass
class LanguageModel:
    """A causal language model ready for inference.

    dense_backend: transformers' name of the attention that prefills. keeps_logits: the model can compute logits of the last
    tokens only. takes_positions: it can be told the tokens' positions. length_dependent: its modules whose rotary factors depend
    on the text's length. layers, continues: what `probe` found out. code_bytes: what `memory` found out. graphs_failed: a CUDA graph
    of its steps did.
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
    takes_positions: bool
    length_dependent: list[Any]
    layers: dict[int, LayerCall] | None = None
    continues: bool | None = None
    graphs_failed: bool = False
    code_bytes: WeakKeyDictionary[ResearchAttention, dict[tuple[str, ...], float]] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str = "model", dense_backend: str = "auto") -> LanguageModel:
        """Wrap a transformers model that is already in memory. UserError if its attention is not supported."""
        from .switch import attention_configs, check_supported

        check_supported(model, name)
        config = model.config.get_text_config(decoder=True)
        embeddings = model.get_input_embeddings().weight
        takes = [inspect.signature(module.forward).parameters for module in (model, model.base_model)]
        return cls(
            id=name,
            model=model.eval(),
            tokenizer=tokenizer,
            device=embeddings.device,
            dtype=embeddings.dtype,
            dense_backend=_pick_dense(dense_backend, embeddings.device, embeddings.dtype),
            eos_token_ids=_eos_ids(model, tokenizer),
            num_layers=config.num_hidden_layers,
            max_positions=max_positions(config),
            attention_configs=attention_configs(model),
            keeps_logits="logits_to_keep" in takes[0],
            takes_positions=all("position_ids" in parameters for parameters in takes),
            length_dependent=length_dependent(model),
        )

    def complete(self, config: ResearchAttentionConfig) -> ResearchAttentionConfig:
        """The configuration with the model's own files where it leaves them out. ValueError if there are none."""
        from .model_files import complete

        return complete(config, self)

    def new_cache(self, capacity: int) -> SharedPrefixCache:
        """An empty cache for `capacity` tokens."""
        from .cache import SharedPrefixCache

        return SharedPrefixCache(self.model.config.get_text_config(decoder=True), capacity)

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
    (bfloat16 on a GPU, float16 on one without bfloat16 such as T4 and V100, float32 on CPU), "float32", "float16", "bfloat16".
    dense_backend: "auto", "sdpa", "flash".
    UserError, one line, if the model cannot be loaded.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    _pick_dense(dense_backend, place, number)  # an impossible choice fails here, before minutes of loading
    with model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        auto: Any = AutoModelForCausalLM
        config = _checked_config(path, model_id, options)
        tokenizer = _usable(AutoTokenizer.from_pretrained(path, **options))
        check_tokenizer(tokenizer, config, model_id)
        _check_without_weights(config, model_id, trust_remote_code)
        options |= {"config": config, "dtype": number, "output_loading_info": True}
        model, report = auto.from_pretrained(path, device_map=_device_map(device, place), **options)
        if device != "sharded":
            model = model.to(place)
        _check_weights(report, len(model.state_dict()), model_id)
    return LanguageModel.wrap(model, tokenizer, name=model_id, dense_backend=dense_backend)


def _device_map(device: str, place: torch.device) -> str | dict[str, torch.device] | None:
    """Where weights go as they are read. Without a map the whole model is in host memory first, once for each worker."""
    from transformers import utils

    if device == "sharded":
        return "auto"
    on_gpu = place.type == "cuda" and utils.is_accelerate_available()  # type: ignore[attr-defined]
    return {"": place} if on_gpu else None


def load_tokenizer(model_id: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone, without weights. UserError as load_model."""
    with model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoTokenizer

        return _usable(AutoTokenizer.from_pretrained(path, **options))


def check_model(model_id: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, after all checks of a model that need no weights. UserError, one line, if it is not supported."""
    from .probe import sparse_of

    with model_files(model_id, trust_remote_code) as (path, options):
        from transformers import AutoTokenizer

        config = _checked_config(path, model_id, options)
        tokenizer = _usable(AutoTokenizer.from_pretrained(path, **options))
        check_tokenizer(tokenizer, config, model_id)
        calls = _check_without_weights(config, model_id, trust_remote_code)
        if calls is not None:
            sparse_of(calls, model_id)
        if tokenizer.chat_template:
            render_chat(tokenizer, "Hello")
    return tokenizer


def _checked_config(path: str, model_id: str, options: dict[str, Any]) -> Any:
    """The model's config. An attention that it names is dropped: the caller decides. UserError for impossible sizes."""
    from transformers import AutoConfig, PreTrainedConfig

    check_raw_config(PreTrainedConfig.get_config_dict(path, **options)[0], f"model {model_id!r}")
    config = AutoConfig.from_pretrained(path, **options)
    config._attn_implementation = None
    return config


def _check_without_weights(config: Any, model_id: str, trust_remote_code: bool) -> dict[int, LayerCall] | None:
    from .probe import calls_without_weights

    return calls_without_weights(config, model_id, trust_remote_code)


def _usable(tokenizer: Any) -> Any:
    """A tokenizer whose longest text is a number: it is compared with, for a warning."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        tokenizer.model_max_length = int(longest) if str(longest).isdigit() else 2**62
    return tokenizer


def check_tokenizer(tokenizer: Any, config: Any, name: str) -> None:
    """UserError if the tokenizer gives tokens that the model's embedding lacks. A padding token that was added is never used."""
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if not isinstance(rows, int) or len(tokenizer) <= rows:
        return
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= rows} - {tokenizer.pad_token}
    if beyond:
        raise UserError(
            f"model {name!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} ({len(beyond)} have no row): "
            "take the tokenizer that belongs to the weights"
        )


def _check_weights(report: dict[str, Any], weights: int, name: str) -> None:
    """UserError if the files lack weights, which would be random numbers; weights that the model does not use are noted."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        more = f"; {len(unexpected)} others are not of this model, such as {unexpected[0]}" if unexpected else ""
        raise UserError(
            f"model {name!r}: {len(missing)} of {weights} weights are missing from its files, such as {missing[0]}{more}: "
            "check config.json and the names in the files"
        )
    if unexpected:
        logger.warning("model %r: %d weights of its files are not used, such as %s", name, len(unexpected), unexpected[0])


def check_place(device: str, dtype: str, dense_backend: str) -> None:
    """UserError if this machine lacks the device, or the device cannot run the dtype or backend. Does not start CUDA."""
    place = pick_device(device)
    _pick_dense(dense_backend, place, likely_dtype(dtype, place))


class ModelShape(NamedTuple):
    """Bytes of one token's keys and values: in all attention layers, and in each of those that can be sparse (the mean), which are
    the ones that a trace holds. sparse_layers: how many these are."""

    kv_bytes: int
    sparse_layers: int
    sparse_layer_bytes: int


def load_shape(model_id: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> ModelShape:
    """What the model keeps of a token, without loading its weights. UserError as load_model."""
    with model_files(model_id, trust_remote_code) as (path, options):
        config = _checked_config(path, model_id, options)
        calls = _check_without_weights(config, model_id, trust_remote_code)
    config = config.get_text_config(decoder=True)
    if calls is None:  # the model's code needs weights to run: the usual shapes
        layers = sum(kind in (*ATTENTION_KINDS, *HYBRID_KINDS) for kind in layer_kinds(config))
        numbers = sparse = [2 * _usual_kv_width(config)] * layers
    else:
        numbers = [call.token_numbers for call in calls.values()]
        sparse = [call.token_numbers for call in calls.values() if not call.rule.limited]
    each = likely_dtype(dtype, pick_device("auto")).itemsize
    return ModelShape(sum(numbers) * each, len(sparse), sum(sparse) * each // max(1, len(sparse)))


def _usual_kv_width(config: Any) -> int:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


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
            # T4 and V100 only emulate bfloat16. What passes float16's range is a failure of the sample, never a score.
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
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
