"""Plans: what is resident, streamed or tiled in which memory, predicted from sizes alone."""

import importlib.util
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.cuda.forward import DeferredFrees
from wan_mlx.errors import MemoryPlanError
from wan_mlx.models import vae_tiling as tiling
from wan_mlx.models.attention_execution import queries_keys_values
from wan_mlx.models.configs import TransformerConfig, VAE22Config, VAEConfig
from wan_mlx.models.networks import new_network
from wan_mlx.models.pieces import FEW_TOKENS, Pacer
from wan_mlx.models.rope import rope_table
from wan_mlx.models.transformer import SelfAttention
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.planning import choose as memory
from wan_mlx.planning import machine as budget
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.planning import speed as timing
from wan_mlx.planning.machine import parse_memory, system_memory
from wan_mlx.presets import PRESETS

GIB = 2**30
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "given, size",
    [("8GB", 8e9), ("8 gib", 8 * GIB), ("1.5GB", 1.5e9), ("900MB", 9e8), (5_000_000_000, 5e9), ("auto", None),
     (None, None)],
)  # fmt: skip
def test_parse_memory(given, size):
    assert parse_memory(given) == size


@pytest.mark.parametrize("given, message", [("8", "expected auto or a size such as 8GB"), ("much", "expected auto"),
                                            ("8 MB", "expected at least 100MB"), (7, "at least 100MB"),
                                            ("9" * 400 + "GB", "at most 1000TB"),
                                            (10**16, "at most 1000TB")])  # fmt: skip
def test_wrong_memory(given, message):
    with pytest.raises(ValueError, match=message):
        parse_memory(given)
    with pytest.raises(ValueError, match=message):
        wan_mlx.WanPipeline.from_pretrained("nano", memory=given)


MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 20000000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/memory.max": "9000\n",
                f"{V2}/a/memory.current": "5000\n",
                f"{V2}/a/memory.stat": "anon 1\ninactive_file 700\n",
                f"{V2}/a/b/memory.max": "max\n",
            },
            4700,
        ),
        ({f"{V2}/memory.max": "8000\n"}, 8000),
        (
            {
                f"{V1}/memory.limit_in_bytes": "6000\n",
                f"{V1}/memory.usage_in_bytes": "1000\n",
                f"{V1}/memory.stat": "total_inactive_file 300\n",
            },
            5300,
        ),
        ({f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, 20000000 * 1024),
    ],
)
def test_system_memory_is_the_least_limit_of_linux(tmp_path, files, free):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert system_memory(tmp_path) == free


@pytest.mark.parametrize(
    "info, left",
    [
        ({"max_recommended_working_set_size": 1000, "memory_size": 1500}, 950),
        ({"free_memory": 1000, "total_memory": 5}, 930),
        ({"free_memory": "1000"}, 930),
        ({"total_memory": 1000}, 930),
        ({"memory_size": 1000}, 700),
    ],
)
def test_auto_leaves_room_on_a_gpu(monkeypatch, info, left):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    assert budget.available_memory() == left


def test_auto_counts_free_memory(monkeypatch):
    monkeypatch.setattr(budget, "system_memory", lambda: 10 * GIB)
    plan = wan_mlx.plan("t2v-1.3B")
    assert not plan.chosen and 8.5 * GIB <= plan.budget < 10 * GIB
    assert wan_mlx.plan("t2v-1.3B", memory="auto").budget == pytest.approx(plan.budget, rel=0.01)


def on_a_gpu(monkeypatch):
    """Predict as for a GPU with fused attention."""
    monkeypatch.setattr(peaks, "has_fused_kernel", lambda dtype, head_dim: dtype != mx.float32)
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    monkeypatch.setattr(wan_mlx.cuda, "in_use", lambda: True)


