"""Step caches: off at threshold 0, the published number of forwards, a state for each pass, resumption."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import sampling
from arrays import random_array, randomized
from sampling import GRID, SCALE, SHIFT, SIZES, always, conditioning

from wan_mlx.caching import (
    COND,
    UNCOND,
    EasyCache,
    MagCache,
    Spectrum,
    StepCache,
    TeaCache,
    make_cache,
    resolve_cache,
)
from wan_mlx.caching.residual import MAGCACHE, TEACACHE
from wan_mlx.cli.summary import extras
from wan_mlx.denoise import denoise
from wan_mlx.guidance import Guidance
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.pipeline import WanPipeline
from wan_mlx.presets import PRESETS
from wan_mlx.schedulers import SOLVERS
from wan_mlx.types import Conditioning

STEPS = 14
walk, latents = partial(sampling.walk, steps=STEPS), partial(sampling.latents, steps=STEPS)
MAG = dict(threshold=0.4, most_skips=2, retention=0.2, ratios=MAGCACHE["t2v-1.3B"]["ratios"])
TEA = dict(threshold=0.8, mode="plain", coefficients=(0.0, 0.0, 0.0, 1.0, 0.02))
CACHES = {
    "teacache": lambda **change: TeaCache(STEPS, **{**TEA, **change}),
    "magcache": lambda **change: MagCache(STEPS, **{**MAG, **change}),
    "easycache": lambda **change: EasyCache(STEPS, **{"threshold": 0.5, "first": 3, **change}),
    "spectrum": lambda threshold=2.0, **change: Spectrum(STEPS, threshold, 0.75, "outputs", **change),
    "spectrum hidden": lambda threshold=2.0, **change: Spectrum(STEPS, threshold, 0.75, "hidden", **change),
}


@pytest.fixture(scope="module")
def model():
    return randomized(Transformer(TransformerConfig(**SIZES, num_layers=3)))


@pytest.fixture(scope="module")
def vace():
    config = TransformerConfig("vace", **SIZES, num_layers=3, vace_layers=(0, 2), vace_in_dim=20)
    network = Execution(randomized(VaceTransformer(config)))
    context = random_array(5, *GRID[:-1], 20)
    mx.eval(context)
    return lambda *args, **hooks: network(*args, vace_context=context, **hooks)


def both_passes(model, cache, index, x, timestep, order=(COND, UNCOND)) -> dict[int, mx.array]:
    """One step, as the sampling loop makes it, its passes in this order."""
    contexts = {COND: conditioning().context, UNCOND: conditioning().negative_context}
    cache.begin_step(index, x, (COND, UNCOND))
    of = {branch: cache.velocity(branch, partial(model, x, timestep, contexts[branch])) for branch in order}
    return of


@pytest.mark.parametrize("name", CACHES)
def test_threshold_0_gives_the_same_bytes_as_off(model, name):
    cache = CACHES[name](threshold=0.0)
    assert np.array_equal(latents(model, cache), latents(model))
    assert cache.computed == 2 * STEPS


def test_threshold_0_is_off_even_where_the_expected_change_is_negative(model):
    cache = CACHES["teacache"](threshold=0.0, coefficients=(0.0, 0.0, 0.0, 0.0, -0.1))
    assert np.array_equal(latents(model, cache), latents(model))


@pytest.mark.parametrize("kind", ["model", "vace"])
@pytest.mark.parametrize("name", CACHES)
def test_some_forwards_are_left_out(request, kind, name):
    network, cache = request.getfixturevalue(kind), CACHES[name]()
    steps = walk(network, cache)
    assert STEPS // 2 < cache.computed < 2 * STEPS - 4
    assert cache.computed == sum(step.forwards for step in steps)
    assert {step.passes for step in steps} == {2}
    assert not np.array_equal(np.array(steps[-1].latents), latents(network))


@pytest.mark.parametrize("name", CACHES)
def test_one_pass_without_guidance(model, name):
    cache = CACHES[name]()
    steps = walk(model, cache, Guidance(1.0))
    assert cache.branches[UNCOND].computed == 0 and not cache.branches[UNCOND].arrays
    assert cache.computed < STEPS and {step.passes for step in steps} == {1}


@pytest.mark.parametrize("name", CACHES)
def test_passes_are_apart_in_any_order(model, name):
    """What a cache gives does not depend on which pass comes first: their states share nothing."""
    timesteps = SOLVERS["unipc"](STEPS, SHIFT).timesteps.tolist()

    def run(order):
        cache, found = CACHES[name](), []
        for index, timestep in enumerate(timesteps):
            x = random_array(index, *GRID) * 0.1 + conditioning().noise
            of = both_passes(model, cache, index, x, timestep, order)
            found += [np.array(of[COND]), np.array(of[UNCOND])]
        assert cache.computed < 2 * STEPS
        return np.stack(found)

    first = run((COND, UNCOND))
    assert np.array_equal(first, run((UNCOND, COND)))
    assert not np.array_equal(first[0::2], first[1::2])


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_can_be_used_again(model, name):
    cache = CACHES[name]()
    assert np.array_equal(latents(model, cache), latents(model, cache))


@pytest.mark.parametrize("stop", [1, 4, 7, STEPS - 1])
@pytest.mark.parametrize("name", CACHES)
def test_resumed_equals_uninterrupted(model, name, stop, tmp_path):
    whole = CACHES[name]()
    want = walk(model, whole)
    before = CACHES[name]()
    steps = denoise(always(model, Guidance(SCALE)), conditioning(), SOLVERS["unipc"](STEPS, SHIFT), before)
    state = [next(steps) for _ in range(stop)][-1].state
    mx.save_safetensors(str(tmp_path / "state.safetensors"), state)
    after, scheduler = CACHES[name](), SOLVERS["unipc"](STEPS, SHIFT)
    state = mx.load(str(tmp_path / "state.safetensors"))
    mx.eval(state)
    got = list(denoise(always(model, Guidance(SCALE)), conditioning(), scheduler, after, first=stop, state=state))
    assert [step.forwards for step in got] == [step.forwards for step in want[stop:]]
    assert np.array_equal(np.array(got[-1].latents), np.array(want[-1].latents))
    assert after.computed == whole.computed


def test_numbers_survive_bit_for_bit():
    before, after = CACHES["magcache"](), CACHES["magcache"]()
    before.branches[UNCOND].numbers["error"], before.branches[UNCOND].computed = 0.1 + 0.2, 7
    after.load_state(before.state())
    assert after.branches[UNCOND].numbers == {"error": 0.1 + 0.2} and after.branches[UNCOND].computed == 7


def test_old_residuals_are_not_held(model):
    """A step's state is emptied when the next is asked for, or every `Step` that somebody keeps would hold one."""
    steps = walk(model, CACHES["magcache"]())
    assert not any(step.state for step in steps)
    assert all(step.state for step in walk(model))


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="MagCache is not whole"):
        CACHES["magcache"]().load_state({"latents": mx.zeros(3)})
    with pytest.raises(ValueError, match="StepCache is not whole"):
        StepCache(4).load_state({})


