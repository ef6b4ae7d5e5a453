"""An MLX folder's config.json: entries of the wrong kind and of newer versions are refused in one line."""

import json
import shutil

import pytest
import tiny_mlx_model
from crafted import refusal

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_mlx_model.write(tmp_path_factory.mktemp("config") / "model")


@pytest.fixture
def folder(written, tmp_path):
    """A function: changes → the folder, with these in its config.json."""

    def change(**changes):
        folder = shutil.copytree(written, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"transformer": []}, "config.json says transformer = [], expected an object"),
        ({"vae": "x\n"}, r"config.json says vae = 'x\n', expected an object"),
        ({"model": {}}, "config.json says model = {}, expected a preset's name"),
        ({"quantization": []}, "config.json says quantization = [], expected a mode"),
        ({"files": []}, "config.json says files = [], expected an object"),
        ({"version": 999}, "config.json says version = 999; it was made by a newer wan_mlx: update this one"),
        ({"version": "1.5"}, "config.json says version = '1.5'; expected 1"),
    ],
)
def test_entries_of_the_wrong_kind(folder, changes, words):
    path = folder(**changes)
    for place in (path, path / "vae.safetensors"):
        with pytest.raises(WeightsError) as refused:
            open_checkpoint(place)
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_entries_that_may_be_missing(folder):
    path = folder(model=None, files=None, quantization=None, version=1)
    assert open_checkpoint(path).model is None


@pytest.mark.parametrize("text", ['{"format": ' + "[" * 100_000, '{"a": ' * 100_000, "[" * 100_000])
def test_a_config_nested_deeply(folder, text):
    path = folder()
    (path / "config.json").write_text(text)
    assert "not readable JSON" in refusal(path / "config.json", lambda _: open_checkpoint(path))


@pytest.mark.parametrize(
    "component, field, value",
    [
        ("transformer", "patch_size", [1, -2, -2]),
        ("transformer", "patch_size", [1.0, 2.0, 2.0]),
        ("transformer", "patch_size", [0, 2, 2]),
        ("vae", "mean", [10**400] * 16),
        ("vae", "mean", [float("nan")] * 16),
        ("text_encoder", "num_layers", -1),
        ("text_encoder", "max_distance", 0),
    ],
)
def test_sizes_that_no_network_has(folder, component, field, value):
    path = folder()
    config = json.loads((path / "config.json").read_text())
    config[component][field] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"says {field} = ") as refused:
        wan_mlx.load_text_encoder(path) if component == "text_encoder" else getattr(wan_mlx, f"load_{component}")(path)
    assert "\n" not in str(refused.value)
