# ruff: noqa: F401, F811
"""Models of two experts (Wan2.2's A14B) as users run them: boundary, guidance, caches, LoRAs, what stays loaded."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from two_experts import I2V, I2V_A14B, QUICK, T2V, T2V_14B, lora, made, opened, pair, whole

import wan_mlx
from wan_mlx.caching import make_cache, resolve_cache
from wan_mlx.cli.main import main
from wan_mlx.errors import WeightsError
from wan_mlx.guidance import Guidance
from wan_mlx.planning import choose
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import EXPERTS, NEGATIVE_PROMPT, PRESETS, find_preset
from wan_mlx.recipes import scheduler_for
from wan_mlx.request_builder import build_request
from wan_mlx.runs.record import check_same
from wan_mlx.weights.lora import open_loras


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
