"""A run on a Mac, with a faked platform and programs: TF32 off, no idle sleep, an end before the battery is empty, and
nothing kept of GPU work that failed."""

import fcntl
import re
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from scaled_files import write
from tiny_mlx_model import random

import wan_mlx
from wan_mlx import mac
from wan_mlx.cli import convert as converting
from wan_mlx.cli.main import main
from wan_mlx.cli.terminal import explain
from wan_mlx.errors import GPUError
from wan_mlx.files.open import open_weights
from wan_mlx.files.scaled import fold
from wan_mlx.models.configs import VAEConfig
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.planning.machine import available_memory
from wan_mlx.planning.plan import limited_memory
from wan_mlx.prompts import extend
from wan_mlx.prompts.cache import cache_folder
from wan_mlx.prompts.extend import Extended
from wan_mlx.runs.folder import RunFolder
from wan_mlx.runs.job import Job
from wan_mlx.types import Step
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_transformer

SMALL = dict(width=16, height=16, num_frames=5, steps=3, seed=3)
ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=4653155)	{}%; discharging; 0:45 remaining present: true
"""
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=4653155)	12%; charging; 1:20 remaining present: true
"""
FAILED = "[METAL] Command buffer execution failed: {}."
INTERACTIVITY = FAILED.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError...)")
MEMORY = FAILED.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)")
TIMEOUT = FAILED.format("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)")


@pytest.fixture
def on_mac(monkeypatch, tmp_path):
    """macOS by `sys.platform`; the function puts a program of macOS, a shell script, on the path."""
    monkeypatch.setattr(sys, "platform", "darwin")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/bin")

    def program(name: str, script: str) -> None:
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)

    return program


@pytest.fixture
def caffeinate(on_mac, tmp_path):
    """A stand-in; the function returns whether it is at work, and the arguments of each time that it was started."""
    log = tmp_path / "caffeinate.log"
    on_mac("caffeinate", f'echo "$$ $*" >> {log}; exec sleep 60')

    def started() -> tuple[bool, list[str]]:
        for _ in range(200):  # until the shell has come to the line
            if log.exists() and log.read_text().endswith("\n"):
                break
            time.sleep(0.01)
        lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()] if log.exists() else []
        alive = lines and subprocess.run(["/bin/kill", "-0", lines[-1][0]], capture_output=True).returncode == 0
        return bool(alive), [arguments for _, arguments in lines]

    return started


@pytest.fixture
def pipe(pico):
    return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


ROOT = Path(__file__).parent.parent


def scripts():
    """Of ours that import MLX."""
    found = (path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.py"))
    begin = re.compile(r"^(from|import) mlx\b", re.MULTILINE)
    return [path for path in sorted(found) if begin.search(path.read_text(encoding="utf-8"))]


# --- TF32 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform, given, after, becomes", [
    ("darwin", None, False, "0"), ("darwin", "1", False, "1"), ("darwin", "1", True, "1"), ("darwin", None, True, "0"),
    ("linux", None, True, None),
])  # fmt: skip
def test_float32_is_float32_on_a_mac(monkeypatch, platform, given, after, becomes):
    if given:
        monkeypatch.setenv("MLX_ENABLE_TF32", given)
    else:
        monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    lines = ["import os, sys", f"sys.platform = {platform!r}", "import mlx.core" if after else "", "import wan_mlx",
             "print(os.environ.get('MLX_ENABLE_TF32'))"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(becomes)
    late = "mlx was imported before wan_mlx" in done.stderr
    assert late == (platform == "darwin" and after and not given) and len(done.stderr.splitlines()) == late
    assert not late or "MLX_ENABLE_TF32=0" in done.stderr


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.name)
def test_our_scripts_import_wan_mlx_before_mlx(script):
    """And its own modules, of which the first import it."""
    text = script.read_text(encoding="utf-8")
    imports = [match[1] for match in re.finditer(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE)]
    first = [name.split(".")[0] for name in imports]
    assert "wan_mlx" in first[: first.index("mlx")], imports



