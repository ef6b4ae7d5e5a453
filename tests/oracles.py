"""PyTorch references: the official modules from the ``wan22`` package, imported one by one.

The package's own ``__init__`` pulls in CUDA-only and unrelated models, so bare package objects stand in for it.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from arrays import relative_error as relative_error  # the tests of parity take it from here
from PIL import Image

torch = pytest.importorskip("torch")


def official(module: str):
    """Import ``wan.<module>`` of the official code, e.g. ``official("modules.vae2_1")``."""
    if "wan" not in sys.modules:
        if importlib.util.find_spec("wan") is None:
            pytest.skip("needs the official modules: pip install --no-deps wan22")
        root = Path(next(iter(importlib.util.find_spec("wan").submodule_search_locations)))
        for name in ("wan", "wan.modules", "wan.utils"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    # A default argument of the umT5 wrapper asks for the current CUDA device while the module is imported.
    current_device, torch.cuda.current_device = torch.cuda.current_device, lambda: "cpu"
    try:
        return importlib.import_module(f"wan.{module}")
    finally:
        torch.cuda.current_device = current_device


def randomize(module, seed: int = 0, std: float | None = None) -> None:
    """Give every parameter of a torch module random values, so that no zero or identity hides an error.

    Matrices get N(0, 1/fan_in) (or ``std``), vectors get 1 + 0.1 N (scales) or 0.1 N (biases).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if p.squeeze().ndim >= 2:
                noise *= std or p[0].numel() ** -0.5
            else:
                noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
            p.copy_(noise)


def diffusers_transformer(config):
    """Diffusers' class for a `TransformerConfig`, as it initialises itself."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    sizes = dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    if config.model_type == "vace":
        vace = dict(vace_layers=list(config.vace_layers), vace_in_channels=config.vace_in_dim)
        return WanVACETransformer3DModel(**sizes, **vace).eval()
    if config.model_type == "animate":
        return diffusers_animate(config, **sizes)
    if config.has_image_branch:
        sizes |= dict(image_dim=config.image_dim, added_kv_proj_dim=config.dim)
    if config.model_type == "flf2v":
        sizes["pos_embed_seq_len"] = 2 * 257
    return WanTransformer3DModel(**sizes).eval()


def diffusers_animate(config, **sizes):
    from diffusers import WanAnimateTransformer3DModel

    features, count, dim = config.motion_dims
    width, tokens = config.face_dims
    channels = {str(config.face_side // 2**n): width for n, width in enumerate(config.motion_widths)}
    return WanAnimateTransformer3DModel(
        **sizes, image_dim=config.image_dim, added_kv_proj_dim=config.dim, motion_encoder_size=config.face_side,
        motion_encoder_channel_sizes=channels, motion_style_dim=features, motion_dim=count, motion_encoder_dim=dim,
        face_encoder_hidden_dim=width, face_encoder_num_heads=tokens,
        inject_face_latents_blocks=config.num_layers // len(config.face_layers),
    ).eval()  # fmt: skip


def unmasked_attention(q, k, v, k_lens=None, **_):
    """float32 stand-in for the official CUDA-only kernel; every length must be the full one."""
    assert k_lens is None or all(int(n) == k.shape[1] for n in k_lens)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def official_s2v():
    """The official module of speech to video's transformer, its CUDA-only attention replaced."""
    official("modules.model")
    for name in ("wan.modules.s2v", "wan.distributed"):  # whose own __init__ imports what is not needed
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            path = [str(Path(sys.modules["wan"].__path__[0]).joinpath(*name.split(".")[1:]))]
            sys.modules[name].__path__ = path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's autocast
        module = official("modules.s2v.model_s2v")
    module.flash_attention = official("modules.model").flash_attention = unmasked_attention
    return module


def official_clip():
    """The official CLIP module, its CUDA-only attention replaced; of torchvision it uses the normalisation alone."""

    class Transform:
        def __init__(self, *args, **kwargs):
            self.args, self.kwargs = args, kwargs

    class Compose(Transform):
        @property
        def transforms(self):
            return self.args[0]

    class Normalize(Transform):
        def __call__(self, images):
            mean, std = (torch.tensor(self.kwargs[name])[:, None, None] for name in ("mean", "std"))
            return (images - mean) / std

    def module(name, **attributes):
        made = types.ModuleType(name)
        vars(made).update(attributes)
        return made

    bicubic = types.SimpleNamespace(BICUBIC="bicubic")
    transforms = dict(
        Compose=Compose, Normalize=Normalize, Resize=Transform, ToTensor=Transform, InterpolationMode=bicubic
    )
    root = official("modules.t5").__file__.rsplit("/", 1)[0]
    with pytest.MonkeyPatch.context() as patch:
        # The packages' own __init__ imports much that is not needed; transformers must not meet the bare torchvision.
        patch.setitem(sys.modules, "wan.modules.animate", module("wan.modules.animate", __path__=[f"{root}/animate"]))
        patch.setitem(sys.modules, "torchvision", module("torchvision"))
        patch.setitem(sys.modules, "torchvision.transforms", module("torchvision.transforms", **transforms))
        clip = official("modules.animate.clip")
    clip.flash_attention = unmasked_attention
    return clip


