"""The doctor passes a healthy machine, sees what MLX is known to have got wrong, and keeps paths to itself."""

import getpass
import importlib
import json
import platform
import re
import socket
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli import doctor, macos, measure, selftest
from wan_mlx.cli.main import main
from wan_mlx.cli.selftest import Check
from wan_mlx.errors import install_command
from wan_mlx.models import chips, kernels
from wan_mlx.models.configs import VAEConfig
from wan_mlx.models.quantized_linear import Packing
from wan_mlx.planning import choose, speed
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.presets import PRESETS


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_healthy_operations_pass(dtype):
    for found in (selftest.matmul(96, 64, dtype), selftest.attention(300, dtype)):
        error, allowed, fault = found
        assert error <= allowed and not fault
    error, allowed, fault = selftest.convolution(32, 12, 16)
    assert error <= allowed and not fault


@pytest.mark.parametrize("mode", selftest.MODE_NAMES)
def test_each_packing_is_compared_with_the_original_and_with_the_cpu(monkeypatch, mode):
    error, allowed, fault = selftest.quantised(mode)
    assert allowed / 3 < error <= allowed and not fault
    right, calls = Packing.unpack, iter((1.0, 1.1))  # here, and on the CPU
    monkeypatch.setattr(Packing, "unpack", lambda *given: right(*given) * next(calls))
    error, allowed, fault = selftest.quantised(mode)
    assert error > 0.05 > allowed and not fault


def off_by(share):
    """One value that differs by this share of the largest."""

    def breaking(function):
        def broken(*args, **options):
            y = function(*args, **options)
            return y + (mx.arange(y.size).reshape(y.shape) == 0) * share * mx.abs(y).max()

        return broken

    return breaking


@pytest.mark.parametrize(
    "system, tf32, share, status",
    [
        ("Darwin", "1", 1.4e-2, "ok"),  # what Winograd's products have in TF32
        ("Darwin", "2", 1.4e-2, "ok"),  # as MLX reads it
        ("Darwin", "1", 5e-2, "fail"),
        ("Darwin", "0", 1.4e-2, "fail"),
        ("Darwin", "", 1.4e-2, "fail"),
        ("Darwin", "0", 2e-3, "ok"),
        ("Linux", "1", 1.4e-2, "fail"),  # where nothing is computed by Winograd in TF32
    ],
)
def test_float32_may_be_less_exact_where_a_macs_user_has_turned_tf32_on(monkeypatch, system, tf32, share, status):
    """In convolutions; and with it an operation is judged when it is made, not when doctor is imported."""
    importlib.import_module("huggingface_hub.hf_api")  # it asks for the platform when it is imported
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
    monkeypatch.setattr(mx, "conv2d", off_by(share)(mx.conv2d))
    found = selftest._guarded("it", selftest.convolution, 32, 12, 16)
    assert found.status == status, found.said
    assert selftest.matmul(96, 64, mx.bfloat16)[1] == 4e-2 and selftest.matmul(96, 64, mx.float16)[1] == 1e-2
    wide = system == "Darwin" and tf32 in ("1", "2")
    assert {selftest.attention(300, mx.float32)[1], selftest.matmul(96, 64, mx.float32)[1]} == {3e-2 if wide else 5e-3}


@pytest.mark.parametrize("fused", kernels.KERNELS, ids=lambda fused: fused.__name__)
def test_tf32_changes_nothing_for_kernels(fused):
    """Neither they nor what they are compared with multiply matrices, so their tolerance is the same with it."""
    results = kernels.listed(fused.plain(*kernels.trial(fused, mx.float32, 256, 23)))
    graph = StringIO()
    mx.export_to_dot(graph, *results)
    assert "label" in graph.getvalue() and not re.search("matmul|addmm|conv|gemm", graph.getvalue(), re.IGNORECASE)


def zeros_below(function):
    """As where scratch memory ran out."""

    def broken(*args, **options):
        y = function(*args, **options)
        rows = mx.arange(y.shape[1])[None, :, None, None]
        return mx.where(rows < 3, y, 0)

    return broken