# --- idle sleep -----------------------------------------------------------------------------------------------------


def test_the_mac_stays_awake_while_a_run_goes_on(pipe, caffeinate):
    run = pipe.run(pipe.request("a red circle", **SMALL))
    events = iter(run)
    next(events)
    alive, arguments = caffeinate()
    assert alive and arguments == [f"-i -w {mac.os.getpid()}"]  # never -d: a lit display makes macOS cut GPU work
    events.close()
    assert caffeinate() == (False, arguments)


def test_also_between_the_videos_of_a_batch(pipe, caffeinate):
    with pipe.keep_loaded():
        assert caffeinate()[0]
    assert not caffeinate()[0]


def test_also_while_a_prompt_is_extended(pipe, caffeinate, monkeypatch):
    seen = []

    class Stands:  # for a language model
        def __init__(self, *_):
            pass

        def __enter__(self):
            seen.append(caffeinate()[0])
            return lambda prompt, *_: Extended(prompt, prompt, "none", None)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(extend, "PromptExtender", Stands)
    requests = [pipe.request("a red circle", **SMALL)]
    extend.extend_requests(pipe.preset, requests, True, pipe.caffeinate)
    assert seen == [True] and not caffeinate()[0]
    extend.extend_requests(pipe.preset, requests, True, False)
    assert seen == [True, False]


def test_also_while_a_model_is_converted(pico, tmp_path, caffeinate, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(converting, "convert", lambda *_, **__: seen.append(caffeinate()[0]) or tmp_path)
    assert main(["convert", str(pico), str(tmp_path / "out"), "--quiet"]) == 0
    assert seen == [True] and not caffeinate()[0]


def test_not_if_it_is_not_wanted(pico, on_mac, tmp_path):
    on_mac("caffeinate", f": > {tmp_path}/started")
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False, caffeinate=False)
    pipe("a red circle", **SMALL)
    assert not (tmp_path / "started").exists()


def test_not_elsewhere_and_not_without_the_program(on_mac, monkeypatch):
    assert not mac.can_stay_awake()
    with mac.awake():
        pass
    on_mac("caffeinate", "exit 1")
    assert mac.can_stay_awake()
    monkeypatch.setattr(sys, "platform", "linux")
    assert not mac.can_stay_awake()


def test_it_is_said_in_one_line(flags, caffeinate, tmp_path, capsys):
    loud = [flag for flag in flags if flag != "--quiet"]
    assert main([*loud, "--output", str(tmp_path / "a.npz"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"^awake     .*--no-caffeinate", said, re.MULTILINE)) == 1
    assert main([*loud, "--output", str(tmp_path / "a.npz"), "--dry-run", "--no-caffeinate"]) == 0
    assert "awake" not in capsys.readouterr().err


def test_stop_below_has_no_effect_elsewhere(flags, tmp_path, capsys, monkeypatch):
    loud = [flag for flag in flags if flag != "--quiet"] + ["--output", str(tmp_path / "a.npz"), "--dry-run"]
    for platform, says in (("linux", True), ("darwin", False)):
        monkeypatch.setattr(sys, "platform", platform)
        assert main([*loud, "--stop-below", "20"]) == 0
        assert ("--stop-below has no effect here" in capsys.readouterr().err) == says


# --- the battery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, left", [(ON_BATTERY.format(18), 18), (ON_BATTERY.format(100), 100), (ON_MAINS, None),
                                        ("Now drawing from 'AC Power'\n", None), ("", None)])  # fmt: skip
def test_battery(on_mac, said, left):
    on_mac("pmset", f"cat <<'END'\n{said}END")
    assert mac.battery() == left


def test_no_battery_without_the_program_or_elsewhere(on_mac, monkeypatch):
    assert mac.battery() is None
    on_mac("pmset", f"cat <<'END'\n{ON_BATTERY.format(18)}END")
    monkeypatch.setattr(sys, "platform", "linux")
    assert mac.battery() is None


