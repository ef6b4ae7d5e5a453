"""Packed linears: what each mode loses, what is packed, and that it is the same however it is loaded."""

import contextlib
import json
import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_distance
from mlx.utils import tree_flatten

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.hub.resolve import resolve
from wan_mlx.models.layers import Linear
from wan_mlx.models.quantized_linear import MODE_NAMES, Packing, QuantizedLinear
from wan_mlx.weights.component import open_component
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_text_encoder, load_transformer, transformer_parameters
from wan_mlx.weights.parameters import Parameters
from wan_mlx.weights.quantize import plan_quantization
from wan_mlx.weights.stream import stream_blocks

# Relative error on Gaussian weights, and how far a mode may be from it.
ERRORS = {
    **{"q8": 0.0054, "q8-g32": 0.0049, "q8-g128": 0.0060, "q6": 0.022, "q5": 0.044, "q4": 0.092, "q4-g32": 0.082},
    **{"q3": 0.19, "mxfp8": 0.0267, "mxfp4": 0.116, "nvfp4": 0.095},
}
NANO = resolve("nano")


def gaussian(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed(weight, bias, mode):
    """A layer over ``weight`` packed."""
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], bias is not None, Packing.parse(mode))
    layer.load_weights([*layer.packing.pack(weight).items(), *([("bias", bias)] if bias is not None else [])])
    return layer


@pytest.mark.parametrize("mode", ERRORS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_quantisation_error_follows_the_bits(mode, dtype):
    weight = gaussian(64, 256)
    layer = packed(weight, None, mode)
    rounding = 0.0017 if dtype == mx.bfloat16 else 0  # of a bfloat16 itself
    assert relative_distance(layer.unpacked(dtype), weight) == pytest.approx(np.hypot(ERRORS[mode], rounding), rel=0.05)
    assert layer.unpacked(dtype).dtype == dtype


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("rows", [3, 300])
def test_a_packed_linear_multiplies_by_its_unpacked_weight(mode, rows):
    x, weight, bias = gaussian(1, rows, 128), gaussian(32, 128, seed=1), gaussian(32, seed=2)
    layer = packed(weight, bias, mode)
    want = x @ layer.unpacked(mx.float32).T + bias
    assert relative_distance(layer(x), want) < 1e-6
    layer.bias, x = bias.astype(mx.bfloat16), x.astype(mx.bfloat16)
    assert layer(x).dtype == mx.bfloat16 and relative_distance(layer(x), want) < 0.01


def test_packing_names_round_trip():
    for name in (*MODE_NAMES, "q4-g32", "q8-g128"):
        assert Packing.parse(name).name == name
    assert Packing.parse("q4-g64").name == "q4"
    for name in ("q7", "q2", "q4-g16", "Q8", "q8 ", "int8", ""):
        with pytest.raises(ValueError, match="expected one of q8, q6"):
            Packing.parse(name)


def test_only_the_matrices_of_the_blocks_are_packed():
    weights = open_component(NANO / "transformer.safetensors", "transformer")
    names = set(plan_quantization("transformer", "q8", weights.shapes).packings)
    attention = [f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"]
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(6) for layer in (*attention, "ffn.0", "ffn.2")}
    text = open_component(NANO / "text_encoder.safetensors", "text_encoder")
    layers = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    names = set(plan_quantization("text_encoder", "q8", text.shapes).packings)
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}


def test_auto_gives_sensitive_layers_more_bits():
    layers = ("cross_attn.q", "cross_attn.k_img", "self_attn.q", "cross_attn.v_img", "cross_attn.o", "ffn.2")
    names = [f"blocks.{i}.{layer}.weight" for i in range(12) for layer in layers]
    names += ["vace_blocks.0.before_proj.weight", "vace_blocks.5.after_proj.weight", "head.head.weight"]
    packings = plan_quantization("transformer", "auto", dict.fromkeys(names, (64, 64))).packings
    modes = {name.removesuffix(".weight"): packing.name for name, packing in packings.items()}
    for i in range(12):
        assert {modes.pop(f"blocks.{i}.{layer}") for layer in layers[:2]} == {"q5"}
        assert {modes.pop(f"blocks.{i}.{layer}") for layer in layers[2:]} == {"q6" if i < 10 else "q8"}
    assert modes == {"vace_blocks.0.before_proj": "q6", "vace_blocks.5.after_proj": "q8"}
    text = plan_quantization("text_encoder", "auto", {"blocks.0.attn.q.weight": (64, 64)})
    assert {packing.name for packing in text.packings.values()} == {"q8"}


