"""What is found out about a model by running it on a few tokens, with weights or without."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import UserError, quoted
from .config_checks import check_config
from .load import LanguageModel
from .lockstep import LayerCall, Lockstep, Row


def layer_calls(lm: LanguageModel) -> dict[int, LayerCall]:
    """How each attention layer calls its attention, by layer: from a forward pass over one token, once for a model."""
    if lm.layers is None:
        batch = Lockstep(lm, _empty(lm, 1), [Row()])
        batch.fill(torch.tensor([[0]], device=lm.device))
        lm.layers = dict(sorted(batch.layers.items()))
    return lm.layers


def sparse_layers(lm: LanguageModel) -> list[int]:
    """The layers that can be sparse, in order. UserError if the model has none."""
    return sparse_of(layer_calls(lm), lm.id)


def sparse_of(calls: dict[int, LayerCall], name: str) -> list[int]:
    """Those of a model's layers that attend to all keys. UserError if there are none."""
    found = [layer for layer, call in calls.items() if not call.rule.limited]
    if not found:
        raise UserError(
            f"model {name!r} has sliding-window layers only, which stay dense: nothing of it can be sparse, take another model"
        )
    return found


def continues(lm: LanguageModel) -> bool:
    """Whether a pass of several tokens begins with the state that the tokens before it left.

    The recurrent layers of some models (Mamba in plain torch) ignore that state. To find out, the state is set to NaN: if nothing is
    NaN afterwards, it was not read.
    """
    if lm.continues is None:
        batch = Lockstep(lm, _empty(lm, 8), [Row()])
        ids = torch.tensor([[0, 1, 2, 3]], device=lm.device)
        layers = batch.prefilled.cache.recurrent
        if layers:
            batch.fill(ids)
        states = [state for layer in layers for state in layer.recurrent_states.values() if state is not None]
        if states:
            for state in states:
                state.fill_(float("nan"))
            batch.fill(ids)
        lm.continues = all(bool(state.isnan().any()) for state in states[:1])
    return lm.continues


def _empty(lm: LanguageModel, capacity: int) -> Any:
    from .session import Prefilled

    return Prefilled(lm.new_cache(capacity), 0, 0.0)


def calls_without_weights(config: Any, name: str, trust_remote_code: bool = False) -> dict[int, LayerCall] | None:
    """`layer_calls` of a model that is built without its weights. UserError if the model is not supported.

    None if its code needs numbers to run; then the first pass with weights decides.
    """
    from transformers import AutoModelForCausalLM

    for part in (config, config.get_text_config(decoder=True)):
        check_config(part, name)
    config = copy.deepcopy(config)
    config._attn_implementation = config._experts_implementation = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        lm = LanguageModel.wrap(model, None, name=name)
        config._experts_implementation = "batched_mm"  # others look at the numbers to find the experts
        try:
            return layer_calls(lm)
        except UserError as error:
            raise UserError(str(error).replace("this model", f"model {name!r} ({config.model_type})")) from None
        except Exception as error:
            if isinstance(error, RuntimeError) and "meta" in str(error).lower():  # the code asks for a tensor's numbers
                return None
            raise UserError(
                f"model {name!r} ({config.model_type}) does not run with a cache that is shared and rewound "
                f"({type(error).__name__}: {quoted(error, 100)}): take another model"
            ) from None