def official_animate():
    """The official module of Animate's transformer, its CUDA-only attention replaced."""
    clip = official_clip()
    root = Path(clip.__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("modules.animate", "distributed"):
            patch.setitem(sys.modules, f"wan.{name}", types.ModuleType(f"wan.{name}"))
            sys.modules[f"wan.{name}"].__path__ = [str(root.joinpath(*name.split(".")))]
        animate, faces = official("modules.animate.model_animate"), official("modules.animate.face_blocks")
    animate.flash_attention = unmasked_attention
    faces.attention = lambda q, k, v, **_: unmasked_attention(q, k, v).flatten(2)
    return animate


def official_animation():
    """The official module of Animate's loop, in float32 on the CPU; of OpenCV it has what it needs, by PyTorch."""

    class Float32:
        bfloat16, autocast = torch.float32, staticmethod(lambda **_: contextlib.nullcontext())

        def __getattr__(self, name):
            return getattr(torch, name)

    def resize(image, size, interpolation):
        picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(picture, size=size[::-1], mode="bilinear")[0]
        return (resized + 0.5).floor().byte().permute(1, 2, 0).numpy()

    animate, clip = official_animate(), official_clip()
    root = Path(clip.__file__).parents[2]
    stubs = {
        "cv2": dict(INTER_LINEAR=1, resize=resize, imread=lambda path: np.asarray(Image.open(path))[..., ::-1]),
        "decord": dict(VideoReader=None),
        "peft": dict(set_peft_model_state_dict=None, LoraConfig=None),
        "wan.distributed": dict(__path__=[str(root / "distributed")]),
        "wan.modules.animate": dict(__path__=[str(root / "modules/animate")], CLIPModel=None,
                                    WanAnimateModel=animate.WanAnimateModel),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in stubs.items():
            patch.setitem(sys.modules, name, types.ModuleType(name))
            vars(sys.modules[name]).update(attributes)
        module = official("animate")
    module.torch = Float32()
    return module


def official_clip_model(seed: int, **sizes):
    """The official ``CLIPModel`` around a network of these sizes, both towers of it, with random weights."""
    clip = official_clip()
    wrapper = object.__new__(clip.CLIPModel)
    wrapper.dtype = torch.float32
    wrapper.model, wrapper.transforms = clip.clip_xlm_roberta_vit_h_14(return_transforms=True, **sizes)
    randomize(wrapper.model.eval().requires_grad_(False), seed)
    return wrapper


def official_features(wrapper, images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) → (N, L, D), each image given as the official tasks give it: a video (3, 1, H, W)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.cuda.amp.autocast
        return wrapper.visual([torch.from_numpy(image).permute(2, 0, 1)[:, None] for image in images])


def official_text(encoder, tokenizer: bytes, text: str) -> torch.Tensor:
    """(length, text_dim): padded to 512 with a mask, encoded, trimmed to the real length."""
    ids = [*sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode(text), 1][:512]
    padded = torch.tensor([ids + [0] * (512 - len(ids))])
    mask = (torch.arange(512)[None] < len(ids)).long()
    return encoder(padded, mask)[0, : len(ids)]


def official_latents(
    velocity,
    texts,
    shape: tuple,
    *,
    steps: int,
    shift: float,
    guidance,
    seed: int,
    solver: str = "unipc",
    begin: int = 0,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two passes per step, the official solver, float32: latents of ``shape`` (C, t, h, w).

    ``velocity``: (latents, timestep (1,), text) → velocity, as latents; ``texts``: what to show, what to avoid.
    ``guidance``: the scale, or timestep → scale.
    ``source``: latents to put under the noise of step ``begin``, which is the first, as Diffusers does.
    """
    if solver == "unipc":
        scheduler = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
        scheduler.set_timesteps(steps, device="cpu", shift=shift)
    else:
        solvers = official("utils.fm_solvers")
        scheduler = solvers.FlowDPMSolverMultistepScheduler(shift=1)
        scheduler.set_timesteps(sigmas=solvers.get_sampling_sigmas(steps, shift), device="cpu")
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if source is not None:
        scheduler.set_begin_index(begin)
        noise, first = latents[None], scheduler.timesteps[begin : begin + 1]
        latents = scheduler.add_noise(source[None], noise, first)[0]
    for t in scheduler.timesteps[begin:]:
        cond, uncond = (velocity(latents, t[None], text) for text in texts)
        guided = uncond + (guidance(t) if callable(guidance) else guidance) * (cond - uncond)
        latents = scheduler.step(guided[None], t, latents[None], return_dict=False)[0][0]
    return latents


def official_frames(vae, scale, latents: torch.Tensor) -> np.ndarray:
    """Decoded, clamped, and truncated to uint8 as the official ``cache_video`` does; a still is rounded."""
    video = (vae.decode(latents[None], scale)[0].clamp(-1, 1) + 1) / 2 * 255
    if video.shape[1] == 1:
        video += 0.5
    return video.type(torch.uint8).movedim(0, -1).numpy()


def in_halves(name: str, array: np.ndarray, head_dim: int) -> np.ndarray:
    """A parameter of a transformer with the rows in our order, written out so that the package is not its own judge.

    Of the rows that make rotated queries and keys, each head's even ones come first, then its odd ones.
    """
    if not re.search(r"self_attn\.(q|k|norm_q|norm_k)\.", name):
        return array
    order = [i for odd in (0, 1) for i in range(odd, head_dim, 2)]
    return array[[head + i for head in range(0, len(array), head_dim) for i in order]]
