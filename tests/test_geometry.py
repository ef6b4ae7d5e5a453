"""Sizes: pixels and frames to latents and tokens, and which are allowed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from wan_mlx.geometry import WAN_2_1, Geometry
from wan_mlx.presets import PRESETS

TI2V_5B = Geometry(temporal=4, spatial=16, patch=(1, 2, 2))  # Wan2.2's other VAE


def test_all_presets_have_their_vaes_geometry():
    for preset in PRESETS.values():
        own = {"s2v-14B": replace(WAN_2_1, together=4)}  # older frames have a quarter of the tokens each way
        assert preset.geometry == (TI2V_5B if "5B" in preset.name else own.get(preset.name, WAN_2_1))


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


@pytest.mark.parametrize("own", [(832, 480), (1280, 720), (128, 128), (1280, 704)])
@pytest.mark.parametrize("name", ["16:9", "9:16", "1:1", "4:3", "3:4", "21:9", "1:999", "999:1", "480p", "720p"])
def test_a_named_size_is_an_allowed_one_near_the_model_s_own(own, name):
    for geometry in (WAN_2_1, TI2V_5B)[: 2 - (own[1] == 720)]:  # which TI2V-5B cannot make
        width, height = geometry.named_size(name, own)
        geometry.check_size(width, height)
        if ":" in name:
            across, down = map(int, name.split(":"))
            assert width * height <= own[0] * own[1]
            assert max(across, down) > 99 or abs(width / height / (across / down) - 1) < 0.2
            assert geometry.named_size(f"{down}:{across}", own) == (height, width)


@pytest.mark.parametrize("page", ["docs/flags.md", "docs/zh/flags.md"])
def test_the_page_of_flags_has_named_sizes(page):
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    head, _, *rows = re.search(r"\| `--size` \|.*?(?=\n\n)", text, re.DOTALL)[0].splitlines()
    names, told = re.findall(r"`([\d:p]+)`", head), set()
    for row in rows:
        models, *sizes = (cell.strip() for cell in row.strip("|").split("|"))
        for preset in PRESETS.values():
            if preset.name.lower() in models.lower().split(", "):
                told.add(preset.name)
                found = [preset.geometry.named_size(name, preset.size) for name in names]
                assert sizes == [f"{width}x{height}" for width, height in found], preset.name
    assert told == {*PRESETS}


def test_named_sizes_of_released_models():
    assert WAN_2_1.named_size("16:9", (832, 480)) == (832, 480) and WAN_2_1.named_size("9:16", (832, 480)) == (480, 832)
    assert WAN_2_1.named_size("1:1", (832, 480)) == (624, 624) and WAN_2_1.named_size("1:1", (1280, 720)) == (960, 960)
    assert WAN_2_1.named_size("480p", (1280, 720)) == (832, 480) and WAN_2_1.named_size("4:3", (832, 480)) == (720, 544)
    assert TI2V_5B.named_size("720p", (1280, 704)) == (1280, 704)
