"""Key maps against the reference classes, instantiated at full size on torch's meta device (no memory, real shapes)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracles import diffusers_transformer, official, official_animate, official_s2v, randomize, relative_error
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from wan_mlx.errors import WeightsError
from wan_mlx.files.scaled_names import without_scales
from wan_mlx.models.configs import TextEncoderConfig, TransformerConfig
from wan_mlx.presets import PRESETS
from wan_mlx.weights.component import check_keys
from wan_mlx.weights.layouts import LAYOUTS, canonical_keys, pattern, recognise

Shapes = dict[str, tuple[int, ...]]
COUNTS = {
    "t2v-1.3B": 825,
    "t2v-14B": 1095,
    "i2v-14B-480P": 1303,
    "i2v-14B-720P": 1303,
    "flf2v-14B-720P": 1304,
    "vace-1.3B": 1264,
    "vace-14B": 1331,
    "ti2v-5B": 825,
    "s2v-14B": 1260,
    "animate-14B": 1441 - 14,  # without the kernels of blurs, which are constants
}


def shapes_of(make) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


@cache
def official_transformer(config: TransformerConfig) -> Shapes:
    """The t2v class of the official code, plus what Wan2.1 adds to it, which that package (2.2) no longer has."""
    dim, width = config.dim, config.image_dim
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim")
    sizes = {name: getattr(config, name) for name in names}
    if config.model_type == "s2v":
        return official_speech_transformer(config)
    if config.model_type == "animate":
        return shapes_of(lambda: official_animate().WanAnimateModel(**sizes))
    shapes = shapes_of(lambda: official("modules.model").WanModel(model_type="t2v", **sizes))
    if config.has_image_branch:
        shapes |= norm("img_emb.proj.0", width) | linear("img_emb.proj.1", width, width)
        shapes |= linear("img_emb.proj.3", dim, width) | norm("img_emb.proj.4", dim)
        for n in range(config.num_layers):
            attention = f"blocks.{n}.cross_attn"
            shapes |= linear(f"{attention}.k_img", dim, dim) | linear(f"{attention}.v_img", dim, dim)
            shapes[f"{attention}.norm_k_img.weight"] = (dim,)
    if config.model_type == "flf2v":
        shapes["img_emb.emb_pos"] = (1, 514, width)
    if config.ref_dim is not None:
        shapes |= {"ref_conv.weight": (dim, config.ref_dim, 2, 2), "ref_conv.bias": (dim,)}
    if config.model_type == "vace":
        shapes |= {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2), "vace_patch_embedding.bias": (dim,)}
        shapes |= linear("vace_blocks.0.before_proj", dim, dim)
        block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
        for n in range(len(config.vace_layers)):
            shapes |= {name.replace("blocks.0.", f"vace_blocks.{n}."): shape for name, shape in block.items()}
            shapes |= linear(f"vace_blocks.{n}.after_proj", dim, dim)
    return shapes


def official_speech_transformer(config: TransformerConfig) -> Shapes:
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "audio_dim")
    sizes = {name: getattr(config, name) for name in names} | {"audio_inject_layers": [*config.audio_inject_layers]}
    kind = official_s2v().WanModel_S2V
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "init_weights", lambda self: None)  # takes minutes
        return shapes_of(
            lambda: kind(
                cond_dim=16, zero_timestep=True, enable_motioner=False, enable_framepack=True,
                framepack_drop_mode="padd", enable_adain=config.audio_adain, **sizes,
            )
        )  # fmt: skip


@cache
def diffusers_shapes(config: TransformerConfig) -> Shapes:
    return shapes_of(lambda: diffusers_transformer(config))


@cache
def official_text_encoder(layers: int = TextEncoderConfig.num_layers) -> Shapes:
    c = TextEncoderConfig(num_layers=layers)
    sizes = (c.vocab_size, c.dim, c.dim_attn, c.dim_ffn, c.num_heads, c.num_layers, c.num_buckets)
    return shapes_of(lambda: official("modules.t5").T5Encoder(*sizes, shared_pos=False))


@cache
def hf_text_encoder() -> Shapes:
    c = TextEncoderConfig()
    config = UMT5Config(
        vocab_size=c.vocab_size,
        d_model=c.dim,
        d_kv=c.dim_attn // c.num_heads,
        d_ff=c.dim_ffn,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        relative_attention_num_buckets=c.num_buckets,
        feed_forward_proj="gated-gelu",
    )
    return shapes_of(lambda: UMT5EncoderModel(config))


@cache
def gguf_text_encoder() -> Shapes:
    """llama.cpp's names, in the order of the official block."""
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_o", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = (*names, "attn_rel_b")
    block = [shape for name, shape in official_text_encoder().items() if name.startswith("blocks.0.")]
    shapes = {"token_embd.weight": (256384, 4096), "enc.output_norm.weight": (4096,)}
    for n in range(24):
        shapes |= {f"enc.blk.{n}.{name}.weight": shape for name, shape in zip(names, block, strict=True)}
    return shapes


