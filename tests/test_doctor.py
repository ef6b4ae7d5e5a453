"""The doctor passes a healthy machine, sees what MLX is known to have got wrong, and keeps paths to itself."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.cli import doctor, selftest
from wan_mlx.cli.main import main
from wan_mlx.cli.selftest import Check
from wan_mlx.planning import choose, speed


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_healthy_operations_pass(dtype):
    for found in (selftest.matmul(96, 64, dtype), selftest.attention(300, dtype)):
        error, allowed, fault = found
        assert error <= allowed and not fault
    error, allowed, fault = selftest.convolution(32, 12, 16)
    assert error <= allowed and not fault
    for bits, allowed in ((8, 0.01), (4, 0.12)):
        error, _, fault = selftest.quantised(bits, allowed)
        assert allowed / 3 < error <= allowed and not fault


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
    assert found.status == "fail" and "no such kernel" in found.said and "pip install -U mlx" in found.advice


def test_the_stored_frames_are_of_this_nano():
    """If it fails: python -m wan_mlx.doctor --store-reference"""
    with np.load(selftest.NANO_REFERENCE) as stored:
        assert str(stored["weights"]) == selftest._nano_weights()
        assert stored["means"].shape == (5, 16, 16, 3) and stored["means"].std() > 20
    assert selftest.NANO_REFERENCE.stat().st_size < 10_000


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


@pytest.fixture
def quick(monkeypatch):
    """A doctor that looks at nothing that takes time; returns what sets its findings."""

    def with_checks(*checks):
        monkeypatch.setattr(selftest, "all_checks", lambda: iter(checks))

    monkeypatch.setattr(choose, "available_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(speed, "measure_rates", lambda *_: speed.Rates(10e12, 20e12, 5e12))

    return with_checks


def test_verdict_and_exit_code(quick, capsys, monkeypatch):
    quick(Check("one", "ok", "fine"), Check("two", "warn", "so so", "be patient"))
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ok   one: fine$", said, re.MULTILINE) and "WARN two: so so\n     be patient" in said
    assert "All is well (two: see above)" in said and "in about 30.7 min" in said  # 100 * (85.2 / 10 + 197.8 / 20) s
    assert wan_mlx.__version__ in said and mx.__version__ in said
    assert all(f"{package} " in said for package in ("mlx", "mlx-lm", "numpy", "huggingface-hub", "pillow"))
    assert "denoise bfloat16: 15.4 TFLOP/s" in said and "denoise float32: 15.4" in said and "decode: 5 TFLOP/s" in said
    monkeypatch.setattr(choose, "available_memory", lambda: 10**9)
    assert doctor.main([]) == 0 and "T2V-1.3B does not fit into the free memory" in capsys.readouterr().out
    quick(Check("one", "fail", "broken", "mend it"), Check("two", "ok", "fine"))
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "1 of 2 checks failed: one. First: mend it"
    assert found["checks"][0] == {"name": "one", "status": "fail", "said": "broken", "advice": "mend it"}


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
    assert selftest.ffmpeg().status == "ok"


@pytest.mark.parametrize("words", [["doctor", "--foo"], ["doctor", "x"], ["models", "--foo"]])
def test_a_wrong_flag_is_one_line(capsys, words):
    assert main(words) == 2
    assert re.fullmatch(f"error: unknown argument {words[1]}; nearest: -.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_this_machine_is_healthy():
    done = subprocess.run([sys.executable, "-m", "wan_mlx.doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(rate > 0 for rate in json.loads(done.stdout)["tflops"].values())
