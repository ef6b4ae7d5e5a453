"""The official speech to video (``wan.speech2video``) on a CPU in float32: its own loop, around tiny networks.

What it takes from packages that are not here is stated anew: of torchvision three transforms, of decord a reader of
videos, of librosa one of sound; its transformers are older, and gave the last hidden state after its norm.
"""

import sys
import types
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import official, official_s2v, official_text, torch
from PIL import Image
from test_vae import scale

from wan_mlx.models.configs import VAEConfig


class Resize:
    """So that the shorter side has this length; with antialiasing."""

    def __init__(self, short: int):
        self.short = short

    def __call__(self, image):
        height, width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[-2:]
        longer = int(self.short * max(height, width) / min(height, width))
        size = (self.short, longer) if height <= width else (longer, self.short)
        if isinstance(image, Image.Image):
            return image.resize(size[::-1], Image.Resampling.BILINEAR)
        return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


class CenterCrop:
    """The middle; zeros where there is nothing."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image):
        if isinstance(image, Image.Image):
            pixels = self(torch.from_numpy(np.array(image)).movedim(-1, 0))
            return Image.fromarray(pixels.movedim(0, -1).numpy())
        lacking = [max(0, wanted - there) for wanted, there in zip(self.size, image.shape[-2:], strict=True)]
        sides = [side for n in reversed(lacking) for side in (n // 2, (n + 1) // 2)]
        image = torch.nn.functional.pad(image, sides)
        top, left = (round((there - wanted) / 2) for there, wanted in zip(image.shape[-2:], self.size, strict=True))
        return image[..., top : top + self.size[0], left : left + self.size[1]]


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


class VideoReader:
    """decord's, of a whole video."""

    def __init__(self, path: str):
        with av.open(str(path)) as file:
            self.rate = float(file.streams.video[0].average_rate)
            self.frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])

    def get_avg_fps(self) -> float:
        return self.rate

    def __len__(self) -> int:
        return len(self.frames)

    def get_batch(self, numbers):
        return SimpleNamespace(asnumpy=lambda: self.frames[numbers])


def load_sound(path: str, sr: int) -> tuple[np.ndarray, int]:
    """librosa's ``load``, of a file of 16 bits at the wanted rate."""
    with av.open(str(path)) as file:
        assert (file.streams.audio[0].rate, file.streams.audio[0].channels) == (sr, 1)
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return samples / np.float32(2**15), sr


def module(name: str, **attributes) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


def speech_module(monkeypatch):
    """The official module, around what it needs of packages that are not here."""
    official_s2v()
    transforms = module("torchvision.transforms", Resize=Resize, CenterCrop=CenterCrop, ToTensor=ToTensor)
    for name, made in {
        "torchvision": module("torchvision", transforms=transforms),
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": module("torchvision.transforms.functional"),
        "decord": module("decord", VideoReader=VideoReader),
        "librosa": module("librosa", load=load_sound),
    }.items():
        monkeypatch.setitem(sys.modules, name, made)
    return official("speech2video")


def official_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) of the video of a picture."""
    with pytest.MonkeyPatch.context() as patch:
        cls = speech_module(patch).WanS2V
        return cls.get_size_less_than_area(object.__new__(cls), height, width, target_area=area)


def official_pipeline(modules, monkeypatch):
    """The official class around these networks; its ``generate`` makes a video float32 (3, T, H, W)."""
    speech = speech_module(monkeypatch)
    pipe = object.__new__(speech.WanS2V)
    vae = object.__new__(official("modules.vae2_1").Wan2_1_VAE)
    vae.model, vae.scale, vae.dtype, vae.device = modules["vae"], scale(VAEConfig()), torch.float32, "cpu"
    tokenizer = checkpoints.sentencepiece_model()

    def encode(texts, device):
        return [official_text(modules["text_encoder"], tokenizer, one) for one in texts]

    vars(pipe).update(
        device=torch.device("cpu"), param_dtype=torch.float32, num_train_timesteps=1000, rank=0, t5_cpu=True,
        init_on_cpu=True, text_encoder=encode, vae=vae, noise_model=modules["transformer"],
        audio_encoder=audio_encoder(modules["audio_encoder"]), motion_frames=73, drop_first_motion=True, fps=16,
        audio_sample_m=0,
    )  # fmt: skip
    return pipe


def audio_encoder(model):
    """The official class around a wav2vec of any size."""
    encoder = object.__new__(official("modules.s2v.audio_encoder").AudioEncoder)

    def processed(sound, sampling_rate, return_tensors):
        normed = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
        return SimpleNamespace(input_values=torch.from_numpy(normed.astype(np.float32))[None])

    class Model:
        device = "cpu"

        def __call__(self, values, output_hidden_states):
            result = model.wav2vec2(values, output_hidden_states=True)
            return SimpleNamespace(hidden_states=[*result.hidden_states[:-1], result.last_hidden_state])

    encoder.processor, encoder.model, encoder.video_rate = processed, Model(), 30
    return encoder


def official_video(modules, monkeypatch, prompt: str, negative: str, image: Path, audio: Path, **options) -> np.ndarray:
    """uint8 (T, H, W, 3), as the official command saves it."""
    pipe = official_pipeline(modules, monkeypatch)
    video = pipe.generate(
        prompt, str(image), str(audio), False, None, None, None, n_prompt=negative, offload_model=False, **options
    )
    return ((video.clamp(-1, 1) + 1) / 2 * 255).type(torch.uint8).movedim(0, -1).numpy()