def test_a_run_stops_below_a_share_of_the_battery(flags, on_mac, monkeypatch, tmp_path, capsys):
    on_mac("caffeinate", "exit 0")
    levels = iter([21, 19])
    monkeypatch.setattr(mac, "battery", lambda: next(levels))
    output = tmp_path / "a.npz"
    assert main([*flags, "--output", str(output), "--stop-below", "20%"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"the battery is at 19 %, below 20 %; 2 steps are kept; go on with: wan-mlx resume {output}"
    )
    monkeypatch.setattr(mac, "battery", lambda: None)
    assert main(["--resume", str(output), "--quiet"]) == 0 and output.exists()


def test_the_battery_is_asked_once_a_step_and_only_if_wanted(pico, monkeypatch):
    asked = []
    monkeypatch.setattr(mac, "battery", lambda: asked.append(1))
    open_ = wan_mlx.WanPipeline.from_pretrained
    open_(pico, dtype="float32", progress=False)("a red circle", **SMALL)
    assert not asked
    open_(pico, dtype="float32", progress=False, stop_below=20)("a red circle", **SMALL)
    assert len(asked) == 3
    with pytest.raises(ValueError, match="stop_below is 101, expected 1 to 99; nearest: 99"):
        open_(pico, stop_below=101)


# --- nothing is kept of work that failed ----------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """The function has a command buffer fail that shows only when the stream is waited for."""

    def fail(said: str, at: int = 1) -> None:
        calls = []

        def synchronize(*streams):
            calls.append(1)
            if len(calls) >= at:
                raise RuntimeError(said)

        monkeypatch.setattr(mx, "synchronize", synchronize)

    return fail


def test_embeddings_are_waited_for_before_they_are_kept(pico, failing):
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
    failing(TIMEOUT)
    with pipe.keep_loaded():
        with pytest.raises(RuntimeError):
            pipe.encode_text(["a red circle"])
        assert not pipe._kept["texts"] and not list(cache_folder().glob("prompts/*"))


def test_states_are_waited_for_before_they_are_kept(tmp_path, failing):
    with RunFolder(tmp_path / "a.mp4") as folder:
        folder.begin({"steps": 5, "settings": {}})
        failing(TIMEOUT)
        latents = mx.zeros((1, 2, 2))
        with pytest.raises(RuntimeError):
            folder.save_step(Step(0, 5, 1000.0, 1.0, latents, latents, state={"latents": latents}))
        assert folder.steps_done == 0


@pytest.mark.parametrize("at, stored", [(6, 0), (7, 1)])
def test_frames_are_waited_for_before_they_are_kept(pipe, tmp_path, failing, at, stored):
    failing(TIMEOUT, at)  # waited for: embeddings, conditioning, three steps, the first frames, the others
    job = Job(pipe, pipe.request("a red circle", **SMALL), tmp_path / "a.npz")
    with pytest.raises(GPUError):
        job.make()
    index = tmp_path / "a.npz.wan/frames.index"
    assert len(index.read_text().splitlines() if index.exists() else []) == stored and not job.output.exists()


def test_converted_weights_are_waited_for_before_they_are_kept(pico, tmp_path, failing):
    failing(TIMEOUT)
    with pytest.raises(RuntimeError):
        convert(pico, tmp_path / "out")
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_a_run_that_failed_keeps_its_steps_and_says_how_to_go_on(flags, pipe, failing, tmp_path, capsys):
    output = tmp_path / "a.npz"
    failing(INTERACTIVITY, at=4)  # waited for: embeddings, conditioning, the first step, the second
    assert main([*flags, "--output", str(output)]) == 1
    kept, failed = capsys.readouterr().err.splitlines()[-2:]
    assert kept == f"1 steps are kept; go on with: wan-mlx resume {output}"
    assert failed.startswith("error: ") and "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in failed


# --- errors of the GPU, told apart ------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, words", [
    (INTERACTIVITY, ["AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1", "display", "ssh", "wan-mlx resume FILE"]),
    (MEMORY, ["out of memory", "--memory", "--vae-tiling", "--size", "wan-mlx resume FILE"]),
    (TIMEOUT, ["Caused GPU Timeout Error", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1", "doctor", "wan-mlx resume FILE"]),
    (FAILED.format("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"), ["AGX", "ssh"]),
    (FAILED.format("Ignored (for causing prior/excessive GPU errors)"), ["Ignored", "wan-mlx resume FILE"]),
])  # fmt: skip
def test_errors_of_metal(said, words):
    line, code = explain(RuntimeError(said))
    assert code == 1 and all(word in line for word in words) and "--debug" not in line and "\n" not in line


def test_python_users_get_the_same_words(pipe, failing):
    failing(INTERACTIVITY)
    with pytest.raises(GPUError) as caught:
        pipe("a red circle", **SMALL)
    assert explain(caught.value) == explain(RuntimeError(INTERACTIVITY))
    assert isinstance(caught.value, wan_mlx.WanError) and isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_pass(pipe, failing):
    failing("a bug")
    with pytest.raises(RuntimeError, match="^a bug$"):
        pipe("a red circle", **SMALL)
    assert explain(RuntimeError("a bug"))[0].endswith("(run again with --debug for the traceback)")


# --- memory ---------------------------------------------------------------------------------------------------------

GB = 10**9
VM_STAT = """Mach Virtual Memory Statistics: (page size of {size} bytes)
Pages free:                             {free:>12}.
Pages active:                              412000.
Pages inactive:                         {inactive:>12}.
Pages speculative:                      {speculative:>12}.
Pages throttled:                                0.
Pages wired down:                          201003.
Pages purgeable:                        {purgeable:>12}.
"Translation faults":                  1299461204.
Pages copy-on-write:                     53816543.
File-backed pages:                         151515.
"""
# Macs with a browser open: pages of 16 KiB that are free, inactive, speculative, purgeable; the pressure that macOS
# tells; the GPU's working set; bytes that "auto" takes.
MACS = {
    "8 GB": ((4_000, 140_000, 3_000, 2_000), 1, 5.7 * GB, 0.85 * 149_000 * 16384),
    "8 GB, short of memory": ((2_000, 90_000, 1_000, 1_000), 2, 5.7 * GB, 0.85 * (45_000 + 4_000) * 16384),
    "16 GB": ((30_000, 330_000, 20_000, 10_000), 1, 11.5 * GB, 0.85 * 390_000 * 16384),
    "64 GB": ((2_100_000, 700_000, 90_000, 9_000), 1, 51.5 * GB, 0.85 * 2_899_000 * 16384),
    "64 GB, nothing else open": ((3_300_000, 300_000, 9_000, 9_000), 1, 51.5 * GB, 0.95 * 51.5 * GB),
}


def metal(monkeypatch, working_set=48 * GB):
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": int(working_set)})
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)


