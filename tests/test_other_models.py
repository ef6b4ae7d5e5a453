"""Models that are not supported are named from headers: in one line, before anything large is read or fetched."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
from crafted import header_only
from hub_server import serving

from wan_mlx import WanPipeline, other_models
from wan_mlx.cli.main import main
from wan_mlx.errors import UnsupportedModel, WeightsError
from wan_mlx.files.safetensors import SafetensorsFile
from wan_mlx.models.configs import ImageEncoderConfig, TransformerConfig
from wan_mlx.models.networks import new_transformer
from wan_mlx.opened import OpenedModel
from wan_mlx.other_models import OTHER_MODELS, of_entries, of_keys, of_name, of_sizes
from wan_mlx.presets import BUNDLED, PRESETS
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import parameter_shapes
from wan_mlx.weights.configs import shapes_of

T2V_14B = PRESETS["t2v-14B"].transformer
I2V_14B = PRESETS["i2v-14B-480P"].transformer
T2V_1_3B = PRESETS["t2v-1.3B"].transformer
OF_5B = PRESETS["ti2v-5B"].transformer
SUPPORTED = "which is not supported; supported are Wan2.1's T2V, I2V, FLF2V and VACE models, Wan2.2's T2V-A14B, I2V"


def official(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an official file of these sizes."""
    shapes = dict(parameter_shapes(new_transformer(config)))
    name = "patch_embedding.weight"
    shapes[name] = (config.dim, config.in_dim, *config.patch_size)
    if config.ref_dim is not None:
        shapes["ref_conv.weight"] = (config.dim, config.ref_dim, *config.patch_size[1:])
    return {key: (shape[0], config.vace_in_dim, *config.patch_size) if key == f"vace_{name}" else shape
            for key, shape in shapes.items()}  # fmt: skip


def of(config: TransformerConfig, *keys: str, without: str = "-", **sizes: int):
    """A file like an official one of these sizes, with more keys and without some."""
    shapes = {key: shape for key, shape in official(replace(config, **sizes)).items() if not key.startswith(without)}
    return {**shapes, **dict.fromkeys(keys, (1,))}


