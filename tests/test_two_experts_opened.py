# ruff: noqa: F401, F811
"""Models of two experts (Wan2.2's A14B) as users open them: folders, pairs of files, names, downloads, plans."""

import json
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from crafted import header_only
from test_other_models import of, official, said
from two_experts import I2V_A14B, QUICK, T2V_14B, lora, made, opened, pair, whole

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.hub.names import expert_named, needed_files
from wan_mlx.models.networks import new_transformer
from wan_mlx.planning import speed
from wan_mlx.presets import EXPERTS, PRESETS
from wan_mlx.weights.checkpoint import open_checkpoint


class TestBadInput:
    @pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "nan"])
    def test_boundary(self, pair, value, capsys):
        assert main(["--model", str(pair), *QUICK, "--boundary", value]) == 2
        assert "boundary" in (err := capsys.readouterr().err) and "above 0 and below 1" in err
        with pytest.raises(ValueError, match="boundary is .*, expected above 0 and below 1"):
            opened(pair, boundary=float(value))

    def test_boundary_of_one_transformer(self, pico):
        with pytest.raises(ValueError, match="boundary is 0.5, but .* has one transformer, which serves all"):
            opened(pico, boundary=0.5)

    @pytest.mark.parametrize("missing", EXPERTS)
    def test_one_expert_is_missing(self, pair, tmp_path, missing, capsys):
        folder = tmp_path / "half"
        shutil.copytree(pair, folder)
        (folder / f"{missing}.safetensors").unlink()
        assert main(["--model", str(folder), *QUICK]) == 1
        files = f"{missing}.safetensors.index.json or {missing}.safetensors"
        assert f"missing {files} ({missing})" in capsys.readouterr().err

    def test_one_of_a_task_of_two(self, pico, capsys):
        assert main(["--model", str(pico), *QUICK, "--task", "t2v-A14B"]) == 2
        line = capsys.readouterr().err
        assert "holds one transformer, and t2v-A14B is a model of two experts; give the other" in line

    def test_one_image_to_video_expert_alone(self, capsys, tmp_path):
        file = header_only(tmp_path / "a.safetensors", of(I2V_A14B))
        line = said(capsys, "--model", file, "--vae", "owner/name:vae.safetensors", "--prompt", "a", "--quiet")
        assert "is one of the two experts of an image-to-video model (I2V-A14B); give both, as --high-noise" in line

    def test_two_of_a_task_of_one(self, pair, tmp_path):
        folder = tmp_path / "two"
        shutil.copytree(pair, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "boundary": None}))
        with pytest.raises(ValueError, match="holds two experts, and nano is a model of one transformer"):
            opened(folder)

    def test_two_equal_ones(self, pair, pico, tmp_path, capsys):
        high = pair / "high_noise.safetensors"
        copy = shutil.copyfile(high, tmp_path / "copy.safetensors")
        assert main(["--model", str(pair), "--low-noise", str(high), *QUICK]) == 1
        assert f"both experts are {high}" in capsys.readouterr().err
        assert main(["--model", str(pair), "--low-noise", str(copy), *QUICK]) == 1
        assert "are equal; a model of two experts has two that differ" in capsys.readouterr().err

    def test_other_kinds_of_values(self, pair):
        with pytest.raises(ValueError, match="boundary is 'a', expected number"):
            opened(pair, boundary="a")
        with pytest.raises(ValueError, match=r"guidance is \(3, 4, 5\), expected number or array of 2"):
            opened(pair).request("a", guidance_scale=(3, 4, 5))

    def test_of_two_models(self, capsys, tmp_path):
        first = header_only(tmp_path / "first.safetensors", official(T2V_14B))
        second = header_only(tmp_path / "second.safetensors", of(I2V_A14B))
        pair = ["--model", first, "--low-noise", second, "--vae", "owner/name:v"]
        line = said(capsys, *pair, "--prompt", "a", "--quiet")
        assert "are not the two experts of one model: their sizes differ, model_type t2v and i2v, in_dim 16" in line
        other = header_only(tmp_path / "other.safetensors", official(PRESETS["ti2v-5B"].transformer))
        line = said(capsys, "--model", first, "--low-noise", other, "--vae", "owner/name:v", "--prompt", "a", "--quiet")
        assert "are not the two experts of one model" in line

    def test_two_experts_as_one_transformer(self, pair):
        for one in (lambda: open_checkpoint(pair, {"transformer": pair}), lambda: wan_mlx.load_transformer(pair)):
            with pytest.raises(WeightsError, match="two experts, not one transformer; give the file of one of them, .*"
                                                   "high_noise.safetensors or .*low_noise.safetensors, or the"):
                one()  # fmt: skip

    def test_one_transformer_instead_of_two(self, pair, pico):
        """It serves all timesteps, and nothing of the pair remains."""
        pipe = opened(pair, transformer=pico)
        assert [part.name for part in pipe.checkpoint.of_kind("transformer")] == ["transformer"]
        assert "boundary" not in pipe.settings(pipe.request("a red circle"))

    def test_two_files_in_a_folder(self, pair, tmp_path, capsys):
        for name in ("high_noise", "low_noise"):
            shutil.copyfile(pair / f"{name}.safetensors", tmp_path / f"{name}_model.safetensors")
        assert main(["--model", str(tmp_path), *QUICK]) == 1
        assert "holds 2 files of a transformer" in (err := capsys.readouterr().err)
        assert "or give two experts as --high-noise and --low-noise" in err

    def test_a_picture_for_text_to_video(self, pair, tmp_path):
        with pytest.raises(ValueError, match="image was given to a t2v model"):
            opened(pair).request("a", image=np.zeros((16, 16, 3), np.uint8))

    def test_a_clip(self, pair, capsys):
        assert main(["--model", str(pair), *QUICK, "--image-encoder", "nano-i2v"]) in (1, 2)
        assert "image_encoder was given to a t2v model, which reads no images with it" in capsys.readouterr().err