def says(on_mac, pages, pressure=1, size=16384):
    free, inactive, speculative, purgeable = pages
    text = VM_STAT.format(size=size, free=free, inactive=inactive, speculative=speculative, purgeable=purgeable)
    on_mac("vm_stat", f"cat <<'END'\n{text}END")
    on_mac("sysctl", f'[ "$2" = kern.memorystatus_vm_pressure_level ] && echo {pressure}')


@pytest.mark.parametrize("name", MACS)
def test_auto_takes_what_is_really_free(on_mac, monkeypatch, name):
    pages, pressure, working_set, takes = MACS[name]
    metal(monkeypatch, working_set)
    says(on_mac, pages, pressure)
    assert available_memory() == pytest.approx(takes, rel=1e-6) and takes <= 0.95 * working_set


def test_own_memory_counts_as_free(on_mac, monkeypatch):
    metal(monkeypatch)
    says(on_mac, (100_000, 0, 0, 0), size=4096)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * GB)
    assert available_memory() == pytest.approx(0.85 * (100_000 * 4096 + 3 * GB), rel=1e-6)


def test_the_working_set_where_the_programs_are_missing(on_mac, monkeypatch):
    metal(monkeypatch)
    assert mac.free_memory() is None and available_memory() == int(0.95 * (48 * GB))
    on_mac("vm_stat", "echo no such thing")
    assert mac.free_memory() is None
    on_mac("vm_stat", "echo '(page size of 4096 bytes)'; echo 'Pages free:   7.'")
    assert mac.free_memory() == 7 * 4096
    monkeypatch.setattr(sys, "platform", "linux")
    assert mac.free_memory() is None


