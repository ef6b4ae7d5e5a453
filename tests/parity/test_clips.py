"""What S2V and Animate share with all models: forms of weights, LoRAs, streaming, step caches, recipes, drafts.

Each model makes two clips once; the transformer alone is run again, from what they were conditioned by.
"""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import official_checkpoints as checkpoints
import published
import pytest
from oracles import official_s2v, randomize, relative_error, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_animate import prepared
from test_preview import taehv  # noqa: F401  # a fixture
from test_s2v import write_sound
from test_tasks import noise_image

from wan_mlx import WanPipeline
from wan_mlx.models.quantized_linear import QuantizedLinear
from wan_mlx.planning import choose
from wan_mlx.types import Conditioning, RunState, Step
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_transformer

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
              pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")]  # fmt: skip
KINDS = ("s2v", "animate")
OPEN = dict(dtype="float32", progress=False, prompt_cache=False)
# Matrices whose rows groups of 32 and 64 divide.
SIZES = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=32)
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def speech(folder: Path) -> dict:
    """A tiny S2V in its official folder, and what a request of it is given."""
    modules = checkpoints.networks(5, "s2v", checkpoints.WIDE_TEXT)
    kind = checkpoints.KINDS["s2v"]
    modules["transformer"] = official_s2v().WanModel_S2V(text_dim=32, **SIZES, **checkpoints.SPEECH, **kind)
    randomize(modules["transformer"].eval().requires_grad_(False), 7)
    checkpoints.write_official_folder(folder, modules, "s2v")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V", **SIZES, **kind}))
    Image.fromarray(noise_image(64, 64)).save(folder.parent / "first.png")
    write_sound(folder.parent / "talk.wav", 0.3)
    return dict(image=folder.parent / "first.png", audio=folder.parent / "talk.wav", size="64x64", infer_frames=4,
                num_clip=2)  # fmt: skip


def whole(pipe: WanPipeline, given: dict) -> SimpleNamespace:
    """A run of two clips: the conditioning of each, and its last latents."""
    conditionings, latents = [], []
    for output in pipe.run(pipe.request(steps=STEPS, seed=1, **given)).outputs():
        if isinstance(output, Conditioning):
            conditionings.append(output)
        elif isinstance(output, Step):
            latents[len(conditionings) - 1 :] = [np.array(output.latents)]
        elif len(latents) == 2:
            break
    return SimpleNamespace(conditionings=conditionings, latents=latents)


def sampled(pipe: WanPipeline, model, clip: int = 0, **changes) -> tuple[np.ndarray, int]:
    """The latents of a clip, conditioned as in the whole run, and how many forwards they took."""
    request = pipe.request(**{"steps": STEPS, "seed": 1, **model.given, **changes})
    conditioning, before = model.run.conditionings[clip], clip * request.steps
    forwards = 0
    for output in pipe.run(request, RunState(conditioning, before)).outputs():
        if isinstance(output, Step):
            forwards += output.forwards
            if output.index + 1 == before + request.steps:
                return np.array(output.latents), forwards
    raise AssertionError("there are steps")


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Kind → the model, opened, what it is given, and its whole run; made when first asked for."""
    found = {}

    def make(kind: str) -> SimpleNamespace:
        if kind not in found:
            place = tmp_path_factory.mktemp(kind)
            if kind == "s2v":
                given = speech(folder := place / "Wan2.2-S2V-14B")
            else:
                folder, given = models(kind)[1], dict(src_root_path=place, num_frames=5)
                prepared(place, 8)
            given |= dict(prompt="a cat boxing on a stage", guidance_scale=3.0)
            pipe = WanPipeline.from_pretrained(folder, **OPEN)
            found[kind] = SimpleNamespace(folder=folder, given=given, pipe=pipe, run=whole(pipe, given),
                                          state=load_file(folder / "diffusion_pytorch_model.safetensors"))  # fmt: skip
        return found[kind]

    return make


def opened(model, transformer: Path, **options) -> WanPipeline:
    """A transformer of the same sizes in a file of its own, beside the model's other parts."""
    (transformer.parent / "config.json").write_text((model.folder / "config.json").read_text())
    others = dict.fromkeys(("text_encoder", "tokenizer", "vae"), model.folder)
    if (wav2vec := model.folder / "wav2vec2-large-xlsr-53-english").exists():
        others["audio_encoder"] = wav2vec
    else:
        others["image_encoder"] = model.folder
    return WanPipeline.from_pretrained(transformer, **OPEN, **others, **options)