FILES = {
    "Lucy Edit, made from Wan2.2 TI2V-5B": of(OF_5B, in_dim=96, out_dim=48),
    "a model made from Wan2.2 TI2V-5B": of(OF_5B, in_dim=104, out_dim=48),
    "a Fun-Control model of Wan2.1": of(I2V_14B, "ref_conv.weight", "ref_conv.bias", in_dim=48),
    "a control model of Fun (Fun-Control)": of(I2V_14B, in_dim=48),
    "a camera model of Fun (Control-Camera)": of(I2V_14B, "control_adapter.conv.weight", in_dim=32),
    "HuMo": of(I2V_14B, "audio_proj.audio_proj_glob_1.layer.weight"),
    "SCAIL": of(I2V_14B, "patch_embedding_pose.weight", in_dim=20),
    "SkyReels V2 with diffusion forcing": of(T2V_1_3B, "fps_embedding.weight", "fps_projection.0.weight"),
    "ReCamMaster, or another model with a camera encoder": of(
        T2V_1_3B, "blocks.0.cam_encoder.weight", "blocks.0.projector.weight"
    ),
    "MiniMax-Remover": of(T2V_1_3B, without="text_embedding."),
    "the sound module of MultiTalk or InfiniteTalk": dict.fromkeys(
        ("audio_proj.proj1.weight", "blocks.0.audio_cross_attn.kv_linear.weight", "blocks.0.norm_x.weight"), (1,)
    ),
    "FLUX, or one of its kind such as Chroma": dict.fromkeys(
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "model.diffusion_model.img_in.weight"),
        (1,),
    ),
    "Stable Diffusion or SDXL": dict.fromkeys(
        ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"), (1,)
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """No tensor of these files is read."""

    def read(self, key):
        raise AssertionError(f"{key} was read")

    for method in ("read", "read_now", "rows", "byte_range"):
        monkeypatch.setattr(SafetensorsFile, method, read)


def said(capsys, *argv: str) -> str:
    """The one line in which a command line is refused."""
    assert main([*map(str, argv)]) == 1
    out, error = capsys.readouterr()
    assert not out and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named(capsys, tmp_path, name):
    """By ``--model`` beside parts that would have to be downloaded, by ``--transformer``, by ``inspect``."""
    file = header_only(tmp_path / "a.safetensors", FILES[name])
    known = next(other for other in OTHER_MODELS if other.name == name)
    expected = f"error: {file}: this is {name}, which is not supported; {other_models.ADVICE[known.kind]}\n"
    run = ["--prompt", "a cat", "--quiet"]
    assert said(capsys, "--model", file, "--vae", "owner/name:vae.safetensors", *run) == expected
    assert said(capsys, "--model", "owner/name", "--transformer", file, *run) == expected
    assert said(capsys, "convert", file, tmp_path / "out") == expected
    code, rows = main(["inspect", str(file)]), capsys.readouterr()
    assert code == 1 and expected.removeprefix("error: ").strip() in rows.out + rows.err


def test_every_mark_is_one_row_and_none_is_a_supported_model():
    for other in OTHER_MODELS:
        for scheme in other.keys:
            keys = [key for key in scheme.split() if not key.startswith("!")]
            assert of_keys(keys) is other or of_keys(keys).name == other.name, scheme
        if other.sizes:
            assert of_sizes(other.kind, other.sizes) is other
    for preset in PRESETS.values():
        assert of_keys(official(preset.transformer)) is None
        if preset.transformer.out_dim != 48:  # one with other channels is made from TI2V-5B
            assert of_sizes("transformer", vars(preset.transformer)) is None
        assert not any(of_name(name) for name in (preset.name, preset.repo, preset.diffusers, preset.comfyui))


@pytest.mark.parametrize("kind, in_dim", [("t2v", 32), ("i2v", 52), ("vace", 36), ("flf2v", 16), ("control", 56)])
def test_channels_of_no_known_model(capsys, tmp_path, kind, in_dim):
    """As of VACE or a text to video model that read more than latents, which once failed at the first step."""
    config = replace(T2V_1_3B, model_type=kind, in_dim=in_dim, vace_layers=(0, 15) if kind == "vace" else (),
                     ref_dim=16 if kind == "control" else None)  # fmt: skip
    line = said(capsys, "--model", header_only(tmp_path / "a.safetensors", official(config)), "--prompt", "a")
    expected = {"i2v": 36, "flf2v": 36, "control": 52}.get(kind, 16)
    assert f"of 16 latent channels it would read {expected}, and it reads {in_dim}" in line


@pytest.mark.parametrize(
    "kind, changed, words",
    [
        ("vae", dict(z_dim=12, mean=(0.0,) * 12, std=(1.0,) * 12), "a VAE of 12 latent channels, where .* takes 16"),
        ("text_encoder", dict(dim=2048), "a text encoder 2048 wide, where .* takes 4096"),
        ("image_encoder", dict(dim=1680, num_heads=21), "an image encoder 1680 wide, where .* takes 1280"),
    ],
)
def test_a_part_that_does_not_fit_the_transformer(capsys, tmp_path, kind, changed, words):
    """It once failed after the text was encoded, or at the first step."""
    preset = PRESETS["i2v-14B-480P"]
    sizes = {"transformer": preset.transformer, "text_encoder": preset.text_encoder, "vae": preset.vae,
             "image_encoder": ImageEncoderConfig()}  # fmt: skip
    sizes[kind] = replace(sizes[kind], **changed)
    for name, config in sizes.items():
        metadata = {"layout": "mlx", "component": name}
        header_only(tmp_path / f"{name}.safetensors", shapes_of(config), metadata=metadata)
    shutil.copy(BUNDLED["nano"] / "tokenizer.model", tmp_path)
    config = {name: asdict(config) for name, config in sizes.items()}
    (tmp_path / "config.json").write_text(json.dumps({"format": "wan_mlx", **config}))
    line = said(capsys, "--model", tmp_path, "--image", "a.png", "--prompt", "a", "--dry-run")
    assert re.search(f"{kind}.safetensors: {words}; give the one of its model as --{kind.replace('_', '-')}$", line)
    with pytest.raises(WeightsError, match=words):
        WanPipeline.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=words):  # as after a download
        OpenedModel(open_checkpoint(tmp_path))


