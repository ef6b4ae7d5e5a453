"""Models of two experts (Wan2.2's A14B) as users open them: folders, pairs of files, boundary, guidance, LoRAs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from crafted import header_only
from test_other_models import of, official, said

import wan_mlx
from wan_mlx.caching import make_cache, resolve_cache
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.guidance import Guidance
from wan_mlx.hub.names import expert_named, needed_files
from wan_mlx.models.networks import new_transformer
from wan_mlx.planning import choose, speed
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import EXPERTS, NEGATIVE_PROMPT, PRESETS, find_preset
from wan_mlx.recipes import scheduler_for
from wan_mlx.request_builder import build_request
from wan_mlx.runs.record import check_same
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.lora import open_loras

T2V, I2V = PRESETS["t2v-A14B"], PRESETS["i2v-A14B"]
T2V_14B, I2V_A14B = T2V.transformer, I2V.transformer
QUICK = ["--prompt", "a red circle", "--size", "16x16", "--frames", "1", "--steps", "5", "--seed", "3", "--dtype",
         "float32", "--quiet", "--shift", "3"]  # fmt: skip


def changed(source, target, factor: float = 0.9) -> None:
    """A transformer like another, that makes something else."""
    arrays, metadata = mx.load(str(source), return_metadata=True)
    # All of it, as that of real experts: files are told apart by samples.
    mx.save_safetensors(str(target), {name: factor * array for name, array in arrays.items()}, metadata)


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    """A folder of two experts as `convert` writes it."""
    folder = tmp_path_factory.mktemp("pair") / "pair"
    shutil.copytree(pico, folder)
    as_pair(folder)
    return folder


def as_pair(folder: Path) -> None:
    """Make a model of one transformer one of two experts."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"high_noise": config["transformer"], "low_noise": config.pop("transformer"), "boundary": 0.8}
    (folder / "config.json").write_text(json.dumps(config))
    changed(folder / "transformer.safetensors", folder / "low_noise.safetensors")
    (folder / "transformer.safetensors").rename(folder / "high_noise.safetensors")


def opened(*args, **options) -> wan_mlx.WanPipeline:
    return wan_mlx.WanPipeline.from_pretrained(*args, dtype="float32", progress=False, prompt_cache=False, **options)


def made(path) -> np.ndarray:
    with np.load(path) as file:
        return file["latents"]


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The latents of the video that `QUICK` asks for."""
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert main(["--model", str(pair), *QUICK, "--output", str(path)]) == 0
    return made(path)


class TestPresets:
    def test_constants_of_fun(self):
        """Of VideoX-Fun's configurations and examples."""
        for name, boundary, shift, guidance, length in (
            ("vace-fun-A14B", 0.875, 12, 5, (81, 16)), ("fun-A14B-InP", 0.9, 5, 6, (81, 16)),
            ("fun-A14B-Control", 0.9, 5, 6, (81, 16)), ("fun-5B-InP", None, 5, 6, (121, 24)),
            ("fun-5B-Control", None, 5, 6, (121, 24)),
        ):  # fmt: skip
            fun = PRESETS[name]
            assert (fun.boundary, fun.num_frames, fun.fps, fun.negative_prompt) == (boundary, *length, NEGATIVE_PROMPT)
            assert vars(fun.sampling_for(*fun.size)) == dict(steps=50, shift=shift, guidance_scale=guidance)

    def test_official_constants(self):
        for preset, boundary, shift, guidance in ((T2V, 0.875, 12, (3, 4)), (I2V, 0.9, 5, 3.5)):
            sampling = preset.sampling_for(832, 480)
            assert (preset.boundary, sampling.shift, sampling.guidance_scale) == (boundary, shift, guidance)
            assert (sampling.steps, preset.fps, preset.num_frames, preset.size) == (40, 16, 81, (1280, 720))
            assert preset.negative_prompt == NEGATIVE_PROMPT  # without 2.1's prefix for pictures
            assert find_preset(preset.name) is preset and preset.experts == 2
        assert I2V_A14B.in_dim == 36 and not I2V_A14B.has_image_branch and T2V_14B == PRESETS["t2v-14B"].transformer

    @pytest.mark.parametrize("solver, shift, preset, high", [
        ("unipc", 12.0, T2V, 26), ("dpm++", 12.0, T2V, 26), ("unipc", 5.0, I2V, 15), ("dpm++", 5.0, I2V, 15),
    ])  # fmt: skip
    def test_steps_of_the_high_noise_expert(self, solver, shift, preset, high):
        request = build_request(preset, preset.transformer, preset.geometry, "a", 2, solver=solver, **picture(preset))
        timesteps = scheduler_for(request).timesteps
        assert request.shift == shift and sum(t >= 1000 * preset.boundary for t in timesteps) == high


