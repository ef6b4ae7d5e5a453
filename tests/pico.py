"""A tiny model without torch: nano with one block in its transformer and one in its text encoder. It makes no sense."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx

from wan_mlx.weights.hub import BUNDLED

LATER_BLOCK = re.compile(r"blocks\.[1-9]\d*\.")


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