@cache
def official_vae(num_res_blocks: int = 2) -> Shapes:
    sizes = dict(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    return shapes_of(lambda: official("modules.vae2_1").WanVAE_(**sizes, num_res_blocks=num_res_blocks))


@cache
def diffusers_vae(num_res_blocks: int = 2) -> Shapes:
    return shapes_of(lambda: AutoencoderKLWan(num_res_blocks=num_res_blocks))


@cache
def official_vae22(num_res_blocks: int = 2) -> Shapes:
    sizes = dict(dim=160, dec_dim=256, z_dim=48, temperal_downsample=[False, True, True])
    return shapes_of(lambda: official("modules.vae2_2").WanVAE_(**sizes, num_res_blocks=num_res_blocks))


@cache
def diffusers_vae22(num_res_blocks: int = 2) -> Shapes:
    sizes = dict(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12)
    return shapes_of(lambda: AutoencoderKLWan(**sizes, num_res_blocks=num_res_blocks))


@cache
def official_image_encoder() -> Shapes:
    """What Wan uses of the official ViT-H, written out: no package ships that class."""
    d = 1280
    shapes = {"patch_embedding.weight": (d, 3, 14, 14), "cls_embedding": (1, 1, d), "pos_embedding": (1, 257, d)}
    shapes |= norm("pre_norm", d)
    for n in range(32):
        block = f"transformer.{n}"
        shapes |= norm(f"{block}.norm1", d) | linear(f"{block}.attn.to_qkv", 3 * d, d)
        shapes |= linear(f"{block}.attn.proj", d, d) | norm(f"{block}.norm2", d)
        shapes |= linear(f"{block}.mlp.0", 4 * d, d) | linear(f"{block}.mlp.2", d, 4 * d)
    return shapes


@cache
def open_clip() -> Shapes:
    """The official .pth: both towers."""
    shapes = {f"visual.{name}": shape for name, shape in official_image_encoder().items()}
    shapes |= {"visual.head": (1280, 1024)} | norm("visual.post_norm", 1280)
    shapes |= {"log_scale": (), "textual.token_embedding.weight": (250002, 1024)}
    return shapes | linear("textual.blocks.0.attn.q", 1024, 1024) | linear("textual.blocks.0.ffn.0", 4096, 1024)


@cache
def hf_image_encoder() -> Shapes:
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )
    return shapes_of(lambda: CLIPVisionModel(config))


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


T2V, I2V = PRESETS["t2v-1.3B"].transformer, PRESETS["i2v-14B-480P"].transformer


@dataclass(frozen=True)
class Case:
    """A file: its layout, its keys and shapes, the official ones, and how many of its keys are ignored."""

    layout: str
    shapes: Callable[[], Shapes]
    canonical: Callable[[], Shapes]
    ignored: int = 0


