"""Headers and config.json whose sizes make no sense end in one WeightsError, before anything is allocated."""

import dataclasses
import json
import tracemalloc

import published
import pytest
from test_full_size_keys import HeaderOnly

from wan_mlx.errors import WeightsError
from wan_mlx.models import configs
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import ComponentWeights
from wan_mlx.weights.config_files import MAX_CONFIG_BYTES
from wan_mlx.weights.configs import network_config

COMPONENTS = {
    "transformer": configs.TransformerConfig,
    "text_encoder": configs.TextEncoderConfig,
    "vae": configs.VAEConfig,
    "image_encoder": configs.ImageEncoderConfig,
}
VALUES = ("x", -1, 0, 1.5, 10**30, [], {}, [1, "a"], True, float("inf"), float("nan"), [float("nan")] * 16)
# Lists that other kinds of transformers have.
OTHERS = ("vace_layers", "audio_inject_layers", "face_layers", "motion_widths", "motion_dims", "face_dims")
# What sizes are read from.
KEYS = {
    "transformer": ("patch_embedding.weight", "text_embedding.0.weight", "blocks.0.ffn.0.weight", "head.head.weight"),
    "text_encoder": ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "blocks.0.attn.q.weight"),
    "vae": ("encoder.conv1.weight", "conv2.weight", "encoder.downsamples.2.resample.1.weight"),
    "image_encoder": ("visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.0.mlp.0.weight"),
}


@pytest.fixture(scope="module")
def shapes():
    return {name: {k: tuple(t.shape) for k, t in state.items()} for name, state in published.states().items()}


def judge(component: str, shapes, config) -> str | None:
    """The refusal, or None if the sizes are taken."""
    try:
        network_config(ComponentWeights(HeaderOnly(shapes)), config)
        return None
    except WeightsError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize("component", COMPONENTS)
def test_configs(component, shapes):
    assert judge(component, shapes[component], {}) is None
    for field in dataclasses.fields(COMPONENTS[component]):
        assert judge(component, shapes[component], {field.name: None}) is None
        for value in VALUES:
            refusal = judge(component, shapes[component], {field.name: value})
            fits = (isinstance(field.default, float) and value == 1.5) or value is field.default is True
            unread = field.name in OTHERS and value == []
            assert (refusal is None) == (fits or unread), (field.name, value, refusal)


@pytest.mark.parametrize("component", COMPONENTS)
def test_shapes(component, shapes):
    tracemalloc.start()
    try:
        good = shapes[component]
        for key in KEYS[component]:
            shape = good[key]
            for bad in ((), (0,), (*shape, 2), shape[:-1], (0,) * len(shape), (2**30,) * len(shape)):
                assert judge(component, {**good, key: bad}, {}) is not None, (key, bad)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_heads_that_do_not_divide(shapes):
    assert "3 heads do not divide 128" in judge("transformer", shapes["transformer"], {"num_heads": 3})


@pytest.mark.parametrize("text", ['{"dim": ' * 5000, "[" * 200_000, "[1]", '{"a": "' + "x" * MAX_CONFIG_BYTES + '"}'])
def test_config_files(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_wrong_kinds_are_named(shapes):
    refusal = judge("vae", shapes["vae"], {"mean": json.loads("[1, null]")})
    assert "config.json says mean = [1, None], expected a list of numbers" in refusal
