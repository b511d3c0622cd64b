"""Draws what a masker chooses on a small example: `python -m sparse_attention_hub.maskers.quest [--out FILE.png]`.

One panel per query head; rows are queries, columns are keys. A key has the colour of the masker that
chose it, paler where its inclusion probability is below 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from .. import maskers as hub
from ..errors import UserError, check_writable, print_any_text
from ..mask import Mask
from . import base
from .channel_file import write_channels
from .inputs import AttentionInputs
from .principal_axes import principal_axes, write_axes

KEYS = 96
HEADS = 2
DIM = 16
COLOURS = {"sink": "#d1495b", "local": "#2e86ab"}
OWN, OTHER, FUTURE = "#edae49", "#66a182", "#d9d9d9"


def example_inputs() -> AttentionInputs:
    """96 queries on their own 96 keys, two query heads on one kv head. Neighbouring keys are alike; five keys in
    a row match the queries of one head."""
    generator = torch.Generator().manual_seed(4)
    steps = torch.randn(KEYS, DIM, generator=generator)
    keys = torch.stack([sum((0.6**lag * steps[max(0, i - lag)] for lag in range(5)), torch.zeros(DIM)) for i in range(KEYS)])
    wanted = torch.randn(HEADS, 1, DIM, generator=generator)
    for head, start in enumerate((22, 58)):
        keys[start : start + 5] += 1.2 * wanted[head]
    queries = wanted + 0.9 * torch.randn(HEADS, KEYS, DIM, generator=generator)
    keys = keys.expand(1, 1, KEYS, DIM).contiguous()
    return AttentionInputs(queries.unsqueeze(0), keys, keys, seeds=[1])


def example_configs(name: str, folder: Path) -> list[base.MaskerConfig]:
    """The pipeline that shows the masker of module `name`, with the files it needs in `folder`. UserError for a
    masker that is not listed here."""
    inputs, channels = example_inputs(), folder / "channels.json"
    order = (inputs.queries.abs().mean((0, 2)) * inputs.keys.std(2)[0]).argsort(-1, descending=True)
    write_channels({"model.layers.0.self_attn.qk_proj": order.tolist()}, channels)
    axes = folder / "axes.safetensors"
    write_axes({0: principal_axes(inputs.keys[0])}, axes)
    heads = folder / "heads.tsv"
    heads.write_text("1\n0\n")  # two layers of one kv head: the drawn one retrieves
    planes = torch.randn(1, DIM, 32, generator=torch.Generator().manual_seed(0)).repeat(HEADS, 1, 1)
    matrices, biases = [planes], [torch.zeros(HEADS, 32)]
    hashes = {"query_matrix": matrices, "query_bias": biases, "key_matrix": matrices, "key_bias": biases}
    own: dict[str, base.MaskerConfig] = {
        "causal": hub.CausalMaskerConfig(),
        "sink": hub.SinkMaskerConfig(6),
        "local": hub.LocalMaskerConfig(10),
        "oracle_top_k": hub.OracleTopKConfig(12),
        "oracle_top_p": hub.OracleTopPMaskerConfig(0.7),
        "quest": hub.QuestTopKMaskerConfig(24, 8),
        "double_sparsity": hub.DoubleSparsityTopKMaskerConfig(12, str(channels), 4),
        "hash_attention": hub.HashAttentionTopKMaskerConfig(12, 32, 1, 0, "relu", hat_weights={0: hashes}),
        "pq_cache": hub.PQCacheConfig(12, 4, 3, 10, 6, "euclidean"),
        "random_sampling": hub.RandomSamplingMaskerConfig(0.15),
        "adaptive_sampling": hub.AdaptiveSamplingMaskerConfig(0.1, 0.3, 0.3, 0, 0),
        "magic_pig": hub.MagicPigConfig(lsh_l=16, lsh_k=5),
        "round_to_pages": hub.RoundToPagesConfig(4),
        "landmarks": hub.LandmarksConfig(24, 8),
        "sparq": hub.SparqConfig(12, 0.25),
        "loki": hub.LokiConfig(12, str(axes), 0.25),
        "clusters": hub.ClustersConfig(12, 8),
        "duo_attention": hub.DuoAttentionConfig(0.5, str(heads)),
        "socket_lsh": hub.SocketConfig(12, lsh_l=20, lsh_k=6),
        "snap_kv": hub.SnapKVConfig(12, window_size=4, kernel_size=3),
        "expected_attention": hub.ExpectedAttentionConfig(12),
        "key_diff": hub.KeyDiffConfig(12),
        "knorm": hub.KnormConfig(12),
        "h2o": hub.H2OConfig(12),
        "tova": hub.TOVAConfig(12),
        "twilight": hub.TwilightConfig(0.8),
    }
    if name not in own:
        raise UserError(f"{name!r} has no example: add it to example_configs() in sparse_attention_hub/maskers/drawing.py")
    first = [] if name in ("causal", "sink", "local") else [own["sink"], own["local"]]
    if name == "round_to_pages":
        first.append(hub.OracleTopKConfig(4))
    if name == "twilight":
        first.append(hub.QuestTopKMaskerConfig(40, 8))
    return [*first, own[name]]


def draw(configs: Sequence[base.MaskerConfig], out: Path, title: str) -> None:
    """Write the picture of a pipeline's mask on the example to `out`, a PNG file."""
    from matplotlib import colors
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    inputs = example_inputs()
    mask = kept = Mask.empty(inputs.shape, kv_heads=inputs.kv_heads)
    before = mask.inclusion_probability()
    allowed = inputs.allowed[0, 0]
    picture = torch.ones(HEADS, KEYS, KEYS, 3)
    picture[:, ~allowed] = torch.tensor(colors.to_rgb(FUTURE))
    legend = []
    for config in configs:
        masker = base.create_masker(config)
        view = inputs.for_masker(None)
        view.kept = kept
        mask = masker.select(view, mask)
        kept = mask if masker.by_position else kept
        after = mask.restrict(inputs.allowed).inclusion_probability()
        name = type(config).__name__.removesuffix("Config").removesuffix("Masker")
        colour = COLOURS.get(name.lower(), OWN if config is configs[-1] else OTHER)
        if masker.narrows:  # what it drops becomes pale, what it leaves of a selector's choice takes its colour
            dropped = (before > after)[0].unsqueeze(-1) * 0.75
            picture = picture * (1 - dropped) + dropped
            before = kept.inclusion_probability()
        gained = (after - before).clamp(min=0)[0].unsqueeze(-1)
        strength = torch.where(gained > 0, 0.35 + 0.65 * gained, gained)
        picture = picture * (1 - strength) + torch.tensor(colors.to_rgb(colour)) * strength
        legend.append(Patch(color=colour, label=name))
        before = after
    figure = Figure(figsize=(12, 7.4), dpi=110, layout="constrained")
    for head, axes in enumerate(figure.subplots(1, HEADS)):
        density = float((before[0, head] > 0).sum() / allowed.sum())
        axes.imshow(picture[head].numpy(), interpolation="nearest")
        axes.set(title=f"query head {head}, density {density:.0%}", xlabel="key position", ylabel="query position")
        axes.set(xticks=range(0, KEYS + 1, 8), yticks=range(0, KEYS + 1, 8))
    lines = [f"{type(config).__name__}({_parameters(config)})" for config in configs]
    figure.suptitle("\n".join(filter(None, [title, ", ".join(lines[:-1]), lines[-1]])), fontsize=11)
    legend += [Patch(facecolor="white", edgecolor="black", label="left out"), Patch(color=FUTURE, label="future")]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(5, len(legend)), fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _parameters(config: base.MaskerConfig) -> str:
    given = base.config_to_dict(config)["params"]
    values = {k: v for k, v in given.items() if v is not None and Path(str(v)).suffix not in (".json", ".tsv", ".safetensors")}
    return ", ".join(f"{name}={value}" for name, value in values.items())


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of every masker module."""
    program = f"python -m sparse_attention_hub.maskers.{name}"
    parser = argparse.ArgumentParser(prog=program, description="Draw this masker's mask on a small example.")
    parser.add_argument("--out", type=Path, default=Path(f"{name}_mask.png"), help="PNG file to write (default: %(default)s)")
    out = parser.parse_args(arguments).out
    print_any_text()
    try:
        check_writable(out)
        if out.suffix.lower() != ".png":
            raise UserError(f"{out}: a picture is a PNG file, name it so")
        with tempfile.TemporaryDirectory() as folder:
            configs = example_configs(name, Path(folder))
            summary = import_module(f".{name}", __package__).__doc__ or name
            draw(configs, out, summary.splitlines()[0])
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(out)