class TestNames:
    @pytest.mark.parametrize("name, expert", [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high_noise"), ("T2V-A14B-LowNoise-Q4_K_M.gguf", "low_noise"),
        ("Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high_noise"), ("a_high_quality.safetensors", None),
        ("low_noise_model/diffusion_pytorch_model.safetensors", "low_noise"), ("wan2.1_t2v_14B.safetensors", None),
    ])  # fmt: skip
    def test_expert(self, name, expert):
        assert expert_named(name) == expert

    def test_a_name_is_never_obeyed_but_said(self, pair, tmp_path, capsys):
        high = shutil.copyfile(pair / "high_noise.safetensors", tmp_path / "x_low_noise_14B.safetensors")
        flags = [*QUICK[:-3], "--shift", "3", "--dry-run"]
        assert main(["--model", str(pair), "--high-noise", str(high), *flags]) == 0
        said = capsys.readouterr().err
        assert "x_low_noise_14B.safetensors is the low noise expert, and it is used as the high noise one" in said
        style = lora(tmp_path / "style_high_noise.safetensors")
        assert main(["--model", str(pair), "--lora", str(style), *flags]) == 0
        assert "is for the high noise expert, and it was given to every transformer" in capsys.readouterr().err
        assert main(["--model", str(pair), "--lora-high", str(style), *flags]) == 0
        assert "by its name" not in capsys.readouterr().err
        alone = shutil.copyfile(pair / "high_noise.safetensors", tmp_path / "HighNoise.safetensors")
        apart = ["--text-encoder", str(pair), "--vae", str(pair), "--tokenizer", str(pair)]
        assert main(["--model", str(alone), *apart, *flags]) == 0
        assert "HighNoise.safetensors is the high noise expert of a model of two" in capsys.readouterr().err


