"""Two experts of nano's size, as a folder, and what tests of them share."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.presets import PRESETS

T2V, I2V = PRESETS["t2v-A14B"], PRESETS["i2v-A14B"]
T2V_14B, I2V_A14B = T2V.transformer, I2V.transformer
QUICK = ["--prompt", "a red circle", "--size", "16x16", "--frames", "1", "--steps", "5", "--seed", "3", "--dtype",
         "float32", "--quiet", "--shift", "3"]  # fmt: skip

def changed(source, target, factor: float = 0.9) -> None:
    """A transformer like another, that makes something else."""
    arrays, metadata = mx.load(str(source), return_metadata=True)
    # All of it, as that of real experts: files are told apart by samples.
    mx.save_safetensors(str(target), {name: factor * array for name, array in arrays.items()}, metadata)


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    """A folder of two experts as `convert` writes it."""
    folder = tmp_path_factory.mktemp("pair") / "pair"
    shutil.copytree(pico, folder)
    as_pair(folder)
    return folder


def as_pair(folder: Path) -> None:
    """Make a model of one transformer one of two experts."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"high_noise": config["transformer"], "low_noise": config.pop("transformer"), "boundary": 0.8}
    (folder / "config.json").write_text(json.dumps(config))
    changed(folder / "transformer.safetensors", folder / "low_noise.safetensors")
    (folder / "transformer.safetensors").rename(folder / "high_noise.safetensors")


def opened(*args, **options) -> wan_mlx.WanPipeline:
    return wan_mlx.WanPipeline.from_pretrained(*args, dtype="float32", progress=False, prompt_cache=False, **options)


def made(path) -> np.ndarray:
    with np.load(path) as file:
        return file["latents"]


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The latents of the video that `QUICK` asks for."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert main(["--model", str(pair), *QUICK, "--output", str(path)]) == 0
    return made(path)


def lora(path, module: str = "diffusion_model.blocks.0.self_attn.o", width: int = 256, value: float = 0.02):
    factors = {"lora_A": mx.full((4, width), value), "lora_B": mx.full((width, 4), 1.0)}
    mx.save_safetensors(str(path), {f"{module}.{name}.weight": array for name, array in factors.items()})
    return path
