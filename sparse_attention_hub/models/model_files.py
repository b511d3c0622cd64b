"""Finds or makes the model-specific files of maskers, so that configurations stay portable.

DoubleSparsity: the model's important channels, Loki: the principal axes of its keys, DuoAttention: its retrieval heads; found
once and kept in the user's cache.
HashAttention: the trained weights that come with the library.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..attention import ResearchAttentionConfig
from ..errors import UserError
from ..maskers.base import MaskerConfig
from ..maskers.double_sparsity import DoubleSparsityTopKMaskerConfig
from ..maskers.duo_attention import DuoAttentionConfig
from ..maskers.hash_attention import HashAttentionTopKMaskerConfig
from ..maskers.hat_weights import hat_config_fields, hat_weights_for
from ..maskers.loki import LokiConfig
from .load import LanguageModel

log = logging.getLogger(__name__)


def fit_template(config: ResearchAttentionConfig, model_id: str) -> ResearchAttentionConfig | None:
    """The template with HashAttention's fields set as in its weights (the model's, or the file named in it).
    None if there are no weights for this model. UserError for a file that holds no weights."""
    maskers: list[MaskerConfig] = []
    for masker in config.masker_configs:
        if isinstance(masker, HashAttentionTopKMaskerConfig):
            path = hat_weights_for(model_id) if _wants_weights(masker) else masker.hat_weight_file
            if path is None:
                return None
            try:
                fields: dict[str, Any] = dict(hat_config_fields(path))
            except (OSError, ValueError) as error:
                raise UserError(f"HashAttention weights {path}: {error}") from None
            masker = dataclasses.replace(masker, **fields)
        maskers.append(masker)
    return dataclasses.replace(config, masker_configs=maskers)


def complete(config: ResearchAttentionConfig, lm: LanguageModel) -> ResearchAttentionConfig:
    """The configuration with its missing files filled in. ValueError if there are no weights for the model, or if layers or head
    budgets are of another one."""
    config.check_layers(lm.num_layers)
    maskers: list[MaskerConfig] = []
    for masker in config.masker_configs:
        if isinstance(masker, DoubleSparsityTopKMaskerConfig) and masker.sorted_channel_file is None:
            masker = dataclasses.replace(masker, sorted_channel_file=str(channels_for(lm)))
        elif isinstance(masker, LokiConfig) and masker.axes_file is None:
            masker = dataclasses.replace(masker, axes_file=str(axes_for(lm)))
        elif isinstance(masker, DuoAttentionConfig) and masker.pattern_file is None:
            masker = dataclasses.replace(masker, pattern_file=str(heads_for(lm)))
        elif isinstance(masker, HashAttentionTopKMaskerConfig) and _wants_weights(masker):
            path = hat_weights_for(lm.id)
            if path is None:
                raise ValueError(f"there are no HashAttention weights for {lm.id}: train some and name them in hat_weight_file")
            masker = dataclasses.replace(masker, hat_weight_file=path)
        maskers.append(masker)
    return dataclasses.replace(config, masker_configs=maskers)


def channels_for(lm: LanguageModel) -> Path:
    """The model's channel file, calibrated on generated text the first time it is asked for."""
    from ..maskers.channel_file import write_channels
    from .channel_calibration import calibrate

    return _calibrated(lm, "channels", ".json", "DoubleSparsity", lambda path: write_channels(calibrate(lm), path))


def axes_for(lm: LanguageModel) -> Path:
    """The file of the model's principal axes, calibrated on generated text the first time it is asked for."""
    from ..maskers.principal_axes import write_axes
    from .axes_calibration import calibrate_axes

    return _calibrated(lm, "axes", ".safetensors", "Loki", lambda path: write_axes(calibrate_axes(lm), path))


def heads_for(lm: LanguageModel) -> Path:
    """The file of the model's retrieval heads, found on generated text the first time it is asked for."""
    from .head_calibration import find_heads, write_pattern

    return _calibrated(lm, "heads", ".tsv", "DuoAttention", lambda path: write_pattern(find_heads(lm), path))


def _calibrated(lm: LanguageModel, what: str, suffix: str, method: str, write: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    from ..user_cache import SET_CACHE, cache_root

    path = cache_root() / what / f"{lm.weights_fingerprint}{suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                log.warning("calibrating the %s of %s for %s, into %s", what, lm.id, method, path)
                write(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): {SET_CACHE}") from None
    return path


def _wants_weights(masker: MaskerConfig) -> bool:
    return isinstance(masker, HashAttentionTopKMaskerConfig) and masker.hat_weight_file is None and masker.hat_weights is None
