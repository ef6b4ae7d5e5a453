"""Predicted times: from given rates, and rates from a clock that only the networks move. No time is measured here."""

import random
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny_mlx_model

import wan_mlx
from wan_mlx.models import execution, vae_execution
from wan_mlx.models.configs import VAEConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.quantized_linear import QuantizedLinear
from wan_mlx.models.vae_layers import CausalConv
from wan_mlx.planning import choose as memory
from wan_mlx.planning import flops as work
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.planning import speed as timing
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.planning.speed import Rates
from wan_mlx.presets import BUNDLED, PRESETS
from wan_mlx.types import Request
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.load import parameters_of

# Seconds: of a block, for any number of tokens and for 32, and of what is outside the blocks.
ANYWAY, BLOCK, OUTSIDE = 0.01, 1.0, 0.25


@pytest.fixture
def nets():
    return sizes_of(replace(PRESETS["nano"], vae=VAEConfig(dim=8)), "float32", None)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds to ``now[0]``."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "MOST_TIMES", 2)
    return now


def takes(monkeypatch, clock, owner, name, seconds):
    """Have the method take ``seconds(its arguments)``."""
    original, one_at_a_time = getattr(owner, name), threading.Lock()

    def slow(*args, **kwargs):
        spent = seconds(*args)
        with one_at_a_time:  # two passes run in two threads, and += is not one step
            clock[0] += spent
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def planned(nets, width, height, num_frames) -> memory.Plan:
    request = Request("", "", width, height, num_frames, 2, 5.0, 5.0, "unipc", seed=0, geometry=nets.geometry)
    return memory.choose(nets, memory.Wanted("tiny", request, memory="4GB"))


def times(plan: memory.Plan, rates: Rates) -> dict[str, float]:
    return {row.stage: row.seconds for row in timing.with_seconds(plan, rates).rows}


def test_seconds_from_rates():
    """What is streamed takes as long as the slower of reading and computing; what is resident, both."""
    plan = wan_mlx.plan("i2v-14B-480P", 832, 480, 81, steps=2, guidance_scale=1, memory="100GB")
    rows = {row.stage: row for row in plan.rows}
    attention = 2 * 4.0 * 32760**2 * 5120 * 40
    assert rows["denoise"].attention == pytest.approx(attention)
    rates = Rates(transformer=500e12, attention=600e12, decode=150e12, encode=100e12)
    computing = attention / 600e12 + (rows["denoise"].flop - attention) / 500e12
    found = times(plan, rates)
    assert found["denoise"] == pytest.approx(computing)
    assert found["decode"] == pytest.approx(rows["decode"].flop / 150e12)
    assert found["encode video"] == pytest.approx(rows["encode video"].flop / 100e12)
    reading = times(plan, replace(rates, reading=1e9))
    assert reading["denoise"] == pytest.approx(computing + rows["denoise"].reads / 1e9)
    assert reading["decode"] == pytest.approx(found["decode"] + rows["decode"].reads / 1e9)
    assert reading["encode text"] == pytest.approx(rows["encode text"].reads / 1e9)
    streamed = replace(plan, stream=True)
    assert times(streamed, replace(rates, reading=1e9))["denoise"] == pytest.approx(rows["denoise"].reads / 1e9)
    assert times(streamed, replace(rates, reading=1e15))["denoise"] == pytest.approx(computing)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("enough", [0.1, 100.0])
def test_predicted_forward_is_blocks_plus_rest(nets, clock, monkeypatch, passes, enough):
    """Of one block, of some of the tokens where that is enough, and with both passes where they run at once."""
    monkeypatch.setattr(timing, "ENOUGH", enough)
    counts = []

    def block(block, x, *rest):
        counts.append(x.shape[1])
        return ANYWAY + BLOCK * x.shape[1] / 32

    takes(monkeypatch, clock, execution, "run_block", block)
    takes(monkeypatch, clock, Execution, "leave", lambda _, x, *rest: OUTSIDE * x.shape[1] / 32)
    rate = timing.transformer_rate(nets, 32, passes, 8192, attending=1e30).flop
    assert max(counts) == (16 if enough == 0.1 else 32)
    parts = work.forward_parts(nets.transformer, 32)
    seconds = (sum(parts.values()) - parts["self attention"]) / rate
    assert seconds == pytest.approx(6 * (ANYWAY + BLOCK) + OUTSIDE)


