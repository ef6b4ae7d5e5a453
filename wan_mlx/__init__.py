"""The Wan2.1 and Wan2.2 video models on Apple silicon, in MLX.

    import wan_mlx

    pipe = wan_mlx.WanPipeline.from_pretrained("nano")         # or "Wan-AI/Wan2.1-T2V-1.3B", a folder, a file
    video = pipe("a red circle moves right on a blue background", seed=42)
    video.save("circle.mp4")                                   # .gif .webp .png .npz; a notebook shows `video` itself
    video.grid()                                               # a contact sheet
    video.smooth(fps=32)                                       # frames between, by RIFE
    print(wan_mlx.plan("t2v-14B", memory="16GB"))              # whether it fits, before a download

A `Request` is the user's wish; `WanPipeline.request` fills in the model's defaults. `WanPipeline.run` makes a
`Run` of it, whose events (`wan_mlx.events`) tell all that happens; `WanPipeline.stages` yields only what comes of it:
the `Conditioning`, a `Step` for every sampling step, then decoded frames.
`PRESETS` has the released models with their defaults, and the functions `load_...` give single networks. Wrong
arguments raise ValueError; other failures raise a `WanError`. `wan_mlx.types` explains the shapes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of __getattr__, for editors and type checkers
    from .errors import MemoryPlanError as MemoryPlanError
    from .errors import SamplingError as SamplingError
    from .errors import WanError as WanError
    from .errors import WeightsError as WeightsError
    from .media.video import Video as Video
    from .media.video import export_to_video as export_to_video
    from .pipeline import WanPipeline as WanPipeline
    from .pipeline import plan as plan
    from .planning.plan import Plan as Plan
    from .presets import PRESETS as PRESETS
    from .prompts.extend import PromptExtender as PromptExtender
    from .prompts.extend import extend_prompt as extend_prompt
    from .runs.run import Run as Run
    from .smoothing import smooth as smooth
    from .types import Conditioning as Conditioning
    from .types import Request as Request
    from .types import Step as Step
    from .weights.load import load_image_encoder as load_image_encoder
    from .weights.load import load_text_encoder as load_text_encoder
    from .weights.load import load_transformer as load_transformer
    from .weights.load import load_vae as load_vae
    from .weights.rife import load_rife as load_rife
    from .weights.taehv import load_taehv as load_taehv

__version__ = "0.1.0"

# On CUDA, MLX gathers submitted work in graphs. Where each operation is large, making them costs more than they save:
# the VAE takes a quarter longer with them. MLX asks once, when it first computes.
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
# On a Mac float32 is to mean float32: by default an M5 multiplies it in TF32. MLX asks when it first multiplies.
if sys.platform == "darwin" and "MLX_ENABLE_TF32" not in os.environ:
    os.environ["MLX_ENABLE_TF32"] = "0"
    if "mlx.core" in sys.modules:
        logging.getLogger(__name__).warning(
            "mlx was imported before wan_mlx: if it has multiplied by now, an M5 goes on rounding float32 to TF32; "
            "import wan_mlx first, or set MLX_ENABLE_TF32=0 in the environment"
        )

# Name → module it lives in. Imported on first use, so that `import wan_mlx` is instant.
_PUBLIC = {
    "WanPipeline": "pipeline",
    "Run": "runs.run",
    "PRESETS": "presets",
    "Request": "types",
    "Conditioning": "types",
    "Step": "types",
    "Video": "media.video",
    "export_to_video": "media.video",
    "plan": "pipeline",
    "Plan": "planning.plan",
    "MemoryPlanError": "errors",
    "WanError": "errors",
    "WeightsError": "errors",
    "SamplingError": "errors",
    "load_transformer": "weights.load",
    "load_text_encoder": "weights.load",
    "load_vae": "weights.load",
    "load_image_encoder": "weights.load",
    "load_taehv": "weights.taehv",
    "load_rife": "weights.rife",
    "smooth": "smoothing",
    "extend_prompt": "prompts.extend",
    "PromptExtender": "prompts.extend",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        return _of_diffusers(name)
    check_backend()
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def _of_diffusers(name: str) -> Any:
    """What Diffusers calls so, or an error that says what to write; other names are not there."""
    words = importlib.import_module(".other_words", __name__)
    if name in words.SAME_NAMES:
        return __getattr__(words.SAME_NAMES[name])
    if name == "models":  # the networks; called, they say what lists the models
        return importlib.import_module(".models", __name__)
    if name in words.NAMES:
        hint = f"wan_mlx has no {name}: {words.NAMES[name]}"
        # `from wan_mlx import name` would leave an AttributeError's words out; but a module it then imports.
        imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"
        is_module = importlib.util.find_spec(f".{name}", __name__) is not None
        raise ImportError(hint) if imported and not is_module else AttributeError(hint)
    raise AttributeError(f"module 'wan_mlx' has no attribute {name!r}")


def check_backend() -> None:
    """Raise ImportError, in one line that names the package to install, if MLX or its backend is missing."""
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        install = importlib.import_module(".errors", __name__).install_command
        way = f"its backend is missing: {install('mlx[cpu]')}; or, with an NVIDIA GPU: {install('mlx[cuda13]')}"
        if sys.platform == "darwin":
            way = (f"it needs macOS 14 or later, and a Python for arm64 and not under Rosetta (this one is for "
                   f"{platform.machine()}); then: {install('--force-reinstall', 'mlx')}")  # fmt: skip
        raise ImportError(f"MLX cannot be imported ({error}); {way}") from error


def __dir__() -> list[str]:
    return sorted(__all__)
