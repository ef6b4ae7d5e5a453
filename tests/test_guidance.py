"""Guidance options: CFG-Zero* against NumPy, ranges, skipped layers against a shorter model."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import sampling
from arrays import random_array, randomized, relative_error
from mlx.utils import tree_flatten
from sampling import GRID, SCALE, SHIFT, SIZES, conditioning

from wan_mlx.guidance import Guidance, check_guidance, zero_steps_of
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.schedulers import SOLVERS
from wan_mlx.types import Request

STEPS, LAYERS = 10, 4
walk = partial(sampling.walk, steps=STEPS, solver="euler")
latents = partial(sampling.latents, steps=STEPS, solver="euler")


@pytest.fixture(scope="module")
def model():
    return randomized(Transformer(TransformerConfig(**SIZES, num_layers=LAYERS)))


class Recorder:
    """A model that notes what it was asked; with a cond velocity and an uncond velocity that differ."""

    def __init__(self):
        self.asked = []
        self.names = {bytes(np.array(conditioning().context)): "cond"}

    def __call__(self, latents, timestep, context, skip_layers=(), shared=None):
        name = self.names.get(bytes(np.array(context)), "uncond")
        self.asked.append((timestep, name, tuple(skip_layers)))
        return mx.tanh(latents * (1.5 if name == "cond" else 0.7))


@pytest.mark.parametrize(
    "same_as_default",
    [dict(range=(0.0, 1.0)), dict(skip_layers=()), dict(skip_layers=(1,), skip_range=(0.91, 0.98))],
)
def test_neutral_options_give_the_same_bytes(model, same_as_default):
    plain, neutral = Guidance(SCALE), Guidance(SCALE, **same_as_default)
    assert np.array_equal(latents(model, guidance=neutral), latents(model, guidance=plain))


@pytest.mark.parametrize(
    "change",
    [dict(range=(0.0, 0.5)), dict(range=(0.5, 1.0)), dict(cfg_zero=0), dict(cfg_zero=1), dict(skip_layers=(1,))],
)
def test_each_option_changes_the_latents(model, change):
    plain, changed = Guidance(SCALE), Guidance(SCALE, **change)
    assert not np.array_equal(latents(model, guidance=changed), latents(model, guidance=plain))


def test_scale_1_is_one_pass():
    recorder = Recorder()
    walk(recorder, guidance=Guidance(1.0))
    assert [name for _, name, _ in recorder.asked] == ["cond"] * STEPS


@pytest.mark.parametrize(
    "span, guided",
    [((0.0, 0.5), range(5)), ((0.3, 0.7), range(3, 7)), ((0.25, 1.0), range(2, 10)), ((0.0, 0.29), range(2))],
)
def test_outside_the_range_one_pass_is_made(span, guided):
    recorder = Recorder()
    steps = walk(recorder, guidance=Guidance(SCALE, range=span))
    assert [step.index for step in steps if step.forwards == 2] == list(guided)
    assert {step.forwards for step in steps} <= {1, 2} and {step.passes for step in steps} == {2}
    timesteps = [step.timestep for step in steps]
    assert {t for t, name, _ in recorder.asked if name == "uncond"} == {timesteps[index] for index in guided}


def test_cfg_zero_against_numpy():
    """The paper's equation, in float64, on velocities far from each other in size."""
    cond, uncond = random_array(1, 1, 2, 3, 4, 16), 3 * random_array(2, 1, 2, 3, 4, 16) + 1
    c, u = np.array(cond, dtype=np.float64), np.array(uncond, dtype=np.float64)
    scale = (c * u).sum() / ((u * u).sum() + 1e-8)
    got = Guidance(5.0, cfg_zero=0).combine(cond, uncond)
    assert relative_error(got, scale * u + 5.0 * (c - scale * u)) < 1e-5
    assert abs(scale - 1) > 0.2


def test_no_forward_is_made_where_the_velocity_is_zero():
    recorder = Recorder()
    steps = walk(recorder, guidance=Guidance(SCALE, cfg_zero=2))
    assert [step.forwards for step in steps] == [0, 0] + [2] * (STEPS - 2)
    assert len(recorder.asked) == 2 * (STEPS - 2)
    assert np.array_equal(np.array(steps[1].latents), np.array(conditioning().noise))