def test_attention_is_counted_once(nets, clock, monkeypatch):
    """With the two rates together, a forward takes what it took, whatever rate attention seemed to have."""
    takes(monkeypatch, clock, execution, "run_block", lambda *_: BLOCK)
    parts = work.forward_parts(nets.transformer, 12)
    for attending in (parts["self attention"] / 0.5, 1e30):
        rate = timing.transformer_rate(nets, 12, 1, 8192, attending).flop
        rest = sum(parts.values()) - parts["self attention"]
        assert rest / rate + parts["self attention"] / attending == pytest.approx(6 * BLOCK)
    assert timing.transformer_rate(nets, 12, 1, 8192, attending=1.0).flop > 0


def test_attention_is_timed_in_parts(nets, clock, monkeypatch):
    """Of one head, where that is enough: then that is what is counted."""
    monkeypatch.setattr(timing, "QUERIES", 16)
    takes(monkeypatch, clock, timing, "attention", lambda q, k, v, _: q.shape[1] * q.shape[2] * k.shape[1] * 1e-3)
    for tokens in (5, 40):
        assert timing.attention_rate(nets, tokens, 2).flop == pytest.approx(4 * nets.transformer.head_dim / 1e-3)


@pytest.mark.parametrize("frames", [1, 5])
def test_the_vae_is_timed_by_a_later_frame_of_a_part(clock, monkeypatch, frames):
    """The first frame, which is other work, counts only where there is no other."""
    config, firsts = tiny_mlx_model.VAE_CONFIG, []

    def frame(decoding, scale):
        def seconds(layer, x, cache):
            if not isinstance(layer, CausalConv) or x.shape[-1] > config.z_dim:  # the first layer takes all the time
                return 0.0
            firsts.append(not cache.frames)
            h, w = (n // scale for n in x.shape[1:3])
            if firsts[-1] and frames > 1:
                return 1000.0
            whole = work.vae_flop(config, (2 - firsts[-1], h, w), decoding)
            return (whole - (0 if firsts[-1] else work.vae_flop(config, (1, h, w), decoding))) / 1e6

        return seconds

    shape = (frames, 3, 6)
    with monkeypatch.context() as decoding:
        takes(decoding, clock, vae_execution, "run_layer", frame(True, 1))
        assert timing.vae_rate(config, shape, True).flop == pytest.approx(1e6)
    takes(monkeypatch, clock, vae_execution, "run_layer", frame(False, 8))
    assert timing.vae_rate(config, shape, False).flop == pytest.approx(1e6)
    assert any(firsts) and any(not first for first in firsts) == (frames > 1)


def test_sizes_grow_until_they_take_enough():
    tried = []

    def seconds_at(size):
        tried.append(size)
        return size * 1e-3

    size, seconds, first = timing.worth_timing(seconds_at, 16, 100_000)
    assert first == 0 and seconds == size * 1e-3 and timing.ENOUGH / 2 <= seconds <= timing.ENOUGH
    tried.clear()
    assert timing.worth_timing(seconds_at, 16, 50) == (50, pytest.approx(0.05), 0)
    assert len(tried) >= timing.ENOUGH / 0.05  # what takes little is done more often


def test_disturbed_timings_are_left_out():
    times = iter([0.1, 0.9, 0.1, 0.3, 0.2])
    assert timing.typical(lambda: next(times), 0.1) == pytest.approx(0.1)  # 0.1 and 0.9 are enough
    assert timing.typical(lambda: next(times)) == pytest.approx(0.1)  # 0.1 and 0.3


def test_the_extra_time_of_a_first_run_counts_once(nets, monkeypatch):
    """On a GPU, where kernels are chosen for each shape: for every kind of tile, and the first frame besides."""
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    tried = []

    def seconds_at(size):
        tried.append(size)
        return 1.0 + (tried.count(size) == 1) * 3.0

    assert timing.worth_timing(seconds_at, 16, 50) == (16, 1.0, 3.0)
    rates = {"attention_rate": (2e9, 0.25), "transformer_rate": (1e9, 0.5), "vae_rate": (3e9, 0.125)}
    for name, rate in rates.items():
        monkeypatch.setattr(timing, name, lambda *_, rate=rate: timing.Rate(*rate))
    plan = planned(nets, 320, 128, 9)
    for tile, kinds in ((None, 1), ((160, 128), 1), ((80, 128), 2)):
        found = timing.measure_rates(replace(plan, decode_tile=tile), nets, (3, 16, 40), 1)
        assert found.first == {"denoise": 0.75, "decode": 0.125 * 2 * kinds}
    later = replace(found, first={})
    assert times(plan, found)["denoise"] == pytest.approx(times(plan, later)["denoise"] + 0.75)


def test_packed_weights_are_timed_packed():
    nets = sizes_of(PRESETS["nano"], "bfloat16", "q8")
    model = timing.random_transformer(replace(nets.transformer, num_layers=1), nets)
    assert isinstance(model.blocks[0].ffn[0], QuantizedLinear) and model.dtype == mx.bfloat16
    latents, context, more = timing.random_inputs(model.config, 4, mx.bfloat16)
    assert mx.isfinite(model(latents, 500.0, context, **more)).all()


def test_reading_is_of_weights_as_they_are_loaded(clock, monkeypatch):
    checkpoint = open_checkpoint(BUNDLED["nano"])
    parameters = parameters_of(checkpoint, mx.float32)
    assert timing.reading_rate(parameters) is None  # 12 MB
    monkeypatch.setattr(timing, "READ_BYTES", 3_000_000)
    read = []

    def seconds(name, *_):
        read.append(name)
        return parameters.weights.file.nbytes(parameters.weights.sources[name][0]) / 5e6

    takes(monkeypatch, clock, parameters.weights, "read", seconds)
    random.seed(0)
    assert timing.reading_rate(parameters) == pytest.approx(5e6)
    assert 0 < len(read) < len(parameters.weights.shapes)


@pytest.mark.parametrize("model", ["nano", "nano-i2v", "i2v without CLIP", "vace"])
def test_every_kind_of_model_can_be_timed(monkeypatch, model):
    """What is timed is what the run does: every network of the plan gets what it takes."""
    monkeypatch.setattr(timing, "ENOUGH", 1e-9)
    preset = PRESETS.get(model) or PRESETS["nano" if model == "vace" else "nano-i2v"]
    if model == "i2v without CLIP":  # Wan2.2's
        preset = replace(preset, transformer=replace(preset.transformer, image_dim=None))
    if model == "vace":
        small = replace(preset.transformer, model_type="vace", num_layers=3, vace_layers=(0, 2))
        preset = replace(preset, task="vace", transformer=small)
    nets = sizes_of(replace(preset, vae=VAEConfig(dim=8)), "float32", None)
    plan = planned(nets, 32, 32, 5)
    state = mx.random.state[0].tolist()
    plan = timing.with_seconds(plan, timing.measure_rates(plan, nets, (2, 4, 4), 2))
    assert plan.seconds > 0 and all(row.seconds > 0 for row in plan.rows)
    assert mx.random.state[0].tolist() == state


def test_a_block_that_seemed_to_take_nothing_leaves_a_rate(nets, monkeypatch):
    monkeypatch.setattr(timing, "worth_timing", lambda *_: (16, 0.5, 0.0))
    monkeypatch.setattr(timing, "typical", lambda *_: 1.0)
    assert timing.transformer_rate(nets, 16, 1, 1024, 1e9).flop > 0


def test_guidance_on_the_cpu_is_timed_with_both_passes_at_once(nets, monkeypatch):
    asked = []
    for name in ("attention_rate", "transformer_rate", "vae_rate"):
        monkeypatch.setattr(timing, name, lambda *args, name=name: asked.append((name, args)) or timing.Rate(1.0, 0.0))
    plan = planned(nets, 32, 32, 1)

    def at_a_time(plan, passes):
        asked.clear()
        timing.measure_rates(plan, nets, (1, 4, 4), passes)
        return asked[0][1][2]

    assert at_a_time(plan, 2) == 2 and at_a_time(plan, 1) == 1
    assert at_a_time(replace(plan, stream=True), 2) == 1  # the passes take turns
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    assert at_a_time(plan, 2) == 1


def test_two_at_once_are_each_half_of_the_time(clock):
    def run():
        clock[0] += 3.0

    assert timing._seconds(run, 2) == timing._seconds(run, 1) == 3.0


def test_a_pipeline_plans_with_times(monkeypatch):
    monkeypatch.setattr(timing, "measure_rates", lambda *_: Rates(1e9, 1e9, 1e9))
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", progress=False)
    request = pipe.request("a red circle", width=64, height=64, num_frames=1, steps=1)
    assert pipe.plan(request).seconds is None
    plan = pipe.plan(request, measure=True)
    assert plan.seconds == pytest.approx(sum(row.flop for row in plan.rows) / 1e9)
