"""Both passes of guidance share what precedes the text: the same bits as apart, with so much less computed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from arrays import randomized
from sampling import SIZES, always
from test_step_caches import CACHES, STEPS

import wan_mlx
from wan_mlx import guidance as passes
from wan_mlx.caching import StepCache
from wan_mlx.denoise import denoise, with_condition
from wan_mlx.guidance import Guidance, guided_velocity
from wan_mlx.models import block_execution
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution, Shared
from wan_mlx.models.networks import new_transformer
from wan_mlx.planning.plan import FILL
from wan_mlx.schedulers import SOLVERS
from wan_mlx.types import Conditioning

LAYERS = 3
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES, num_layers=LAYERS),
    "ti2v": TransformerConfig("t2v", **SIZES, num_layers=LAYERS),
    "i2v": TransformerConfig("i2v", **SIZES, num_layers=LAYERS, in_dim=36, image_dim=12),
    "vace": TransformerConfig("vace", **SIZES, num_layers=LAYERS, vace_layers=(0, 2), vace_in_dim=6),
    "control": TransformerConfig("t2v", **SIZES, num_layers=LAYERS, in_dim=36, ref_dim=16),
}
GRID = (1, 3, 4, 6)


def rows(plan) -> dict:
    return {row.stage: row for row in plan.rows}


def given(kind: str) -> Conditioning:
    """What a task conditions on: random noise, texts, and of each kind its own."""
    keys = iter(mx.random.split(mx.random.key(5), 9))

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    texts = (random(1, SIZES["text_len"], SIZES["text_dim"]) for _ in range(2))
    found = Conditioning(random(*GRID, 16), *texts)
    if kind == "ti2v":
        found.first_latents = found.noise[:, :1]
    elif kind in ("i2v", "control"):
        found.condition = random(*GRID, 20)
    if kind == "i2v":
        found.image_features = random(1, 257, 12)
    elif kind == "control":
        found.reference = random(1, 1, *GRID[2:], 16)
    elif kind == "vace":
        found.vace_context, found.context_scale = random(*GRID, 6), 0.7
    mx.eval(found.arrays())
    return found


@pytest.fixture(scope="module")
def network():
    return {kind: randomized(new_transformer(config)) for kind, config in CONFIGS.items()}


def ran(model, streamed: bool, tokens_at_once: int, shares: bool) -> Execution:
    def blocks(names):
        for name in names:
            kind, index = name.split(".")
            yield model[kind][int(index)]

    run = Execution(model, blocks if streamed else None, tokens_at_once)
    run.shares = shares
    return run


@pytest.fixture
def attended(monkeypatch):
    """Counts the self-attentions that are computed."""
    seen, attend = [], block_execution._attended

    def counting(*args):
        seen.append(args)
        return attend(*args)

    monkeypatch.setattr(block_execution, "_attended", counting)
    return seen


@pytest.fixture(params=["at once", "in turns"])
def how(request, monkeypatch):
    """Two threads, as on a CPU, or one pass after the other, as on a GPU."""
    if request.param == "in turns":
        monkeypatch.setattr(passes, "at_once", lambda work, *calls: tuple(work(*call) for call in calls))


@pytest.mark.parametrize("tokens_at_once", [4, 7, 100_000])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_bits_with_less_computed(network, attended, how, kind, streamed, tokens_at_once):
    conditioning, blocks = given(kind), LAYERS + 2 * (kind == "vace")
    found, counts = [], []
    for shares in (False, True):
        run = with_condition(ran(network[kind], streamed, tokens_at_once, shares), conditioning)
        step = guided_velocity(run, conditioning.noise, 500.0, conditioning, Guidance(4.0), 0, 1, StepCache(1))
        mx.eval(step)
        found.append(step)
        counts.append(len(attended))
        attended.clear()
    assert mx.array_equal(*found) and found[0].std() > 0.1
    assert counts == [2 * blocks, 2 * blocks - (2 if kind == "vace" else 1)]


@pytest.mark.parametrize("cache", [*CACHES, "none"])
@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_whole_walks_with_step_caches(network, how, kind, cache):
    conditioning, ends, forwards = given(kind), [], []
    for shares in (False, True):
        run = with_condition(ran(network[kind], False, 100_000, shares), conditioning)
        held = CACHES[cache]() if cache in CACHES else StepCache(STEPS)
        steps = list(denoise(always(run, Guidance(4.0)), conditioning, SOLVERS["unipc"](STEPS, 5.0), held))
        ends.append(steps[-1].latents)
        forwards.append([step.forwards for step in steps])
    assert mx.array_equal(*ends) and forwards[0] == forwards[1]
    assert cache == "none" or sum(forwards[0]) < 2 * STEPS


class TestWherePassesDiffer:
    """Then nothing is shared."""

    def shared(self, network, guidance: Guidance, index: int = 5, total: int = 10) -> list:
        conditioning, hooks = given("t2v"), []

        def model(*inputs, **named):
            hooks.append(named.get("shared"))
            return Execution(network["t2v"])(*inputs, **named)

        guided_velocity(model, conditioning.noise, 500.0, conditioning, guidance, index, total, StepCache(total))
        return hooks

    def test_of_two_alike(self, network):
        one, other = self.shared(network, Guidance(4.0))
        assert isinstance(one, Shared) and one is other and "blocks.0" not in one  # taken, and kept no longer

    def test_where_layers_are_skipped(self, network):
        skipping = Guidance(4.0, skip_layers=(1,), skip_range=(0.2, 0.8))
        assert self.shared(network, skipping) == [None, None]
        assert None not in self.shared(network, skipping, index=9)
        assert [skipping.shares(index, 10) for index in (1, 2, 7, 8)] == [True, False, False, True]

    def test_of_one_pass(self, network):
        assert self.shared(network, Guidance(1.0)) == [None]
        assert self.shared(network, Guidance(4.0, range=(0.0, 0.3))) == [None]


def test_a_pass_that_fails_does_not_hold_the_other_up(network, how):
    """Where the first to come cannot compute, the other one does; the error is told."""
    shared, tries = Shared(), []

    def fails():
        tries.append(1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        shared("blocks.0", fails)
    assert shared("blocks.0", lambda: mx.array(2.0)) == 2 and shared("blocks.0", fails) == 2
    assert "blocks.0" not in shared and tries == [1]


class TestPlans:
    def test_what_is_kept_is_counted_and_left_out_where_it_does_not_fit(self, monkeypatch):
        monkeypatch.setattr("wan_mlx.planning.peak_memory.on_cpu", lambda: False)
        for model, kept in (("t2v-14B", 1), ("vace-14B", 2)):
            roomy = wan_mlx.plan(model, memory="100GB", width=832, height=480)
            least = rows(roomy)["denoise"].peak - 1
            short = wan_mlx.plan(model, memory=f"{least / FILL / 1e9:.6f}GB", width=832, height=480)
            assert roomy.shares and not short.shares and (short.stream, short.tokens_at_once) == (False, 8192)
            assert rows(roomy)["denoise"].peak - rows(short)["denoise"].peak == kept * 32760 * 5120 * 2
            assert rows(roomy)["denoise"].flop < rows(short)["denoise"].flop
        assert not wan_mlx.plan("t2v-14B", memory="100GB", guidance_scale=1).shares

    def test_the_run_does_as_planned(self, pico, attended):
        pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
        asked = pipe.request("a red circle", width=16, height=16, num_frames=5, steps=2, seed=1)
        shared = pipe.run(asked).video()
        computed, plan = len(attended), pipe.plan
        pipe.plan = lambda request: replace(plan(request), shares=False)
        apart = pipe.run(asked).video()
        assert np.array_equal(shared.latents, apart.latents) and np.array_equal(shared.frames, apart.frames)
        assert len(attended) - computed == computed + 2
