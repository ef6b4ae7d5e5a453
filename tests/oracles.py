"""PyTorch references: the official modules from the ``wan22`` package, imported one by one.

The package's own ``__init__`` pulls in CUDA-only and unrelated models, so bare package objects stand in for it.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

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


def relative_error(got, want) -> float:
    """max |a-b| / max |b|, the measure of DESIGN's bounds; shapes must agree and values be finite."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all() and np.isfinite(want).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def unmasked_attention(q, k, v, k_lens=None, **_):
    """float32 stand-in for the official CUDA-only kernel; every length must be the full one."""
    assert k_lens is None or all(int(n) == k.shape[1] for n in k_lens)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