class TestHub:
    OFFICIAL = ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model"]

    def of(self, *folders: str) -> list[str]:
        return [f"{folder}/diffusion_pytorch_model{end}" for folder in folders
                for end in (".safetensors.index.json", "-00001-of-00001.safetensors")]  # fmt: skip

    def test_both_experts_are_needed(self):
        experts = self.of("high_noise_model", "low_noise_model")
        configs = ["high_noise_model/config.json", "low_noise_model/config.json"]
        assert {*needed_files([*experts, *configs, *self.OFFICIAL, "README.md"], "a/b")} == {
            *experts, *configs, *self.OFFICIAL
        }
        with pytest.raises(WeightsError, match=r"lacks low_noise_model/diffusion.* \(low_noise\)"):
            needed_files([*self.of("high_noise_model"), *self.OFFICIAL], "a/b")

    def test_the_vae_that_is_named_is_the_model_s(self, tmp_path, capsys):
        for preset, vae in (("t2v-14B", "wan_2.1_vae"), ("ti2v-5B", "wan2.2_vae")):
            file = header_only(tmp_path / f"{preset}.safetensors", official(PRESETS[preset].transformer))
            line = said(capsys, "--model", file, "--prompt", "a", "--quiet")
            assert f"split_files/vae/{vae}.safetensors" in line and line.count("split_files/vae") == 1

    def test_one_may_be_given_apart(self):
        experts = self.of("high_noise_model", "low_noise_model")
        assert needed_files([*experts, *self.OFFICIAL], "a/b", ["low_noise"]) == self.of("low_noise_model")
        assert needed_files(["diffusion_pytorch_model.safetensors"], "a/b", ["low_noise"]) == [
            "diffusion_pytorch_model.safetensors"
        ]

    def test_diffusers(self):
        rest = ["model_index.json", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                "tokenizer/spiece.model"]  # fmt: skip
        two = self.of("transformer", "transformer_2")
        assert {*needed_files([*two, *rest], "a/b")} == {*two, *rest}
        assert {*needed_files([*two[:2], *rest], "a/b")} == {*two[:2], *rest}


def test_a_diffusers_folder_records_the_boundary(tmp_path):
    for value in (0.0, 1, "a", True):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": value}))
        with pytest.raises(WeightsError, match="model_index.json has the boundary .*, expected a number between"):
            open_checkpoint(tmp_path)


def test_an_mlx_video_folder_of_one_transformer_records_none(tmp_path):
    config = {"model_version": "2.1", "dual_model": False, "boundary": 0.0, "vae_z_dim": 16, "t5_num_buckets": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="no file of a Wan network in it"):
        open_checkpoint(tmp_path)


def test_parts_of_a_pair(pair):
    checkpoint = open_checkpoint(pair)
    assert [part.name for part in checkpoint.of_kind("transformer")] == [*EXPERTS] and checkpoint.boundary == 0.8
    high, low = checkpoint.divided(0.8).of_kind("transformer")
    assert high.timesteps == (800, math.inf) and low.timesteps == (0, 800)


