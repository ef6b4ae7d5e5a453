"""Fixtures of crafted weight files."""

import json

import pytest
from crafted import TWO, TWO_DATA, entry, write_pth, write_safetensors


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