PUBLISHED = [
    ("t2v-1.3B", 50, "magcache:0.12:2:0.2", 50),
    ("t2v-1.3B", 50, "magcache", 50),
    ("t2v-1.3B", 50, "magcache:0.12:4", 42),
    ("t2v-14B", 50, "magcache:0.24:6:0.2", 36),
    ("t2v-14B", 50, "magcache", 36),
    ("i2v-14B-480P", 40, "magcache:0.12:4", 34),
    ("i2v-14B-480P", 40, "magcache:0.24:6", 30),
    ("i2v-14B-720P", 40, "magcache:0.24:6", 28),
    ("ti2v-5B", 50, "magcache", 50),
]


@pytest.mark.parametrize("preset, steps, text, computed", PUBLISHED)
def test_magcache_computes_as_many_forwards_as_published(model, preset, steps, text, computed):
    resolved = resolve_cache(text, steps, preset, PRESETS[preset].transformer)
    cache = make_cache(resolved, steps, preset)
    walk(model, cache, steps=steps)
    assert cache.computed == computed == make_cache(resolved, steps, preset).planned(2)


def test_ti2v_has_ratios_for_runs_with_and_without_an_image():
    text, image = (make_cache("magcache:0.06:2:0.2", 50, "ti2v-5B", 0, None, given) for given in (False, True))
    assert (text.ratios[COND][1], text.ratios[UNCOND][-1]) == (0.99505, 0.97015)
    assert (image.ratios[COND][1], image.ratios[UNCOND][-1]) == (0.99512, 0.96616)
    assert (text.planned(2), image.planned(2)) == (50, 52)


