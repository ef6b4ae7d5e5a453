"""Fixtures of crafted weight files and of a tiny model, and a cache folder of the tests' own.

Tests compute on the CPU, where equal means equal bit for bit; with WAN_MLX_TESTS_ON=gpu on the GPU.
"""

import json
import os
from itertools import count

# Before PyTorch and numpy: tests run in two processes on two cores, where more threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import pytest
import quick  # noqa: F401  before mlx, which then finds it

import wan_mlx  # noqa: F401  before mlx, so that on a Mac float32 means float32

# isort: split
import mlx.core as mx
import tiny_mlx_model
from crafted import TWO, TWO_DATA, entry, write_pth, write_safetensors

if os.environ.get("WAN_MLX_TESTS_ON") != "gpu":
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="session", autouse=True)
def cache_folders(tmp_path_factory):
    """Encoded prompts of the tests are kept apart from the user's; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("WAN_MLX_CACHE", str(folder / "shared"))
        yield (str(folder / str(number)) for number in count())


@pytest.fixture(autouse=True)
def cache_folder(cache_folders, monkeypatch):
    """And apart from other tests'."""
    monkeypatch.setenv("WAN_MLX_CACHE", next(cache_folders))


@pytest.fixture
def two(tmp_path):
    return write_safetensors(tmp_path / "two.safetensors", TWO, TWO_DATA)


@pytest.fixture
def sharded(tmp_path):
    """An index over two shards; the function writes it with changes to the weight map."""
    write_safetensors(tmp_path / "1.safetensors", {"__metadata__": {"format": "pt", "n": "1"}, **TWO}, TWO_DATA)
    more = {"__metadata__": {"format": "pt", "n": "2"}, "c": entry("U8", [2, 1], 0, 2)}
    write_safetensors(tmp_path / "2.safetensors", more, b"\5\6")
    index = tmp_path / "model.safetensors.index.json"

    def write(**changes):
        weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", **changes}
        index.write_text(json.dumps({"metadata": {"total_size": 30}, "weight_map": weight_map}, indent=1))
        return index

    return write


@pytest.fixture
def pth(tmp_path):
    return lambda *args, **kwargs: write_pth(tmp_path / "model.pth", *args, **kwargs)


@pytest.fixture(scope="session")
def pico(tmp_path_factory):
    """The folder of a model that makes a video in a second, without torch."""
    return tiny_mlx_model.write(tmp_path_factory.mktemp("pico") / "pico")


@pytest.fixture(scope="session")
def flags(pico):
    """A command line, but for its --output, of three steps and three latent frames."""
    return ["--model", str(pico), "--prompt", "a red circle", "--size", "16x16", "--frames", "9", "--steps", "3",
            "--seed", "3", "--dtype", "float32", "--quiet"]  # fmt: skip
