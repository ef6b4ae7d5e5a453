"""Alibaba PAI's Fun models of Wan2.2 at tiny sizes, from folders as they are published, against the official modules
put together as VideoX-Fun does it, and VACE-Fun against Diffusers' pipeline of two transformers.

The oracle of Fun-Control is stated here in PyTorch: a reference image is one more frame of tokens before the video's.
"""

import json
import shlex
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import (
    official,
    official_frames,
    official_latents,
    official_text,
    randomize,
    relative_error,
    torch,
    unmasked_attention,
)
from PIL import Image
from safetensors.torch import save_file
from test_sources import write_video
from test_tasks import first, noise_image, noise_video, official_image
from test_two_experts_official import SIZES, assert_same
from test_vae import scale

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAE22Config, VAEConfig
from wan_mlx.models.execution import Execution
from wan_mlx.presets import BUNDLED, NEGATIVE_PROMPT, PRESETS
from wan_mlx.types import Conditioning, RunState, Step
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.load import load_transformer

PROMPT = "a cat boxing on a stage"
STEPS, SEED, NUM_FRAMES = 3, 42, 5
# Kind → channels of the latents, that the transformer reads, and that a reference image has.
KINDS = {"A14B-InP": (16, 36, None), "A14B-Control": (16, 52, 16),
         "5B-InP": (48, 100, None), "5B-Control": (48, 148, 48)}  # fmt: skip
FIRST, LAST, REFERENCE = noise_image(50, 75), noise_image(50, 75, seed=1), noise_image(64, 80, seed=2)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


class Fun(torch.nn.Module):
    """The official WanModel with other channels, and perhaps tokens of a reference image before the video's."""

    def __init__(self, kind: str, seed: int):
        super().__init__()
        out, channels, reference = KINDS[kind]
        self.model = official("modules.model").WanModel(model_type="t2v", **SIZES, in_dim=channels, out_dim=out)
        self.ref_conv = reference and torch.nn.Conv2d(reference, SIZES["dim"], 2, 2)
        randomize(self.eval().requires_grad_(False), seed)

    def published(self) -> dict[str, torch.Tensor]:
        """The tensors under the names of the published files."""
        return {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}

    def forward(self, latents, t, text, y, reference=None):
        """Velocity (C, t, h, w) of latents; ``t`` (1,), or a timestep for each token of the video."""
        m = self.model
        x = m.patch_embedding(torch.cat([latents, y])[None])
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        before = 0
        t = t.expand(x.shape[1])
        if self.ref_conv is not None:
            image = self.ref_conv(reference.transpose(0, 1)).flatten(2).transpose(1, 2)
            before = image.shape[1]
            x, t = torch.cat([image, x], dim=1), torch.cat([t[-1:].expand(before), t])
        positions = torch.tensor([[grid[0] + (before > 0), *grid[1:]]])
        embedded = official("modules.model").sinusoidal_embedding_1d(m.freq_dim, t)[None].float()
        time = m.time_embedding(embedded)
        context = m.text_embedding(torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[None])
        given = dict(e=m.time_projection(time).unflatten(2, (6, m.dim)), seq_lens=torch.tensor([x.shape[1]]),
                     grid_sizes=positions, freqs=m.freqs, context=context, context_lens=None)  # fmt: skip
        for block in m.blocks:
            x = block(x, **given)
        return m.unpatchify(m.head(x, time)[:, before:], torch.tensor([list(grid)]))[0]


def write_folder(folder, kind: str, modules, pair):
    """A repository of alibaba-pai's: config.json names the kind that the model was made of."""
    checkpoints.write_official_folder(folder, modules, "ti2v" if kind.startswith("5B") else "t2v")
    places = {"high": "high_noise_model", "low": "low_noise_model"} if len(pair) > 1 else {"one": "."}
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        (folder / file).unlink()
    for name, place in places.items():
        (folder / place).mkdir(exist_ok=True)
        save_file(pair[name].published(), folder / place / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "WanModel", "model_type": "ti2v" if len(pair) == 1 else "i2v", **SIZES,
                  "in_dim": KINDS[kind][1], "out_dim": KINDS[kind][0], "add_ref_conv": "Control" in kind}  # fmt: skip
        (folder / place / "config.json").write_text(json.dumps(config))
    return folder


