"""What a training run is said to need: memory as measured, seconds from a block that is timed."""

import pytest
from PIL import Image

from wan_mlx.errors import UsageError
from wan_mlx.planning.peak_memory import GPU_OVERHEAD
from wan_mlx.planning.sizes import sizes_of
from wan_mlx.presets import PRESETS
from wan_mlx.training import Recipe, block_backward, estimate, timing, train
from wan_mlx.training.estimate import plan_of

RECIPE = Recipe(rank=32)


def nets_of(name, quantize=None, dtype="bfloat16"):
    return sizes_of(PRESETS[name], dtype, quantize)


# What an H200 took (benchmarks/LOG.md): model, base, size, frames, tokens at once, GiB.
STILL, CLIP, LONG = (832, 480, 1), (480, 272, 33), (832, 480, 81)
MEASURED = [
    ("t2v-1.3B", "resident", STILL, 4096, 3.59), ("t2v-1.3B", "resident", CLIP, 4096, 4.14),
    ("t2v-1.3B", "resident", LONG, 4096, 7.73), ("t2v-1.3B", "resident", CLIP, 8192, 4.29),
    ("t2v-1.3B", "streamed", STILL, 8192, 1.14), ("t2v-1.3B", "streamed", CLIP, 8192, 1.82),
    ("ti2v-5B", "streamed", STILL, 8192, 2.26), ("t2v-14B", "q4", STILL, 8192, 11.52),
    ("t2v-14B", "streamed", STILL, 8192, 5.03), ("t2v-14B", "streamed", CLIP, 8192, 7.17),
]  # fmt: skip


@pytest.mark.parametrize("name, base, shape, at_once, measured", MEASURED)
def test_peaks_are_within_a_tenth_of_those_measured(name, base, shape, at_once, measured, monkeypatch):
    """As planned where they were measured: on CUDA, of files in bfloat16."""
    monkeypatch.setattr(block_backward, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(estimate, "has_fused_gradient", lambda dtype, head_dim: True)
    monkeypatch.setattr(estimate, "overhead", lambda: GPU_OVERHEAD)
    nets = nets_of(name, base if base.startswith("q") else None)
    plan = plan_of(nets, [shape], RECIPE, stream=base == "streamed")
    reordered = nets.weights.in_flight if base == "streamed" else 0
    assert (plan.peak - reordered) / 2**30 == pytest.approx(measured, rel=0.1)


def test_seconds_are_those_of_all_blocks_and_of_what_is_around_them(monkeypatch):
    """Timed as if a token took 3 seconds outside the blocks and 2 in each."""
    monkeypatch.setattr(timing, "_step", lambda *given: given[-1] * (3.0 + 2.0 * given[-2]))
    nets = nets_of("t2v-1.3B")
    plan = plan_of(nets, [(832, 480, 1)], RECIPE)
    assert plan.lengths == (1560,)
    few = 16  # tokens, of which a step takes long enough to be timed
    work = (plan.flop, timing.step_flop(nets.transformer, few, max(1, round(estimate.rows_of_text(nets) * few / 1560))))
    assert timing.with_seconds(plan, nets, RECIPE).seconds == pytest.approx(few * (3 + 2 * 30) * work[0] / work[1])
    for clips, rounds in ((1, 1), (2, 1), (3, 2)):  # two at once, on a CPU
        recipe = Recipe(rank=32, accumulate=clips)
        found = timing.with_seconds(plan_of(nets, [(832, 480, 1)], recipe), nets, recipe).seconds
        assert found == pytest.approx(rounds * few * (3 + 2 * 30) * work[0] / work[1])
    monkeypatch.setattr(timing, "threads", lambda *given: 1)
    one_by_one = timing.with_seconds(plan_of(nets, [(832, 480, 1)], recipe), nets, recipe).seconds
    assert one_by_one == pytest.approx(1.5 * found)


def test_a_streamed_step_takes_as_long_as_reading_twice(monkeypatch):
    monkeypatch.setattr(timing, "_step", lambda *given: 1e-6 * given[-2] * given[-1])
    monkeypatch.setattr(timing, "reading_rate", lambda parameters, stream: 1e9)
    nets = nets_of("t2v-1.3B")
    plan = plan_of(nets, [(832, 480, 1)], RECIPE, stream=True)
    assert plan.reads == 2 * nets.weights.stored_blocks > 10e9
    assert timing.with_seconds(plan, nets, RECIPE, parameters=object()).seconds == pytest.approx(plan.reads / 1e9)
    resident = plan_of(nets, [(832, 480, 1)], RECIPE)
    assert resident.reads == 0


def test_a_real_block_is_timed():
    nets = nets_of("nano", dtype="float32")
    plan = timing.with_seconds(plan_of(nets, [(64, 64, 1)], Recipe(rank=2)), nets, Recipe(rank=2))
    assert 0.001 < plan.seconds < 100


def test_training_from_python_refuses_what_does_not_fit(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(UsageError, match="it needs about .* are free to use"):
        train(tmp_path, "nano", tmp_path / "out", memory="100MB", rank=1024, size=(128, 128), frames=1)
    assert not (tmp_path / "out").exists()