@pytest.mark.parametrize("tile, decoding, more", [((256, 256), True, 1.355), ((432, 360), False, 1.069),
                                                  (None, True, 1.054), (None, False, 1.121)])  # fmt: skip
def test_winograd_takes_memory_on_metal(monkeypatch, tile, decoding, more):
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    elsewhere = peaks.vae(VAEConfig(), (21, 90, 160), tile, decoding)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert peaks.vae(VAEConfig(), (21, 90, 160), tile, decoding) / elsewhere == pytest.approx(more, abs=0.01)


@pytest.mark.parametrize("shape, channels", [((1, 60, 104), (96, 96)), ((1, 60, 104), (16, 384)),
                                             ((1, 60, 104), (384, 3)), ((1, 63, 64), (192, 192))])  # fmt: skip
def test_convolutions_of_another_kernel_take_none(shape, channels):
    """Too few channels, or too few pixels, or not in 32s."""
    assert peaks.winograd_scratch(*shape, *channels) == 0


def test_scratch_of_one_convolution():
    """What MLX allocates for each of three: transformed input, output and weights, and the padded input."""
    tiles, c, o = 2 * 10 * 18, 384, 192
    values = 64 * tiles * c + 64 * tiles * o + 64 * c * o + 2 * 62 * 110 * c
    assert peaks.winograd_scratch(2, 60, 104, c, o) == 3 * 4 * values


def test_metal_waits_for_running_work_at_the_budget(pipe, monkeypatch):
    plan, set_ = pipe.plan(pipe.request("a red circle", **SMALL)), []
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: set_.append(limit) or 7)
    with limited_memory(plan):
        assert not set_  # CUDA and the CPU as ever
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with limited_memory(plan):
        assert set_ == [plan.budget]
    assert set_ == [plan.budget, 7]


# --- files larger than free memory ----------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch):
    """Descriptors that were taken out of the cache; the function says how much memory is free."""
    found = []
    monkeypatch.setattr(fcntl, "fcntl", lambda file, command, value: found.append((command, value)))

    def free(count):
        monkeypatch.setattr(mac, "free_memory", lambda: count)
        return found

    return free


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_reads_past_the_cache_give_the_same(pico, cached, dtype):
    latents, context = random(1, 2, 2, 2, 16), random(1, 512, 128)
    want = load_transformer(pico, dtype, stream=True)(latents, 500.0, context)
    mx.eval(want)
    found = cached(10**5)
    model = load_transformer(pico, dtype, stream=True)
    assert mx.array_equal(model(latents, 500.0, context), want)
    before = len(found)
    assert found and set(found) == {(48, 1)}
    mx.eval(model(latents, 500.0, context))
    assert len(found) > before  # in every pass


@pytest.mark.parametrize("free", [10**9, None])
def test_files_that_fit_are_read_as_ever(pico, cached, free):
    found = cached(free)
    mx.eval(load_transformer(pico, "float32", stream=True)(random(1, 2, 2, 2, 16), 500.0, random(1, 512, 128)))
    load_transformer(pico, "float32")
    assert not found


@pytest.mark.parametrize("kind", ["shards", "scaled"])
def test_files_of_files_are_read_past_the_cache_too(sharded, tmp_path, cached, kind):
    numbers = {"a": ("F8_E4M3", np.full((4, 16), 60, np.uint8))}
    path = sharded() if kind == "shards" else write(tmp_path / "scaled.safetensors", numbers)
    file, found = fold(open_weights(path)), cached(0)
    want = np.array(file.read("a").astype(mx.float32))
    assert not found and file.is_lazy
    file.read_past_cache()
    assert not file.is_lazy and np.array_equal(np.array(file.read("a").astype(mx.float32)), want) and found