@cache
def model(kind: str, root: Path) -> tuple:
    """Kind, networks, transformers, folder."""
    modules = checkpoints.networks(kind="ti2v" if kind.startswith("5B") else "t2v")
    names = ("one",) if kind.startswith("5B") else ("high", "low")
    pair = {name: Fun(kind, 20 + seed) for seed, name in enumerate(names)}
    return kind, modules, pair, write_folder(root / f"Wan2.2-Fun-{kind}", kind, modules, pair)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fun")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, image in (("first", FIRST), ("last", LAST), ("reference", REFERENCE)):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def files(folder: Path, name: str):
    return folder / f"{name}.{'mkv' if name == 'control' else 'png'}"


def stretched(image, size) -> torch.Tensor:
    """As VideoX-Fun's get_image_to_video_latent: Pillow's own resizing; (3, H, W) in [-1, 1]."""
    return official_image(np.array(Image.fromarray(image).resize(size)))


def condition_of(encode, size, first, last, shape) -> torch.Tensor:
    """Mask and latents of a video with the given frames, grey between; all zero where none is given."""
    if first is None and last is None:
        return torch.zeros(4 + shape[0], *shape[1:])
    width, height = size
    video, mask = torch.zeros(3, NUM_FRAMES, height, width), torch.zeros(NUM_FRAMES)
    for at, image in ((0, first), (-1, last)):
        if image is not None:
            video[:, at], mask[at] = stretched(image, size), 1
    mask = torch.cat([mask[:1].repeat(3), mask]).view(-1, 4).T[:, :, None, None].expand(-1, -1, *shape[2:])
    return torch.cat([mask, encode(video)])