def transformer_case(layout: str, build: Callable, config: TransformerConfig) -> Case:
    kernels = 14 if layout == "official" and config.face_layers else 0  # of blurs
    official_shapes = partial(official_transformer, config)
    return Case(f"{layout} transformer", partial(build, config), lambda: canonical(official_shapes()), kernels)


def canonical(shapes: Shapes) -> Shapes:
    """S2V's injectors are blocks here."""
    for theirs in ("audio_injector.injector.", "audio_injector.injector_adain_layers."):
        shapes = {name.replace(theirs, "audio_injectors."): shape for name, shape in shapes.items()}
    return {
        name.replace(".linear.", ".adain.") if name.startswith("audio_injectors") else name: shape
        for name, shape in shapes.items()
    }


@cache
def hf_audio_encoder() -> Shapes:
    return shapes_of(
        lambda: Wav2Vec2ForCTC(
            Wav2Vec2Config(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, vocab_size=33,
            )
        )
    )  # fmt: skip


def official_audio_encoder() -> Shapes:
    """As it is published: written by an older PyTorch."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    shapes = hf_audio_encoder()
    for new, name in old.items():
        shapes = {key.replace(new, name): shape for key, shape in shapes.items()}
    return shapes


def sound_alone() -> Shapes:
    shapes = {name.removeprefix("wav2vec2."): shape for name, shape in official_audio_encoder().items()}
    return {name: shape for name, shape in shapes.items() if not name.startswith(("lm_head", "masked_spec"))}


def comfyui_fp8() -> Shapes:
    """As stored, what `fp8` takes away left out."""
    layer = "blocks.0.ffn.0"
    scales = {"scaled_fp8": (0,), f"{layer}.scale_input": (), f"{layer}.scale_weight": (), f"{layer}.input_scale": ()}
    shapes = prefixed("diffusion_model.", official_transformer(T2V) | scales)
    return {key: shapes[key] for key in without_scales(shapes)}


def diffusers_i2v_published() -> Shapes:
    return diffusers_shapes(I2V) | {f"blocks.{n}.attn2.norm_added_q.weight": (5120,) for n in range(40)}


def comfyui_text_encoder() -> Shapes:
    return hf_text_encoder() | {"spiece_model": (4548313,)}


def saved_text_encoder(name: str = "umt5xxl.") -> Shapes:
    """As in a checkpoint of a whole model; some are named as T5 is."""
    saved = prefixed(name, prefixed("transformer.", hf_text_encoder()) | {"logit_scale": ()})
    return prefixed("text_encoders.", saved | {"spiece_model": (4548313,)})


def mlx_video(shapes: Shapes) -> Shapes:
    """In mlx-video's names; the patch embedding is a matrix there, and packed files have a table of rotations."""
    places = {"time_embedding.2": "time_embedding_1", "text_embedding.2": "text_embedding_1", ".ffn.0.": ".ffn.fc1.",
              "time_embedding.0": "time_embedding_0", "text_embedding.0": "text_embedding_0", ".ffn.2.": ".ffn.fc2.",
              "time_projection.1": "time_projection", "patch_embedding": "patch_embedding_proj",
              ".ffn.gate.0.": ".ffn.gate_proj."}  # fmt: skip
    for theirs, ours in places.items():
        shapes = {name.replace(theirs, ours): shape for name, shape in shapes.items()}
    return shapes


def untied_text_encoder() -> Shapes:
    return {name: shape for name, shape in hf_text_encoder().items() if name != "shared.weight"}


def hf_clip_published() -> Shapes:
    extra = {"vision_model.embeddings.position_ids": (1, 257), "visual_projection.weight": (1024, 1280)}
    return prefixed("vision_model.", hf_image_encoder()) | extra


