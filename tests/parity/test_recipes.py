"""Recipes of distilled models: whole trajectories against the published loops, restated in torch; wrong use; hints."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracles import relative_error, torch
from sampling import always
from test_schedulers import fake_model

import wan_mlx
from wan_mlx.caching import StepCache
from wan_mlx.cli.main import main
from wan_mlx.cli.summary import recipe_notes, strength_notes, suggest_recipe
from wan_mlx.denoise import denoise
from wan_mlx.guidance import Guidance
from wan_mlx.noise import latent_noise
from wan_mlx.phases import phase_at, read_phases
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import RECIPES, scheduler_for
from wan_mlx.schedulers import SOLVERS, Grid
from wan_mlx.types import Conditioning, Request

SHAPE, SEED, BOUND = (16, 3, 4, 5), 42, 1e-5


def request(recipe: str, steps: int | None = None) -> Request:
    filled = RECIPES[recipe].fill(steps=steps, guidance_scale=None, shift=None, solver=None, phases=None)
    return Request("a", "", 40, 32, 9, seed=SEED, recipe=recipe, **filled)


def ours(recipe: str, steps: int | None = None) -> list[np.ndarray]:
    """Latents (C, t, h, w) after every step of the loop, and the timesteps that the model was given."""
    told = []

    def model(latents, timestep, context):
        told.append(timestep)
        return mx.array(np.moveaxis(fake_model(np.moveaxis(np.array(latents), -1, 1), timestep), 1, -1))

    asked = request(recipe, steps)
    conditioning = Conditioning(latent_noise(SHAPE[1:], SHAPE[0], SEED), mx.zeros((1, 2, 3)))
    serving = always(model, Guidance(asked.guidance_scale))
    walk = denoise(serving, conditioning, scheduler_for(asked), StepCache(asked.steps))
    return [np.moveaxis(np.array(step.latents)[0], -1, 0) for step in walk], told


def theirs(velocity_step, sigmas, timesteps, start=lambda x, sigmas: x):
    """The published loop in float64: ``velocity_step(x, v, sigma, next sigma, draw)`` where ``draw()`` is noise."""
    generator = torch.Generator().manual_seed(SEED)

    def draw():
        return torch.randn(SHAPE, generator=generator)

    x, states = start(draw().double(), sigmas), []
    for index, timestep in enumerate(timesteps):
        v = torch.from_numpy(fake_model(x.float().numpy()[None], timestep))[0].double()
        x = velocity_step(x, v, sigmas[index], sigmas[index + 1], draw)
        states.append(x)
    return states


def euler(x, v, sigma, following, draw):
    clean = x - sigma * v
    return clean + following * v


def renoise(x, v, sigma, following, draw):
    clean = x - sigma * v
    return clean if following == 0 else (1 - following) * clean + following * draw()


def compare(recipe, loop, steps=None):
    (got, told), (want, timesteps) = ours(recipe, steps), loop
    assert len(got) == len(want) and np.allclose(told, timesteps, rtol=1e-6)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative_error(a, b) <= BOUND, f"after step {index}"


# What is published, where it is: the timesteps that the model is told, to the digits that are given.
PUBLISHED = {
    "lightx2v-4step": [1000.0000, 937.5001, 833.3333, 625.0000],
    "lightx2v-8step": [1000, 972.2, 937.5, 892.9, 833.3, 750, 625, 416.7],
    "fastwan-5B": [1000, 940, 846],
    "fastwan-3step": [1000, 757, 522],
    "causvid-1.3B": [1000, 934, 862, 756, 603, 410, 250, 140],
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_timesteps(recipe):
    scheduler = scheduler_for(request(recipe))
    digits = [len(f"{t}".partition(".")[2].rstrip("0")) for t in PUBLISHED[recipe]]
    assert [round(float(t), n) for t, n in zip(scheduler.timesteps, digits, strict=True)] == pytest.approx(
        PUBLISHED[recipe], abs=1.1e-4
    )
    assert np.allclose(scheduler.sigmas[:-1], np.array(PUBLISHED[recipe]) / 1000, atol=1e-3)


@pytest.mark.parametrize("recipe, steps", [("lightx2v-4step", 4), ("lightx2v-8step", 8)])
def test_lightx2v(recipe, steps):
    """1000 even levels, shifted by 5 in float32 as LightX2V does, of which some are walked; Euler."""
    levels = torch.linspace(1.0, 0.0, 1001)[:-1]
    levels = 5 * levels / (1 + 4 * levels)
    sigmas = [levels[1000 * place // steps].item() for place in range(steps)]
    timesteps = [1000 * sigma for sigma in sigmas]
    compare(recipe, (theirs(euler, [*sigmas, 0.0], timesteps), timesteps))


@pytest.mark.parametrize("recipe, shift", [("lightx2v-3phase", 3.0), ("lightx2v-3phase-i2v", 5.0)])
def test_three_phases(recipe, shift):
    """Wan2GP's Euler: timesteps from 1000 to 1, shifted; the last one goes to 0. A step has guidance, then three."""
    timesteps = torch.linspace(1000, 1, 8, dtype=torch.float32).double() / 1000
    sigmas = (shift * timesteps / (1 + (shift - 1) * timesteps)).tolist()
    told = [1000 * sigma for sigma in sigmas]
    compare(recipe, (theirs(euler, [*sigmas, 0.0], told), told))
    phases = read_phases(RECIPES[recipe].phases)
    assert [sum(phase_at(phases, t) is phase for t in told) for phase in phases] == [1, 3, 4]
    assert [phase.guidance for phase in phases] == [3.5, 1, 1]
    assert [(*phase.loras, phase.expert) for phase in phases] == [
        (0, "high_noise"), (1, "high_noise"), (1, "low_noise"),
    ]  # fmt: skip