def official_run(model, monkeypatch, size, first=None, last=None, control=None, reference=None) -> tuple:
    """Latents and frames of VideoX-Fun's pipelines, with the official solver."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    kind, modules, pair, _ = model
    preset, (channels, *_) = PRESETS[f"fun-{kind}"], KINDS[kind]
    side = 16 if kind.startswith("5B") else 8
    normal = scale(VAE22Config() if side == 16 else VAEConfig())
    shape = (channels, (NUM_FRAMES + 3) // 4, size[1] // side, size[0] // side)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return modules["vae"].encode(video[None], normal)[0]

    y, given = condition_of(encode, size, first, last, shape), {}
    frames = y[4:]
    if control is not None:
        y = torch.cat([encode(torch.tensor(control).movedim(-1, 0).float() / 127.5 - 1), y])
        given["reference"] = torch.zeros(channels, 1, *shape[2:])
        if reference is not None:
            given["reference"] = encode(stretched(reference, size)[:, None])
    texts = [official_text(modules["text_encoder"], checkpoints.sentencepiece_model(), text)
             for text in (PROMPT, NEGATIVE_PROMPT)]  # fmt: skip
    kept = torch.zeros(1, *shape[1:])
    if side == 16 and first is not None:
        kept[:, 0] = 1
    served = set()

    def velocity(latents, t, text):
        name = "one" if len(pair) == 1 else "high" if t.item() >= 1000 * preset.boundary else "low"
        served.add(name)
        times = ((1 - kept[0, :, ::2, ::2]) * t).flatten() if kept.any() else t
        return pair[name](kept * frames + (1 - kept) * latents, times, text, y, **given)

    latents = official_latents(velocity, texts, shape, steps=STEPS, shift=5.0, guidance=6.0, seed=SEED)
    latents = kept * frames + (1 - kept) * latents
    assert served == set(pair)
    return latents, official_frames(modules["vae"], normal, latents)


def command(model, size, output, *extra: str) -> list[str]:
    kind, _, _, folder = model
    words = f"--task fun-{kind} --ckpt_dir {folder} --size {size[0]}*{size[1]} --frame_num {NUM_FRAMES} " \
        f"--sample_steps {STEPS} --base_seed {SEED} --prompt '{PROMPT}' --save_file {output} --dtype float32 --quiet"
    return [*shlex.split(words), *extra]


def words_of(folder, names: str) -> list[str]:
    """The flags of the sources that ``names`` names."""
    flags = {"first": "--image", "last": "--last-image", "reference": "--src_ref_images", "control": "--src_video"}
    return [word for name in names.split() for word in (flags[name], str(files(folder, name)))]


def written(folder, kind: str) -> tuple[tuple[int, int], np.ndarray]:
    """The size of a video of this kind, and a control video of that size, which is written."""
    size = (48, 32) if "A14B" in kind else (96, 64)
    control = noise_video(NUM_FRAMES, size[1], size[0], seed=4)
    write_video(folder / "control.mkv", control, rate=PRESETS[f"fun-{kind}"].fps)
    return size, control


@pytest.mark.parametrize(
    "kind, names",
    [(kind, names) for kind in KINDS for names in ("first last", "")
     if "InP" in kind] + [(kind, f"{names} control") for kind in KINDS for names in ("first reference", "last")
                          if "Control" in kind],
)  # fmt: skip
def test_whole_run(kind, names, sources, root, tmp_path, monkeypatch):
    opened = model(kind, root)
    size, control = written(sources, kind)
    pictures = {"first": FIRST, "last": LAST, "reference": REFERENCE, "control": control}
    given, words = {name: pictures[name] for name in names.split()}, words_of(sources, names)
    assert main(command(opened, size, tmp_path / "a.npz", *words)) == 0
    assert_same(tmp_path / "a.npz", *official_run(opened, monkeypatch, size, **given))


@pytest.mark.parametrize("kind", ["A14B-Control", "5B-Control"])
def test_transformer(kind, root, monkeypatch):
    """At an odd grid, with and without a first frame that is given; and run in pieces, the same bits."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    _, _, pair, folder = model(kind, root)
    theirs = pair.get("high") or pair["one"]
    ours = load_transformer(open_checkpoint(folder).of_kind("transformer")[0], dtype="float32")
    channels, reads, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    sizes = {"latents": channels, "y": reads - channels, "reference": channels}
    given = {name: torch.randn(c, 1 if name == "reference" else 3, 6, 10, generator=generator)
             for name, c in sizes.items()}  # fmt: skip
    text = torch.randn(20, SIZES["text_dim"], generator=generator)
    latents, y, reference = (mx.array(array.movedim(0, -1)[None].numpy()) for array in given.values())
    context = mx.array(torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[None].numpy())
    for clean in (0, 1):
        times = torch.full((45,), 500.0)
        times[: clean * 15] = 0
        want = theirs(given["latents"], times, text, given["y"], given["reference"])
        inputs = dict(condition=y, reference=reference, clean_frames=clean)
        got = ours(latents, 500.0, context, **inputs)
        assert relative_error(first(got), want) < 2e-5
        in_pieces = Execution(ours, tokens_at_once=7)(latents, 500.0, context, **inputs)
        assert mx.array_equal(got, in_pieces)
    for wrong in (None, reference[..., 1:], latents):
        with pytest.raises(ValueError, match="reference has shape"):
            ours(latents, 500.0, context, condition=y, reference=wrong)


def test_resumed_run_is_the_same(sources, root, tmp_path):
    """Stopped after the first of three steps, before the other expert takes over."""
    opened = model("A14B-Control", root)
    size, _ = written(sources, "A14B-Control")
    words = words_of(sources, "first reference control")
    assert main(command(opened, size, tmp_path / "whole.npz", *words)) == 0
    pipe = wan_mlx.WanPipeline.from_pretrained(opened[3], dtype="float32", progress=False, preset="fun-A14B-Control")
    request = pipe.request(PROMPT, width=size[0], height=size[1], num_frames=NUM_FRAMES, steps=STEPS, seed=SEED,
                           image=files(sources, "first"), src_ref_images=[files(sources, "reference")],
                           src_video=files(sources, "control"))  # fmt: skip
    state = None
    for output in pipe.run(request).outputs():
        if isinstance(output, Conditioning):
            conditioning = output
        elif isinstance(output, Step):
            state = RunState(conditioning, 1, dict(output.state))
            break
    rest = [step for step in pipe.run(request, resume=state).outputs() if isinstance(step, Step)]
    with np.load(tmp_path / "whole.npz") as whole:
        assert np.array_equal(first(rest[-1].latents), whole["latents"])


