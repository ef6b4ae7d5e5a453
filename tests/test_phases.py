"""Phases of a run: what is read, what is refused, and a run of three phases against a loop of its own."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from two_experts import lora, made, opened, pair  # noqa: F401  # a fixture

from wan_mlx.cli.main import main
from wan_mlx.guidance import Guidance
from wan_mlx.noise import latent_noise
from wan_mlx.phases import Phase, phase_at, read_phases
from wan_mlx.planning.choose import forwards_of
from wan_mlx.planning.sizes import not_here, sizes_of
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import RECIPES, timesteps_of
from wan_mlx.request_builder import build_request
from wan_mlx.types import Conditioning, RunState, Step
from wan_mlx.weights.load import load_transformer

SMALL = dict(width=16, height=16, num_frames=1, seed=3)


def test_what_is_read():
    high, middle, low = read_phases("965:3.5:0:high, 800:1:1:high,0:1:1/0.5:low")
    assert (high.down_to, high.guidance, high.loras, high.expert) == (965, 3.5, (0,), "high_noise")
    assert (low.guidance, low.loras, low.expert) == (1, (1, 0.5), "low_noise")
    assert read_phases("500::0,0") == (Phase(500, None, (0.0,)), Phase(0))
    assert read_phases(None) == read_phases("") == ()
    phases = read_phases("965,800,0")
    assert [phase_at(phases, t).down_to for t in (1000, 965, 964.9, 800, 0)] == [965, 965, 800, 800, 0]
    for text in ("965:3.5:0:high,800:1:1:high,0:1:1/0.5:low", "500::0,0::1"):
        assert ",".join(map(str, read_phases(",".join(map(str, read_phases(text)))))) == text


@pytest.mark.parametrize("text, says", [
    ("half", "'half' is no phase; expected FROM:GUIDANCE:LORA:EXPERT"),
    ("965:3.5:0:middle,0", "'965:3.5:0:middle' is no phase"),
    ("965:nan,0", "'965:nan' is no phase"),
    ("965:1:1:high:1,0", "is no phase"),
    ("965,,0", "'' is no phase"),
    ("965:3.5", "the last one ends at 965, expected 0: 965:3.5:1 → 0:3.5:1"),
    ("800,965,0", "the phase 965::1 goes down to 965, expected below 800, where the phase before it ends"),
    ("800,800,0", "expected below 800"),
    ("1000,0", "goes down to 1000, expected 0 to below 1000"),
    ("-5", "expected 0 to below 1000"),
    ("965:1:1:high,0", "the expert is named for some"),
    ("965:1:1:low,0:1:1:high", "the high-noise expert comes after"),
])  # fmt: skip
def test_what_is_refused(text, says, capsys):
    code = main(["--model", "nano", "--prompt", "a red circle", "--dry-run", f"--phases={text}"])
    error = capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1 and says in error, error


def request(**given):
    preset = PRESETS["t2v-A14B"]
    return build_request(preset, preset.transformer, preset.geometry, "a", 2, **given)


class TestRequests:
    def test_a_phase_must_hold_a_step(self):
        with pytest.raises(ValueError, match="the phase 999.5::1 holds none of the 40 steps, whose timesteps are 999"):
            request(phases="999.5,0")

    def test_an_expert_of_a_model_of_one(self):
        nano = PRESETS["nano"]
        with pytest.raises(ValueError, match="name an expert, but this model has one transformer"):
            build_request(nano, nano.transformer, nano.geometry, "a", phases="800:1:1:high,0:1:1:low")

    def test_beside_a_recipe(self):
        with pytest.raises(ValueError, match="phases is 800,0, but the recipe lightx2v-4step is made for one phase"):
            request(phases="800,0", recipe="lightx2v-4step")

    def test_a_cache_beside_loras_that_change(self):
        with pytest.raises(ValueError, match="the phases 800::0,0::1 change the LoRAs, and what the cache easycache"):
            request(phases="800::0,0", cache="easycache")
        assert request(phases="800:3,0:1", cache="easycache").cache.startswith("easycache")

    def test_guidance(self):
        asked = request(phases="800:1,0")
        scales = [Guidance.of(asked, expert, t).scale for expert, t in (("high_noise", 900), ("low_noise", 700))]
        assert scales == [1, 3] and asked.passes == 2  # the low-noise expert's own
        assert request(phases="800:1,0:1").passes == 1
        assert request(phases="800,0", guidance_scale=1.0).passes == 1

    def test_the_plan_counts_forwards(self):
        preset = PRESETS["t2v-A14B"]
        experts = sizes_of(not_here(preset).divided(preset.boundary), "bfloat16", released=preset).experts
        low = sum(t < 800 for t in timesteps_of(request()))
        for given, want in (
            (dict(recipe="lightx2v-3phase"), ([5, 4], 1)), (dict(recipe="lightx2v-4step"), ([2, 2], 0)),
            (dict(phases="800:1:1:high,0::1:low"), ([40 - low, 2 * low], low)),
        ):  # fmt: skip
            assert forwards_of(request(**given), experts, preset.name) == want


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    low = lora(folder / "low.safetensors", value=-0.03)
    return {"high": [(lora(folder / "high.safetensors"), 0.8)], "low": [(low, 1.0)]}


@pytest.fixture(scope="module")
def three(pair, files):  # noqa: F811
    """A pipeline whose own boundary would have another expert serve the second phase, and its steps by the recipe."""
    pipe = opened(pair, loras=files, boundary=0.99)
    asked = pipe.request("a red circle", recipe="lightx2v-3phase", **SMALL)
    return pipe, asked, list(pipe.run(asked).outputs())


def test_three_phases_are_the_published_loop(three, files):
    """Guidance without LoRA while t > 965, the high-noise expert and its LoRA while t > 800, then the low-noise one."""
    pipe, asked, outputs = three
    timesteps = np.linspace(1000, 1, 8) / 1000
    sigmas = np.append(3 * timesteps / (1 + 2 * timesteps), 0)
    high, low = pipe.checkpoint.of_kind("transformer")
    networks = {name: load_transformer(part, "float32", loras=loras) for name, part, loras in (
        ("high", high, None), ("high with", high, files["high"]), ("low with", low, files["low"]))}  # fmt: skip
    contexts = pipe.encode_text([asked.prompt, asked.negative_prompt])
    x = np.array(latent_noise(asked.latent_shape, pipe.latent_channels, asked.seed)).astype(np.float64)
    steps = [output for output in outputs if isinstance(output, Step)]
    for index, step in enumerate(steps):
        t = 1000 * sigmas[index]
        name = "high" if t > 965 else "high with" if t > 800 else "low with"
        passes = contexts if t > 965 else contexts[:1]
        cond, *uncond = (np.array(networks[name](mx.array(x.astype(np.float32)), t, c)) for c in passes)
        velocity = uncond[0] + 3.5 * (cond - uncond[0]) if uncond else cond
        x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        assert np.abs(np.array(step.latents) - x).max() <= 1e-5 * np.abs(x).max(), f"after step {index + 1}"
    assert [step.forwards for step in steps] == [2] + 7 * [1] and pipe.switch(asked) == 4


def test_streamed_is_resident(three, monkeypatch):
    pipe, asked, outputs = three
    plan = pipe.plan
    monkeypatch.setattr(pipe, "plan", lambda *given: replace(plan(*given), stream=True))
    again = [output for output in pipe.run(asked).outputs() if isinstance(output, Step)][-1]
    whole = [output for output in outputs if isinstance(output, Step)][-1]
    # Not the same bits: streamed, the low-noise expert's LoRA stays beside its weights.
    assert np.abs(np.array(again.latents - whole.latents)).max() <= 1e-5


@pytest.mark.parametrize("done", [1, 2, 5])
def test_resumed_is_uninterrupted(three, done):
    pipe, asked, outputs = three
    steps = [output for output in outputs if isinstance(output, Step)]
    conditioning = next(output for output in outputs if isinstance(output, Conditioning))
    state = RunState(conditioning, done, steps[done - 1].state)
    rest = [output for output in pipe.run(asked, state).outputs() if isinstance(output, Step)]
    assert len(rest) == 9 - done and np.array_equal(np.array(rest[-1].latents), np.array(steps[-1].latents))


def test_kept_loaded_is_alone(three):
    """One with phases, one without, and one with, of which each loads the networks as if it were alone."""
    pipe, asked, outputs = three
    whole = [output for output in outputs if isinstance(output, Step)][-1]
    plain = dict(steps=2, shift=3.0, **SMALL)
    alone = pipe("a red circle", **plain).latents
    with pipe.keep_loaded():
        for _ in range(2):
            latents = np.moveaxis(np.array(whole.latents)[0], -1, 0)
            assert np.array_equal(pipe.run(asked).video().latents, latents)
            assert np.array_equal(pipe("a red circle", **plain).latents, alone)


def test_settings_and_config(pair, tmp_path):  # noqa: F811
    first, again = tmp_path / "first.npz", tmp_path / "again.npz"
    flags = ["--model", str(pair), "--dtype", "float32", "--quiet"]
    asked = [*"--size 16x16 --frames 1 --seed 3 --steps 4 --prompt red --shift".split(), "3"]
    assert main([*flags, *asked, "--phases", "900:2::high, 0:1::low", "--output", str(first)]) == 0
    assert main([*flags, "--config", str(first), "--output", str(again)]) == 0
    assert np.array_equal(made(first), made(again))
    asked[-1] = "3"
    assert main([*flags, *asked, "--output", str(again), "--overwrite"]) == 0
    assert not np.array_equal(made(first), made(again))


def test_a_number_for_each_lora(pair, files):  # noqa: F811
    style = files["low"][0]
    pipe = opened(pair, loras_high=files["high"], loras=[style])
    asked = pipe.request("a", steps=4, shift=3.0, phases="900:1:0.5,0:1:0/1", **SMALL)
    high = files["high"][0]
    assert pipe.loras_at(asked, 999) == [style, (high[0], 0.4)]  # one factor: the expert's own
    assert pipe.loras_at(asked, 850) == [high]  # of both experts' 0
    with pytest.raises(ValueError, match="the phase 0:1:0/1 has 2 strengths of LoRAs, expected one, or 1"):
        pipe.loras_at(asked, 100)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if "t2v-1.3B" not in recipe.models])
def test_a_recipe_with_the_wrong_model(name):
    preset = PRESETS["t2v-1.3B"]
    says = f"the recipe {name} is for .*, not for t2v-1.3B; recipes for it: fastwan-3step, causvid-1.3B, rcm"
    with pytest.raises(ValueError, match=says):
        build_request(preset, preset.transformer, preset.geometry, "a", recipe=name)


def test_models_of_recipes_exist():
    assert {name for recipe in RECIPES.values() for name in recipe.models} <= {*PRESETS}
    asked = request(recipe="causvid")
    assert (asked.steps, asked.shift, asked.solver) == (12, 7.0, "unipc")


def test_presets_know_the_steps_of_their_recipes():
    for preset in PRESETS.values():
        assert preset.recipe_steps == (RECIPES[preset.recipe].steps if preset.recipe else 0)