def test_fastwan_5b():
    """FastVideo's warped levels: places among the 1000 that its scheduler makes for 1000 steps at shift 5."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    grid = FlowMatchEulerDiscreteScheduler(shift=5.0)
    grid.set_timesteps(1000)
    places = [1000 - place for place in (1000, 757, 522)]
    sigmas, timesteps = grid.sigmas[places].tolist(), grid.timesteps[places].tolist()
    compare("fastwan-5B", (theirs(renoise, [*sigmas, 0.0], timesteps), timesteps))


def test_causvid_1_3b():
    """Wan2GP's solver causvid: CausVid's own timesteps, as many as steps, as sigmas divided by 1000; Euler."""
    timesteps = [1000, 934, 862, 756, 603, 410, 250, 140]
    sigmas = [timestep / 1000 for timestep in timesteps]
    compare("causvid-1.3B", (theirs(euler, [*sigmas, 0.0], timesteps), timesteps))


def test_fastwan():
    """Diffusers' flow-matching grid at shift 8, of which FastVideo takes the level nearest to each timestep."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    grid = FlowMatchEulerDiscreteScheduler(shift=8.0)
    timesteps = [1000, 757, 522]
    sigmas = [grid.sigmas[(grid.timesteps - t).abs().argmin()].item() for t in timesteps]
    assert np.allclose(sigmas, [1.0, 0.757, 0.522], atol=1e-3)
    compare("fastwan-3step", (theirs(renoise, [*sigmas, 0.0], timesteps), timesteps))


