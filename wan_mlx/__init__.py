"""wan_mlx: the Wan2.1 video models on Apple silicon, in MLX.

import wan_mlx
pipe = wan_mlx.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B")
video = pipe("a cat boxing")
video.save("cat.mp4")
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Name → module it lives in. Imported on first use, so that `import wan_mlx` is instant.
_PUBLIC = {
    "WanPipeline": "pipeline",
    "PRESETS": "configs",
    "Request": "types",
    "Conditioning": "types",
    "Step": "types",
    "Video": "types",
    "plan": "memory",
    "Plan": "memory",
    "MemoryPlanError": "types",
    "WanError": "types",
    "WeightsError": "types",
    "SamplingError": "types",
    "load_transformer": "weights.networks",
    "load_text_encoder": "weights.networks",
    "load_vae": "weights.networks",
    "load_image_encoder": "weights.networks",
    "load_taehv": "weights.taehv",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'wan_mlx' has no attribute {name!r}")
    check_backend()
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def check_backend() -> None:
    """Raise ImportError, in one line that says what to install, if MLX or its backend is missing."""
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise ImportError(
            f"MLX cannot be imported ({error}). On a Mac: pip install wan-mlx; "
            "on Linux: pip install 'wan-mlx[cpu]' or 'wan-mlx[cuda13]'"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