def picture(preset) -> dict:
    return {"image": np.full((32, 32, 3), 128, np.uint8)} if preset.task == "i2v" else {}


class TestGuidance:
    def request(self, **given):
        return build_request(T2V, T2V_14B, T2V.geometry, "a", 2, **given)

    def test_official_order_is_low_then_high(self):
        request = self.request()
        assert request.guidance_scales == (3.0, 4.0)
        assert [Guidance.of(request, expert).scale for expert in EXPERTS] == [4.0, 3.0]

    def test_one_number_is_for_both(self):
        request = self.request(guidance_scale=2.5)
        assert [Guidance.of(request, expert).scale for expert in EXPERTS] == [2.5, 2.5]
        assert self.request(guidance_scale=(2.5, 2.5)).guidance_scale == 2.5

    def test_one_expert_may_be_without(self):
        request = self.request(guidance_scale=(1.0, 4.0))
        assert request.passes == 2 and self.request(guidance_scale=(1, 1)).passes == 1
        assert Guidance.of(request, "low_noise").passes(0, 9) == (0,)
        assert len(Guidance.of(request, "high_noise").passes(0, 9)) == 2

    def test_two_numbers_for_one_transformer_are_refused(self):
        nano = PRESETS["nano"]
        with pytest.raises(ValueError, match="guidance_scale is 3,4, but this model has one transformer"):
            build_request(nano, nano.transformer, nano.geometry, "a", guidance_scale=(3, 4))

    @pytest.mark.parametrize("text", ["3,4,5", "a,4", "3,", "nan,4"])
    def test_no_guidance(self, pair, text, capsys, tmp_path):
        assert main(["--model", str(pair), *QUICK, "--guidance", text, "--output", str(tmp_path / "a.npz")]) in (1, 2)
        assert "guidance" in capsys.readouterr().err