@pytest.mark.parametrize(
    "model, size, budget, stream, most",
    [("t2v-1.3B", (832, 480), "6.5GiB", False, 6.5), ("t2v-1.3B", (832, 480), "5GB", False, 4.6),
     ("t2v-1.3B", (832, 480), "3GB", True, 2.8), ("t2v-14B", (832, 480), "6GiB", True, 6),
     ("t2v-14B", (1280, 720), "10GiB", True, 10), ("t2v-14B", (832, 480), "64GB", False, 33)],
)  # fmt: skip
def test_plans_of_released_models(monkeypatch, model, size, budget, stream, most):
    on_a_gpu(monkeypatch)
    plan = wan_mlx.plan(model, *size, 81, memory=budget)
    assert plan.fits and plan.peak <= most * GIB
    assert plan.stream == stream
    assert [row.stage for row in plan.rows] == ["encode text", "denoise", "decode"]


def test_quantised_weights_need_less(monkeypatch):
    on_a_gpu(monkeypatch)
    plain, q8, q4 = (
        wan_mlx.plan("t2v-14B", 832, 480, 81, memory="64GB", quantize=mode).rows[1].peak for mode in (None, "q8", "q4")
    )
    assert 0.5 < q8 / plain < 0.65 and 0.5 < q4 / q8 < 0.7


def test_image_models_have_more_stages():
    stages = [row.stage for row in wan_mlx.plan("i2v-14B-480P", memory="64GB").rows]
    assert stages == ["encode text", "encode images", "encode video", "denoise", "decode"]
    assert [row.stage for row in wan_mlx.plan("vace-1.3B", memory="64GB").rows][1] == "encode video"


def test_forwards_and_reads_follow_the_request():
    def denoise(**options):
        return next(row for row in wan_mlx.plan("t2v-1.3B", **options).rows if row.stage == "denoise")

    once, guided = denoise(steps=10, guidance_scale=1.0, memory="64GB"), denoise(steps=10, memory="64GB")
    # The second pass takes what precedes the text from the first. Resident: weights are read once.
    assert 1.97 * once.flop < guided.flop < 1.98 * once.flop and guided.reads == once.reads
    assert once.flop / 1e12 == pytest.approx(2830, rel=1e-3)
    streamed = denoise(steps=10, memory="3GB")
    assert 19 * once.reads < streamed.reads < 20 * once.reads and streamed.how.startswith("streamed")


@pytest.mark.parametrize("model", ["Wan-AI/Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers"])
def test_a_hub_model_is_planned_before_any_download(monkeypatch, model):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    plan = wan_mlx.plan(model, memory="128GB")
    assert plan.title.startswith("t2v-14B 1280x720, 81 frames")


def test_advice_names_options_that_fit(monkeypatch):
    on_a_gpu(monkeypatch)
    plan = wan_mlx.plan("t2v-14B", 1280, 720, 81, memory="6GB")
    assert not plan.fits
    options = dict(option.removeprefix("--").split(" ") for option in plan.advice)
    assert {"size", "frames", "memory"} <= options.keys()
    width, height = map(int, options["size"].split("x"))
    assert wan_mlx.plan("t2v-14B", width, height, 81, memory="6GB").fits
    assert wan_mlx.plan("t2v-14B", 1280, 720, int(options["frames"]), memory="6GB").fits
    assert wan_mlx.plan("t2v-14B", 1280, 720, 81, memory=options["memory"]).fits
    message = r"needs about 7\.\d+ GiB to denoise, but plans fill at most 5\.364 of the 5\.588 GiB that are allowed: --"
    with pytest.raises(MemoryPlanError, match=message):
        plan.check()