@pytest.mark.parametrize("skipped", [(0,), (2,), (1, 3)])
def test_skipping_a_layer_is_a_model_without_it(model, skipped):
    """Every step of the pass without the prompt, by a transformer whose blocks are fewer; bit for bit."""
    shorter = Transformer(TransformerConfig(**SIZES, num_layers=LAYERS - len(skipped)))
    kept = [layer for layer in range(LAYERS) if layer not in skipped]
    renamed = {f"blocks.{layer}.": f"blocks.{place}." for place, layer in enumerate(kept)}
    weights = [(name, array) for name, array in tree_flatten(model.parameters())
               if not name.startswith(tuple(f"blocks.{layer}." for layer in skipped))]  # fmt: skip
    for old, new in renamed.items():
        weights = [(new + name.removeprefix(old) if name.startswith(old) else name, array) for name, array in weights]
    shorter.load_weights(weights, strict=True)
    guidance = Guidance(SCALE, skip_layers=skipped, skip_range=(0.2, 0.8))
    x, scheduler = conditioning().noise, SOLVERS["euler"](STEPS, SHIFT)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        without = shorter if 2 <= index < 8 else model
        cond = model(x, float(timestep), conditioning().context)
        uncond = without(x, float(timestep), conditioning().negative_context)
        x = scheduler.step(index, uncond + SCALE * (cond - uncond), x)
    assert np.array_equal(latents(model, guidance=guidance), np.array(x))


def test_skipped_layers_are_of_the_uncond_pass_alone():
    recorder = Recorder()
    walk(recorder, guidance=Guidance(SCALE, skip_layers=(1, 2), skip_range=(0.1, 0.5)))
    skipped = [(name, layers) for _, name, layers in recorder.asked if layers]
    assert skipped == [("uncond", (1, 2))] * 4


def test_vace_keeps_the_hint_of_a_skipped_layer():
    config = TransformerConfig("vace", **SIZES, num_layers=LAYERS, vace_layers=(0, 2), vace_in_dim=20)
    model = randomized(VaceTransformer(config))
    context, x, text = random_array(7, *GRID[:-1], 20), conditioning().noise, conditioning().context
    full = model(x, 500.0, text, context)
    without = model(x, 500.0, text, context, skip_layers=(2,))
    bare = model(x, 500.0, text, context, vace_scale=0.0, skip_layers=(0, 1, 2, 3))
    hinted = model(x, 500.0, text, context, skip_layers=(0, 1, 2, 3))
    assert not np.array_equal(np.array(full), np.array(without))
    assert not np.array_equal(np.array(bare), np.array(hinted))


class TestWrongUse:
    def check(self, **options):
        sampling = dict(steps=STEPS, guidance_scale=SCALE, shift=5.0, solver="euler", seed=1)
        check_guidance(Request("a", "", 32, 32, 5, **sampling | options), num_layers=4)

    @pytest.mark.parametrize(
        "options, says",
        [
            (dict(guidance_range=(0.5, 0.5)), r"guidance_range is \(0.5, 0.5\), expected two fractions"),
            (dict(guidance_range=(-0.1, 0.5)), "0 <= from < to <= 1"),
            (dict(guidance_range=(0.0, 1.1)), "0 <= from < to <= 1"),
            (dict(guidance_range=(0.11, 0.19)), "holds none of the 10 steps"),
            (dict(skip_layers=(1,), skip_range=(0.9, 0.1)), "skip_range"),
            (dict(skip_layers=(1,), skip_range=(0.91, 0.98)), "skip_range .* holds none of the 10 steps"),
            (dict(skip_layers=(4,)), "names layer 4, expected 0 to 3"),
            (dict(skip_layers=(-1,)), "names layer -1"),
            (dict(cfg_zero=10), "cfg_zero is 10 steps, expected 0 to 9 of 10"),
            (dict(cfg_zero=-1), "cfg_zero is -1"),
            (dict(guidance_scale=1.0, cfg_zero=1), "cfg_zero is 1, but guidance is off"),
            (dict(guidance_scale=1.0, skip_layers=(1,)), "skip_layers is .* but guidance is off"),
            (dict(guidance_scale=1.0, guidance_range=(0.0, 0.5)), "guidance_range is .* but guidance is off"),
        ],
    )
    def test_is_said(self, options, says):
        with pytest.raises(ValueError, match=says):
            self.check(**options)

    def test_right_use_passes(self):
        self.check(guidance_range=(0.0, 0.5), cfg_zero=0, skip_layers=(0, 3), skip_range=(0.0, 1.0))
        self.check(guidance_scale=1.0)


def test_default_zero_steps():
    assert [zero_steps_of(task) for task in ("t2v", "vace", "i2v", "flf2v")] == [2, 2, 1, 1]
    assert [zero_steps_of("ti2v", of_picture) for of_picture in (False, True)] == [2, 1]


def test_of_request_takes_every_option():
    request = Request("a", "", 32, 32, 5, STEPS, SCALE, 5.0, "euler", 1, guidance_range=(0.1, 0.9), cfg_zero=3,
                      skip_layers=(2,), skip_range=(0.2, 0.7))  # fmt: skip
    assert Guidance.of(request) == Guidance(SCALE, (0.1, 0.9), 3, (2,), (0.2, 0.7))
