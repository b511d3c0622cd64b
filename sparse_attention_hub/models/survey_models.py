"""Tiny random models of every causal kind that the installed transformers knows, for the survey and for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch

VOCABULARY, WINDOW, CHUNK, POSITIONS = 101, 24, 32, 1024
MOST_WEIGHTS = 8_000_000

#: Sizes by the names that configs give them. A config gets those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "expert_ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **{"kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_dt_rank": 4},
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_d_ssm": 128, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    **{
        "sliding_window": WINDOW,
        "attention_chunk_size": CHUNK,
        "window_size": WINDOW,
        "initializer_range": 0.15,
        "init_std": 0.15,
    },
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attention_dropout": 0.0, "rope_interleave": True},
}
#: Leaves a field as transformers has it.
DEFAULT = object()
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
#: What a kind needs beyond that.
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_HYBRID, "num_local_experts": 4, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere2": _MIXED,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "exaone4": _MIXED,
    "falcon": {"new_decoder_architecture": True, "alibi": False, "num_ln_in_parallel_attn": 2},
    "gemma2": {**_MIXED, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **_MIXED, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "altup_num_inputs": 2,
    },
    "gemma4_text": {**_MIXED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {**_HYBRID, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1, 0], "floor_scale": 64, "num_experts_per_tok": 1},
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "num_hidden_layers": DEFAULT, "zero_expert_num": 2},
    "ministral": _MIXED,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mistral": {"sliding_window": None},
    "olmo3": _MIXED,
    "phi3": {"sliding_window": None},
    "qwen3_next": _HYBRID,
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip
_SHORT, _LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
#: More than one model of a kind: (kind, RoPE parameters or other fields). Their scaling begins inside the survey's context.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 with longrope": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": _SHORT, "long_factor": _LONG},
            "original_max_position_embeddings": 100,
        },
    ),
    "llama with dynamic RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 100},
    ),
    "llama with YaRN": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100
            },
            "max_position_embeddings": 100,
        },
    ),
    "llama with linear RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 100},
    ),
    "mistral with a window": ("mistral", {"sliding_window": WINDOW}),
    "falcon (old decoder)": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
}  # fmt: skip


def causal_kinds() -> list[str]:
    """The model types of transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **fields: Any) -> Any:
    """A small config of a model type or of one of VARIANTS. fields: of the text decoder's config, over all others.

    Raises what transformers raises where it has no such config.
    """
    from transformers import CONFIG_MAPPING

    model_type, variant = VARIANTS.get(kind, (kind, {}))
    default = CONFIG_MAPPING[model_type]()
    text = default.get_text_config(decoder=True)
    own = {**_OWN.get(text.model_type, _OWN.get(model_type, {})), **variant, **fields}
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    small = {name: type(part)(**_sizes(part, own if part is text else {})) for name, part in parts.items() if part is not None}
    return type(default)(**(small or _sizes(default, own)))


def _sizes(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Small sizes for the fields that a config has, and its own ones."""
    known = {name: size for name, size in _SIZES.items() if _can_have(config, name)}
    if "qk_rope_head_dim" in known:  # a latent: every head has keys of its own, and their width is no head_dim
        known |= {"num_key_value_heads": _SIZES["num_attention_heads"]}
        known.pop("head_dim", None)
    return {name: size for name, size in {**known, **own}.items() if size is not DEFAULT}


def _can_have(config: Any, name: str) -> bool:
    field = getattr(type(config), name, None)
    if isinstance(field, property) and field.fset is None:
        return False
    try:
        held = getattr(config, name)
    except AttributeError:
        return False
    except Exception:  # a field of each layer, which have several values
        return True
    return held is not None or name.endswith("_token_id") or name in ("head_dim", "num_key_value_heads")


def tiny_model(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A random model in float32 on the CPU, no weight of which is trivial: norms are not one, sinks and biases not zero.

    ValueError if it is not tiny: a config has sizes by names that are not known here.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **fields)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"a small {kind} would have {weights} weights")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.isfinite().all() or (weight.dim() == 1 and weight.numel() > 1 and weight.std() == 0):
                weight.copy_(weight.nan_to_num(0.0, 0.0, 0.0) + 0.3 * torch.randn_like(weight))
            elif weight.numel() and float(weight.abs().max()) == 0:
                weight.normal_(std=0.15)
            if name.endswith("sinks"):
                weight.normal_()
    return model.eval()