class TestPlans:
    def test_two_on_disk_and_one_in_memory(self):
        """Of a released model: streamed, each pass reads one expert's blocks, and both are read once at least."""
        two, one = (wan_mlx.plan(name, 832, 480, 81, 40, "40GB", dtype="bfloat16") for name in ("t2v-A14B", "t2v-14B"))
        assert two.peak == one.peak and two.fits and not two.stream
        rows, row = ({r.stage: r for r in plan.rows}["denoise"] for plan in (two, one))
        assert (rows.reads, rows.flop) == (2 * row.reads, row.flop)
        small, alone = (wan_mlx.plan(name, 832, 480, 81, 40, "8GB") for name in ("t2v-A14B", "t2v-14B"))
        assert small.peak == alone.peak and small.stream

    def test_no_clip(self):
        assert "encode images" not in [row.stage for row in wan_mlx.plan("i2v-A14B", memory="64GB").rows]
        assert "encode images" in [row.stage for row in wan_mlx.plan("i2v-14B-720P", memory="64GB").rows]

    def test_of_fun_models(self):
        """A reference image is one more frame of tokens, the control video is encoded; of 5B likewise."""
        for name, base, videos in (("fun-A14B-Control", "t2v-A14B", 1), ("fun-5B-Control", "ti2v-5B", 1),
                                   ("fun-A14B-InP", "t2v-A14B", 0), ("vace-fun-A14B", "vace-14B", 2)):  # fmt: skip
            fun, plain = ({row.stage: row for row in wan_mlx.plan(model, 832, 480, 81, 40, "40GB").rows}
                          for model in (name, base))  # fmt: skip
            assert ("encode video" in fun) == bool(videos) and "encode images" not in fun
            work = fun["denoise"].flop / plain["denoise"].flop
            assert 22 / 21 < work < 1.1 if "Control" in name else work == 1

    def test_speed_can_be_measured_of_every_kind(self):
        for preset in {preset.transformer.kind: preset for preset in PRESETS.values()}.values():
            config = replace(speed.one_block(preset.transformer), dim=48, ffn_dim=16, num_heads=2)
            latents, context, more = speed.random_inputs(config, 2, mx.float32)
            assert new_transformer(config)(latents, 500.0, context, **more).shape == latents.shape

    def test_list_of_models(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        assert main(["models"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("t2v-A14B"))
        assert "2 x 28.6" in row and "2 x 8.04" in row and "Wan-AI/Wan2.2-T2V-A14B" in row

    def test_quantisation_of_each(self, capsys):
        """In bits: the largest expert decides, and what is read is of both."""
        both, one = (wan_mlx.plan("t2v-A14B", 832, 480, memory="100GB", quantize_low="q4", quantize_high=high)
                     for high in ("q4", None))  # fmt: skip
        alike = wan_mlx.plan("t2v-A14B", 832, 480, memory="100GB", quantize="q4")
        plain = wan_mlx.plan("t2v-A14B", 832, 480, memory="100GB")
        rows = ({row.stage: row for row in plan.rows}["denoise"] for plan in (both, alike, one, plain))
        peaks = [row.peak for row in rows]
        assert peaks[0] == peaks[1] < peaks[2] == pytest.approx(peaks[3], rel=0.02)
        with pytest.raises(ValueError, match="t2v-14B has one transformer, and quantize_high or quantize_low"):
            wan_mlx.plan("t2v-14B", quantize_low="q4")
        assert main(["plan", "t2v-14B", "--quantize-high", "q4"]) == 2

    def test_of_a_pair_of_files(self, pair, monkeypatch, capsys):
        """The flags of the run, as they are: parts given apart, and quantisation of one."""
        high, low = str(pair / "high_noise.safetensors"), str(pair / "low_noise.safetensors")
        apart = ["--text-encoder", str(pair), "--vae", str(pair), "--tokenizer", str(pair)]
        size = ["--size", "16x16", "--frames", "1"]
        monkeypatch.setattr("wan_mlx.planning.speed.measure_rates", lambda *args: speed.Rates(1e12, 1e12, 1e12, 1e12))
        got = []
        for way in (["--model", high, "--low-noise", low, *apart], ["--high-noise", high, "--low-noise", low, *apart],
                    ["--model", str(pair), "--quantize-low", "q8", "--quantize-high", "q8"]):  # fmt: skip
            assert main(["plan", *way, *size]) == 0
            got.append(capsys.readouterr().out.splitlines()[1:])
        assert got[0] == got[1] != got[2]
        assert main(["plan", "t2v-A14B", "--vae-tiling", "auto", "--low-noise", "a/b:low.gguf", "--frames", "5"]) == 0
        assert main(["plan", high, "--low-noise", "a/b:low.gguf", *apart, *size]) == 2
        assert "the sizes of a/b:low.gguf are not known before it is here" in capsys.readouterr().err

    def test_of_a_local_pair(self, pair):
        assert wan_mlx.plan(pair, 16, 16, 1, memory="2GB").fits
        assert wan_mlx.plan(pair, 16, 16, 1, memory="2GB").title.startswith("nano ")


def test_info_of_a_lora_beside_a_pair(pair, tmp_path, capsys):
    """Beside the expert that its name speaks of, else the high-noise one."""
    seen = []
    for name in ("style", "style_high_noise", "style_low_noise"):
        assert main(["info", str(lora(tmp_path / f"{name}.safetensors")), "--model", str(pair), "--quiet"]) == 0
        seen.append(capsys.readouterr().out)
    assert [("high" if "the high noise expert of" in said else "low") for said in seen] == ["high", "high", "low"]
    assert "the low noise expert of" in seen[2]


def test_inspect(pair, capsys, tmp_path):
    assert main(["inspect", str(pair)]) == 0
    out = capsys.readouterr().out
    assert "high noise" in out and "low noise" in out and out.count("\nmodel ") == 1
    file = header_only(tmp_path / "wan2.2_i2v_high_noise_14B_fp16.safetensors", of(I2V_A14B))
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "image to video, one expert of i2v-A14B" in out
    assert f"by its name {file.name} is the high noise expert of a model of two" in out


def test_convert_keeps_the_pair(pair, whole, tmp_path, capsys):
    assert main(["convert", str(pair), str(tmp_path / "out"), "--dtype", "float32", "--quiet"]) == 0
    assert {"high_noise.safetensors", "low_noise.safetensors"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert open_checkpoint(tmp_path / "out").boundary == 0.8
    assert main(["--model", str(tmp_path / "out"), *QUICK, "--output", str(tmp_path / "a.npz")]) == 0
    assert np.array_equal(made(tmp_path / "a.npz"), whole)