def nan_in_one(function):
    def broken(*args, **options):
        y = function(*args, **options)
        return mx.where(mx.arange(y.size).reshape(y.shape) == 17, mx.nan, y)

    return broken


def first_keys_only(function):
    """As where an index overflowed."""
    return lambda q, k, v, scale: function(q, k[:, :, :200], v[:, :, :200], scale=scale)


@pytest.mark.parametrize(
    "place, name, breaking, check, says",
    [
        (mx, "conv2d", zeros_below, lambda: selftest.convolution(32, 12, 16), "zeros"),
        (mx, "conv2d", nan_in_one, lambda: selftest.convolution(32, 12, 16), "1 of 6144 values are NaN"),
        (mx.fast, "scaled_dot_product_attention", first_keys_only, lambda: selftest.attention(300, mx.float32), ""),
        (mx.fast, "scaled_dot_product_attention", nan_in_one, lambda: selftest.attention(300, mx.float32), "NaN"),
    ],
)
def test_broken_operations_are_found(monkeypatch, place, name, breaking, check, says):
    monkeypatch.setattr(place, name, breaking(getattr(place, name)))
    error, allowed, fault = check()
    assert says in fault and (fault or error > allowed)
    assert selftest._guarded("it", check).status == "fail"


def test_an_operation_that_raises_is_a_failed_check():
    def fail():
        raise RuntimeError("no such kernel")

    found = selftest._guarded("it", fail)
    assert found.status == "fail" and "no such kernel" in found.said and selftest.update_mlx() in found.advice


@pytest.mark.parametrize("backend, package", [("Metal", "mlx"), ("CUDA", "mlx[cuda13]"), ("CPU", "mlx[cpu]")])
def test_mlx_is_updated_with_its_backend(monkeypatch, backend, package):
    monkeypatch.setattr(selftest, "backend", lambda: backend)
    assert selftest.update_mlx() == install_command("-U", package)


def test_the_stored_frames_are_of_this_nano():
    """If it fails: python -m wan_mlx.doctor --store-reference"""
    with np.load(selftest.NANO_REFERENCE) as stored:
        assert str(stored["weights"]) == selftest._nano_weights()
        assert stored["means"].shape == (5, 16, 16, 3) and stored["means"].std() > 20
    assert selftest.NANO_REFERENCE.stat().st_size < 10_000


@pytest.mark.parametrize("before", ["on", "off"])
def test_in_float32_operations_run_one_by_one(monkeypatch, before):
    """So that CUDA compiles nothing for that video; afterwards all is as before."""
    traced = []
    function = mx.compile(lambda x: traced.append(x) or x + 1)
    if before == "off":
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
        mx.disable_compile()
    try:
        with selftest.operations_alone():
            assert kernels.off()
            function(mx.array(1)), function(mx.array(1))
        assert len(traced) == 2 and not kernels.off()
        function(mx.array(1)), function(mx.array(1))
        assert len(traced) == (3 if before == "on" else 4)
    finally:
        mx.enable_compile()


def test_nano_is_compared(monkeypatch):
    with np.load(selftest.NANO_REFERENCE) as stored:
        means = stored["means"].astype(np.float32)
    monkeypatch.setattr(selftest, "nano_means", lambda dtype: means + 3)
    assert selftest.nano("float32").status == "ok"
    monkeypatch.setattr(selftest, "nano_means", lambda dtype: means + 5)
    found = selftest.nano("float32")
    assert found.status == "fail" and "differs by at most 5.0" in found.said
    monkeypatch.setattr(selftest, "_nano_weights", lambda: "others")
    assert "--store-reference" in selftest.nano("float32").advice


RATES = {
    "matmul": {"bf16": 8.0, "f16": 10.0, "f32": 7.9, "q8": 7.8},
    "attention": {"bf16": 6.0, "f16": 7.0, "f32": 5.0},
}