CASES = {
    f"{layout} {name}": transformer_case(layout, build, preset.transformer)
    for name, preset in PRESETS.items()
    for layout, build in (("official", official_transformer), ("diffusers", diffusers_shapes))
    # Diffusers has no class of Fun-Control, nor of S2V.
    if layout == "official" or (preset.transformer.ref_dim is None and preset.transformer.model_type != "s2v")
} | {
    "comfyui i2v": Case(
        "official transformer",
        lambda: prefixed("model.diffusion_model.", official_transformer(I2V)),
        lambda: official_transformer(I2V),
    ),
    "comfyui fp8": Case("official transformer", comfyui_fp8, lambda: official_transformer(T2V)),
    "mlx-video i2v": Case(
        "mlx-video transformer",
        lambda: mlx_video(official_transformer(I2V)) | {"freqs": (1024, 64, 2)},
        lambda: official_transformer(I2V),
        1,
    ),
    "mlx-video umT5": Case(
        "mlx-video text_encoder", lambda: mlx_video(official_text_encoder()), official_text_encoder
    ),
    "diffusers i2v published": Case(
        "diffusers transformer", diffusers_i2v_published, lambda: official_transformer(I2V), 40
    ),
    "official umT5": Case("official text_encoder", official_text_encoder, official_text_encoder),
    "official umT5 with its tokenizer": Case(
        "official text_encoder",
        lambda: official_text_encoder() | {"spiece_model": (4548313,)},
        official_text_encoder,
        1,
    ),
    "hf umT5": Case("huggingface text_encoder", hf_text_encoder, official_text_encoder, 1),
    "hf umT5 without shared": Case("huggingface text_encoder", untied_text_encoder, official_text_encoder),
    "comfyui umT5": Case("huggingface text_encoder", comfyui_text_encoder, official_text_encoder, 2),
    "umT5 saved by comfyui": Case("huggingface text_encoder", saved_text_encoder, official_text_encoder, 3),
    "umT5 saved under T5's name": Case(
        "huggingface text_encoder", lambda: saved_text_encoder("t5xxl."), official_text_encoder, 3
    ),
    "gguf umT5": Case("gguf text_encoder", gguf_text_encoder, official_text_encoder),
    "official vae": Case("official vae", official_vae, official_vae),
    "official vae in a wrapper": Case("official vae", lambda: prefixed("model.", official_vae()), official_vae),
    "diffusers vae": Case("diffusers vae", diffusers_vae, official_vae),
    "diffusers vae of 1 resnet": Case("diffusers vae", lambda: diffusers_vae(1), lambda: official_vae(1)),
    "official vae 2.2": Case("official vae", official_vae22, official_vae22),
    "diffusers vae 2.2": Case("diffusers vae", diffusers_vae22, official_vae22),
    "diffusers vae 2.2 of 1 resnet": Case("diffusers vae", lambda: diffusers_vae22(1), lambda: official_vae22(1)),
    "official clip": Case("official image_encoder", open_clip, official_image_encoder, 9),
    "official visual tower": Case("official image_encoder", official_image_encoder, official_image_encoder),
    "hf clip": Case("huggingface image_encoder", hf_image_encoder, official_image_encoder, 2),
    "official wav2vec": Case("official audio_encoder", official_audio_encoder, sound_alone, 3),
    "wav2vec of a newer PyTorch": Case("official audio_encoder", hf_audio_encoder, sound_alone, 3),
    "hf clip published": Case("huggingface image_encoder", hf_clip_published, official_image_encoder, 4),
}
ONE_OF_EACH = {case.layout: name for name, case in CASES.items()}.values()


def names_of(keys):
    """The canonical names of a file's keys."""
    return canonical_keys(recognise(keys), keys)


def sources_of(mapping) -> list[str]:
    return [key for value in mapping.values() for key in ((value,) if isinstance(value, str) else value)]


def mapped_shapes(mapping, shapes: Shapes) -> Shapes:
    """Shape of each canonical tensor, made as the docstring of layouts says."""
    result = {}
    for name, value in mapping.items():
        parts = [shapes[key] for key in ((value,) if isinstance(value, str) else value)]
        result[name] = parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])
    for name in ("cls_embedding", "pos_embedding"):
        if name in result:
            result[name] = (1,) * (3 - len(result[name])) + result[name]
    return result


