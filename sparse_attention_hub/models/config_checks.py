"""What config.json alone says: the longest text, and models that are refused before weights are loaded."""

from __future__ import annotations

from typing import Any

from ..errors import UserError, quoted

#: Sizes in config.json and the most that a model could have of each. More is a damaged file, which would fill the memory.
_SIZES = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 1_000_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
    "num_local_experts": 1_000_000,
    "num_experts": 1_000_000,
}
#: Layers with keys that every query of the layer may read, or a window of them; and layers with a state instead.
ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
RECURRENT_KINDS = ("linear_attention", "conv")
HYBRID_KINDS = ("hybrid",)
#: Layers without attention.
EMPTY_KINDS = ("moe", "mlp")
#: RoPE scalings that reach factor x original positions. Others (llama3, longrope) name the whole length themselves.
_STRETCHED = ("linear", "dynamic", "yarn")


def max_positions(config: Any) -> int | None:
    """The longest text that a decoder's config takes, in tokens: its positions, or factor x original positions of a RoPE
    scaling if that is more. Where layers scale differently, the least of them. None if the config does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    reach = [_reach(scaling, positions) for scaling in rope_scalings(config)]
    return max(positions, min(reach, default=positions))


def _reach(scaling: dict[str, Any], positions: int) -> int:
    if scaling.get("rope_type", scaling.get("type")) not in _STRETCHED:
        return positions
    return int((scaling.get("factor") or 1.0) * (scaling.get("original_max_position_embeddings") or positions))


def rope_scalings(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one dictionary, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def check_raw_config(raw: dict[str, Any], name: str) -> None:
    """UserError for what transformers answers with a traceback or by filling the memory. raw: config.json as it is."""
    for part in (raw, *(raw[key] for key in ("text_config", "decoder") if isinstance(raw.get(key), dict))):
        for field, most in _SIZES.items():
            value = part.get(field)
            if value is None or isinstance(value, list):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise UserError(
                    f"{name}: {field} in config.json must be a whole number from 0 to {most}, got {quoted(value, 40)}: "
                    "correct the file"
                )
        scaling = part.get("rope_scaling") or part.get("rope_parameters")
        if isinstance(scaling, dict) and "auto_map" not in raw:
            _check_rope(scaling, str(part.get("model_type")), name)


def _check_rope(scaling: dict[str, Any], kind: str, name: str) -> None:
    for part in [value for value in scaling.values() if isinstance(value, dict)] or [scaling]:
        given = part.get("rope_type", part.get("type", "default"))
        if given == "su" and "phi" not in kind:  # Phi's own configs translate it
            raise UserError(f"{name}: RoPE type 'su' in config.json is the old name of 'longrope': write 'longrope' instead")


def check_config(config: Any, name: str) -> None:
    """UserError for models that are not supported, whatever their weights. config: the model's, or that of its text decoder."""
    kinds = set(layer_kinds(config)) - {*ATTENTION_KINDS, *RECURRENT_KINDS, *HYBRID_KINDS, *EMPTY_KINDS}
    problems = {
        "is an encoder-decoder model: take a decoder-only one": getattr(config, "is_encoder_decoder", False),
        "attends in both directions: take a causal language model": getattr(config, "is_causal", True) is False,
        f"has layers of kind {', '.join(sorted(kinds))}, which are not supported: take a model with plain attention": kinds,
        "has no attention layers, so nothing of it can be sparse: take another model": layer_kinds(config)
        and not any(kind in (*ATTENTION_KINDS, *HYBRID_KINDS) for kind in layer_kinds(config)),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"model {name!r} ({getattr(config, 'model_type', 'unknown type')}) {problem}")


def layer_kinds(config: Any) -> list[str]:
    """What transformers calls each layer: "full_attention", "linear_attention", ..."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return []
    return ["full_attention"] * layers