class TestRuns:
    def test_each_expert_serves_its_timesteps(self, pair, whole, monkeypatch):
        """Latents of a walk of our own: high where t >= 800."""
        pipe = opened(pair)
        request = pipe.request("a red circle", width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0)
        served = []
        load = wan_mlx.opened.load_transformer
        monkeypatch.setattr(
            "wan_mlx.opened.load_transformer", lambda part, *a, **k: served.append(part.name) or load(part, *a, **k)
        )
        assert np.array_equal(pipe.run(request).video().latents, whole)
        assert served == ["high_noise", "low_noise"]
        timesteps = [float(t) for t in scheduler_for(request).timesteps]
        assert pipe.switch(request) == sum(t >= 800 for t in timesteps) == 3

    def test_the_boundary_itself_is_high(self, pair):
        pipe = opened(pair, boundary=0.875)
        assert [pipe.expert(t).name for t in (875.0, 874.999, 875)] == ["high_noise", "low_noise", "high_noise"]

    def test_boundary_moves_the_switch(self, pair, whole, tmp_path):
        moved, none = tmp_path / "moved.npz", tmp_path / "none.npz"
        assert main(["--model", str(pair), *QUICK, "--boundary", "0.95", "--output", str(moved)]) == 0
        assert not np.array_equal(made(moved), whole)
        assert main(["--config", str(moved), "--model", str(pair), "--quiet", "--output", str(none)]) == 0
        assert np.array_equal(made(none), made(moved))

    def test_guidance_of_each(self, pair, whole, tmp_path):
        got = []
        for scales in ("3,3", "3,9", "9,3"):
            path = tmp_path / f"{scales}.npz"
            assert main(["--model", str(pair), *QUICK, "--guidance", scales, "--output", str(path)]) == 0
            got.append(made(path))
        assert np.array_equal(got[0], whole)
        pipe = opened(pair)
        options = dict(width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0, guidance_scale=(3, 9))
        first = list(pipe.run(pipe.request("a red circle", **options)).outputs())[1]
        plain = list(pipe.run(pipe.request("a red circle", **options | {"guidance_scale": 3})).outputs())[1]
        assert not mx.array_equal(first.latents, plain.latents)  # the second number is the high-noise expert's
        assert not np.array_equal(got[1], got[2])

    def test_pair_of_files(self, pair, whole, tmp_path):
        """Each way of saying which is which gives the same; the other way round it is another video."""
        high, low = pair / "high_noise.safetensors", pair / "low_noise.safetensors"
        apart = ["--text-encoder", pair, "--vae", pair, "--tokenizer", pair, "--boundary", "0.8", "--task", "nano"]
        ways = [
            ["--model", high, "--low-noise", low, *apart],
            ["--model", low, "--high-noise", high, *apart],
            ["--model", pair, "--high-noise", high, "--low-noise", low],
            ["--model", "nano", "--high-noise", high, "--low-noise", low, *apart],
            ["--high-noise", high, "--low-noise", low, *apart],
        ]
        for number, way in enumerate(ways):
            path = tmp_path / f"{number}.npz"
            assert main([*map(str, way), *QUICK, "--output", str(path)]) == 0
            assert np.array_equal(made(path), whole)
        swapped = ["--model", str(pair), "--high-noise", str(low), "--low-noise", str(high)]
        assert main([*swapped, *QUICK, "--output", str(tmp_path / "swapped.npz")]) == 0
        assert not np.array_equal(made(tmp_path / "swapped.npz"), whole)

    def test_resumed_across_the_boundary(self, pair, whole, tmp_path):
        """Through the run folder, as after a crash between the steps."""
        from wan_mlx.errors import Stopped
        from wan_mlx.runs.job import Job

        for stop in (2, 3, 4):
            output = tmp_path / f"{stop}.npz"
            pipe = opened(pair)
            request = pipe.request("a red circle", width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0,
                                   cache="none")  # fmt: skip
            job = Job(pipe, request, output)

            def listen(event, job=job, stop=stop):
                if type(event).__name__ == "Stepped" and event.step.index + 1 == stop:
                    job.stop()

            with pytest.raises(Stopped):
                job.make(listen)
            assert main(["--resume", str(output), "--quiet"]) == 0
            assert np.array_equal(made(output), whole)

    def test_other_guidance_is_told_as_it_is_given(self):
        record = {"model": {}, "asked": {"guidance_scale": [3.0, 4.0], "size": [32, 16]}, "request": {}}
        with pytest.raises(ValueError, match="--guidance is 3.0,4.0, 5.0,4.0 was given; --size is 32x16, 16x16 was"):
            check_same({"guidance_scale": (5.0, 4.0), "size": (16, 16)}, record, ())
        record = {"model": {"boundary": None}, "asked": {}, "request": {"width": 16, "height": 16},
                  "settings": {"boundary": 0.875}}  # fmt: skip
        check_same({"boundary": 0.875}, record, ())
        with pytest.raises(ValueError, match="--boundary is 0.875, 0.9 was given"):
            check_same({"boundary": 0.9}, record, ())

    def test_quantisation_of_each(self, pair):
        pipe = opened(pair, quantize_high="q8", quantize_low="q4")
        assert pipe.quantized == {"high_noise": "q8", "low_noise": "q4"}
        settings = pipe.settings(pipe.request("a"))
        assert (settings["quantize_high"], settings["quantize_low"]) == ("q8", "q4")
        assert opened(pair, quantize="q8", quantize_low="q4").quantized["low_noise"] == "q4"