def without_ones(shapes: Shapes) -> Shapes:
    """With biases flat."""
    return {name: (prod(shape),) if name.endswith(".bias") else shape for name, shape in shapes.items()}


@pytest.mark.parametrize("name", CASES)
def test_maps_one_to_one_onto_official_keys_and_shapes(name):
    case = CASES[name]
    shapes = case.shapes()
    layout = recognise(shapes)
    assert str(layout) == case.layout
    mapping = canonical_keys(layout, shapes)
    # Animate's kernels of blurs are constants, and biases of its convolutions may have axes of size 1.
    canonical = {name: shape for name, shape in case.canonical().items() if not name.endswith(".kernel")}
    mapped = mapped_shapes(mapping, shapes)
    assert without_ones(mapped) == without_ones(canonical)
    used = sources_of(mapping)
    assert len(used) == len(set(used)) == len(shapes) - case.ignored


def test_one_layout_per_file_one_name_per_key_one_use_per_name():
    idle = {(str(layout), theirs) for layout in LAYOUTS for theirs in layout.names}
    for case in CASES.values():
        shapes = case.shapes()
        fits = [one for one in LAYOUTS if {one.strip(key) for key in shapes}.issuperset(one.anchors)]
        assert [str(one) for one in fits] == [case.layout]
        layout = fits[0]
        for key in map(layout.strip, shapes):
            names = [theirs for theirs in layout.names if pattern(theirs).fullmatch(key)]
            assert len(names) == 1 or (layout.name == "official" and not names)
            idle -= {(case.layout, theirs) for theirs in names}
    assert not idle


@pytest.mark.parametrize("preset", COUNTS)
def test_number_of_tensors(preset):
    assert (
        len(canonical_keys(recognise(shapes := official_transformer(PRESETS[preset].transformer)), shapes))
        == (COUNTS[preset])
    )


def test_parts_are_stacked_in_the_official_order():
    shapes = hf_image_encoder()
    keys = sorted(shapes, reverse=True)
    sources = canonical_keys(recognise(keys), keys)["transformer.7.attn.to_qkv.bias"]
    assert sources == tuple(f"encoder.layers.7.self_attn.{p}_proj.bias" for p in "qkv")


def test_decoder_layers_are_numbered_flat():
    mapping = canonical_keys(recognise(diffusers_vae()), diffusers_vae())
    assert mapping["decoder.upsamples.5.residual.6.weight"] == "decoder.up_blocks.1.resnets.1.conv2.weight"
    assert mapping["decoder.upsamples.7.time_conv.bias"] == "decoder.up_blocks.1.upsamplers.0.time_conv.bias"
    assert mapping["decoder.upsamples.14.residual.0.gamma"] == "decoder.up_blocks.3.resnets.2.norm1.gamma"


def test_tied_embedding_comes_from_shared():
    mapping = canonical_keys(recognise(hf_text_encoder()), hf_text_encoder())
    assert mapping["token_embedding.weight"] == "shared.weight"


