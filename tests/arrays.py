"""Random arrays and networks, and how far two results are apart; without torch."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def random_array(seed: int, *shape: int) -> mx.array:
    """Normal, float32."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def randomized(module: nn.Module) -> nn.Module:
    """``module`` with random weights, of a size that activations keep theirs."""
    weights = [
        (name, random_array(index, *array.shape) / max(1, array.shape[-1]) ** 0.5 + ("norm" in name))
        for index, (name, array) in enumerate(tree_flatten(module.parameters()))
    ]
    module.load_weights(weights)
    mx.eval(module.parameters())  # on the CPU each pass has a thread, and an array is computed where it was made
    return module


def relative_error(got, want) -> float:
    """max |a-b| / max |b|, the measure of the bounds on parity; shapes must agree and values be finite."""
    got, want = (np.asarray(array, dtype=np.float64) for array in (got, want))
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all() and np.isfinite(want).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def relative_distance(got: mx.array, want: mx.array) -> float:
    """|a-b| / |b|, Euclidean: the measure of quantised weights and what they give."""
    got, want = (array.astype(mx.float32).flatten() for array in (got, want))
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