def test_vace_of_two_experts(tmp_path):
    """VACE-Fun: a folder that Diffusers wrote, and one as it is published, against Diffusers' pipeline."""
    from diffusers import WanVACEPipeline
    from test_diffusers_pipelines import make_pipeline

    one = make_pipeline("vace", tmp_path)
    second = type(one.transformer)(**{k: v for k, v in one.transformer.config.items() if not k.startswith("_")})
    randomize(second.eval().requires_grad_(False), 77)
    parts = {name: part for name, part in one.components.items() if part is not None}
    pipe = WanVACEPipeline(**parts | {"transformer_2": second}, boundary_ratio=0.875)
    folder = tmp_path / "Wan2.2-VACE-Fun-14B-diffusers"
    pipe.save_pretrained(folder)
    pipe.scheduler = solver = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    solver.set_timesteps = partial(solver.set_timesteps, shift=12.0)
    pipe.set_progress_bar_config(disable=True)
    frames = noise_video(NUM_FRAMES, 32, 48, seed=4)
    write_video(tmp_path / "control.mkv", frames)
    noise = torch.randn((16, 2, 4, 6), generator=torch.Generator().manual_seed(SEED))[None]
    white = [Image.new("L", (48, 32), 255)] * NUM_FRAMES
    want = pipe(PROMPT, "", video=[Image.fromarray(frame) for frame in frames], mask=white, height=32, width=48,
                num_frames=NUM_FRAMES, num_inference_steps=4, guidance_scale=5.0, latents=noise,
                output_type="latent").frames[0]  # fmt: skip
    published = tmp_path / "Wan2.2-VACE-Fun-A14B"
    for name, model in (("high", one.transformer), ("low", second)):
        (published / f"{name}_noise_model").mkdir(parents=True)
        state = model.state_dict()
        names = canonical_keys(recognise(state), state)
        file = published / f"{name}_noise_model/diffusion_pytorch_model.safetensors"
        save_file({ours: state[theirs].contiguous() for ours, theirs in names.items()}, file)
        config = {"_class_name": "VaceWanModel", "model_type": "t2v", "num_heads": 2, "vace_layers": [0, 2]}
        (file.parent / "config.json").write_text(json.dumps(config))
    rest = [word for part in ("text-encoder", "vae", "tokenizer") for word in (f"--{part}", str(folder))]
    for made, parts in ((folder, []), (published, rest)):
        words = [*"--task vace-fun-A14B --size 48*32 --frame_num 5 --sample_steps 4 --base_seed 42 --quiet".split(),
                 "--ckpt_dir", str(made), "--prompt", PROMPT, "--negative-prompt", "", "--dtype", "float32",
                 "--src_video", str(tmp_path / "control.mkv"), *parts]  # fmt: skip
        assert main([*words, "--save_file", str(made / "a.npz")]) == 0
        with np.load(made / "a.npz") as got:
            assert relative_error(got["latents"], want) < 1e-4


@pytest.mark.parametrize(
    "kind, words, line",
    [
        ("A14B-Control", "", "Fun-Control needs a control video: give it with --src_video FILE"),
        ("A14B-Control", "--src_video control.mkv --src_ref_images last.png,first.png",
         "2 reference images were given; Fun-Control takes one"),
        ("A14B-Control", "--src_video control.mkv --image first.png --last-image last.png --frames 1",
         "frames is 1, expected room for a first and a last one; nearest: 5"),
        ("A14B-InP", "--src_video control.mkv", "src_video was given to a inp model, which takes image, last_image"),
        ("A14B-InP", "--task t2v-A14B", "holds a i2v model of 16 latent channels, but the task t2v-A14B needs a t2v"),
        ("5B-InP", "--task i2v-14B", "needs a i2v model of 16 latent channels, with CLIP"),
        ("5B-Control", "--task ti2v-5B", "holds a control model of 48 latent channels, but the task ti2v-5B needs a"),
        ("5B-Control", "--size 80x64", "width is 80, expected a positive multiple of 32; nearest: 64"),
    ],
)  # fmt: skip
def test_refused_in_one_line(kind, words, line, sources, root, capsys):
    written(sources, kind)
    given = [",".join(str(sources / name) for name in word.split(",")) if "." in word else word
             for word in words.split()]  # fmt: skip
    begin = ["--model", str(model(kind, root)[3]), "--task", f"fun-{kind}", "--prompt", "a", "--dry-run"]
    assert main([*begin, *given]) == 2
    said = capsys.readouterr().err
    assert line in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_clip_is_refused(root, capsys):
    given = ["--model", str(model("A14B-InP", root)[3]), "--task", "fun-A14B-InP", "--prompt", "a", "--dry-run"]
    assert main([*given, "--image-encoder", str(BUNDLED["nano-i2v"])]) == 2
    assert "image_encoder was given to a inp model, which reads no images with it" in capsys.readouterr().err


