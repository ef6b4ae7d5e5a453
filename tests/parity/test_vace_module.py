"""VACE's part of a transformer in a file of its own, as Kijai publishes it, beside a text-to-video transformer."""

import json

import mlx.core as mx
import numpy as np
import published
import pytest
from diffusers import WanTransformer3DModel
from oracles import torch
from PIL import Image
from test_published import VIDEO, same

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.runs.folder import RunFolder
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import open_component
from wan_mlx.weights.load import load_transformer

GRID = (1, 2, 4, 4)


def module_of(states, seed=7):
    """Random weights of two of VACE's blocks, in the official names."""
    torch.manual_seed(seed)
    base = states["transformer"]
    inner = {name.removeprefix("blocks.0."): tensor for name, tensor in base.items() if name.startswith("blocks.0.")}
    inner |= {f"{place}.{end}": torch.zeros((128, 128)[: 2 if end == "weight" else 1])
              for place in ("before_proj", "after_proj") for end in ("weight", "bias")}  # fmt: skip
    found = {f"vace_blocks.{n}.{name}": tensor for n in (0, 1) for name, tensor in inner.items()}
    del found["vace_blocks.1.before_proj.weight"], found["vace_blocks.1.before_proj.bias"]
    found["vace_patch_embedding.weight"] = torch.zeros(128, 96, 1, 2, 2)
    found["vace_patch_embedding.bias"] = torch.zeros(128)
    return {name: torch.randn(tensor.shape) * 0.1 for name, tensor in found.items()}


@pytest.fixture(scope="module")
def states():
    found = published.states()
    return found | {"module": module_of(found)}


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    """A base, the module, and both in one file, with the other parts."""
    folder = tmp_path_factory.mktemp("vace")
    both = states["transformer"] | states["module"]
    for name, state in (("base", states["transformer"]), ("module", states["module"]), ("both", both)):
        published.comfyui_file(folder / f"{name}.safetensors", state)
    published.comfyui_file(folder / "vae.safetensors", states["vae"])
    text = published.hf_text_encoder(states["text_encoder"])
    published.comfyui_file(folder / "text.safetensors", text, tokenizer=True)
    return folder


def others(folder):
    return {"text_encoder": folder / "text.safetensors", "vae": folder / "vae.safetensors"}


def opened(folder, base, module):
    return open_checkpoint(base, others(folder) | {"vace_module": module})


def forward(model):
    rng = np.random.default_rng(1)
    shapes = (*GRID, 16), (1, 512, 32), (*GRID, 96)
    latents, context, vace = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return np.array(model(latents, mx.array([500.0]), context, vace_context=vace))


@pytest.fixture(scope="module")
def want(folder):
    return forward(load_transformer(folder / "both.safetensors", "float32"))


def test_base_and_module_are_a_vace_transformer(folder, want):
    found = opened(folder, folder / "base.safetensors", folder / "module.safetensors")
    assert found.missing() == [] and found.files["vace_module"] == folder / "module.safetensors"
    for stream in (False, True):
        assert np.array_equal(forward(load_transformer(found, "float32", stream=stream)), want)
    weights = found.part("transformer").open()
    places = weights.byte_ranges(weights.sources)
    assert {place.file.path.name for place in places.values()} == {"base.safetensors", "module.safetensors"}
    q8 = [load_transformer(model, "float32", quantize="q8-g32") for model in (found, folder / "both.safetensors")]
    assert np.array_equal(*map(forward, q8))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["scaled", "fp8", "bfloat16", "gguf", "flat gguf"])
def test_forms_of_the_module(states, folder, tmp_path, prefix, kind):
    """Its true values are taken, whatever the base is stored as: here as scaled fp8 with a marker."""
    stored, true = published.scaled_fp8(states["transformer"], "marker")
    base = published.comfyui_file(tmp_path / "base.safetensors", stored, "model.diffusion_model.")
    module = {name: tensor.to(torch.bfloat16) for name, tensor in states["module"].items()}
    path = tmp_path / "module"
    if kind == "scaled":
        module, values = published.scaled_fp8(states["module"], "per row")
    elif kind == "fp8":
        module = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in module.items()}
        values = {name: tensor.float() for name, tensor in module.items()}
    elif kind == "bfloat16":
        values = {name: tensor.float() for name, tensor in module.items()}
    else:
        flat = {"vace_patch_embedding.weight": module["vace_patch_embedding.weight"].flatten(1)}
        values = published.gguf_file(path, module | (flat if "flat" in kind else {}), "Q8_0", prefix)
        values["vace_patch_embedding.weight"] = values["vace_patch_embedding.weight"].reshape(128, 96, 1, 2, 2)
    if "gguf" not in kind:
        published.comfyui_file(path, module, prefix)
    both = published.comfyui_file(tmp_path / "both.safetensors", true | values)
    got = load_transformer(opened(folder, base, path), "float32", quantize="none")
    assert np.array_equal(forward(got), forward(load_transformer(both, "float32")))