def test_the_command_line_prints_the_plan(capsys, monkeypatch):
    rates = timing.Rates(transformer=100e12, attention=80e12, decode=25e12)
    monkeypatch.setattr(timing, "measure_rates", lambda *_: rates)
    assert main(["--model", "t2v-1.3B", "--plan", "--memory", "64GB", "--steps", "10"]) == 0
    printed, noted = capsys.readouterr()
    assert re.search(r"it fits in \d+\.\d\d GiB; to tell the time, its parts are timed", noted)
    assert "t2v-1.3B 832x480, 81 frames, within 59.6 GiB (64 GB as asked)" in printed
    assert printed.rstrip().endswith("it fits")
    # 20 forwards: 197.8 TFLOP of self-attention at 80 TFLOP/s and 85.2 of all else at 100; ten of them take 6.6 and 0.6
    # of these from another. Decoding 275.4 at 25.
    assert "65.6 s" in printed and "11.0 s" in printed and "76.6 s" in printed
    monkeypatch.setattr(timing, "measure_rates", None)  # what does not fit is not timed
    assert main(["--model", "t2v-14B", "--plan", "--memory", "1GB"]) == 1
    assert "it does not fit; what would: " in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [(dict(width=830), "width is 830"), (dict(num_frames=80), "nearest: 81"),
                                              (dict(steps=0), "steps is 0")])  # fmt: skip
def test_wrong_requests(options, message):
    with pytest.raises(ValueError, match=message):
        wan_mlx.plan("t2v-1.3B", **options)
    with pytest.raises(ValueError, match="sizes of someone/else are not known"):
        wan_mlx.plan("someone/else")


STILL = dict(num_frames=1, steps=1, seed=3, width=64, height=128)


def test_a_small_budget_streams_and_tiles_to_the_same_video(monkeypatch):
    prompt = "a red circle moves right on a blue background"
    whole, small = (wan_mlx.WanPipeline.from_pretrained("nano", progress=False, memory=m) for m in ("4GB", "100MB"))
    plan = whole.plan(whole.request(prompt, **STILL))
    assert not plan.stream and plan.decode_tile is None and plan.fits
    # Nano fits into less than users may ask for, so that it must be told that there is less.
    room = min(row.peak for row in plan.rows if row.stage != "encode text")
    monkeypatch.setattr(memory, "parse_memory", lambda given: 4 * 10**9 if given == "4GB" else room)
    monkeypatch.setattr(memory.Plan, "check", lambda plan: None)
    plan = small.plan(small.request(prompt, **STILL))
    assert plan.stream and plan.decode_tile == (64, 64)
    limit = mx.set_cache_limit(123_000_000)
    videos = [pipe(prompt, **STILL) for pipe in (whole, small)]
    assert mx.set_cache_limit(limit) == 123_000_000  # as it was before the runs
    assert np.array_equal(*(video.latents for video in videos))
    assert np.abs(np.subtract(*(video.frames.astype(int) for video in videos))).max() <= 1


def test_a_plan_that_does_not_fit_is_refused_before_loading(monkeypatch):
    pipe = wan_mlx.WanPipeline.from_pretrained("nano", progress=False, memory="700MB")
    monkeypatch.setattr(wan_mlx.Run, "__iter__", lambda run: pytest.fail("it ran"))
    with pytest.raises(MemoryPlanError, match="nano 1280x720, 81 frames needs about .* GiB .*: --frames 1; --mem"):
        pipe("a red circle", width=1280, height=720, num_frames=81, steps=1)


def test_tiles_get_smaller_and_cost_more(monkeypatch):
    on_a_gpu(monkeypatch)
    vae, shape = VAEConfig(), (21, 90, 160)
    tiles = memory.tile_choices(shape)
    assert tiles[0] is None and len(tiles) > 10 and all(min(tile) >= tiling.SMALLEST_TILE for tile in tiles[1:])
    assert peaks.tile_work(vae, shape, None, True) == 1 < peaks.tile_work(vae, shape, (640, 360), True)
    assert peaks.vae(vae, shape, (256, 240), True) < 3 * GIB < peaks.vae(vae, shape, None, True)