class TestCaches:
    @pytest.mark.parametrize("preset, computed", [(T2V, 52), (I2V, 59)])
    def test_magcache_computes_as_many_forwards_as_its_authors(self, preset, computed):
        request = build_request(preset, preset.transformer, preset.geometry, "a", 2, **picture(preset))
        resolved = resolve_cache("magcache", 40, preset.name, preset.transformer)
        switch = int((scheduler_for(request).timesteps >= 1000 * preset.boundary).sum())
        assert make_cache(resolved, 40, preset.name, switch=switch).planned(2) == computed

    def test_every_cache_starts_afresh(self):
        """TeaCache, too, which may be asked for with another model's constants and a boundary."""
        for name in ("teacache", "magcache", "easycache"):
            resolved = resolve_cache(name, 40, "t2v-14B", T2V_14B)
            assert make_cache(resolved, 40, "t2v-14B", switch=26).starts_at(26)

    def test_teacache_has_no_constants(self):
        with pytest.raises(ValueError, match="teacache has no published constants for t2v-A14B"):
            resolve_cache("teacache", 40, "t2v-A14B", T2V_14B)

    def test_easycache_starts_afresh_at_the_switch(self, pair):
        """Nothing of the high-noise expert's steps is used in the low-noise one's first."""
        pipe = opened(pair)
        options = dict(width=16, height=16, num_frames=1, steps=12, seed=3, shift=3.0, cache="easycache:9:1")
        request = pipe.request("a red circle", **options)
        computed = [s.forwards for s in pipe.run(request).outputs() if hasattr(s, "forwards")]
        switch = pipe.switch(request)
        assert computed[switch] == 2 and computed[switch - 1] == 0 and 0 in computed[switch:]


def lora(path, module: str = "diffusion_model.blocks.0.self_attn.o", width: int = 256, value: float = 0.02):
    factors = {"lora_A": mx.full((4, width), value), "lora_B": mx.full((width, 4), 1.0)}
    mx.save_safetensors(str(path), {f"{module}.{name}.weight": array for name, array in factors.items()})
    return path


class TestLoras:
    def test_for_both_or_for_one(self, pair, tmp_path):
        file = str(lora(tmp_path / "a.safetensors"))
        got = {}
        for flags in ((), ("--lora",), ("--lora-high",), ("--lora-low",), ("--lora-high", "--lora-low")):
            path = tmp_path / f"{'+'.join(flags) or 'none'}.npz"
            given = [word for flag in flags for word in (flag, file)]
            assert main(["--model", str(pair), *QUICK, *given, "--output", str(path)]) == 0
            got[flags] = made(path)
        both = got.pop(("--lora-high", "--lora-low"))
        assert np.array_equal(both, got[("--lora",)])
        assert len({array.tobytes() for array in got.values()}) == 4

    def test_in_python(self, pair, tmp_path):
        file = lora(tmp_path / "a.safetensors")
        options = dict(width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0)
        given = opened(pair, loras={"high": f"{file}:0.5"})
        settings = given.settings(given.request("a"))
        assert "loras" not in settings and settings["loras_high"][0]["strength"] == 0.5
        later = opened(pair)
        with later.keep_loaded():
            plain = later("a red circle", **options).latents
            later.set_loras({"high": [(file, 0.5)]})
            changed = later("a red circle", **options).latents
            later.set_loras()
            assert np.array_equal(later("a red circle", **options).latents, plain)
        assert not np.array_equal(changed, plain)
        assert np.abs(given("a red circle", **options).latents - changed).max() < 1e-5 * np.abs(changed).max()

    @pytest.mark.parametrize("loras, match", [
        ({"middle": "a"}, "loras has the key 'middle', expected high and low"),
        ({"high": 5}, "loras is 5, expected a path"), (5, "loras is 5, expected"), ({"low": [5]}, "5 is no LoRA"),
    ])  # fmt: skip
    def test_wrong(self, pair, loras, match):
        with pytest.raises(ValueError, match=match):
            opened(pair, loras=loras)

    def test_for_a_model_of_one_transformer(self, pico, tmp_path):
        with pytest.raises(ValueError, match="loras_high or loras_low was given, which is for one of"):
            opened(pico, loras_low=str(lora(tmp_path / "a.safetensors")))

    def test_of_a_model_with_clip(self, tmp_path):
        """I2V-A14B is an image-to-video model, and has no such layers all the same."""
        file = lora(tmp_path / "a.safetensors", "diffusion_model.blocks.0.cross_attn.k_img", width=5120)
        with pytest.raises(WeightsError, match="it was made for a model that reads pictures by CLIP"):
            open_loras([(file, 1.0)], I2V_A14B)

    def test_of_another_shape(self, pair, tmp_path, capsys):
        file = lora(tmp_path / "a.safetensors", "diffusion_model.blocks.0.self_attn.q", width=5120)
        assert main(["--model", str(pair), *QUICK, "--lora-low", str(file)]) == 1
        assert "it is 5120 wide, this transformer 256" in capsys.readouterr().err


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