def latents_of(model, state: dict, path: Path) -> np.ndarray:
    """Of a transformer with these weights, in float32."""
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return sampled(opened(model, path), model)[0]


def packed_between_blocks(network) -> bool:
    """Whether what stands between the blocks is quantised: S2V's injectors, Animate's face blocks."""
    if hasattr(network, "audio_injectors"):
        return isinstance(network.audio_injectors[0].q, QuantizedLinear)
    return isinstance(network.face_adapter["fuser_blocks"][0].linear1_kv, QuantizedLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_scaled(made, tmp_path, kind):
    """The bits of the values that are stored."""
    model = made(kind)
    stored, true = published.scaled_fp8(model.state, "marker")
    (tmp_path / "fp8").mkdir()
    published.comfyui_file(tmp_path / "fp8/x.safetensors", stored, "model.diffusion_model.")
    got, _ = sampled(opened(model, tmp_path / "fp8/x.safetensors"), model)
    assert np.array_equal(got, latents_of(model, true, tmp_path / "true/x.safetensors"))
    assert 1e-4 < relative_error(got, model.run.latents[0]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_q8_0(made, tmp_path, kind):
    """Unpacked it has the bits of the values that are stored; packed, as by default, it comes near."""
    model = made(kind)
    (tmp_path / "gguf").mkdir()
    true = published.gguf_file(tmp_path / "gguf/x.gguf", model.state, "Q8_0")
    want = latents_of(model, true, tmp_path / "true/x.safetensors")
    unpacked = opened(model, tmp_path / "gguf/x.gguf", quantize="none")
    assert np.array_equal(sampled(unpacked, model)[0], want)
    packed = opened(model, tmp_path / "gguf/x.gguf")
    assert packed.quantized["transformer"] == "q8-g32"
    assert packed_between_blocks(load_transformer(tmp_path / "gguf/x.gguf", "float32"))
    assert relative_error(sampled(packed, model)[0], want) < 1e-4


@pytest.mark.parametrize("mode, bound", [("q8-g32", 0.1), ("q4-g32", 0.8)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(made, tmp_path, kind, mode, bound):
    """While it is read, or when it is converted: the same bits."""
    model = made(kind)
    pipe = WanPipeline.from_pretrained(model.folder, quantize=mode, **OPEN)
    got, _ = sampled(pipe, model)
    assert packed_between_blocks(load_transformer(model.folder, "float32", quantize=mode))
    assert 1e-4 < relative_error(got, model.run.latents[0]) < bound
    name = model.pipe.preset.name
    folder = convert(model.folder, tmp_path / "mlx", dtype="float32", quantize=mode, model=name)
    converted = WanPipeline.from_pretrained(folder, **OPEN)
    assert converted.preset.name == name and np.array_equal(sampled(converted, model)[0], got)


def test_converted(made, tmp_path):
    """All parts of Animate have the same bits; those of S2V in `test_s2v`."""
    model = made("animate")
    folder = convert(model.folder, tmp_path / "mlx", dtype="float32", model="animate-14B")
    pipe = WanPipeline.from_pretrained(folder, **OPEN)
    assert np.array_equal(sampled(pipe, model)[0], model.run.latents[0])
    found = next(pipe.run(pipe.request(steps=STEPS, seed=1, **model.given)).outputs())
    for name, array in model.run.conditionings[0].arrays().items():
        assert mx.array_equal(found.arrays()[name], array), name


def lora_of(state: dict, rank: int = 4) -> dict:
    """Of every matrix of the blocks and of what stands between them, under ComfyUI's names."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in state.items():
        between = ("blocks.", "audio_injector.", "face_adapter.")
        if name.startswith(between) and name.endswith(".weight") and weight.ndim == 2:
            for end, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                key = f"diffusion_model.{name.removesuffix('.weight')}.lora_{end}.weight"
                found[key] = torch.randn(shape, generator=generator) * 0.1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_lora(made, tmp_path, monkeypatch, kind):
    """Merged, and beside streamed weights: as its own arithmetic has it."""
    model = made(kind)
    lora = lora_of(model.state)
    save_file(lora, tmp_path / "lora.safetensors")
    merged = dict(model.state)
    for key, down in lora.items():
        if "lora_A" in key:
            name = key.removeprefix("diffusion_model.").replace("lora_A.", "")
            merged[name] = merged[name] + 0.5 * lora[key.replace("lora_A", "lora_B")] @ down
    want = latents_of(model, merged, tmp_path / "merged/x.safetensors")
    assert relative_error(want, model.run.latents[0]) > 1e-2
    pipe = WanPipeline.from_pretrained(model.folder, loras=[(tmp_path / "lora.safetensors", 0.5)], **OPEN)
    assert relative_error(sampled(pipe, model)[0], want) < 2e-5
    monkeypatch.setattr(choose, "LADDER", [(True, 1024)])
    assert relative_error(sampled(pipe, model)[0], want) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_resident(made, monkeypatch, kind):
    """Both clips, bit for bit."""
    model = made(kind)
    monkeypatch.setattr(choose, "LADDER", [(True, 1024)])
    assert model.pipe.plan(model.pipe.request(**model.given)).stream
    for clip in (0, 1):
        assert np.array_equal(sampled(model.pipe, model, clip)[0], model.run.latents[clip])


@pytest.mark.parametrize("off, on", [
    ("easycache:0", "easycache:0.5:2"), ("spectrum:0", "spectrum:2"),
    ("spectrum:0:0.75:hidden", "spectrum:2:0.75:hidden"),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_step_caches(made, kind, off, on):
    """Off it has the bits of none; on it computes fewer forwards."""
    model = made(kind)
    if not hasattr(model, "plain"):
        model.plain = sampled(model.pipe, model, steps=10)
    plain, count = model.plain
    assert count == 20
    without, count = sampled(model.pipe, model, steps=10, cache=off)
    assert count == 20 and np.array_equal(without, plain)
    cached, count = sampled(model.pipe, model, steps=10, cache=on)
    assert 4 <= count < 20 and np.isfinite(cached).all() and not np.array_equal(cached, plain)


@pytest.mark.parametrize("cache", ["teacache", "magcache"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_without_constants(made, kind, cache):
    model = made(kind)
    words = f"{cache} has no published constants for {model.pipe.preset.name}, .*; easycache and spectrum need none"
    with pytest.raises(ValueError, match=words):
        model.pipe.request(**model.given, steps=10, cache=cache)


def test_a_cache_begins_anew_with_each_clip(made):
    """Each clip takes as many forwards as the first."""
    model, counts = made("animate"), [0, 0]
    given = model.given | {"guidance_scale": 1.0}
    request = model.pipe.request(**given, steps=10, seed=1, cache="spectrum:2")
    for output in (run := model.pipe.run(request)).outputs():
        if isinstance(output, Step):
            counts[run.forwards[1] > 10] += output.forwards
    assert counts[0] == counts[1] < 10 and run.forwards == (sum(counts), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps(made, tmp_path, kind):
    """lightx2v's recipe, with a LoRA: four forwards a clip, on its own levels of noise."""
    model = made(kind)
    save_file(lora_of(model.state), tmp_path / "lora.safetensors")
    pipe = WanPipeline.from_pretrained(model.folder, loras=[(tmp_path / "lora.safetensors", 1.0)], **OPEN)
    given = {name: value for name, value in model.given.items() if name != "guidance_scale"}
    request = pipe.request(**given, recipe="lightx2v-4step", seed=1)
    assert (request.steps, request.shift, request.guidance_scale, request.passes) == (4, 5.0, 1.0, 1)
    for clip in (0, 1):
        run = pipe.run(request, RunState(model.run.conditionings[clip], clip * 4))
        steps = list(islice((output for output in run.outputs() if isinstance(output, Step)), 4))
        assert [step.forwards for step in steps] == [1] * 4
        assert np.allclose([step.sigma for step in steps], [1, 0.9375, 5 / 6, 0.625])
        assert mx.isfinite(steps[-1].latents).all().item()


@pytest.mark.parametrize("kind", KINDS)
def test_draft(made, taehv, kind):  # noqa: F811
    """Both clips, half as wide and high, decoded by TAEHV; as many frames as the video has."""
    model = made(kind)
    pipe, given = WanPipeline.from_pretrained(model.folder, draft=True, taehv=taehv, **OPEN), dict(model.given)
    if kind == "s2v":
        Image.fromarray(noise_image(128, 128)).save(model.folder.parent / "large.png")
        given |= {"size": "128x128", "image": model.folder.parent / "large.png"}
    video = pipe(**given, steps=1, seed=1)
    size = (64, 64) if kind == "s2v" else (16, 16)
    assert video.frames.shape == (5 if kind == "s2v" else 8, *size, 3) and video.settings["draft"] is True