def test_a_run_with_an_image_takes_the_ratios_for_it(monkeypatch):
    never, always = [0.0] * 18, [1.0] * 18
    values = dict(threshold=0.5, most_skips=2, retention=0.2, ratios=never, ratios_with_image=always)
    monkeypatch.setitem(MAGCACHE, "nano-i2v", values)
    pipe = WanPipeline.from_pretrained("nano-i2v", dtype="float32", progress=False)
    request = pipe.request("a red circle", image=np.zeros((16, 16, 3), np.uint8), size=(16, 16), num_frames=1,
                           steps=10, cache="magcache")  # fmt: skip
    assert extras(request, "nano-i2v")[0].endswith(", 8 of 20 forwards")
    assert pipe.run(request).video().settings["forwards"] == [8, 20]


@pytest.mark.parametrize("name", ["magcache", "easycache"])
def test_a_given_first_frame_stays_and_threshold_0_is_off(model, name):
    """Wan2.2 TI2V with an image: of its tokens there are two kinds, those at time 0 too."""
    noise, texts = random_array(1, 1, 2, *GRID[2:]), (conditioning().context, conditioning().negative_context)
    given = Conditioning(noise, *texts, first_latents=noise[:, :1] * 0.5)

    def run(cache):
        steps = denoise(always(model, Guidance(SCALE)), given, SOLVERS["unipc"](STEPS, SHIFT), cache)
        return np.array(list(steps)[-1].latents)

    whole, cache = run(None), CACHES[name]()
    assert np.array_equal(run(CACHES[name](threshold=0.0)), whole)
    cached = run(cache)
    assert STEPS // 2 < cache.computed < 2 * STEPS - 4 and not np.array_equal(cached, whole)
    assert np.array_equal(cached[:, :1], np.array(given.first_latents))


def test_planned_forwards_of_one_pass_and_of_a_cache_that_decides_on_the_way(model):
    cache = CACHES["magcache"]()
    walk(model, cache, Guidance(1.0))
    assert cache.planned(1) == cache.computed
    assert make_cache("easycache:0.1:3", 12, "nano").planned(2) is None


@pytest.mark.parametrize("steps", [10, 30, 50, 77])
def test_magcache_stretches_its_ratios_to_other_numbers_of_steps(steps):
    ratios = np.array([1.0, 1.0, *MAG["ratios"]])
    for branch in range(2):
        got = MagCache(steps, **MAG).ratios[branch]
        places = [int(np.round(index * 49 / (steps - 1))) for index in range(steps)]
        assert np.array_equal(got, ratios[branch::2][places])
        assert got[0] == 1.0 and got[-1] == ratios[98 + branch]


def test_magcache_of_a_run_that_starts_late_takes_the_later_ratios():
    whole, late = MagCache(20, **MAG), MagCache(12, **MAG, left_out=8)
    assert np.array_equal(late.ratios[COND], whole.ratios[COND][8:])


def test_magcache_has_ratios_for_each_pass(model):
    cache = MagCache(STEPS, threshold=0.3, most_skips=2, retention=0.2, ratios=(1.0, 0.5) * (STEPS - 1))
    walk(model, cache)
    assert cache.branches[COND].computed < STEPS == cache.branches[UNCOND].computed


def test_one_step_takes_the_last_ratio():
    assert MagCache(1, **MAG).ratios[0].tolist() == [MAG["ratios"][-2]]