class TestFolders:
    @pytest.mark.parametrize(
        "file, entries, name",
        [
            ("model_index.json", {"_class_name": "FluxPipeline"}, "FLUX, or one of its kind such as Chroma"),
            ("model_index.json", {"_class_name": "WanAnimate2Pipeline"}, "Wan2.2 Animate-2"),
            ("model_index.json", {"_class_name": "NewPipeline"}, "a 'NewPipeline'"),
        ],
    )
    def test_by_its_configuration(self, capsys, tmp_path, file, entries, name):
        (tmp_path / file).write_text(json.dumps(entries))
        line = said(capsys, "--model", tmp_path, "--prompt", "a cat")
        assert line.startswith(f"error: {tmp_path / file}: this is {name}") and SUPPORTED in line

    @pytest.mark.parametrize("entries", [
        {"_class_name": "WanDMDPipeline", "boundary_ratio": None}, {}, {"a": [1]}, {"model_type": "ti2v"},
        {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True},
    ])  # fmt: skip
    def test_of_a_supported_model(self, entries):
        assert of_entries(entries) is None

    def test_one_file_among_others(self, capsys, tmp_path):
        """A folder lacks a VAE and has another model's: that is said."""
        header_only(tmp_path / "dit.safetensors", official(T2V_1_3B))
        keys = ("encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight")
        header_only(tmp_path / "vae.safetensors", dict.fromkeys(keys, (1,)))
        line = said(capsys, "--model", tmp_path, "--prompt", "a cat")
        assert "missing text_encoder, vae, tokenizer" in line and "vae.safetensors: this is the VAE of Stable" in line
        assert main(["inspect", str(tmp_path)]) == 0
        assert "not used       " in capsys.readouterr().out


class TestNames:
    def test_only_a_name_tells(self, capsys, tmp_path):
        """Phantom has the keys and shapes of T2V-14B: a note, no refusal."""
        file = header_only(tmp_path / "Phantom-Wan-14B_fp16.safetensors", official(T2V_14B))
        assert main(["inspect", str(file)]) == 0
        out = capsys.readouterr().out
        assert "text to video, t2v-14B" in out and f"by its name {file.name} is Phantom" in out

    @pytest.mark.parametrize(
        "name, model",
        [
            ("wan2.1_fun_control_1.3B_bf16", "a Fun-Control"), ("Phantom-Wan-14B_fp16", "Phantom"),
            ("alibaba-pai/Wan2.1-Fun-14B-InP", "Fun-InP"),
            ("wan2.1_fun_inp_1.3B_bf16", "Fun-InP"), ("Wan2_1-I2V-ATI-14B_fp8", "ATI"),
            ("Wan2.1-Fun-V1.1-14B-Control-Camera", "a camera model"), ("wan2.1_fun_camera_v1.1_1.3B", "a camera model"),
            ("Wan2_1-Wan-Move-480p", "Wan-Move"), ("Wan2_1-Phantom-1_3B", "Phantom"), ("Wan-Animate-2", "Wan2.2 Ani"),
            ("Wan2_1_mocha-14B-preview_fp8", "MoCha"),
        ],
    )  # fmt: skip
    def test_of_published_files(self, name, model):
        assert of_name(name).name.startswith(model)

    @pytest.mark.parametrize(
        "name",
        ["wan2.1_t2v_14B_lightx2v_4step", "Wan21_CausVid_14B", "nano", "umt5_xxl_fp16", "animate_24fps",
         "Wan2.2-TI2V-5B", "my_fun_style_inpaint", "fun_inpaint", "wan_movement", "phantom_menace", "latte_mocha",
         "wan2.2_fun_control_high_noise_14B", "Wan2.2-Fun-A14B-InP", "Wan2_2-Fun-InP-5B", "Wan2.2-VACE-Fun-A14B",
         "my_ati_style", "Wan2.2-Animate-14B", "wan2.2_animate_14B_bf16"],
    )  # fmt: skip
    def test_of_others(self, name):
        assert of_name(name) is None

    def test_a_known_header_leaves_only_models_of_the_same_shapes(self):
        assert of_name("Wan-Animate-2") and of_name("wan2.1_fun_control")
        assert not any(of_name(name, known=True) for name in ("Wan-Animate-2", "fun_control"))
        assert of_name("Phantom-Wan-14B", known=True).name == "Phantom"