def test_auto_lies_between_q6_and_q8():
    """On nano's trained weights: what benchmarks/quantisation_sensitivity.py measures at many points, at one."""
    latents, context = gaussian(1, 3, 8, 8, 16), gaussian(1, 512, 128, seed=1)
    errors, sizes = {}, {}
    want = load_transformer(NANO, "float32")(latents, 700.0, context)
    for mode in ("q8", "auto", "q6"):
        model = load_transformer(NANO, "float32", quantize=mode)
        errors[mode] = relative_distance(model(latents, 700.0, context), want)
        sizes[mode] = sum(array.nbytes for array in parameters_of(model).values())
    assert sizes["q6"] < sizes["auto"] < 1.05 * sizes["q6"] < sizes["q8"]
    assert errors["q8"] < errors["auto"] < errors["q6"], errors


def parameters_of(model):
    return dict(tree_flatten(model.parameters()))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("quantize", [None, "q4"])
def test_streamed_blocks_equal_resident_ones(quantize):
    model = load_transformer(NANO, "bfloat16", quantize=quantize)
    assert isinstance(model.blocks[1].ffn[2], QuantizedLinear if quantize else Linear)
    weights = open_component(NANO / "transformer.safetensors", "transformer")
    parameters = transformer_parameters(weights, model.config, mx.bfloat16, quantize)
    held = []
    places = [f"blocks.{i}" for i in range(6)]
    for index, block in enumerate(stream_blocks(places, partial(model.new_block, model.config), parameters)):
        same(parameters_of(block), parameters_of(model.blocks[index]))
        assert not any(parameters_of(earlier) for earlier in held)  # two resident at most: this one and the next
        held.append(block)
    assert len(held) == 6


def test_rows_are_reordered_the_same_in_every_form():
    order = mx.array(np.random.default_rng(0).permutation(256))
    weights = open_component(NANO / "transformer.safetensors", "transformer")
    name = "blocks.0.self_attn.q.weight"
    for quantize in (None, "q4", "mxfp8"):
        plain = Parameters(weights, mx.float32, quantize)
        reordered = Parameters(weights, mx.float32, quantize, row_order=lambda n: order if n == name else None)
        for (key, a), (_, b) in zip(*(p.finish(p.start([name])) for p in (plain, reordered)), strict=True):
            assert mx.array_equal(a[order], b) and not mx.array_equal(a, b), key


@pytest.mark.parametrize("mode", ["q8", "nvfp4", "auto"])
def test_a_quantised_folder_is_the_same_bits_as_quantising_at_load(tmp_path, mode):
    folder = convert(NANO, tmp_path / mode, quantize=mode)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"transformer": mode, "text_encoder": mode}
    same(parameters_of(load_transformer(folder)), parameters_of(load_transformer(NANO, quantize=mode)))
    ids = [[5, 9, 40, 1]]
    at_load, kept = load_text_encoder(NANO, quantize=mode)(ids)[0], load_text_encoder(folder)(ids)[0]
    assert mx.array_equal(at_load, kept) and not mx.array_equal(kept, load_text_encoder(NANO)(ids)[0])
    again = convert(folder, tmp_path / "again")
    assert (again / "transformer.safetensors").read_bytes() == (folder / "transformer.safetensors").read_bytes()
    size = (folder / "transformer.safetensors").stat().st_size / (NANO / "transformer.safetensors").stat().st_size
    assert size < {"q8": 0.75, "nvfp4": 0.55, "auto": 0.66}[mode]


def test_a_quantised_folder_is_reported_and_recorded(tmp_path, capsys):
    from wan_mlx.cli.main import main

    folder = convert(NANO, tmp_path / "q6", quantize="q6")
    pipe = wan_mlx.WanPipeline.from_pretrained(folder)
    settings = pipe.settings(pipe.request("a red circle"))
    assert settings["quantized"] == {"transformer": "q6", "text_encoder": "q6"} and "quantize" not in settings
    for model, arguments in ((folder, []), ("nano", ["--quantize", "q6"])):
        assert main(["--model", str(model), "--prompt", "a red circle", "--dry-run", *arguments]) == 0
        assert "bfloat16, transformer q6, text encoder q6)" in capsys.readouterr().err
    assert "quantized" not in wan_mlx.WanPipeline.from_pretrained("nano").settings(pipe.request("a red circle"))


def test_quantising_at_load_never_holds_the_model_unquantised():
    def nbytes(model):
        return sum(array.nbytes for array in parameters_of(model).values())

    whole = nbytes(load_transformer(NANO))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load_transformer(NANO, quantize="q4")
    peak = mx.get_peak_memory() - before
    assert nbytes(model) < 0.5 * whole and peak < nbytes(model) + 2**20


def test_unpacking_a_quantised_folder(tmp_path):
    folder = convert(NANO, tmp_path / "q6", quantize="q6")
    unpacked, packed = load_transformer(folder, quantize="none"), load_transformer(folder)
    assert isinstance(unpacked.blocks[0].ffn[0], Linear)
    assert mx.array_equal(
        unpacked.blocks[0].ffn[0].weight, packed.blocks[0].ffn[0].unpacked(mx.float32).astype(mx.bfloat16)
    )


