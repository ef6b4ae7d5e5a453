"""float16 for the transformer, as M1 and M2 compute fastest: umT5 stays in bfloat16, and an overflow is told."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_mlx_model import random

import wan_mlx
from wan_mlx import denoise, opened
from wan_mlx.cli.main import main
from wan_mlx.errors import SamplingError
from wan_mlx.media.write import read_settings
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import BUNDLED, PRESETS
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_transformer

NANO = BUNDLED["nano"]
SMALL = dict(width=16, height=16, num_frames=5, steps=3, seed=3)


def opened_in(dtype: str, model, **options) -> wan_mlx.WanPipeline:
    return wan_mlx.WanPipeline.from_pretrained(model, dtype=dtype, progress=False, **options)


def rms(a: mx.array, b: mx.array) -> float:
    return float(mx.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


@pytest.fixture(scope="module")
def inputs():
    return random(1, 3, 8, 8, 16), 700.0, random(1, 512, 128)


@pytest.fixture(scope="module")
def exact(inputs):
    return load_transformer(NANO, "float32")(*inputs)


def test_closer_than_bfloat16(inputs, exact):
    """On nano's trained weights: it has three digits more."""
    model = load_transformer(NANO, "float16")
    assert model.dtype == mx.float16 and model.blocks[0].ffn[0].weight.dtype == mx.float16
    assert model.time_embedding[0].weight.dtype == model.blocks[0].modulation.dtype == mx.float32
    errors = {dtype: rms(load_transformer(NANO, dtype)(*inputs), exact) for dtype in ("float16", "bfloat16")}
    assert errors["float16"] < 0.3 * errors["bfloat16"] < 0.01, errors


@pytest.mark.parametrize("quantize", [None, "q8", "mxfp8"])
def test_streamed_equals_resident(inputs, exact, quantize):
    resident, streamed = (load_transformer(NANO, "float16", quantize=quantize, stream=s) for s in (False, True))
    found = resident(*inputs)
    assert mx.array_equal(streamed(*inputs), found)
    packed = load_transformer(NANO, "float32", quantize=quantize)(*inputs)
    assert rms(found, packed) < 2e-3 and rms(found, exact) < (0.1 if quantize else 2e-3)


@pytest.mark.parametrize("merge", [True, False])
def test_loras(inputs, exact, tmp_path, merge):
    rng, arrays = np.random.default_rng(0), {}
    for block in range(6):
        for kind, shape in (("A", (4, 256)), ("B", (640, 4))):
            factor = mx.array(rng.normal(0, 0.1, shape).astype(np.float32))
            arrays[f"blocks.{block}.ffn.0.lora_{kind}.weight"] = factor
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), arrays)
    half, whole = (
        load_transformer(NANO, dtype, loras=tmp_path / "lora.safetensors", merge=merge)(*inputs)
        for dtype in ("float16", "float32")
    )
    assert rms(half, whole) < 2e-3 < 0.05 < rms(whole, exact)


def test_the_text_encoder_stays_in_bfloat16(pico, monkeypatch):
    want = opened_in("bfloat16", pico).encode_text(["a red circle"])[0]
    monkeypatch.setattr(opened, "load_text_encoder", lambda *_: pytest.fail("it was encoded anew"))
    found = opened_in("float16", pico).encode_text(["a red circle"])[0]
    assert found.dtype == mx.bfloat16 and mx.array_equal(found, want)


def test_a_video(pico, tmp_path, flags):
    half, whole = (opened_in(d, pico)("a red circle", **SMALL).frames.astype(int) for d in ("float16", "float32"))
    assert np.abs(half - whole).max() <= 3
    output = tmp_path / "a.npz"
    assert main([*flags, "--dtype", "float16", "--output", str(output)]) in (0, 3)
    assert read_settings(output)["dtype"] == "float16"


def test_an_overflow_is_told_with_the_way_out(pico, monkeypatch, tmp_path, capsys, flags):
    enter = denoise.guided_velocity

    def overflowing(*args):
        return enter(*args) * (mx.array(70000.0).astype(mx.float16) if args[5] == 1 else 1)

    output = str(tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr(denoise, "guided_velocity", overflowing)
        assert main([*flags, "--dtype", "float16", "--output", output]) == 1
        said = capsys.readouterr().err
        with pytest.raises(SamplingError, match="float16 ends at 65504.*--dtype bfloat16"):
            opened_in("float16", pico)("a red circle", **SMALL)
        with pytest.raises(SamplingError, match="try --dtype float32"):
            opened_in("bfloat16", pico)("a red circle", **SMALL)
    assert f"wan-mlx resume {output} --dtype bfloat16" in said and "float16 ends at 65504" in said
    assert main(["--resume", output, "--dtype", "bfloat16", "--quiet"]) in (0, 3)
    assert read_settings(output)["dtype"] == "float16, bfloat16 from step 2"


def test_a_converted_folder(tmp_path):
    folder = convert(NANO, tmp_path / "half", dtype="float16")
    for name, key, dtype in (("transformer", "self_attn.q", mx.float16), ("text_encoder", "attn.q", mx.bfloat16)):
        assert mx.load(str(folder / f"{name}.safetensors"))[f"blocks.0.{key}.weight"].dtype == dtype


def test_plans_know_it():
    half, brain = (sizes_of(PRESETS["t2v-1.3B"], dtype) for dtype in ("float16", "bfloat16"))
    assert half.dtype == mx.float16 and half.parts == brain.parts
    planned = [wan_mlx.plan("t2v-1.3B", memory="8GB", dtype=dtype) for dtype in ("float16", "bfloat16")]
    assert planned[0] == planned[1]