def test_one_expert_is_missing(root, tmp_path, capsys):
    """Alone it is no model; and the folder lacks the other."""
    folder = model("A14B-Control", root)[3]
    high = folder / "high_noise_model/diffusion_pytorch_model.safetensors"
    for given, line in (
        (["--model", str(high), "--vae", str(folder)], "is one of the two experts of Fun-A14B-Control; give both"),
        (["--model", str(high), "--low-noise", str(high), "--vae", str(folder)], "both experts are"),
    ):
        parts = ["--text-encoder", str(folder), "--tokenizer", str(folder)]
        assert main([*given, *parts, "--prompt", "a", "--dry-run"]) != 0
        assert line in capsys.readouterr().err


def test_a_folder_on_this_machine_is_told_apart_by_its_task(root, capsys):
    """Fun-A14B-InP has I2V-A14B's shapes, which is said; Fun-5B's have none but their own."""
    assert main(["--model", str(model("A14B-InP", root)[3]), "--prompt", "a", "--dry-run"]) == 2
    assert "image to video needs an image" in capsys.readouterr().err
    for kind in ("5B-InP", "5B-Control", "A14B-Control"):
        assert open_model(model(kind, root)[3]).preset.name == f"fun-{kind}"


def open_model(folder):
    return wan_mlx.WanPipeline.from_pretrained(folder, dtype="float32", progress=False)


def made(opened, size, output, *words: str) -> np.ndarray:
    assert main(command(opened, size, output, *words)) == 0
    with np.load(output) as file:
        return file["latents"]


def test_converted(sources, root, tmp_path):
    """An MLX folder makes the same video, without an image encoder, whatever the kind that its config.json says."""
    opened = model("5B-InP", root)
    size, _ = written(sources, "5B-InP")
    asked = ["--model", "fun-5B-InP", "--quiet", "--dtype", "float32"]
    assert main(["convert", str(opened[3]), str(tmp_path / "mlx"), *asked]) == 0
    words = words_of(sources, "last")
    folders = (opened, (*opened[:3], tmp_path / "mlx"))
    got = [made(folder, size, tmp_path / "a.npz", *words, "--overwrite") for folder in folders]
    assert np.array_equal(*got)


def test_each_expert_has_its_own_form_and_loras(sources, root, tmp_path):
    opened = model("A14B-Control", root)
    size, _ = written(sources, "A14B-Control")
    lora = {"diffusion_model.ref_conv.diff_b": torch.full((128,), 0.5),
            "diffusion_model.blocks.0.self_attn.o.lora_A.weight": torch.ones(1, 128),
            "diffusion_model.blocks.0.self_attn.o.lora_B.weight": torch.full((128, 1), 0.01)}  # fmt: skip
    save_file(lora, tmp_path / "lora.safetensors")
    words = [*words_of(sources, "reference control"), "--overwrite"]
    plain, *changed = (
        made(opened, size, tmp_path / "a.npz", *words, *more)
        for more in ([], ["--quantize-high", "q8-g32"], ["--lora-low", str(tmp_path / "lora.safetensors")])
    )
    for latents in changed:
        assert 1e-5 < relative_error(latents, plain) < 0.9