class TestAgainstAPlainStatement:
    """Every decision and every value, bit for bit, of the cond pass: the methods written down once more, as loops."""

    def run(self, model, cache):
        computed = []
        scheduler = SOLVERS["unipc"](STEPS, SHIFT)
        for step in denoise(always(model, Guidance()), conditioning(), scheduler, cache):
            computed.append(step.forwards == 1)
        return computed, np.array(step.latents)

    def replay(self, model, decide):
        """The loop with a residual cache; decide(index, this_pass) → whether to compute."""
        scheduler, x = SOLVERS["unipc"](STEPS, SHIFT), conditioning().noise
        computed, residual = [], None
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            tokens, this_pass = model.enter(x, float(timestep), conditioning().context, None)
            computed.append(decide(index, this_pass))
            if computed[-1]:
                after = tokens
                for block in model.blocks:
                    after = block(after, *this_pass.for_blocks)
                residual = after - tokens
            x = scheduler.step(index, model.leave(tokens + residual, this_pass), x)
        return computed, np.array(x)

    @pytest.mark.parametrize("mode", ["plain", "ret"])
    def test_teacache(self, model, mode):
        error, before = 0.0, None
        a, b, c, d, e = TEA["coefficients"]
        head, tail = {"plain": (1, 1), "ret": (5, 0)}[mode]

        def decide(index, this_pass):
            nonlocal error, before
            signal = this_pass.time if mode == "plain" else this_pass.modulation
            compute = True
            if head <= index < STEPS - tail:
                x = (mx.abs(signal - before).mean() / mx.abs(before).mean()).item()
                error += a * x**4 + b * x**3 + c * x**2 + d * x + e
                compute = error >= TEA["threshold"]
            if compute:
                error = 0.0
            before = signal
            return compute

        want, far = self.replay(model, decide)
        got, near = self.run(model, CACHES["teacache"](mode=mode))
        assert got == want and 4 < sum(want) < STEPS - 2
        assert np.abs(near - far).max() < 1e-4 * np.abs(far).max()

    def test_magcache(self, model):
        ratio, error, skips = 1.0, 0.0, 0
        ratios = CACHES["magcache"]().ratios[COND]

        def decide(index, this_pass):
            nonlocal ratio, error, skips
            compute = True
            if 2 * index >= int(2 * STEPS * MAG["retention"]):
                ratio, skips = ratio * ratios[index], skips + 1
                error += abs(1 - ratio)
                compute = not (error < MAG["threshold"] and skips <= MAG["most_skips"])
            if compute:
                ratio, error, skips = 1.0, 0.0, 0
            return compute

        want, far = self.replay(model, decide)
        got, near = self.run(model, CACHES["magcache"]())
        assert got == want and 4 < sum(want) < STEPS - 2
        assert np.abs(near - far).max() < 1e-4 * np.abs(far).max()

    @pytest.mark.parametrize("scale", [1.0, SCALE])
    def test_easycache(self, model, scale):
        """The pass without the prompt too, which follows the decision but keeps an offset of its own."""
        scheduler, x = SOLVERS["unipc"](STEPS, SHIFT), conditioning().noise
        texts = [conditioning().context, conditioning().negative_context][: 1 if scale == 1.0 else 2]
        want, error, rate = [], 0.0, None
        previous = at = output = offsets = None
        size = lambda array: mx.abs(array).mean().item()  # noqa: E731
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            compute = True
            if 3 <= index < STEPS - 1:
                error += rate * size(x - previous) / size(output)
                compute = error >= 0.5
            if compute:
                error = 0.0
                velocities = [model(x, float(timestep), text) for text in texts]
                if output is not None:
                    rate = size(velocities[0] - output) / size(x - at)
                output, at, offsets = velocities[0], x, [velocity - x for velocity in velocities]
            else:
                velocities = [x + offset for offset in offsets]
            want.append(len(texts) if compute else 0)
            velocity = velocities[0] if scale == 1.0 else velocities[1] + scale * (velocities[0] - velocities[1])
            previous, x = x, scheduler.step(index, velocity, x)
        steps = walk(model, CACHES["easycache"](), Guidance(scale))
        assert [step.forwards for step in steps] == want and 4 < sum(map(bool, want)) < STEPS - 2
        assert np.array_equal(np.array(steps[-1].latents), np.array(x))


    @pytest.mark.parametrize("place", ["outputs", "hidden"])
    def test_spectrum(self, model, place):
        """In float64: polynomials by least squares with a ridge, and the line through the last two, half and half."""
        scheduler, x = SOLVERS["unipc"](STEPS, SHIFT), conditioning().noise
        want, known, cached, window = [], {}, 0, 2.0
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            tokens, this_pass = model.enter(x, float(timestep), conditioning().context, None)
            compute = index < 5 or (cached + 1) % int(window) == 0
            window += 0.75 * (compute and index >= 5)
            cached = 0 if compute else cached + 1
            want.append(compute)
            if compute:
                after = model.run_blocks(tokens, this_pass)
                found = np.array(after if place == "hidden" else model.leave(after, this_pass)).astype(np.float64)
                known[index] = found
            else:
                times, values = np.array([*known]), np.stack([value.ravel() for value in known.values()])
                forecast = 0.5 * chebyshev(times, values, index) + 0.5 * line(times, values, index)
                found = forecast.reshape(found.shape)
            array = mx.array(found.astype(np.float32))
            x = scheduler.step(index, model.leave(array, this_pass) if place == "hidden" else array, x)
        got, near = self.run(model, CACHES["spectrum hidden" if place == "hidden" else "spectrum"]())
        assert got == want and sum(want) == 8
        assert np.abs(near - np.array(x)).max() < 1e-5 * np.abs(near).max()