def test_a_quantised_folder_is_not_quantised_again(tmp_path):
    folder = convert(NANO, tmp_path / "q6", quantize="q6")
    for load in (load_transformer, load_text_encoder):
        with pytest.raises(ValueError, match="already quantised as q6, so quantize='q4' is not possible"):
            load(folder, quantize="q4")
    load_transformer(folder, quantize="q6")


def test_sizes_that_a_group_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 64, but blocks.0.ffn.2.weight has 80"):
        plan_quantization("transformer", "q4", {"blocks.0.ffn.0.weight": (80, 64), "blocks.0.ffn.2.weight": (64, 80)})


@pytest.fixture(scope="module")
def q8_folder(tmp_path_factory):
    return convert(NANO, tmp_path_factory.mktemp("q8") / "q8", quantize="q8")


def damaged(q8_folder, tmp_path, change):
    """A copy of the folder, its transformer's header changed."""
    folder = shutil.copytree(q8_folder, tmp_path / "damaged")
    path = folder / "transformer.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = json.loads(header["__metadata__"]["quantization"])
    change(header, entry)
    if "quantization" in header["__metadata__"]:
        header["__metadata__"]["quantization"] = json.dumps(entry)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return folder


LAYER = "blocks.3.ffn.0.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda h, e: e["packings"].update({LAYER: "q4"}), r"it has other shapes|needs F16"),
        (lambda h, e: e["packings"].update({LAYER: "q8-g32"}), r"blocks.3.ffn.0.scales is F16 \(640, 4\); q8-g32 of"),
        (lambda h, e: e["packings"].update({LAYER: "mxfp8"}), r"blocks.3.ffn.0.scales is F16"),
        (lambda h, e: e["packings"].update({LAYER: "q1"}), r"quantization entry is damaged .*'q1'"),
        (lambda h, e: e["packings"].update({"blocks.9.ffn.0.weight": "q8"}), r"names blocks.9.ffn.0.weight"),
        (lambda h, e: e["packings"].pop(LAYER), r"unexpected blocks.3.ffn.0.biases, blocks.3.ffn.0.scales"),
        (lambda h, e: e.pop("packings"), r"quantization entry is damaged"),
        (lambda h, e: h["__metadata__"].pop("quantization"), r"unexpected blocks.0.cross_attn.k.biases"),
        (lambda h, e: h.update({"x": h.pop("blocks.3.ffn.0.biases")}), r"blocks.3.ffn.0.biases is missing"),
    ],
)
def test_a_packed_file_that_contradicts_itself_is_refused(q8_folder, tmp_path, change, says):
    with pytest.raises(WeightsError, match=says):
        load_transformer(damaged(q8_folder, tmp_path, change))


# How far one step of the whole pipeline may be from the unquantised one.
STEP_ERRORS = {"q8": 0.01, "q6": 0.04, "auto": 0.04, "q5": 0.08, "q4-g32": 0.15, "q4": 0.15, "q3": 0.35}
STEP_ERRORS |= {"mxfp8": 0.05, "mxfp4": 0.25, "nvfp4": 0.2, "none": 0.0}


def sampled(quantize):
    """Latents after one step of a picture."""
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", quantize=quantize, progress=False)
    request = pipe.request("a red star spins", width=32, height=32, num_frames=1, steps=1, guidance_scale=1, seed=2)
    with contextlib.closing(pipe.stages(request)) as events:
        step = next(event for event in events if isinstance(event, wan_mlx.Step))
        return step.latents, pipe.settings(request).get("quantize")


def test_a_pipeline_in_every_mode():
    want, _ = sampled(None)
    for mode, bound in STEP_ERRORS.items():
        got, said = sampled(mode)
        error = relative_distance(got, want)
        assert said == mode and bound / 20 <= error <= bound, (mode, error)


def test_q8_videos_are_within_35_db():
    options = dict(width=48, height=48, num_frames=5, steps=2, guidance_scale=3.0, seed=5)
    frames = []
    for quantize in (None, "q8"):
        pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", quantize=quantize, progress=False)
        frames.append(pipe("a red circle moves right on a blue background", **options).frames.astype(np.float64))
    error = np.mean((frames[0] - frames[1]) ** 2)
    assert 0 < error and 10 * np.log10(255**2 / error) >= 35
    assert frames[0].std() > 10


@pytest.mark.parametrize("mode", ["q4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("stream", [False, True])
def test_scales_that_are_not_finite_are_refused(tmp_path, mode, stream):
    folder = convert(NANO, tmp_path / mode, quantize=mode)
    path, key = folder / "transformer.safetensors", "blocks.4.ffn.0.scales"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[key]["data_offsets"][0]
    data[start : start + 2] = b"\x00\x7e" if mode == "q4" else b"\xff\x01" if mode == "mxfp8" else b"\x7f\x01"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="blocks.4.ffn.0.weight has scales that are not finite"):
        model = load_transformer(path, stream=stream)
        if stream:
            list(model.blocks([f"blocks.{i}" for i in range(6)]))
