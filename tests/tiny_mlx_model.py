"""Tiny models without torch, which make no sense: nano with one block in each transformer; a VAE of random weights."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from wan_mlx.models.configs import VAE22Config, VAEConfig
from wan_mlx.models.networks import new_network
from wan_mlx.models.vae import VAE
from wan_mlx.presets import BUNDLED

LATER_BLOCK = re.compile(r"blocks\.[1-9]\d*\.")
LATENTS = dict(z_dim=4, mean=(0.5, -0.3, 0.0, 1.0), std=(1.0, 2.0, 0.7, 1.5))
VAE_CONFIG = VAEConfig(dim=8, **LATENTS)
VAE_CONFIGS = {"2.1": VAE_CONFIG, "2.2": VAE22Config(dim=4, decoder_dim=6, **LATENTS)}


def write(folder: Path) -> Path:
    """Write the model as an MLX folder."""
    nano = BUNDLED["nano"]
    folder.mkdir()
    config = json.loads((nano / "config.json").read_text())
    for name in ("transformer", "text_encoder"):
        arrays, metadata = mx.load(str(nano / f"{name}.safetensors"), return_metadata=True)
        kept = {key: array for key, array in arrays.items() if not LATER_BLOCK.match(key)}
        mx.save_safetensors(str(folder / f"{name}.safetensors"), kept, metadata)
        config[name]["num_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("vae.safetensors", "tokenizer.model"):
        shutil.copyfile(nano / name, folder / name)
    return folder


def random_vae(config: VAEConfig = VAE_CONFIG) -> VAE:
    """A VAE of these sizes, float32."""
    rng = np.random.default_rng(0)

    def fill(path, value):
        noise = rng.normal(size=value.shape)
        return mx.array(noise * value[0].size ** -0.5 if value.ndim > 1 else 0.1 * noise + path.endswith("gamma"))

    vae = new_network(config)
    return vae.update(tree_map_with_path(lambda p, v: fill(p, v).astype(mx.float32), vae.parameters()))


def random(*shape: int) -> mx.array:
    """Uniform in [-1, 1], float32."""
    return mx.array(np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32))