@pytest.mark.parametrize("recipe, greatest", [("rcm", 80), ("turbowan-i2v", 200)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rcm(recipe, greatest, steps):
    """TrigFlow's angles turned into noise levels in float64; the start is scaled to the first."""
    angles = torch.tensor([math.atan(greatest), *[1.5, 1.4, 1.0][: steps - 1], 0], dtype=torch.float64)
    sigmas = (torch.sin(angles) / (torch.cos(angles) + torch.sin(angles))).tolist()
    timesteps = [1000 * sigma for sigma in sigmas[:-1]]
    states = theirs(renoise, sigmas, timesteps, start=lambda x, sigmas: x * sigmas[0])
    compare(recipe, (states, timesteps), steps)


def test_turbowan_changes_experts_after_two_steps():
    assert [t >= 900 for t in scheduler_for(request("turbowan-i2v")).timesteps] == [True, True, False, False]


@pytest.mark.parametrize("recipe, steps, shift, strength", [
    ("causvid", 12, 7.0, 0.3), ("causvid", 8, 7.0, 0.5), ("causvid", 4, 7.0, 0.9), ("accvid", 50, 5.0, 1.0),
    ("fusionix", 10, 2.0, 1.0), ("fun-reward", 8, 3.0, 1.0),
])  # fmt: skip
def test_unipc_on_its_own_grid(recipe, steps, shift, strength):
    scheduler = scheduler_for(request(recipe, steps))
    assert type(scheduler).__name__ == "UniPC" and len(scheduler.timesteps) == steps
    assert np.array_equal(scheduler.sigmas, SOLVERS["unipc"](steps, shift).sigmas)
    assert RECIPES[recipe].strength(steps) == strength


@pytest.mark.parametrize("recipe", ["fastwan-5B", "rcm"])
def test_resumed_draws_the_same_noise(recipe):
    """A run that goes on at any step ends as the run without a break: the noise depends on seed and step alone."""
    want, _ = ours(recipe)

    def model(latents, timestep, context):
        return mx.array(np.moveaxis(fake_model(np.moveaxis(np.array(latents), -1, 1), timestep), 1, -1))

    conditioning = Conditioning(latent_noise(SHAPE[1:], SHAPE[0], SEED), mx.zeros((1, 2, 3)))
    serving = always(model, Guidance())
    whole = list(denoise(serving, conditioning, scheduler_for(request(recipe))))
    for first in range(1, len(whole)):
        scheduler, state = scheduler_for(request(recipe)), whole[first - 1].state
        rest = denoise(serving, conditioning, scheduler, first=first, state=state)
        assert mx.array_equal(list(rest)[-1].latents, whole[-1].latents)
    assert relative_error(np.moveaxis(np.array(whole[-1].latents)[0], -1, 0), want[-1]) == 0


def test_every_step_draws_other_noise():
    draws = [np.array(latent_noise(SHAPE[1:], SHAPE[0], SEED, earlier)) for earlier in range(3)]
    assert all(np.abs(a - b).mean() > 0.5 for a, b in zip(draws, draws[1:], strict=False))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole(name):
    recipe = RECIPES[name]
    for steps in (recipe.steps, *recipe.other_steps):
        scheduler = scheduler_for(request(name, steps))
        assert len(scheduler.timesteps) == steps == len(scheduler.sigmas) - 1
        assert scheduler.sigmas[-1] == 0 and (np.diff(scheduler.sigmas) < 0).all()


class TestWrongUse:
    @pytest.mark.parametrize(
        "given, says",
        [
            (dict(steps=8), "steps is 8, but the recipe lightx2v-4step is made for 4; leave one of the two out"),
            (dict(shift=3.0), "shift is 3.0, but the recipe .* made for 5.0"),
            (dict(guidance_scale=5.0), "guidance_scale is 5.0, but the recipe .* made for 1.0"),
            (dict(phases="800,0"), "phases is 800,0, but the recipe .* made for one phase"),
            (dict(solver="unipc"), "solver is unipc, but the recipe .* made for euler"),
        ],
    )
    def test_options_that_contradict_the_recipe_are_refused(self, given, says):
        nothing = dict(steps=None, guidance_scale=None, shift=None, solver=None, phases=None)
        with pytest.raises(ValueError, match=says):
            RECIPES["lightx2v-4step"].fill(**nothing | given)
        assert RECIPES["lightx2v-4step"].fill(**nothing | dict(steps=4, shift=5.0))["solver"] == "euler"

    def test_other_steps(self):
        with pytest.raises(ValueError, match="steps is 3, .* made for 4 or 5 or .* or 12"):
            request("causvid", 3)


SUGGESTED = {
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": "lightx2v-4step",
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "lightx2v-4step",
    "lightx2v/Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v": "lightx2v-4step",
    "Wan2.1-T2V-14B-StepDistill-CfgDistill": "lightx2v-4step",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan-3step",
    "Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "causvid",
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors": "causvid-1.3B",
    "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors": "lightx2v-4step",
    "wan2.2_i2v_A14b_low_noise_lightx2v_4step_720p_260412.safetensors": "lightx2v-4step",
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors": "lightx2v-4step",
    "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors": "fastwan-5B",
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan-5B",
    "Wan21_AccVid_I2V_480P_14B_lora_rank32_fp16.safetensors": "accvid",
    "Wan2.1_I2V_14B_FusionX_LoRA.safetensors": "fusionix",
    "Wan14BT2VFusioniX": "fusionix",
    "TurboWan2.2-I2V-A14B-high-720P.pth": "turbowan-i2v",
    "TurboWan2.1-T2V-1.3B-480P.pth": "rcm",
    "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors": "fun-reward",
    "Wan2.2-Fun-A14B-InP/high_noise_model": None,
    "rCM_Wan2.1_T2V_1.3B_480p.pt": "rcm",
    "Wan-AI/Wan2.1-T2V-1.3B": None,
    "Wan2.1-T2V-14B/diffusion_pytorch_model-00001-of-00006.safetensors": None,
    "arcmage_style.safetensors": None,
    "breakfast-wander.safetensors": None,
}


@pytest.mark.parametrize("path, name", SUGGESTED.items())
def test_suggestion_by_name(path, name):
    suggested = suggest_recipe(path)
    assert (suggested and suggested.name) == name


def test_suggestion_by_metadata():
    assert suggest_recipe("lora.safetensors", {"modelspec.title": "CausVid 14B"}).name == "causvid"
    assert suggest_recipe("lora.safetensors", {"ss_output_name": "my_cat", "ss_network_dim": "32"}) is None
    training_data = json.dumps({"tag": "a lightx2v video " * 50})
    assert suggest_recipe("lora.safetensors", {"ss_tag_frequency": training_data}) is None


def test_a_suggestion_is_a_line_and_no_more():
    notes = recipe_notes(["a/Wan21_CausVid_lora.safetensors", "b/CausVid"], None)
    assert len(notes) == 1
    assert all(word in notes[0] for word in ("--recipe causvid", "12 steps", "unipc", "shift 7", "strength 0.3"))
    assert recipe_notes(["CausVid.safetensors"], "causvid") == []
    assert "strength 0.5" in recipe_notes(["CausVid.safetensors"], None, steps=8)[0]
    assert recipe_notes(["a_lightx2v_4step.safetensors"], "lightx2v-3phase") == []


def test_a_suggestion_is_for_the_model():
    """The same name is of another recipe where the model is another one."""
    small, large = (PRESETS[name] for name in ("t2v-1.3B", "t2v-14B"))
    assert suggest_recipe("CausVid_1_3B.safetensors", preset=small).name == "causvid-1.3B"
    assert suggest_recipe("CausVid_1_3B.safetensors", preset=large).name == "causvid"


def test_another_strength_is_told():
    asked, lora = request("causvid", 8), Path("CausVid.safetensors")
    assert list(strength_notes([(lora, 0.5), (Path("style.safetensors"), 1.0)], asked, PRESETS["t2v-14B"])) == []
    (note,) = strength_notes([(lora, 1.0)], asked, PRESETS["t2v-14B"])
    assert "CausVid.safetensors is given at 1; " in note and note.endswith("0.5 in 8 steps")


def test_notes_read_the_metadata_of_a_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros(3)}, {"modelspec.title": "FastWan 14B"})
    assert "--recipe fastwan-3step" in recipe_notes([path], None)[0]
    path.write_bytes(b"damaged")
    assert recipe_notes([path], None) == []