def chebyshev(times, values, wanted, steps=STEPS, ridge=0.1):
    """T_0 to T_4 by their recurrence, time in [-1, 1] over all steps; coefficients by Cholesky, as the authors do."""

    def design(t):
        tau = (np.asarray(t, np.float64) - steps / 2) / (steps / 2)
        columns = [np.ones_like(tau), tau]
        for _ in range(3):
            columns.append(2 * tau * columns[-1] - columns[-2])
        return np.stack(columns, axis=-1)

    lower = np.linalg.cholesky(design(times).T @ design(times) + ridge * np.eye(5))
    coefficients = np.linalg.solve(lower.T, np.linalg.solve(lower, design(times).T @ values))
    return design(wanted) @ coefficients


def line(times, values, wanted):
    return values[-1] + (wanted - times[-1]) / (times[-1] - times[-2]) * (values[-1] - values[-2])


@pytest.mark.parametrize("steps, computed", [
    (50, (27, 18, 14, 10)), (40, (22, 16, 13, 9)), (30, (17, 14, 11, 8)), (20, (12, 11, 9, 8)),
])  # fmt: skip
def test_spectrum_computes_as_many_forwards_as_published(steps, computed):
    for growth, count in zip((0, 0.25, 0.75, 3), computed, strict=True):
        resolved = resolve_cache(f"spectrum:2:{growth}", steps, "nano", PRESETS["nano"].transformer)
        cache = make_cache(resolved, steps, "nano")
        assert (cache.planned(1), cache.planned(2)) == (count, 2 * count)


def test_spectrum_keeps_what_the_plan_says(model):
    """Its history at the end, and afresh after another expert has taken over."""
    for place, each in (("outputs", 4 * 256), ("hidden", 4 * 4 * SIZES["dim"])):
        cache = Spectrum(STEPS, 2.0, 0.75, place)
        walk(model, cache)
        held = sum(array.nbytes for branch in cache.branches for array in branch.arrays.values())
        assert held == cache.kept_bytes(2, 4 * 256, 4 * 4 * SIZES["dim"]) == cache.planned(2) * each
        assert cache.computed == cache.planned(2)
    divided = Spectrum(STEPS, 2.0, 0.75, "outputs", switch=7)
    computed = [step.forwards for step in walk(model, divided)]
    assert computed[7:12] == 5 * [2] and divided.planned(2) == divided.computed == sum(computed)
    assert {*divided.branches[COND].arrays} <= {f"{index:04d}" for index in range(7, STEPS)}


def test_easycache_lets_the_prompt_decide_for_both(model):
    cache = CACHES["easycache"]()
    for step in walk(model, cache):
        assert step.forwards in (0, 2)


@pytest.mark.parametrize("name", CACHES)
def test_a_pass_that_was_not_made_before_is_computed(model, name):
    """Guidance that begins late: the pass without the prompt has nothing to look back on."""
    for start in range(4, 9):
        cache = CACHES[name]()
        steps = walk(model, cache, Guidance(SCALE, range=(start / STEPS, 1.0)))
        assert steps[start].forwards >= 1 and np.isfinite(np.array(steps[-1].latents)).all()


def test_every_2_1_model_with_magcache_has_teacache_too():
    released = {name: preset for name, preset in PRESETS.items() if preset.repo.startswith("Wan-AI/")}
    released = {name: preset for name, preset in released.items() if preset.task not in ("flf2v", "s2v", "animate")}
    assert TEACACHE.keys() == {name for name, preset in released.items() if "Wan2.1" in preset.repo}
    assert MAGCACHE.keys() == released.keys()


@pytest.mark.parametrize("name", MAGCACHE)
def test_magcache_has_a_ratio_for_each_forward_but_the_first_two(name):
    lists = [values for key, values in MAGCACHE[name].items() if key.startswith("ratios")]
    assert {len(values) for values in lists} == {2 * PRESETS[name].sampling.steps - 2}


