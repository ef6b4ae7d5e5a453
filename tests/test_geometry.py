"""Sizes: pixels and frames to latents and tokens, and which are allowed."""

import pytest

from wan_mlx.geometry import WAN_2_1, Geometry
from wan_mlx.presets import PRESETS

TI2V_5B = Geometry(temporal=4, spatial=16, patch=(1, 2, 2))  # Wan2.2's other VAE


def test_all_presets_have_their_vaes_geometry():
    for preset in PRESETS.values():
        assert preset.geometry == (TI2V_5B if preset.name == "ti2v-5B" else WAN_2_1)


@pytest.mark.parametrize(
    "geometry, size, frames, latents, tokens",
    [(WAN_2_1, (832, 480), 81, (21, 60, 104), 32760),
     (WAN_2_1, (16, 16), 1, (1, 2, 2), 1),
     (TI2V_5B, (1280, 704), 121, (31, 44, 80), 27280)],
)  # fmt: skip
def test_latents_and_tokens(geometry, size, frames, latents, tokens):
    geometry.check_size(*size), geometry.check_frames(frames)
    assert geometry.latent_shape(*size, frames) == latents
    assert geometry.seq_len(latents) == tokens
    assert geometry.num_frames(latents[0]) == frames


@pytest.mark.parametrize(
    "geometry, width, nearest", [(WAN_2_1, 33, 32), (WAN_2_1, 1, 16), (WAN_2_1, -40, 16), (TI2V_5B, 48, 64)]
)
def test_a_side_that_is_not_allowed_names_the_nearest(geometry, width, nearest):
    with pytest.raises(ValueError, match=f"width is {width}, .* multiple of {geometry.side}; nearest: {nearest}$"):
        geometry.check_size(width, 64)


@pytest.mark.parametrize("frames, nearest", [(80, 81), (6, 5), (0, 1), (-3, 1), (2, 1)])
def test_a_length_that_is_not_allowed_names_the_nearest(frames, nearest):
    with pytest.raises(ValueError, match=rf"frames is {frames}, expected 4n\+1 \(1, 5, .* 81, .*; nearest: {nearest}$"):
        WAN_2_1.check_frames(frames)
    assert WAN_2_1.nearest_frames(frames) == nearest