def lora(path, width: int, module: str, count: int = 2):
    """A LoRA of rank 4 for some blocks; ``module`` has their number to be put in."""
    return header_only(path, {
        f"{module.format(block)}.{end}": shape for block in range(count)
        for end, shape in (("lora_A.weight", (4, width)), ("lora_B.weight", (width, 4)))
    })  # fmt: skip


class TestLoras:
    @pytest.mark.parametrize(
        "module, width, made_for",
        [
            ("diffusion_model.blocks.{}.self_attn.q", 3072, "ti2v-5B or fun-5B-InP or fun-5B-Control: it is 3072 wide"),
            ("transformer.blocks.{}.attn1.to_q", 3072, "ti2v-5B or fun-5B-InP or fun-5B-Control: it is 3072 wide"),
            ("diffusion_model.blocks.{}.self_attn.k", 1536, "t2v-1.3B or vace-1.3B: it is 1536 wide"),
            ("blocks.{}.self_attn.v", 5120, "t2v-14B or i2v-14B-480P or "),
            ("lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k", 640, "Stable Diffusion or SDXL,"),
            ("transformer.single_transformer_blocks.{}.attn.to_q", 3072, "FLUX, or one of its kind such as Chroma,"),
            ("transformer.transformer_blocks.{}.img_mlp.net.2", 3072, "Qwen-Image, which is not supported"),
            ("diffusion_model.layers.{}.attention.to_q", 3840, "Z-Image or Lumina, which is not supported"),
            ("transformer.transformer_blocks.{}.attn2.to_q", 2048, "LTX-Video, which is not supported"),
        ],
    )
    def test_for_another_model(self, capsys, tmp_path, module, width, made_for):
        file = lora(tmp_path / "a.safetensors", width, module)
        line = said(capsys, "--model", "nano", "--lora", file, "--prompt", "a", "--quiet")
        assert line.startswith(f"error: {file}: this LoRA was made for {made_for}")

    def test_no_lora_but_part_of_another_model(self, capsys, tmp_path):
        file = header_only(tmp_path / "a.safetensors", {"proj_model.proj.weight": (4, 4)})
        line = said(capsys, "--model", "nano", "--lora", file, "--prompt", "a", "--quiet")
        assert "this is FantasyTalking, which is not supported" in line

    @pytest.mark.parametrize("module", ["transformer.blocks.{}.attn2.to_q", "lora_transformer_blocks_{}_attn2_to_k"])
    def test_for_more_layers_than_this_one_s(self, capsys, tmp_path, module):
        """Diffusers' names of Wan's layers, with a prefix, are part of LTX-Video's names."""
        run = ["--model", "nano", "--prompt", "a", "--dry-run", "--quiet", "--lora"]
        assert main([*run, str(lora(tmp_path / "a.safetensors", 256, module))]) == 0
        capsys.readouterr()
        line = said(capsys, *run, lora(tmp_path / "b.safetensors", 256, module, 8))
        assert "4 keys match nothing in this transformer" in line and "LTX" not in line


class TestHub:
    def test_the_configuration_comes_first(self, tmp_path, monkeypatch):
        from wan_mlx.hub.resolve import Places

        big = {"text_encoder/model.safetensors": b"t" * 50, "vae/diffusion_pytorch_model.safetensors": b"v" * 50}
        index = json.dumps({"_class_name": "WanAnimate2Pipeline"}).encode()
        transformer = {"transformer/diffusion_pytorch_model.safetensors": b"d" * 50, "tokenizer/spiece.model": b"s"}
        repo = {"model_index.json": index, **transformer, **big}
        with serving({"Wan-AI/Five": repo}, monkeypatch, tmp_path) as hub:
            with pytest.raises(UnsupportedModel, match="Wan-AI/Five: this is Wan2.2 Animate-2, which is not"):
                Places("Wan-AI/Five").fetch()
            assert {*hub.got()} == {"model_index.json"}

    def test_a_repository_without_wan2_1_s_files_is_named(self, tmp_path, monkeypatch):
        from wan_mlx.hub.resolve import survey

        repo = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"d", "Wan2.1_VAE.pth": b"v"}
        with serving({"some/Phantom-Wan-14B": repo}, monkeypatch, tmp_path):
            with pytest.raises(WeightsError, match="but by its name Phantom, which is not supported"):
                survey("some/Phantom-Wan-14B")
