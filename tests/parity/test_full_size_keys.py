"""At full size: the reference classes' own lists of keys and shapes (torch's meta device) load strictly into ours."""

import math
from pathlib import Path

import pytest
import test_layouts
from oracles import official, torch

from benchmarks.random_checkpoint import published
from wan_mlx.errors import WeightsError
from wan_mlx.files.base import TensorInfo, WeightsFile
from wan_mlx.models.configs import AudioEncoderConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_mlx.models.image_encoder import ImageEncoder, last_block_shapes
from wan_mlx.models.text_encoder import TextEncoder
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vae import VAE
from wan_mlx.presets import PRESETS
from wan_mlx.weights.component import ComponentWeights, check_keys, parameter_shapes
from wan_mlx.weights.configs import network_config, shapes_of


class HeaderOnly(WeightsFile):
    """What a weight file's header tells; there is no data behind it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.path = Path("published.safetensors")
        self.metadata = {}
        self.tensors = {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}


def on_meta(build, *args, **kwargs) -> ComponentWeights:
    with torch.device("meta"):
        return ComponentWeights(HeaderOnly({n: tuple(t.shape) for n, t in build(*args, **kwargs).state_dict().items()}))


def official_transformer(name: str) -> ComponentWeights:
    c = PRESETS[name].transformer
    sizes = dict(dim=c.dim, ffn_dim=c.ffn_dim, num_heads=c.num_heads, num_layers=c.num_layers, freq_dim=c.freq_dim)
    return on_meta(official("modules.model").WanModel, model_type="t2v", in_dim=16, out_dim=16, text_dim=4096, **sizes)


@pytest.mark.parametrize("name, count", [("t2v-1.3B", 825), ("t2v-14B", 1095)])
def test_transformer(name, count):
    weights = official_transformer(name)
    assert len(weights.shapes) == count
    config = network_config(weights, {"num_heads": PRESETS[name].transformer.num_heads})
    assert config == PRESETS[name].transformer
    assert network_config(weights, {}) == config  # heads of 128 where no config.json says otherwise
    check_keys(weights, parameter_shapes(Transformer(config)))


def test_text_encoder():
    sizes = dict(vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32)
    weights = on_meta(official("modules.t5").T5Encoder, shared_pos=False, **sizes)
    assert network_config(weights, {}) == TextEncoderConfig()
    check_keys(weights, parameter_shapes(TextEncoder(TextEncoderConfig())))


def test_vae():
    sizes = dict(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    weights = on_meta(official("modules.vae2_1").WanVAE_, **sizes)
    assert network_config(weights, {}) == VAEConfig()
    check_keys(weights, parameter_shapes(VAE(VAEConfig())))


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.repo])
@pytest.mark.parametrize("layout", ["diffusers", "official", "comfyui"])
def test_every_released_transformer(name, layout):
    """Sizes from the file alone; then neither a key too many nor one too few, and every shape."""
    config = PRESETS[name].transformer
    if layout == "diffusers" and (config.ref_dim is not None or config.model_type == "s2v"):
        pytest.skip("Diffusers has no class of Fun-Control, nor of S2V")
    shapes = {"diffusers": test_layouts.diffusers_shapes}.get(layout, test_layouts.official_transformer)(config)
    prefix = "model.diffusion_model." if layout == "comfyui" else ""  # that some of its files have
    shapes = {prefix + key: shape for key, shape in shapes.items()}
    for lacking in (None, f"blocks.{config.num_layers - 1}.", "patch_embedding.bias"):
        keys = {key: shape for key, shape in shapes.items() if lacking is None or lacking not in key}
        weights = ComponentWeights(HeaderOnly(keys))
        assert weights.layout.name == layout.replace("comfyui", "official")
        if lacking is None:
            assert network_config(weights, {}) == config
            check_keys(weights, shapes_of(config))
    with pytest.raises(WeightsError, match="lacks|without|missing"):
        network_config(weights, {})
    with pytest.raises(WeightsError, match="head.more"):
        network_config(ComponentWeights(HeaderOnly({**shapes, "head.more": (1,)})), {})


@pytest.mark.parametrize("name", ["t2v-1.3B", "i2v-14B-480P", "s2v-14B", "animate-14B"])
def test_a_random_checkpoint_is_as_published(name):
    """What the benchmarks write has the official names and shapes, but for biases' axes of size 1 and constants."""
    config = PRESETS[name].transformer
    official_shapes = test_layouts.official_transformer(config)
    want = {key: (math.prod(shape),) if key.endswith(".bias") else shape
            for key, shape in official_shapes.items() if not key.endswith(".kernel")}  # fmt: skip
    assert published(config) == want
    if config.hears:
        want = test_layouts.official_audio_encoder()
        kept = {key.removeprefix("wav2vec2."): shape for key, shape in want.items()}
        unused = {"masked_spec_embed", "lm_head.weight", "lm_head.bias"}
        assert published(AudioEncoderConfig()) == {key: kept[key] for key in kept.keys() - unused}
        assert len(kept) - len(published(AudioEncoderConfig())) <= 3


def test_huggingface_text_encoder():
    for shapes in (test_layouts.hf_text_encoder(), test_layouts.gguf_text_encoder()):
        weights = ComponentWeights(HeaderOnly(shapes))
        assert network_config(weights, {}) == TextEncoderConfig()
        check_keys(weights, parameter_shapes(TextEncoder(TextEncoderConfig())))


def test_diffusers_vae():
    weights = ComponentWeights(HeaderOnly(test_layouts.diffusers_vae()))
    assert network_config(weights, {}) == VAEConfig()
    check_keys(weights, parameter_shapes(VAE(VAEConfig())))


def test_huggingface_image_encoder():
    weights = ComponentWeights(HeaderOnly(test_layouts.hf_image_encoder()))
    assert network_config(weights, {}) == ImageEncoderConfig()
    check_keys(weights, parameter_shapes(ImageEncoder(ImageEncoderConfig())) | last_block_shapes(ImageEncoderConfig()))


def test_the_check_is_strict():
    weights = official_transformer("t2v-1.3B")
    shapes = parameter_shapes(Transformer(PRESETS["t2v-1.3B"].transformer))
    with pytest.raises(WeightsError, match="lacks head.extra"):
        check_keys(weights, {**shapes, "head.extra": (1,)})
    with pytest.raises(WeightsError, match="unexpected blocks.7.modulation"):
        check_keys(weights, {k: s for k, s in shapes.items() if k != "blocks.7.modulation"})
    with pytest.raises(WeightsError, match="other shapes: head.modulation"):
        check_keys(weights, {**shapes, "head.modulation": (1, 3, 1536)})
