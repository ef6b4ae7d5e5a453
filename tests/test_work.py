"""FLOP of the released models against numbers that were counted by other means (TFLOP)."""

import pytest

from wan_mlx.models.configs import ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_mlx.planning.flops import forward_parts, image_flop, text_flop, vae_flop
from wan_mlx.presets import PRESETS


@pytest.mark.parametrize(
    "model, latents, tokens, parts, total",
    [("t2v-1.3B", (21, 60, 104), 32760, (18.6, 197.8, 9.4, 3.1, 54.1), 283.0),
     ("t2v-1.3B", (21, 90, 160), 75600, (42.8, 1053.5, 21.5, 7.1, 124.9), 1249.8),
     ("t2v-1.3B", (11, 60, 104), 17160, (9.7, 54.3, 5.0, 1.6, 28.3), 99.0),
     ("t2v-14B", (21, 60, 104), 32760, (274.8, 879.2, 139.6, 13.7, 371.0), 1678.4),
     ("t2v-14B", (21, 90, 160), 75600, (634.2, 4682.0, 319.2, 31.7, 856.1), 6523.4),
     ("i2v-14B-480P", (21, 60, 104), 32760, (274.8, 879.2, 140.6, 20.6, 371.0), 1686.4)],
)  # fmt: skip
def test_forward(model, latents, tokens, parts, total):
    config = PRESETS[model].transformer
    assert PRESETS[model].geometry.seq_len(latents) == tokens
    found = [flop / 1e12 for flop in forward_parts(config, tokens).values()]
    assert found[:5] == pytest.approx(parts, abs=0.06) and found[5] == 0
    assert sum(found) == pytest.approx(total, rel=1e-3)


def test_vace_runs_its_blocks_too():
    vace, plain = (sum(forward_parts(PRESETS[m].transformer, 32760).values()) for m in ("vace-1.3B", "t2v-1.3B"))
    assert vace / plain == pytest.approx(45 / 30, rel=0.01)


@pytest.mark.parametrize("latents, decode, encode", [((21, 60, 104), 275.4, 163.8), ((21, 90, 160), 639.2, 381.7),
                                                     ((1, 60, 104), 4.35, 2.72)])  # fmt: skip
def test_vae(latents, decode, encode):
    assert vae_flop(VAEConfig(), latents, decoding=True) / 1e12 == pytest.approx(decode, rel=5e-3)
    assert vae_flop(VAEConfig(), latents, decoding=False) / 1e12 == pytest.approx(encode, rel=5e-3)


def test_encoders():
    assert text_flop(TextEncoderConfig(), 512) / 1e12 == pytest.approx(4.84, rel=0.01)
    assert text_flop(TextEncoderConfig(), 128) / 1e12 == pytest.approx(1.19, rel=0.01)
    assert image_flop(ImageEncoderConfig()) / 1e12 == pytest.approx(0.32, rel=0.05)