class TestCommandLine:
    def run(self, capsys, *extra):
        code = main(["--model", "nano", "--prompt", "a red circle", "--seed", "1", "--dry-run", *extra])
        return code, capsys.readouterr().err

    def test_a_recipe_binds_everything(self, capsys):
        code, error = self.run(capsys, "--recipe", "fastwan-3step")
        assert code == 0
        assert "dmd, 3 steps, shift 8, guidance off" in error and "by the recipe fastwan-3step" in error

    def test_contradiction_is_usage(self, capsys):
        code, error = self.run(capsys, "--recipe", "fastwan-3step", "--steps", "20")
        assert code == 2 and "steps is 20" in error

    def test_cache_with_few_steps_is_usage(self, capsys):
        code, error = self.run(capsys, "--recipe", "lightx2v-4step", "--cache", "easycache")
        assert code == 2 and "easycache makes no sense with 4 steps" in error


def test_video_says_its_recipe():
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", dtype="float32", progress=False)
    video = pipe("a red circle", width=32, height=32, num_frames=1, seed=3, recipe="rcm", steps=2)
    again = pipe("a red circle", width=32, height=32, num_frames=1, seed=3, recipe="rcm", steps=2)
    assert video.settings["recipe"] == "rcm" and video.settings["forwards"] == [2, 2]
    assert np.array_equal(video.latents, again.latents)


def test_grid_of_given_levels():
    grid = Grid.of([1.0, 0.5], [1000, 400])
    assert grid.sigmas.tolist() == [1.0, 0.5, 0.0] and grid.timesteps.tolist() == [1000.0, 400.0]