class TestKeptLoaded:
    def test_both_where_memory_allows(self):
        nets = sizes_of(T2V, "bfloat16")
        request = build_request(T2V, T2V_14B, T2V.geometry, "a", 2, width=832, height=480)
        roomy, tight = (choose.choose(nets, choose.Wanted("t2v-A14B", request, memory=memory, kept=True))
                        for memory in ("100GB", "45GB"))  # fmt: skip
        assert roomy.all_stay and not roomy.stream
        assert not tight.all_stay and not tight.stream and tight.fits  # one at a time, and none streamed

    def test_one_at_a_time(self, pair, monkeypatch):
        """Where the plan says so, one is gone before the other is loaded, in each of two videos."""
        pipe, names = opened(pair), []
        load, plan = wan_mlx.opened.load_transformer, wan_mlx.opened.plan_video

        def loading(part, *args, **kwargs):
            names.append(part.name)
            assert not {*EXPERTS}.intersection(pipe._kept)
            return load(part, *args, **kwargs)

        monkeypatch.setattr("wan_mlx.opened.load_transformer", loading)
        monkeypatch.setattr("wan_mlx.opened.plan_video", lambda *args: replace(plan(*args), all_stay=False))
        options = dict(width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0)
        with pipe.keep_loaded():
            first, second = (pipe("a red circle", **options).latents for _ in range(2))
        assert names == ["high_noise", "low_noise"] * 2 and np.array_equal(first, second)

    @pytest.mark.parametrize("later, stay", [(dict(all_stay=False), 1), (dict(stream=True), 0), ({}, 2)])
    def test_a_larger_video_after_a_smaller_one(self, pair, whole, monkeypatch, later, stay):
        """What its plan does not count is gone before anything is encoded."""
        pipe, plan, changes = opened(pair), wan_mlx.opened.plan_video, {}
        monkeypatch.setattr("wan_mlx.opened.plan_video", lambda *args: replace(plan(*args), **changes))
        request = pipe.request("a red circle", width=16, height=16, num_frames=1, steps=5, seed=3, shift=3.0)
        with pipe.keep_loaded():
            pipe.run(request).video()
            changes = later
            events = iter(pipe.run(request))
            next(events)
            assert len({*EXPERTS}.intersection(pipe._kept)) == stay
            *_, last = (event.step for event in events if hasattr(event, "step"))
            assert np.array_equal(np.array(last.latents[0].transpose(3, 0, 1, 2)), whole)
