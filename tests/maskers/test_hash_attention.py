"""HashAttention: packed signatures, weights of every kind, and the files they come in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark.settings import as_sparse_configs
from sparse_attention_hub import HashAttentionTopKMaskerConfig, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.codes import pack_bits, popcount
from sparse_attention_hub.maskers.hat_weights import Layer, read_hat_weights, write_hat_weights
from sparse_attention_hub.models.model_files import fit_template
from sparse_attention_hub.testing import MaskerContract


def make_weights(
    heads: int, dim: int, bits: int = 32, layers: int = 2, hidden: int = 16, key_heads: int | None = None
) -> dict[int, Layer]:
    generator = torch.Generator().manual_seed(11)
    sizes = [dim, *[hidden] * (layers - 1), bits]
    weights: dict[int, Layer] = {0: {}, 1: {}}
    for layer in weights.values():
        for side, count in (("query", heads), ("key", key_heads or heads)):
            pairs = list(zip(sizes, sizes[1:], strict=False))
            layer[f"{side}_matrix"] = [torch.randn(count, i, o, generator=generator) / i**0.5 for i, o in pairs]
            layer[f"{side}_bias"] = [0.1 * torch.randn(count, o, generator=generator) for _, o in pairs]
    return weights


class TestHashAttention(MaskerContract):
    def make_config(self) -> HashAttentionTopKMaskerConfig:
        return HashAttentionTopKMaskerConfig(0.1, 32, 2, 16, "silu", hat_weights=make_weights(self.heads, self.head_dim))


class TestHashAttentionLongSignature(TestHashAttention):
    def make_config(self) -> HashAttentionTopKMaskerConfig:
        return HashAttentionTopKMaskerConfig(0.1, 40, 1, 0, "relu", hat_weights=make_weights(self.heads, self.head_dim, 40, 1))


def tensors(n: int, rows: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, rows, dim), (1, kv_heads, n, dim), (1, kv_heads, n, dim)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def attention(*args: Any, **kwargs: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([HashAttentionTopKMaskerConfig(*args, **kwargs)]))


def reference_scores(q: Tensor, k: Tensor, layer: Layer, activation: Any) -> Tensor:
    """Shared minus different bits (H, N), with whole signatures of +1 and -1."""

    def signs(x: Tensor, side: str, head: int) -> Tensor:
        share = head * layer[f"{side}_matrix"][0].shape[0] // q.shape[1]
        for depth, (matrix, bias) in enumerate(zip(layer[f"{side}_matrix"], layer[f"{side}_bias"], strict=True)):
            x = (activation(x) if depth else x) @ matrix[share] + bias[share]
        return x.sign()

    group = q.shape[1] // k.shape[1]
    return torch.stack([signs(k[0, h // group], "key", h) @ signs(q[0, h, 0], "query", h) for h in range(q.shape[1])])


@pytest.mark.parametrize("bits", [1, 16, 32, 33, 64, 100])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_chosen_keys_share_the_most_bits(bits: int, key_heads: int) -> None:
    q, k, v = tensors(150)
    weights = make_weights(4, 32, bits, 2, 16, key_heads)
    mask = attention(20, bits, 2, 16, "relu", hat_weights=weights)(q, k, v).mask.inclusion_probability()[0, :, 0] > 0
    scores = reference_scores(q, k, weights[0], torch.relu)
    assert bool((mask.sum(-1) == 20).all())
    for head in range(4):
        chosen, left = mask[head].nonzero()[:, 0], (~mask[head]).nonzero()[:, 0]
        assert scores[head, chosen].min() >= scores[head, left].max()
        tied = scores[head] == scores[head, chosen].min()
        kept, dropped = (tied & mask[head]).nonzero(), (tied & ~mask[head]).nonzero()
        assert not len(dropped) or kept.min() > dropped.max(), "among equals, the most recent"


def test_signatures_are_kept_once_a_kv_head_where_its_group_shares_them() -> None:
    q, k, v = tensors(100)
    shared = make_weights(4, 32, key_heads=2)
    repeated = copy.deepcopy(shared)
    for layer in repeated.values():
        layer["key_matrix"] = [t.repeat_interleave(2, 0) for t in layer["key_matrix"]]
        layer["key_bias"] = [t.repeat_interleave(2, 0) for t in layer["key_bias"]]
    sizes, masks = [], []
    for weights in (shared, repeated, make_weights(4, 32)):
        hub = attention(10, 32, 2, 16, "silu", hat_weights=weights)
        state = hub.new_state()
        hub.prepare(k, 0, state)
        codes = state.entry(0, 0).codes()
        assert codes.dtype == torch.int32
        sizes.append(codes.shape)
        result = hub(q, k, v, state=state)
        masks.append(result.mask.inclusion_probability())
        fraction = result.kv_fraction - float(result.mask.group_counts().float().mean()) / 100
        assert fraction == pytest.approx(codes.shape[3] * 32 / (64 * 32))
    assert sizes == [(1, 2, 100, 1, 1), (1, 2, 100, 1, 1), (1, 2, 100, 2, 1)]
    assert torch.equal(masks[0], masks[1])


def test_the_config_is_never_changed() -> None:
    weights = make_weights(4, 32)
    config = HashAttentionTopKMaskerConfig(10, 32, 2, 16, "gelu", hat_weights=weights)
    before = copy.deepcopy(weights)
    q, k, v = (t.bfloat16() for t in tensors(100))
    assert ResearchAttention(ResearchAttentionConfig([config]))(q, k, v).output.dtype == torch.bfloat16
    assert config.hat_weights is weights
    for layer, parts in before.items():
        for part, entries in parts.items():
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(entries, weights[layer][part], strict=True))


def test_weights_from_a_file_give_the_same_mask(tmp_path: Path) -> None:
    path = str(tmp_path / "hat.safetensors")
    weights = make_weights(4, 32)
    write_hat_weights(weights, path, "tanh")
    q, k, v = tensors(100, rows=3)
    first = attention(10, 32, 2, 16, "tanh", hat_weight_file=path)(q, k, v, layer_idx=1)
    second = attention(10, 32, 2, 16, "tanh", hat_weights=weights)(q, k, v, layer_idx=1)
    assert torch.equal(first.mask.inclusion_probability(), second.mask.inclusion_probability())


def test_popcount_of_packed_bits() -> None:
    bits = torch.rand(7, 5, 77, generator=torch.Generator().manual_seed(0)) < 0.5
    bits[0, 0] = True
    bits[0, 1] = False
    packed = pack_bits(bits)
    assert packed.shape == (7, 5, 3) and packed.dtype == torch.int32
    assert torch.equal(popcount(packed.clone()).sum(-1), bits.sum(-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        (
            {"hat_mlp_activation": "softplus"},
            "hat_mlp_activation must be one of relu, silu, gelu, tanh, got 'softplus'",
        ),
        ({"hat_bits": 0}, "hat_bits must be an integer >= 1, got 0"),
        ({"hat_bits": 16}, "hat_bits is 16, the query weights of layer 0 have"),
        ({"hat_mlp_layers": 3}, "hat_mlp_layers is 3, the query weights of layer 0 have 2"),
        ({"hat_mlp_hidden_size": 24}, "hat_mlp_hidden_size is 24, the query weights of layer 0 have"),
        ({"hat_weights": None}, "exactly one of hat_weights and hat_weight_file must be given, got neither"),
        ({"hat_weight_file": "x"}, "exactly one of hat_weights and hat_weight_file must be given, got both"),
        (
            {"hat_weights": None, "hat_weight_file": "nowhere"},
            "hat_weight_file must be an existing file, got 'nowhere'",
        ),
        ({"hat_weights": {}}, "at least one layer"),
        ({"hat_weights": {0: {"query_matrix": []}}}, "layer 0 lack query_bias, key_matrix, key_bias"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "heavy_size": 9,
        "hat_bits": 32,
        "hat_mlp_layers": 2,
        "hat_mlp_hidden_size": 16,
        "hat_mlp_activation": "relu",
    }
    with pytest.raises(ValueError, match=message):
        attention(**(good | {"hat_weights": make_weights(4, 32)} | fields))


def test_weights_that_do_not_fit_the_model() -> None:
    q, k, v = tensors(50)
    with pytest.raises(ValueError, match=r"no layer 7, only \[0, 1\]"):
        attention(9, 32, 2, 16, "relu", hat_weights=make_weights(4, 32))(q, k, v, layer_idx=7)
    with pytest.raises(ValueError, match="are for 6 query heads, the model has 4"):
        attention(9, 32, 2, 16, "relu", hat_weights=make_weights(6, 32))(q, k, v)
    with pytest.raises(ValueError, match="do not fit 2 kv heads of 32 channels"):
        attention(9, 32, 2, 16, "relu", hat_weights=make_weights(4, 24))(q, k, v)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"lm_head.weight": torch.ones(2)}, str(path))
    with pytest.raises(ValueError, match="'lm_head.weight', which is no tensor of hash weights"):
        read_hat_weights(str(path))
    path.write_bytes(pickle.dumps({0: 1}))
    with pytest.raises(ValueError, match="convert"):
        read_hat_weights(str(path))


def test_pickles_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_attention_hub.models.hat_training import main

    weights = make_weights(4, 32)
    plain, saved, out = tmp_path / "in.pkl", tmp_path / "in.pt", tmp_path / "out.safetensors"
    plain.write_bytes(pickle.dumps(weights))
    torch.save(weights, saved)
    for source in (plain, saved):
        assert main(["convert", str(source), str(out)]) == 0
        read = read_hat_weights(str(out))
        assert sorted(read) == [0, 1]
        assert torch.equal(read[1]["key_matrix"][1], weights[1]["key_matrix"][1])
        out.unlink()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_converting_runs_nothing_that_a_pickle_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_attention_hub.models.hat_training import main

    touched, source, out = tmp_path / "touched", tmp_path / "in.pkl", tmp_path / "out.safetensors"
    import io

    inner = io.BytesIO()
    torch.save(Trap(touched), inner, _use_new_zipfile_serialization=False)

    class Hidden:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    for content in (Trap(touched), {0: Trap(touched)}, {0: Hidden()}):
        source.write_bytes(pickle.dumps(content))
        assert main(["convert", str(source), str(out)]) == 2
        assert not touched.exists() and not out.exists()
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    for content in (
        [1],
        {"a": {}},
        {0: {"query_matrix": []}},
        {0: dict.fromkeys(("query_matrix", "query_bias", "key_matrix", "key_bias"), 3)},
    ):
        source.write_bytes(pickle.dumps(content))
        assert main(["convert", str(source), str(out)]) == 2
    assert main(["convert", str(tmp_path / "nowhere.pkl"), str(out)]) == 2


def test_training_finds_what_attention_looks_for() -> None:
    """Queries look for one of 8 directions in 4 of 16 channels, the others are noise; signatures learn to look there."""
    from sparse_attention_hub.models.hat_training import Recipe, mass_at, train_layer

    generator = torch.Generator().manual_seed(0)
    topics = torch.cat([5 * torch.randn(8, 4, generator=generator), torch.zeros(8, 12)], 1)

    def recorded() -> tuple[Tensor, Tensor]:
        noise = torch.cat([torch.ones(4), 8 * torch.ones(12)])
        keys = topics[torch.randint(8, (2, 300), generator=generator)] + noise * torch.randn(2, 300, 16, generator=generator)
        return topics[torch.randint(8, (4, 299), generator=generator)], keys

    texts = [recorded() for _ in range(4)]
    start = mass_at(train_layer(texts[:3], Recipe(bits=16, steps=1, rate=0.0)), *texts[3], share=0.1)
    end = mass_at(train_layer(texts[:3], Recipe(bits=16, steps=60)), *texts[3], share=0.1)
    assert end[0] > start[0] + 0.15 and end[0] > 0.5 * end[1]


def test_shipped_weights_fit_the_embedded_model() -> None:
    from sparse_attention_hub.maskers.hat_weights import hat_config_fields, hat_weights_for

    assert hat_weights_for("nobody/nothing") is None
    path = hat_weights_for("embedded/SmolLM2-135M-Instruct")
    assert path is not None and Path(path).stat().st_size < 2_000_000
    config = HashAttentionTopKMaskerConfig(heavy_size=10, hat_weight_file=path, **hat_config_fields(path))  # type: ignore[arg-type]
    hub = ResearchAttention(ResearchAttentionConfig([config]))
    q, k, v = tensors(80, heads=9, kv_heads=3, dim=64)
    for layer in range(30):
        assert hub(q, k, v, layer_idx=layer).output.isfinite().all()


def test_a_template_takes_the_sizes_of_the_weights_it_names(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    write_hat_weights(make_weights(8, 16, layers=1), str(path), "relu")
    template = ResearchAttentionConfig([HashAttentionTopKMaskerConfig(0.1, 32, 3, 128, "silu", hat_weight_file=str(path))])
    fitted = fit_template(template, "organisation/own")
    assert fitted is not None
    (masker,) = fitted.masker_configs
    assert isinstance(masker, HashAttentionTopKMaskerConfig)
    assert (masker.hat_mlp_layers, masker.hat_mlp_activation, masker.hat_weight_file) == (1, "relu", str(path))
    path.write_text("no weights")
    with pytest.raises(UserError, match="own.safetensors"):
        fit_template(template, "organisation/own")


@pytest.mark.parametrize(
    "held",
    [{}, {"query_matrix.0": (3,)}, {"query_matrix.0": ()}, {"key_bias.0": (3, 4)}],
    ids=["nothing", "one dimension", "a number", "no matrix"],
)
def test_weights_without_matrices_are_one_line(held: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "own.safetensors"
    save_file({f"layers.0.{name}": torch.ones(shape) for name, shape in held.items()}, path)
    template = ResearchAttentionConfig([HashAttentionTopKMaskerConfig(0.1, 32, 3, 128, "silu", hat_weight_file=str(path))])
    with pytest.raises(UserError, match=r"own.safetensors: it must hold query matrices \(heads, in, out\)"):
        fit_template(template, "organisation/own")
    with pytest.raises(ValueError, match="hash weights"):
        ResearchAttention(template)(*tensors(20))


def test_weights_in_place_cannot_be_tuned() -> None:
    config = HashAttentionTopKMaskerConfig(0.1, 32, 1, 0, "relu", hat_weights=make_weights(8, 16, layers=1))
    with pytest.raises(UserError, match="hat_weights of HashAttentionTopKMaskerConfig holds tensors"):
        as_sparse_configs([("hash_10pct", ResearchAttentionConfig([config]), [HashAttentionTopKMaskerConfig])])
