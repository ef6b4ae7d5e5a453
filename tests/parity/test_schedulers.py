"""Every solver's whole trajectory, step by step, against the official solvers (Euler: Diffusers')."""

import mlx.core as mx
import numpy as np
import pytest
from oracles import official, relative_error, torch

from wan_mlx.schedulers import SOLVERS, Grid

SHAPE = (1, 3, 4, 5, 16)
STEPS = [1, 2, 3, 4, 10, 20, 40, 50]
SHIFTS = [3.0, 5.0, 8.0, 16.0]
BOUND = 1e-5


def fake_model(sample: np.ndarray, timestep: int) -> np.ndarray:
    """A velocity that depends on sample and timestep and is far from linear, so that errors would compound.

    NumPy float32 on both sides: equal inputs give equal outputs.
    """
    t = np.float32(timestep / 1000)
    return np.tanh(1.7 * sample + np.sin(5 * t)) - np.float32(0.6) * np.roll(sample, 1, -1) * np.cos(3 * t * sample)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


def reference(name: str, steps: int, shift: float):
    if name == "unipc":
        solver = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
        solver.set_timesteps(steps, device="cpu", shift=shift)
    elif name == "dpm++":
        solvers = official("utils.fm_solvers")
        solver = solvers.FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
        solvers.retrieve_timesteps(solver, device="cpu", sigmas=solvers.get_sampling_sigmas(steps, shift))
    else:
        from diffusers import FlowMatchEulerDiscreteScheduler

        solver = FlowMatchEulerDiscreteScheduler(shift=shift)
        solver.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist())
    return solver


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_every_step(name, steps, shift):
    theirs, ours = reference(name, steps, shift), SOLVERS[name](steps, shift)
    assert ours.sigmas.dtype == np.float32 and ours.sigmas.shape == (steps + 1,)
    assert ours.timesteps.dtype == np.int64 and ours.timesteps.shape == (steps,)
    if name == "euler":  # Diffusers shifts in float32 and does not truncate its timesteps
        assert np.abs(ours.sigmas - theirs.sigmas.numpy()).max() <= 1e-6
        assert (np.abs(ours.timesteps - theirs.timesteps.numpy()) <= 1).all()
    else:
        assert np.array_equal(ours.sigmas, theirs.sigmas.numpy())
        assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())
    sample = mx.array(noise())
    want = torch.from_numpy(noise())
    for index, timestep in enumerate(ours.timesteps.tolist()):
        velocity = torch.from_numpy(fake_model(want.numpy(), timestep))
        want_x0 = want - theirs.sigmas[index] * velocity
        want = theirs.step(velocity, theirs.timesteps[index], want, return_dict=False)[0]
        sample = ours.step(index, mx.array(fake_model(np.array(sample), timestep)), sample)
        assert sample.dtype == ours.denoised.dtype == mx.float32
        assert relative_error(sample, want) <= BOUND, f"sample after step {index}"
        assert relative_error(ours.denoised, want_x0) <= BOUND, f"denoised at step {index}"
    assert np.abs(want.numpy() - noise()).max() > 1


@pytest.mark.parametrize("steps, begin", [(2, 1), (4, 1), (10, 3), (20, 8), (20, 19), (50, 15)])
@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_beginning_later(name, steps, begin):
    """The references at ``set_begin_index(begin)``: the rest of the same grid, first order at its start."""
    theirs, ours = reference(name, steps, 5.0), SOLVERS[name](steps, 5.0, begin=begin)
    theirs.set_begin_index(begin)
    whole = SOLVERS[name](steps, 5.0)
    assert np.array_equal(ours.sigmas, whole.sigmas[begin:]) and np.array_equal(ours.timesteps, whole.timesteps[begin:])
    sample, want = mx.array(noise()), torch.from_numpy(noise())
    for index, timestep in enumerate(ours.timesteps.tolist()):
        velocity = torch.from_numpy(fake_model(want.numpy(), timestep))
        want = theirs.step(velocity, theirs.timesteps[begin + index], want, return_dict=False)[0]
        sample = ours.step(index, mx.array(fake_model(np.array(sample), timestep)), sample)
        assert relative_error(sample, want) <= BOUND, f"sample after step {index}"


@pytest.mark.parametrize("steps", range(1, 101))
def test_grid_for_every_number_of_steps(steps):
    for name in ("unipc", "dpm++"):
        for shift in (1.0, 3.0, 5.0, 12.0):
            theirs, ours = reference(name, steps, shift), SOLVERS[name](steps, shift)
            assert np.array_equal(ours.sigmas, theirs.sigmas.numpy())
            assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())


@pytest.mark.parametrize("stop", range(0, 7))
@pytest.mark.parametrize("name", SOLVERS)
def test_resumed_equals_uninterrupted(name, stop, tmp_path):
    steps = 6

    def walk(scheduler, sample, first, last):
        for index in range(first, last):
            velocity = mx.array(fake_model(np.array(sample), int(scheduler.timesteps[index])))
            sample = scheduler.step(index, velocity, sample)
        return sample

    whole = walk(SOLVERS[name](steps, 5.0), mx.array(noise()), 0, steps)
    before = SOLVERS[name](steps, 5.0)
    arrays = {"latents": walk(before, mx.array(noise()), 0, stop), **before.state()}
    mx.save_safetensors(str(tmp_path / "state.safetensors"), arrays)
    arrays = mx.load(str(tmp_path / "state.safetensors"))
    after = SOLVERS[name](steps, 5.0)
    sample = arrays.pop("latents")
    after.load_state(stop, arrays)
    assert np.array_equal(np.array(walk(after, sample, stop, steps)), np.array(whole))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_scheduler_can_be_used_again(name):
    scheduler = SOLVERS[name](4, 5.0)
    runs = []
    for _ in range(2):
        sample = mx.array(noise())
        for index in range(4):
            sample = scheduler.step(index, mx.tanh(sample), sample)
        runs.append(np.array(sample))
    assert np.array_equal(*runs)


def test_last_step_lands_on_the_clean_estimate():
    for name in SOLVERS:
        scheduler, sample = SOLVERS[name](1, 5.0), mx.array(noise())
        assert relative_error(scheduler.step(0, mx.tanh(sample), sample), scheduler.denoised) <= 1e-6


class TestWrongUse:
    @pytest.mark.parametrize("steps, shift", [(0, 5.0), (-1, 5.0), (4, 0.0), (4, -1.0), (4, np.nan), (4, np.inf)])
    def test_steps_and_shift(self, steps, shift):
        with pytest.raises(ValueError, match="expected"):
            Grid.even(steps, shift, 1.0)

    @pytest.mark.parametrize("begin", [-1, 4, 9])
    def test_no_step_left(self, begin):
        with pytest.raises(ValueError, match=f"begins at step {begin} of 4, expected 0 to 3"):
            SOLVERS["unipc"](4, 5.0, begin=begin)

    def test_state_of_another_step_or_solver(self):
        state = {"x0_1": mx.zeros(3)}
        with pytest.raises(ValueError, match=r"expected \['sample', 'x0_1', 'x0_2'\] for UniPC"):
            SOLVERS["unipc"](6, 5.0).load_state(2, state)
        for name in ("euler", "dmd"):
            with pytest.raises(ValueError, match=r"expected \[\] for (Euler|DMD)"):
                SOLVERS[name](6, 5.0).load_state(2, state)
        with pytest.raises(ValueError, match="step 7, expected 0 to 6"):
            SOLVERS["dpm++"](6, 5.0).load_state(7, state)
