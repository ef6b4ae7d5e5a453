"""Quantised files written by the tools' own code read as those tools' own dequantised weights."""

import json

import mlx.core as mx
import numpy as np
import published
import pytest
from oracles import official, randomize, relative_error, torch
from safetensors.torch import save_file

from wan_mlx.files.open import open_weights
from wan_mlx.weights.component import ComponentWeights
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.quantize import quantizable

DIT = dict(published.DIT, in_dim=16, out_dim=16, text_dim=32)


def wan_model():
    model = official("modules.model").WanModel(model_type="t2v", **DIT)
    randomize(model, 3)
    return model


@pytest.fixture(scope="module")
def state():
    return wan_model().state_dict()


def assert_reads_as(path, true) -> ComponentWeights:
    """Every weight of ``path``, resident or streamed, is the ``true`` one, in the same names."""
    plain = path.parent / "true.safetensors"
    save_file({name: tensor.detach().float().contiguous() for name, tensor in true.items()}, plain)
    weights, expected = (ComponentWeights(open_weights(file)) for file in (path, plain))
    assert weights.shapes == expected.shapes
    for name in weights.shapes:
        got, want = (np.array(of.read(name).astype(mx.float32)) for of in (weights, expected))
        assert relative_error(got, want) <= 5e-6, name
    resident, streamed = (load_transformer(path, "float32", stream=stream) for stream in (False, True))
    rng = np.random.default_rng(5)
    latents, context = (mx.array(rng.standard_normal(s, np.float32)) for s in ((1, 2, 4, 4, 16), (1, 512, 32)))
    got = resident(latents, 400.0, context)
    assert mx.array_equal(streamed(latents, 400.0, context), got)
    assert relative_error(got, load_transformer(plain, "float32")(latents, 400.0, context)) <= 5e-6
    return weights


# --- ComfyUI's mixed formats, by comfy-kitchen


@pytest.mark.parametrize("declared", ["tensor", "header", "nowhere"])
@pytest.mark.parametrize(
    "form, layout, settings",
    [
        ("float8_e4m3fn", "TensorCoreFP8Layout", {}),
        ("float8_e5m2", "TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
        ("mxfp8", "TensorCoreMXFP8Layout", {}),
        ("nvfp4", "TensorCoreNVFP4Layout", {}),
        ("int8_tensorwise", "TensorWiseINT8Layout", {}),
        ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}),
        ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 16}),
    ],
    ids=["e4m3", "e5m2", "mxfp8", "nvfp4", "int8", "int8 rows", "int8 rotated"],
)
def test_comfy_kitchen(state, tmp_path, form, layout, settings, declared):
    layout = getattr(pytest.importorskip("comfy_kitchen.tensor"), layout)
    if "convrot" in settings and declared == "nowhere":
        pytest.skip("a rotation is only known if it is declared")
    stored, true, layers = dict(state), dict(state), {}
    for name in quantizable("transformer", state):
        numbers, parameters = layout.quantize(state[name], **settings)
        true[name] = layout.dequantize(numbers, parameters)
        stored |= {name + end: t for end, t in layout.state_dict_tensors(numbers, parameters).items()}
        rotation = {key: value for key, value in settings.items() if "convrot" in key}
        layers[name.removesuffix(".weight")] = {"format": form, **rotation}
    if declared == "tensor":
        for layer, entry in layers.items():
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    path, prefix = tmp_path / "x.safetensors", "" if declared == "header" else "model.diffusion_model."
    save_file({prefix + k: t.contiguous() for k, t in stored.items()}, path, header if declared == "header" else None)
    weights = assert_reads_as(path, true)
    assert bool(weights.packable) == (form == "mxfp8")


# --- lightx2v's, which is not on PyPI, after tools/convert/quant/quant.py


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_lightx2v(state, tmp_path, form):
    stored, true = dict(state), dict(state)
    for name in quantizable("transformer", state):
        scale = state[name].abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / (127 if form == "int8" else 448)
        numbers = state[name] / scale
        stored[name] = numbers.round().to(torch.int8) if form == "int8" else numbers.to(torch.float8_e4m3fn)
        stored[f"{name}_scale"], true[name] = scale, stored[name].float() * scale
    save_file(stored, tmp_path / "x.safetensors")
    assert_reads_as(tmp_path / "x.safetensors", true)


# --- optimum-quanto, as in Wan2GP's files


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qfloat8_e5m2"])
def test_quanto(tmp_path, kind):
    quanto = pytest.importorskip("optimum.quanto")
    model = wan_model()
    quanto.quantize(model, weights=getattr(quanto, kind), include=["blocks.*"])
    quanto.freeze(model)
    parameters = dict(model.named_parameters())
    assert any(isinstance(tensor, quanto.QTensor) for tensor in parameters.values())
    true = {k: t.dequantize() if isinstance(t, quanto.QTensor) else t for k, t in parameters.items()}
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "x.safetensors")
    assert_reads_as(tmp_path / "x.safetensors", true)


# --- Diffusers' folders


def diffusers_folder(tmp_path, config):
    """A transformer quantised by Diffusers: its folder, and its own dequantised weights."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
                                  text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2)  # fmt: skip
    randomize(model, 3)
    model.save_pretrained(tmp_path / "plain")
    model = WanTransformer3DModel.from_pretrained(
        tmp_path / "plain", quantization_config=config, torch_dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "transformer")
    true = {
        name: tensor.dequantize() if type(tensor.data) is not torch.Tensor else tensor
        for name, tensor in model.named_parameters()
    }
    return tmp_path / "transformer", true


@pytest.mark.filterwarnings("ignore:.*[Qq]uanto:FutureWarning")
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_diffusers_quanto(tmp_path, kind):
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    folder, true = diffusers_folder(tmp_path, QuantoConfig(weights_dtype=kind))
    assert load_transformer(folder, "float32").config.num_heads == 1  # the folder is known by its config.json
    assert_reads_as(folder / "diffusion_pytorch_model.safetensors", true)


@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_diffusers_torchao(tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    folder, true = diffusers_folder(tmp_path, TorchAoConfig(getattr(quantization, kind)()))
    assert load_transformer(folder, "float32").config.num_heads == 1  # the folder is known by its config.json
    assert_reads_as(folder / "diffusion_pytorch_model.safetensors", true)
