"""LoRAs without an alpha: raw files of Wan2.2-Lightning are known by keys and ranks, too large changes are refused."""

import mlx.core as mx
import pytest
from crafted import header_only

from wan_mlx.errors import WeightsError
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.presets import PRESETS
from wan_mlx.weights.lora import open_loras
from wan_mlx.weights.lora_scale import check_sizes

A14B = PRESETS["t2v-A14B"].transformer
MATRICES = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
SMALL = TransformerConfig(dim=16, ffn_dim=24, num_heads=1, num_layers=10, freq_dim=8, text_dim=8)


def keys(config, rank=64, prefix="", ends=("lora_down", "lora_up"), alpha=False) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a file that changes every matrix of the blocks."""
    wide, found = {"ffn.0": (config.ffn_dim, config.dim), "ffn.2": (config.dim, config.ffn_dim)}, {}
    for layer in range(config.num_layers):
        for name in MATRICES:
            out, into = wide.get(name, (config.dim, config.dim))
            module = f"{prefix}blocks.{layer}.{name}"
            found |= {f"{module}.{ends[0]}.weight": (rank, into), f"{module}.{ends[1]}.weight": (out, rank)}
            found |= {f"{module}.alpha": ()} if alpha else {}
    return found


def scales(path, config=A14B) -> set[float]:
    return {change.scale for changes in open_loras([(path, 1.0)], config).values() for change in changes}


def test_a_raw_lightning_file(tmp_path, caplog):
    path = tmp_path / "high_noise_model.safetensors"
    header_only(path, keys(A14B), "F32")
    assert scales(path) == {0.125} == scales(path)
    assert [record.message for record in caplog.records] == [
        f"{path}: by its keys and ranks a raw file of Wan2.2-Lightning, whose alpha of 8 is not in it: scaled by 0.125"
    ]


@pytest.mark.parametrize("other", [
    dict(rank=32), dict(prefix="diffusion_model."), dict(ends=("lora_A", "lora_B")), dict(prefix="transformer."),
], ids=str)  # fmt: skip
def test_others_are_taken_at_1(tmp_path, other):
    """lightx2v's files of rank 64 have ComfyUI's prefix, and their alpha is in their factors."""
    path = tmp_path / "lora.safetensors"
    header_only(path, keys(A14B, **other), "F32")
    assert scales(path) == {1.0}


def save(path, size: float, config=SMALL, **kind):
    shapes = keys(config, **kind)
    arrays = {key: mx.ones(shape) * (8.0 if key.endswith("alpha") else size) for key, shape in shapes.items()}
    mx.save_safetensors(str(path), arrays)
    return path


def check(path, strength=1.0) -> None:
    check_sizes(open_loras([(path, strength)], SMALL), lambda name: mx.ones((1, 1)) * 16)


def test_a_change_that_is_too_large(tmp_path):
    """Of ones, 16 by 16 and rank 8: each value of the change is 8 size², its norm 128 size²; the weights' is 16."""
    path = save(tmp_path / "lora.safetensors", 0.3, rank=8)
    with pytest.raises(WeightsError) as caught:
        check(path)
    assert "it holds no alpha, and at strength 1 changes the weights by " in str(caught.value)
    assert str(caught.value).endswith("after a colon, such as lora.safetensors:0.125")
    check(path, strength=0.125)
    check(path, strength=0.9)  # somebody said so
    check(save(tmp_path / "smaller.safetensors", 0.2, rank=8))
    check(save(tmp_path / "with_alpha.safetensors", 0.3, rank=8, alpha=True))


def test_a_small_file_is_not_looked_at(tmp_path):
    path = tmp_path / "lora.safetensors"
    factors = {"lora_A": mx.ones((4, 16)), "lora_B": mx.ones((16, 4)) * 100}
    mx.save_safetensors(str(path), {f"diffusion_model.blocks.0.self_attn.q.{n}.weight": a for n, a in factors.items()})
    check(path)