def benchmark():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks/memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told_rows() -> list[tuple[str, float, float, float]]:
    """What was done, predicted and measured GiB and their ratio, from the table in benchmarks/memory.md."""
    text = (ROOT / "benchmarks/memory.md").read_text(encoding="utf-8")
    text = text[: text.index("## The parts of a peak")]
    found = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    return [(what, *map(float, numbers)) for what, *numbers in found]


def test_predicted_peaks_are_within_a_tenth_of_gpu_measurements(monkeypatch):
    on_a_gpu(monkeypatch)
    table, rows = benchmark(), told_rows()
    bench = table.Bench(ROOT, PRESETS)
    assert len(rows) >= 30
    now = table.against([{"what": what, "measured_gib": measured} for what, _, measured, _ in rows], bench)
    for (what, *told), row in zip(rows, now, strict=True):
        assert row["predicted_by_measured"] == pytest.approx(1, abs=0.1), what
        again = row["predicted_gib"], row["measured_gib"], row["predicted_by_measured"]
        assert told == pytest.approx(again, abs=0.006), what


def test_where_memory_is_short_keys_wait_for_queries():
    """Then three wide arrays fewer live at once: queries' projection and norm are gone."""
    config = TransformerConfig("t2v", dim=128, ffn_dim=128, num_heads=1, num_layers=1, freq_dim=32, text_dim=32)
    attention, tokens, table = SelfAttention(config), mx.ones((1, 5000, 128)), rope_table((1, 50, 100), 128)
    mx.eval(tokens, table, attention.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(queries_keys_values(attention, tokens, table, Pacer(FEW_TOKENS)))
    assert mx.get_peak_memory() - before <= 5.2 * tokens.nbytes
    assert min(memory.LADDER, key=lambda step: (not step[0], step[1])) == (True, FEW_TOKENS)


def test_deferred_frees_are_waited_for_above_their_limit(monkeypatch):
    """Each time memory has grown since, so never for what is held; on CUDA alone."""
    active, waits = [1000], []

    def synchronize():
        waits.append(active[0])
        active[0] = min(active[0], 1500)  # what is held

    monkeypatch.setattr(mx, "get_active_memory", lambda: active[0])
    monkeypatch.setattr(mx, "synchronize", synchronize)
    pace = Pacer(frees=DeferredFrees(100))

    def grow_to(*sizes):
        for size in sizes:
            active[0] = size
            pace(mx.zeros(1))

    grow_to(5000)
    assert waits == []  # not on CUDA
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    grow_to(1100, 1101, 1150, 1201, 1202, 1400, 1600, 1400, 1600, 1601, 1500)
    assert waits == [1101, 1202, 1400, 1600, 1601]


def test_convolutions_are_those_of_the_network():
    other = VAEConfig(dim=8, dim_mult=(1, 2), num_res_blocks=3, temporal_downsample=(True,))
    for config in (VAEConfig(), other, VAE22Config()):
        vae = new_network(config)
        assert peaks.convolutions(config, True) == tiling._convolutions(vae.decoder.local)
        assert peaks.convolutions(config, False) == tiling._convolutions(vae.encoder.local)


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("config", [VAEConfig(dim=8), VAE22Config(dim=8, decoder_dim=8)])
def test_predicted_decode_peak_equals_the_measured_one(tile, config):
    vae, latents = new_network(config), mx.zeros((1, 3, 2, 32, config.z_dim))
    mx.eval(vae.parameters(), latents)
    mx.clear_cache()
    before = mx.get_active_memory() - peaks.vae_weights(config)
    mx.reset_peak_memory()
    for _ in tiling.decode(VAEExecution(vae), latents, tile):
        pass
    assert mx.get_peak_memory() - before == pytest.approx(peaks.vae(config, (3, 2, 32), tile, True), rel=0.25)


def test_every_preset_can_be_planned():
    for name in PRESETS:
        plan = wan_mlx.plan(name, memory="100GB")
        assert plan.fits and str(plan).count("\n") == len(plan.rows) + 3
