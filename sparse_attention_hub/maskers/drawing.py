"""Draws what a masker chooses on a small example: `python -m sparse_attention_hub.maskers.quest [--out FILE.png]`.

One panel a query head; rows are queries, columns are keys. Each key is coloured by the masker that chose it, and paler
where it was chosen with a probability below 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import UserError, check_writable
from ..mask import Mask
from . import base
from .inputs import AttentionInputs

KEYS = 96
HEADS = 2
DIM = 16
COLOURS = {"sink": "#d1495b", "local": "#2e86ab", "own": "#edae49"}


def example_inputs() -> AttentionInputs:
    """96 queries on their own 96 keys, two query heads on one kv head. Neighbouring keys are alike, and some stretches of
    the text are what every later query looks for."""
    generator = torch.Generator().manual_seed(4)
    steps = torch.randn(KEYS, DIM, generator=generator)
    keys = torch.stack([sum((0.6**lag * steps[max(0, i - lag)] for lag in range(5)), torch.zeros(DIM)) for i in range(KEYS)])
    wanted = torch.randn(HEADS, 1, DIM, generator=generator)
    for head, start in enumerate((22, 58)):
        keys[start : start + 5] += 1.2 * wanted[head]
    queries = wanted + 0.9 * torch.randn(HEADS, KEYS, DIM, generator=generator)
    keys = keys.expand(1, 1, KEYS, DIM).contiguous()
    return AttentionInputs(queries.unsqueeze(0), keys, keys, seeds=[1])


def _channels(folder: Path) -> str:
    queries, keys = example_inputs().queries, example_inputs().keys
    order = (queries.abs().mean((0, 2)) * keys.std(2)[0]).argsort(-1, descending=True).tolist()
    path = folder / "channels.json"
    path.write_text(json.dumps({"model.layers.0.self_attn.qk_proj": order}))
    return str(path)


def _hash_weights() -> dict[int, dict[str, list[torch.Tensor]]]:
    planes = torch.randn(1, DIM, 32, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(1, 32)
    both = {"query_matrix": [planes.repeat(HEADS, 1, 1)], "query_bias": [none.repeat(HEADS, 1)]}
    return {0: both | {"key_matrix": [planes], "key_bias": [none]}}


def example_configs(name: str, folder: Path) -> list[base.MaskerConfig]:
    """The pipeline that shows the masker of module `name`; files that a config needs are made in `folder`. UserError for a
    masker that has no line here."""
    hub: dict[str, Callable[..., base.MaskerConfig]] = dict(base.registered_configs())

    own: dict[str, Callable[[], base.MaskerConfig]] = {
        "causal": lambda: hub["CausalMaskerConfig"](),
        "sink": lambda: hub["SinkMaskerConfig"](6),
        "local": lambda: hub["LocalMaskerConfig"](10),
        "oracle_top_k": lambda: hub["OracleTopKConfig"](12),
        "oracle_top_p": lambda: hub["OracleTopPMaskerConfig"](0.7),
        "quest": lambda: hub["QuestTopKMaskerConfig"](24, 8),
        "double_sparsity": lambda: hub["DoubleSparsityTopKMaskerConfig"](12, _channels(folder), 4),
        "hash_attention": lambda: hub["HashAttentionTopKMaskerConfig"](12, 32, 1, 0, "relu", hat_weights=_hash_weights()),
        "pq_cache": lambda: hub["PQCacheConfig"](12, 4, 3, 10, 6, "euclidean"),
        "random_sampling": lambda: hub["RandomSamplingMaskerConfig"](0.15),
        "adaptive_sampling": lambda: hub["AdaptiveSamplingMaskerConfig"](0.1, 0.3, 0.3, 0, 0),
        "magic_pig": lambda: hub["MagicPigConfig"](lsh_l=16, lsh_k=5),
    }
    if name not in own:
        raise UserError(
            f"{name!r} has no example: add its line to example_configs() in sparse_attention_hub/maskers/drawing.py"
        )
    alone = [own[name]()]
    return alone if name in ("causal", "sink", "local") else [hub["SinkMaskerConfig"](6), hub["LocalMaskerConfig"](10), *alone]


def draw(configs: Sequence[base.MaskerConfig], out: Path, title: str) -> None:
    """Write the picture of a pipeline's mask on the example to `out`, a PNG file."""
    from matplotlib import colors
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    inputs = example_inputs()
    mask = Mask.empty(inputs.shape, kv_heads=inputs.kv_heads)
    before = mask.inclusion_probability()
    allowed = inputs.allowed[0, 0]
    picture = torch.ones(HEADS, KEYS, KEYS, 3)
    picture[:, ~allowed] = torch.tensor(colors.to_rgb("#d9d9d9"))
    legend = []
    for config in configs:
        masker = base.create_masker(config)
        mask = masker.select(inputs.for_masker(None), mask)
        after = mask.restrict(inputs.allowed).inclusion_probability()
        name = type(config).__name__.removesuffix("Config").removesuffix("Masker")
        colour = COLOURS.get(name.lower(), COLOURS["own"])
        gained = (after - before).clamp(min=0)[0].unsqueeze(-1)
        strength = torch.where(gained > 0, 0.35 + 0.65 * gained, gained)
        picture = picture * (1 - strength) + torch.tensor(colors.to_rgb(colour)) * strength
        legend.append(Patch(color=colour, label=name))
        before = after
    figure = Figure(figsize=(12, 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for head, axes in enumerate(figure.subplots(1, HEADS)):
        density = float((before[0, head] > 0).sum() / allowed.sum())
        axes.imshow(picture[head].numpy(), interpolation="nearest")
        axes.set(title=f"query head {head}, density {density:.0%}", xlabel="key position", ylabel="query position")
        axes.set_xticks(range(0, KEYS + 1, 8))
        axes.set_yticks(range(0, KEYS + 1, 8))
    lines = [f"{type(config).__name__}({_parameters(config)})" for config in configs]
    figure.suptitle("\n".join([title, ", ".join(lines[:-1]), lines[-1]] if len(lines) > 1 else [title, *lines]), fontsize=11)
    legend += [Patch(facecolor="white", edgecolor="black", label="left out"), Patch(color="#d9d9d9", label="future")]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(5, len(legend)), fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _parameters(config: base.MaskerConfig) -> str:
    values = {k: v for k, v in base.config_to_dict(config)["params"].items() if v is not None and not str(v).endswith(".json")}
    return ", ".join(f"{name}={value}" for name, value in values.items())


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of every masker module."""
    parser = argparse.ArgumentParser(
        prog=f"python -m sparse_attention_hub.maskers.{name}", description="Draw this masker's mask on a small example."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(f"{name}_mask.png"), help="the PNG file to write (default: %(default)s)"
    )
    out = parser.parse_args(arguments).out
    try:
        check_writable(out)
        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: a picture is a PNG file, name it so")
        with tempfile.TemporaryDirectory() as folder:
            configs = example_configs(name, Path(folder))
            draw(configs, out, (_summary(name) or name).strip())
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(out)


def _summary(name: str) -> str | None:
    """The first line of the masker module's docstring."""
    from importlib import import_module

    text = import_module(f".{name}", __package__).__doc__
    return text.splitlines()[0] if text else None