class TestChoice:
    def resolve(self, text, steps=50, preset="t2v-1.3B", config=None):
        return resolve_cache(text, steps, preset, config or PRESETS[preset].transformer)

    @pytest.mark.parametrize(
        "text, full",
        [
            (None, "none"),
            ("none", "none"),
            ("teacache", "teacache:0.08:plain"),
            ("teacache:0.05", "teacache:0.05:plain"),
            ("TeaCache:0.05:ret", "teacache:0.05:ret"),
            ("magcache", "magcache:0.12:2:0.2"),
            ("magcache:0.2:4", "magcache:0.2:4:0.2"),
            ("magcache:0:4:0.5", "magcache:0.0:4:0.5"),
            ("easycache", "easycache:0.05:10"),
            ("easycache:0.1:5", "easycache:0.1:5"),
            ("spectrum", "spectrum:2.0:0.75:outputs"),
            ("spectrum:3:0.25:hidden", "spectrum:3.0:0.25:hidden"),
        ],
    )
    def test_missing_settings_take_defaults(self, text, full):
        assert self.resolve(text) == full
        assert self.resolve(full) == full  # so a run can be repeated from its settings
        cache = make_cache(full, 50, "t2v-1.3B")
        assert type(cache).__name__.lower().removesuffix("stepcache") == full.split(":")[0].replace("none", "")

    def test_easycache_starts_after_a_quarter_of_few_steps(self):
        assert self.resolve("easycache", steps=12) == "easycache:0.05:3"
        assert self.resolve("easycache", preset="nano", steps=40) == "easycache:0.05:10"

    @pytest.mark.parametrize(
        "text, says",
        [
            ("tecache:0.1", "unknown cache 'tecache:0.1'.*nearest: teacache"),
            ("teacache:much", "threshold: 'much' is no number"),
            ("teacache:", "threshold: it is empty, expected NUMBER"),
            ("teacache:-0.1", "threshold is -0.1, expected at least 0; nearest: 0"),
            ("teacache:nan", "threshold is nan"),
            ("teacache:0.1:fast", "unknown mode 'fast', expected one of plain, ret"),
            ("magcache:0.1:0", "count of steps is 0, expected at least 1"),
            ("magcache:0.1:2.5", "count of steps: '2.5' is no whole number"),
            ("magcache:0.1:2:1.5", "retention is 1.5, expected 0 to 1; nearest: 1"),
            ("easycache:0.1:3:4", "has 3 settings"),
            ("none:1", "has 1 settings, expected none"),
        ],
    )
    def test_wrong_settings(self, text, says):
        with pytest.raises(ValueError, match=says):
            self.resolve(text)

    @pytest.mark.parametrize("name", [name for name in CACHES if " " not in name])
    def test_few_steps_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} makes no sense with 9 steps, expected at least 10"):
            self.resolve(name, steps=9)
        assert self.resolve(name, steps=10).startswith(name)

    @pytest.mark.parametrize("name", ["teacache", "magcache"])
    def test_models_without_constants_are_refused(self, name):
        for preset in ("nano", "flf2v-14B-720P"):
            with pytest.raises(ValueError, match=f"no published constants for {preset}.*spectrum need none"):
                self.resolve(name, preset=preset)
        with pytest.raises(ValueError, match=r"for t2v-1.3B \(dim 1536, 30 layers\), not for .* \(dim 32, 3 layers\)"):
            self.resolve(name, config=TransformerConfig(**SIZES, num_layers=3))
        assert self.resolve("easycache", preset="flf2v-14B-720P")

    def test_vace_14b_takes_the_ratios_of_its_text_to_video_model(self):
        assert MAGCACHE["vace-14B"]["ratios"] == MAGCACHE["t2v-14B"]["ratios"] != MAGCACHE["t2v-1.3B"]["ratios"]


@pytest.mark.parametrize("name", [name for name in CACHES if "spectrum" not in name])
def test_no_more_is_kept_than_a_residual_for_each_pass(model, name):
    """Of tokens; EasyCache's are of latents, of which it keeps three more."""
    most = 4 * int(np.prod(GRID)) * (2 + 3) if name == "easycache" else 4 * 2 * 4 * SIZES["dim"]
    cache = CACHES[name]()
    for _ in denoise(always(model, Guidance(SCALE)), conditioning(), SOLVERS["unipc"](STEPS, SHIFT), cache):
        kept = [array for branch in cache.branches for key, array in branch.arrays.items() if key != "signal"]
        assert sum(array.nbytes for array in kept) <= most
    assert sum(array.nbytes for array in kept) == most