@pytest.fixture
def quick(monkeypatch):
    """A doctor that looks at nothing that takes time; returns what sets its findings."""

    def with_checks(*checks):
        monkeypatch.setattr(selftest, "all_checks", lambda: iter(checks))

    monkeypatch.setattr(selftest, "videos", lambda: Check("videos", "ok", "writes"))
    monkeypatch.setattr(choose, "available_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(speed, "measure_rates", lambda *_, **__: speed.Rates(10e12, 20e12, 5e12))
    monkeypatch.setattr(measure, "rates", lambda: RATES)
    monkeypatch.setattr(measure, "checks", lambda slower: iter(()))

    return with_checks


def test_rates_do_not_wait_for_videos(quick, capsys, monkeypatch):
    quick(Check("one", "ok", "fine"))
    monkeypatch.setattr(selftest, "videos", lambda: Check("videos", "fail", "is missing", "install it"))
    assert doctor.main([]) == 1
    assert re.search("denoise: 10 TFLOP/s.*1 of 2 checks failed: videos. First: install it",
                     capsys.readouterr().out, re.DOTALL)  # fmt: skip


def test_verdict_and_exit_code(quick, capsys, monkeypatch):
    quick(Check("one", "ok", "fine"), Check("two", "warn", "so so", "be patient"))
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ok   one: fine$", said, re.MULTILINE) and "WARN two: so so\n     be patient" in said
    assert "All is well (two: see above)" in said
    assert wan_mlx.__version__ in said and mx.__version__ in said
    assert all(f"{package} " in said for package in ("mlx", "mlx-lm", "numpy", "huggingface-hub", "pillow"))
    assert "denoise: 10 TFLOP/s" in said and "matmul q8: 7.8 TFLOP/s" in said and "decode: 5 TFLOP/s" in said
    # 100 * (85.2 / 10 + 197.8 / 20) s, and the texts and the decode
    assert re.search(r"makes t2v-1.3B 832x480, 81 frames, 50 steps: 3\d min \d+ s, \d.\d GiB, resident\n", said)
    assert len(re.findall("makes ", said)) == sum(bool(preset.repo) for preset in PRESETS.values())
    assert "makes t2v-14B 1280x720" in said
    monkeypatch.setattr(choose, "available_memory", lambda: 10**9)
    monkeypatch.setattr(measure, "PRESETS", {"t2v-1.3B": PRESETS["t2v-1.3B"]})  # to say what would fit takes long
    assert doctor.main([]) == 0
    assert "81 frames, 50 steps: does not fit; what would: --frames 1\n" in capsys.readouterr().out
    quick(Check("one", "fail", "broken", "mend it"), Check("two", "ok", "fine"))
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "1 of 3 checks failed: one. First: mend it" and found["tflops"] == {}
    assert found["checks"][0] == {"name": "one", "status": "fail", "said": "broken", "advice": "mend it"}


def test_the_block_to_share_has_no_names_and_no_paths(quick, capsys, monkeypatch):
    home = str(Path.home())
    quick(Check("disk for models", "warn", f"9 GB free for {home}/x", f"set HF_HOME, {socket.gethostname()}"))
    assert doctor.main(["--share"]) == 0
    said = capsys.readouterr().out
    shared = said[said.index(doctor.BEGIN) : said.index(doctor.END)]
    for private in (home, "~", socket.gethostname(), getpass.getuser() + "/", sys.executable, "free for"):
        assert private not in shared
    assert "warn: 1 (disk for models)\nfail: 0\n" in shared and "matmul bf16 8, matmul f16 10" in shared
    assert f"\nmemory: {selftest.installed_memory() / 1e9:.1f} GB\n" in shared and "makes t2v-14B" in shared


def test_advice_follows_from_the_rates():
    said = " ".join(measure.advice(RATES))
    assert "q8 costs no time here" in said and "float16 multiplies 25 % faster" in said and "float32 is about" in said
    said = " ".join(measure.advice({"matmul": {"bf16": 40.0, "f16": 41.0, "f32": 12.0, "q8": 20.0}}))
    assert said == "q8 takes 100% longer, and halves the memory for weights"


@pytest.mark.parametrize("seconds, status", [(0.4, "ok"), (0.6, "warn"), (3.1, "fail")])
def test_a_long_dispatch_is_told(seconds, status):
    assert measure.judge_dispatch("product", seconds).status == status


@pytest.mark.parametrize("kind", ["product", "feed-forward", "attention", "convolution", "norm"])
def test_real_dispatches_are_timed_as_runs_cut_them(monkeypatch, kind):
    """At small sizes, in pieces of 300 tokens."""
    small = replace(measure.BIG, dim=32, ffn_dim=64, num_heads=2)
    monkeypatch.setattr(measure, "BIG", small)
    monkeypatch.setattr(measure, "TOKENS_720P", 1000)
    monkeypatch.setattr(chips, "dispatch_flop", lambda: 2.0 * 32 * 32 * 300)
    monkeypatch.setattr(measure, "random_array", lambda shape, *rest: shapes.append(shape) or mx.zeros(shape[-2:]))
    shapes = []
    if kind in ("product", "feed-forward"):
        monkeypatch.setattr(measure, "second", lambda run: 0.25)
        assert measure.dispatches()[kind]() == 0.25
        assert shapes[-1] == (1, {"product": 250, "feed-forward": 143}[kind], 32)
    monkeypatch.setattr(measure, "random_array", lambda shape, *rest: mx.zeros([min(n, 64) for n in shape]))
    assert measure.dispatches()[kind]() > 0


def test_a_decode_within_its_plan_is_well(monkeypatch):
    config = VAEConfig(dim=8, z_dim=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    for planned, status in ((10**9, "ok"), (10**5, "warn")):
        monkeypatch.setattr(peaks, "vae", lambda *args, planned=planned, **kwargs: planned)
        assert measure.decode_peak(config, (2, 4, 4)).status == status


SETTINGS = """ SleepDisabled\t\t0
 lowpowermode         {low}
 sleep                {sleep} (sleep prevented by powerd)
 displaysleep         10
"""


@pytest.fixture
def mac(monkeypatch):
    """``mac(...)``: this is a Mac of that kind, as far as doctor can see; returns its checks by name."""
    importlib.import_module("huggingface_hub.hf_api")  # it asks for the platform when it is imported

    def found(translated="0", version="15.1", wheel="macosx_14_0_arm64", gpu="applegpu_g14s", tf32="0", low=0, sleep=1,
              percent=None, machine="arm64"):  # fmt: skip
        said = {"sysctl": f"{translated}\n", "pmset": SETTINGS.format(low=low, sleep=sleep)}
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(macos, "macos_version", lambda: version)
        monkeypatch.setattr(macos, "answer", lambda *command: said[command[0]])
        monkeypatch.setattr(macos, "wheel_tag", lambda: wheel)
        monkeypatch.setattr(macos, "can_stay_awake", lambda: True)
        monkeypatch.setattr(macos, "battery", lambda: percent)
        monkeypatch.setattr(mx, "device_info", lambda *_: {"architecture": gpu})
        monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
        return {check.name: check for check in macos.checks()}

    return found


def test_the_version_of_macos_is_the_systems(monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda: ("16.2", ("", "", ""), "arm64"))
    monkeypatch.setattr(selftest, "answer", lambda *command: {"sw_vers": "26.2\n"}[command[0]])
    assert selftest.macos_version() == "26.2" and macos.version() == (26, 2)
    monkeypatch.setattr(selftest, "answer", lambda *command: "")
    assert macos.version() == (16, 2)


def test_elsewhere_no_mac_is_looked_for(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert list(macos.checks()) == []


def test_a_mac_that_is_well(mac):
    checks = mac()
    assert {check.status for check in checks.values()} == {"ok"}
    assert list(checks) == ["Apple silicon", "macOS", "float32", "sleep"]
    assert checks["sleep"].said == "after 1 idle minutes, but not during a run"
    checks = mac(gpu="applegpu_g17s", wheel="macosx_26_0_arm64", version="26.2", sleep=0)
    assert {check.status for check in checks.values()} == {"ok"} and "neural accelerators" in checks
    assert checks["sleep"].said == "never when idle"


@pytest.mark.parametrize(
    "name, status, says, given",
    [
        ("Apple silicon", "fail", "Rosetta", {"translated": "1"}),
        ("Apple silicon", "fail", "Rosetta", {"machine": "x86_64"}),
        ("macOS", "fail", "macOS 14", {"version": "13.6"}),
        ("neural accelerators", "warn", "wheel is for macosx_14_0_arm64", {"gpu": "applegpu_g17g", "version": "26.2"}),
        ("neural accelerators", "warn", "macOS is 26.1",
         {"gpu": "applegpu_g17d", "version": "26.1", "wheel": "macosx_26_0_arm64"}),
        ("float32", "warn", "unset MLX_ENABLE_TF32", {"tf32": "1"}),
        ("float32", "warn", "unset MLX_ENABLE_TF32", {"tf32": "2"}),
        ("sleep", "warn", "Low Power Mode", {"low": 1}),
        ("sleep", "warn", "Low Power Mode", {"low": "0\n powermode 1"}),
        ("sleep", "warn", "on its battery, 40% full", {"percent": 40}),
    ],
)  # fmt: skip
def test_a_mac_that_is_not(mac, name, status, says, given):
    checks = mac(**given)
    check = checks.pop(name)
    assert check.status == status and says in f"{check.said} {check.advice}"
    assert {other.status for other in checks.values()} == {"ok"}


@pytest.mark.parametrize(
    "name, says",
    [
        ("Apple M1", "at most 0.57 TFLOP, 0.25 s at 2.27 TFLOP/s, published for Apple M1; .* 10800 tokens at once"),
        ("Apple M2 Max", "at most 2.7 TFLOP, 0.25 s at 10.7 TFLOP/s, published for Apple M2 Max; .* 37800 tokens"),
        ("Apple M4 Max", "at most 3.4 TFLOP, 0.25 s at 13.8 TFLOP/s, published for Apple M4 Max; .* 37800 tokens"),
        ("Apple M5", "at most 0.81 TFLOP, 0.25 s at 3.23 TFLOP/s, published for Apple M5; .* 15120 tokens"),
    ],
)
def test_limits_of_a_mac(monkeypatch, name, says):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": name})
    chips.measured.cache_clear()
    assert re.search(says, measure.limits()), measure.limits()
    chips.keep_measured({"matmul": 20.0, "attention": 12.0}, [])
    assert measure.limits().startswith("at most 3 TFLOP, 0.25 s at 12 TFLOP/s, measured")
    chips.measured.cache_clear()


def test_rates_and_slow_kernels_are_kept_on_a_gpu(monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda: RATES)
    monkeypatch.setattr(measure, "network_rates", lambda: {"decode": 1.0})
    monkeypatch.setattr(measure, "checks", lambda slower: slower.append("gelu_tanh 8960 bfloat16") or [])
    monkeypatch.setattr(peaks, "on_cpu", lambda: True)
    chips.measured.cache_clear()
    measure.all_rates(list)
    assert chips.measured()["tflops"] == {}  # a CPU's are of no use
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    tflops, _ = measure.all_rates(list)
    kept = chips.measured()
    assert kept["tflops"] == {"matmul": 7.9, "attention": 5.0}  # of the slowest dtype: float32
    assert kept["slower"] == {"gelu_tanh 8960 bfloat16"}
    assert tflops["matmul q8"] == 7.8 and tflops["decode"] == 1.0
    chips.measured.cache_clear()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_home_is_not_shown(quick, capsys, monkeypatch, arguments):
    home = str(Path(wan_mlx.__file__).parent.parent)
    monkeypatch.setenv("HOME", home)
    quick(Check("one", "ok", f"in {home}/models"))
    assert doctor.main(arguments) == 0
    said = capsys.readouterr().out
    assert home not in said and "in ~/models" in said and "in ~/wan_mlx" in said


def test_surroundings(monkeypatch):
    found = {check.name: check for check in selftest.surroundings()}
    assert found["MLX's version"].status == "ok" and {"a GPU", "memory", "disk for models"} < set(found)
    monkeypatch.setattr(selftest, "OLDEST_MLX", (99, 0, 0))
    assert next(selftest.surroundings()).status == "fail"
    assert selftest.videos().status == "ok"


@pytest.mark.parametrize("words", [["doctor", "--foo"], ["doctor", "x"], ["models", "--foo"]])
def test_a_wrong_flag_is_one_line(capsys, words):
    assert main(words) == 2
    assert re.fullmatch(f"error: unknown argument {words[1]}(; nearest: -.*)?\n", capsys.readouterr().err)


@pytest.mark.slow
def test_this_machine_is_healthy():
    done = subprocess.run([sys.executable, "-m", "wan_mlx.doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(rate > 0 for rate in json.loads(done.stdout)["tflops"].values())


@pytest.mark.parametrize(
    "name, memory, gpu, says",
    [
        ("Apple M1", 16, "applegpu_g13g", ["0.4 TFLOP, 0.25 s at 1.59 TFLOP/s, measured; .* 7560 tokens at once",
                                           "float16 multiplies 25 %", "t2v-1.3B .*: 4 h 57 min, .* resident"]),
        ("Apple M2 Max", 64, "applegpu_g14s", ["1.9 TFLOP, 0.25 s at 7.52 TFLOP/s, measured; .* 25200 tokens at once",
                                               "float16 multiplies 25 %", "t2v-14B .*: 23 h 54 min, .* resident"]),
        ("Apple M4 Max", 36, "applegpu_g16s", ["2.4 TFLOP, 0.25 s at 9.63 TFLOP/s, measured; .* 37800 tokens at once",
                                               "q8 costs no time", "t2v-14B .*: 18 h 39 min, .* streamed"]),
        ("Apple M5", 24, "applegpu_g17g", ["0.57 TFLOP, 0.25 s at 2.26 TFLOP/s, measured; .* 9450 tokens at once",
                                           "WARN neural accelerators", "t2v-14B .*: 3 days, .* streamed"]),
    ],
)  # fmt: skip
def test_doctor_on_a_faked_mac(quick, mac, monkeypatch, capsys, name, memory, gpu, says):
    """At seven tenths of the published rate, and the usual share of memory; float16 is faster on M1 and M2."""
    mac(gpu=gpu, version="26.1", wheel="macosx_14_0_arm64")
    share = 0.75 if memory > 36 else 2 / 3
    about = {"device_name": name, "architecture": gpu, "max_recommended_working_set_size": int(share * memory * 2**30)}
    rate = 0.7 * chips.published_rate(name)
    half = 1.25 if gpu < "applegpu_g15" else 1.02
    rates = {"bf16": rate / 1e12, "f16": half * rate / 1e12, "f32": rate / 1e12, "q8": 0.98 * rate / 1e12}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: about)
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    monkeypatch.setattr(peaks, "has_fused_kernel", lambda *_: True)
    monkeypatch.setattr(choose, "available_memory", lambda: int(0.95 * about["max_recommended_working_set_size"]))
    monkeypatch.setattr(measure, "rates", lambda: {"matmul": rates, "attention": rates})
    monkeypatch.setattr(speed, "measure_rates", lambda *_, **__: speed.Rates(rate, rate, 0.6 * rate))
    chips.measured.cache_clear()
    quick(Check("a GPU", "ok", "in use"))
    assert doctor.main(["--share"]) == 0
    said = capsys.readouterr().out
    print(said[said.index("ok   Apple silicon") : said.index("Add a line")])
    assert all(re.search(words, said) for words in says)
    assert "makes i2v-14B-480P" in said and f"chip: {name}\n" in said
    chips.measured.cache_clear()


def test_without_mlx_the_line_says_which_python_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(ImportError, match=re.escape(f"backend is missing: {install_command('mlx[cpu]')}; or, ")):
        wan_mlx.check_backend()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ImportError, match=f"under Rosetta .this one is for {platform.machine()}.; then: .* mlx$"):
        wan_mlx.check_backend()