EXTRA = ["blocks.0.self_attn.q.weight_scale", "blocks.3.extra.weight", "blocks.1.ffn.1.weight", "xblocks.0.modulation"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_unknown_keys_are_named(name):
    """The official layout has no table: its keys are compared with the network's own names."""
    case = CASES[name]
    shapes = case.shapes() | dict.fromkeys(EXTRA, (1,))
    with pytest.raises(WeightsError, match=rf"(4 of {len(shapes)} keys .*|unexpected ).*blocks\.1\.ffn\.1\.weight"):
        layout = recognise(shapes)
        seen = mapped_shapes(canonical_keys(layout, shapes), shapes)
        check_keys(SimpleNamespace(path="file", component=layout.component, shapes=seen), case.canonical())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_missing_key_is_named(name):
    case = CASES[name]
    shapes = case.shapes()
    layout = recognise(shapes)
    mapping = canonical_keys(layout, shapes)
    lost = next(n for n, key in reversed(mapping.items()) if isinstance(key, str) and key not in layout.anchors)
    shapes = {key: shape for key, shape in shapes.items() if key != mapping[lost]}
    seen = mapped_shapes(canonical_keys(recognise(shapes), shapes), shapes)
    with pytest.raises(WeightsError, match=f"lacks {lost}$"):
        check_keys(SimpleNamespace(path="file", component=layout.component, shapes=seen), case.canonical())


def test_missing_part_is_named():
    key = "encoder.layers.31.self_attn.k_proj.weight"
    keys = [k for k in hf_image_encoder() if k != key]
    with pytest.raises(WeightsError, match=f"without {key}"):
        names_of(keys)


def test_two_keys_for_one_tensor_are_named():
    keys = [*official_transformer(T2V), "model.diffusion_model.head.head.weight"]
    with pytest.raises(WeightsError, match="head.head.weight and model.diffusion_model.head.head.weight"):
        names_of(keys)
    keys = [*diffusers_vae(), "decoder.up_blocks.0.resnets.4.conv1.bias"]  # past the upsampler, where block 1 begins
    with pytest.raises(WeightsError, match="two keys for decoder.upsamples.4.residual.2.bias"):
        names_of(keys)


FOREIGN = {
    "nothing": (lambda: [], "0 keys of no known network: none"),
    "sdxl": (
        lambda: ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.time_embed.0.weight"],
        "2 keys of no known network: model.diffusion_model.input_blocks.0.0.weight",
    ),
    "llama": (
        lambda: ["lm_head.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(10))],
        "11 keys of no known network: lm_head.weight, .* and 6 more; expected one of: official transformer",
    ),
    "lora": (lambda: ["diffusion_model.blocks.0.self_attn.q.lora_down.weight"], "no known network: diffusion_model"),
    "gguf by convert.py alone": (
        lambda: [key for key in official_transformer(T2V) if key != "patch_embedding.weight"],
        "824 keys of no known network: .*nearest is official transformer, but patch_embedding.weight is missing, as in "
        ".*fix_5d_tensors.py was not run: run that",
    ),
    "a layer of diffusers": (
        lambda: [key for key in diffusers_shapes(T2V) if key.startswith("blocks.0.")],
        "nearest is diffusers transformer, but patch_embedding.weight, condition_embedder.time_proj.weight is missing",
    ),
    "whole umT5": (lambda: [*hf_text_encoder(), "lm_head.weight"], "huggingface text_encoder with 1 of .*: lm_head"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_networks_are_refused_with_their_keys(case):
    make, message = FOREIGN[case]
    with pytest.raises(WeightsError, match=message):
        names_of(make())


def official_state(reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = reference.state_dict()
    mapping = canonical_keys(recognise(state), state)
    return {name: state[source] for name, source in mapping.items()}


@torch.no_grad()
def test_umt5_keeps_its_meaning():
    """Equal shapes cannot tell the gate from its partner, or one norm from the other; the output can."""
    sizes = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    theirs = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    randomize(theirs)
    ours = official("modules.t5").T5Encoder(50, 24, 32, 40, 4, 2, 32, shared_pos=False).eval()
    ours.load_state_dict(official_state(theirs))
    ids = torch.arange(1, 12)[None]
    assert relative_error(ours(ids), theirs(ids).last_hidden_state) < 1e-5


@torch.no_grad()
def test_vae_keeps_its_meaning():
    sizes = dict(z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True])
    theirs = AutoencoderKLWan(base_dim=8, **sizes).eval()
    randomize(theirs)
    ours = official("modules.vae2_1").WanVAE_(dim=8, **sizes).eval()
    ours.load_state_dict(official_state(theirs))
    video = torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = theirs.encode(video).latent_dist.mode()
    assert relative_error(ours.encode(video, [0, 1]), latents) < 1e-5
    assert relative_error(ours.decode(latents, [0, 1]).clamp(-1, 1), theirs.decode(latents).sample) < 1e-5