@pytest.mark.parametrize("kind", ["diffusers", "mlx", "packed", "all in one", "gguf"])
def test_forms_of_the_base(states, folder, tmp_path, kind, want):
    base, module = tmp_path / "base.safetensors", folder / "module.safetensors"
    if kind == "diffusers":
        sizes = dict(num_attention_heads=1, attention_head_dim=128, ffn_dim=96, num_layers=2, freq_dim=32, text_dim=32)
        keys = list(WanTransformer3DModel(**sizes).state_dict())
        published.comfyui_file(base, published.in_other_names(states["transformer"], keys))
    elif kind == "all in one":
        published.checkpoint_save(base, {kind: states[kind] for kind in ("transformer", "vae")})
    elif kind == "gguf":
        published.gguf_file(base, states["transformer"], "F32")
    else:
        parts = [flag for kind, file in others(folder).items() for flag in (f"--{kind.replace('_', '-')}", str(file))]
        packing = ["--quantize", "q8-g32"] if kind == "packed" else []
        source = str(folder / "base.safetensors")
        assert main(["convert", source, str(base), *parts, *packing, "--dtype", "float32", "--quiet"]) == 0
    got = load_transformer(opened(folder, base, module), "float32")
    if kind == "packed":
        whole = forward(load_transformer(opened(folder, base, module), "float32", quantize="none"))
        assert np.abs(forward(got) - whole).max() < 1e-4 * np.abs(whole).max() and not np.array_equal(whole, want)
    else:
        assert np.array_equal(forward(got), want)


def test_a_video_names_the_module_and_goes_on(folder, tmp_path, monkeypatch):
    """The pipeline, the plan, the settings, and a run that was cut."""
    clip = Image.new("RGB", (32, 32), "red")
    given = dict(VIDEO, src_ref_images=[clip])
    options = dict(dtype="float32", progress=False, **others(folder))
    pipe = wan_mlx.WanPipeline.from_pretrained(
        folder / "base.safetensors", vace_module=folder / "module.safetensors", **options
    )
    plain = wan_mlx.WanPipeline.from_pretrained(folder / "both.safetensors", **options)
    got, want = (one("a cat", **given) for one in (pipe, plain))
    assert same(got, want) and pipe.preset.task == "vace"
    assert got.settings["vace_module"] == "module.safetensors" and "vace_module" not in want.settings
    assert pipe.plan(pipe.request("a cat", **given)).rows == plain.plan(plain.request("a cat", **given)).rows
    clip.save(tmp_path / "red.png")
    command = [
        "--model", str(folder / "base.safetensors"), "--vace-module", str(folder / "module.safetensors"),
        "--text-encoder", str(folder / "text.safetensors"), "--vae", str(folder / "vae.safetensors"),
        "--prompt", "a cat", "--src_ref_images", str(tmp_path / "red.png"), "--size", "32x32", "--frames", "5",
        "--steps", "2", "--seed", "1", "--shift", "5", "--guidance", "5", "--dtype", "float32", "--quiet",
    ]  # fmt: skip
    save = RunFolder.save_step

    def failing(self, step, notes):
        return 1 / 0 if step.index else save(self, step, notes)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_step", failing)
        assert main([*command, "--output", str(tmp_path / "a.npz")]) == 1
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "a.npz"]) == 0
    assert np.array_equal(np.load("a.npz")["latents"], want.latents)


def test_it_is_refused_where_it_does_not_fit(states, folder, tmp_path, capsys):
    module = folder / "module.safetensors"
    for refuse in (lambda: open_checkpoint(module), lambda: load_transformer(module),
                   lambda: open_checkpoint(folder / "base.safetensors", {"transformer": module})):
        with pytest.raises(WeightsError, match="holds a vace_module, expected .* with --vace-module") as e:
            refuse()
        assert "\n" not in str(e.value)
    with pytest.raises(WeightsError, match="base.safetensors: holds a transformer, expected a vace_module"):
        opened(folder, folder / "base.safetensors", folder / "base.safetensors")
    with pytest.raises(WeightsError, match="both.safetensors is vace$"):
        opened(folder, folder / "both.safetensors", module)
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in states["module"].items()}
    published.comfyui_file(tmp_path / "wide.safetensors", wide)
    with pytest.raises(WeightsError, match="for a transformer of width 256; .*base.safetensors has 128"):
        opened(folder, folder / "base.safetensors", tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="VACE module .*nowhere does not exist"):
        opened(folder, folder / "base.safetensors", tmp_path / "nowhere")
    del (short := dict(states["module"]))["vace_blocks.1.ffn.0.bias"]
    published.comfyui_file(tmp_path / "short.safetensors", short)
    with pytest.raises(WeightsError, match="lacks vace_blocks.1.ffn.0.bias"):
        load_transformer(opened(folder, folder / "base.safetensors", tmp_path / "short.safetensors"))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"model_type": "t2v", "num_heads": 1}))
    base = published.comfyui_file(tmp_path / "transformer/x.safetensors", states["transformer"])
    assert opened(folder, base, module).part("transformer").config == {"num_heads": 1}
    assert open_component(base, "transformer").component == "transformer"
