"""The kernels' own text, for Metal and for CUDA, compiled as C++ with a thread for each lane: they give what MLX gives.

What stands in for a GPU is the adding among lanes, the languages' names, and float32 as the only dtype.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx import doctor, kernels, layers, rope
from wan_mlx.vae import RMSNorm

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

LANES = r"""
#include <barrier>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>
using std::exp;
static float slots[32];
static std::barrier<> meet(32);
thread_local int this_lane;
static float other_lane(float value, int step) {
  slots[this_lane] = value; meet.arrive_and_wait();
  float other = slots[this_lane ^ step]; meet.arrive_and_wait();
  return other;
}
static float rsqrt(float x) { return 1 / std::sqrt(x); }
struct Place { unsigned x; };
"""
LANGUAGE = {
    "cuda": """
#define __device__
#define __shfl_xor_sync(mask, value, step) other_lane(value, step)
thread_local Place blockIdx, blockDim, threadIdx;
static void set_place(int thread) { blockIdx.x = thread / 64; blockDim.x = 64; threadIdx.x = thread % 64; }
""",
    "metal": """
#define device
using uint = unsigned;
thread_local Place thread_position_in_grid;
static void set_place(int thread) { thread_position_in_grid.x = thread; }
namespace metal {
static float simd_sum(float v) { for (int step = 1; step < 32; step *= 2) v += other_lane(v, step); return v; }
}
""",
}


@pytest.fixture(scope="module", params=["cuda", "metal"])
def emulated(request, tmp_path_factory):
    """What takes `kernels._run`'s place: it compiles the text of one language and runs it."""
    language, folder, compiled = request.param, tmp_path_factory.mktemp("kernels"), {}

    def compile_text(name, steps, eps, inputs, outputs, constants):
        parameters = [f"const float* {n}, const int* {n}_shape" for n in inputs] + [f"float* {n}" for n in outputs]
        arguments = ", ".join([f"{n}, {n}_shape" for n in inputs] + list(outputs))
        parameters = ", ".join(parameters)
        common = (kernels.METAL if language == "metal" else kernels.CUDA) + kernels.FOUR
        fixed = "".join(f"constexpr int {n} = {v};\n" for n, v in constants.items())
        body = kernels.THREAD[language] + kernels.ROW + steps.replace("EPS", f"{eps!r}f")
        run = f"""
extern "C" void run(int rows, {parameters}) {{
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 32; lane++) lanes.emplace_back([=] {{
    this_lane = lane;
    for (int row = 0; row < rows; row++) {{ set_place(32 * row + lane); kernel({arguments}); }}
  }});
  for (auto& lane : lanes) lane.join();
}}"""
        text = f"{LANES}{LANGUAGE[language]}{common}"
        text += f"static void kernel({parameters}) {{ using T = float;\n{fixed}{body}\n}}"
        source, library = folder / f"{len(compiled)}.cpp", folder / f"{len(compiled)}.so"
        source.write_text(text + run)
        command = ["g++", "-std=c++20", "-w", "-shared", "-fPIC", "-pthread", source, "-o", library]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))

    def run(name, steps, eps, inputs, outputs=("out",), **constants):
        channels = inputs["x"].shape[-1]
        key = (name, steps, eps, channels, *constants.items())
        if key not in compiled:
            names = {"C": channels, **{n: int(v) for n, v in constants.items()}}
            compiled[key] = compile_text(name, steps, eps, list(inputs), outputs, names)
        arrays = {n: np.array(a.astype(mx.float32)) for n, a in inputs.items()}
        arrays["x"] = arrays["x"].reshape(-1, channels)
        shapes = [np.array(a.shape, dtype=np.int32) for a in arrays.values()]
        rows = len(arrays["x"])
        results = [np.full((rows + 1, channels), np.nan, dtype=np.float32) for _ in outputs]
        pairs = [a for array, shape in zip(arrays.values(), shapes, strict=True) for a in (array, shape)]
        # One row more than there are, as the last group of threads has: it must not be touched.
        compiled[key].run(rows + 1, *[a.ctypes.data_as(ctypes.c_void_p) for a in (*pairs, *results)])
        assert all(np.isnan(result[rows]).all() for result in results)
        return [mx.array(result[:rows].reshape(inputs["x"].shape)).astype(inputs["x"].dtype) for result in results]

    return run


@pytest.fixture
def on_gpu(emulated, monkeypatch):
    """The kernels are used as on a GPU."""
    monkeypatch.setattr(kernels, "_run", emulated)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    kernels.agree.cache_clear()
    yield
    kernels.agree.cache_clear()


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_agree_with_operations(on_gpu, caplog):
    assert kernels.agree(mx.float32)
    assert not caplog.records


@pytest.mark.parametrize("text", ["RMS_NORM", "ROTATE", "LAYER_NORM", "READ_SUM"])
def test_a_wrong_kernel_is_not_used(on_gpu, emulated, monkeypatch, caplog, text):
    wrong = getattr(kernels, text)

    def off_by_a_little(name, steps, *args, **kwargs):
        results = emulated(name, steps, *args, **kwargs)
        return [result + 1e-3 for result in results] if wrong in steps else results

    monkeypatch.setattr(kernels, "_run", off_by_a_little)
    assert not kernels.agree(mx.float32)
    assert "are wrong" in caplog.text


def test_a_kernel_that_does_not_compile_is_not_used(on_gpu, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("[metal::Device] Unable to build metal library")

    monkeypatch.setattr(kernels, "_run", fails)
    assert not kernels.agree(mx.float32)
    assert "do not run here" in caplog.text
    assert not kernels.usable(normal(0, 1, 2, 96))


def test_can_be_turned_off(on_gpu, monkeypatch):
    monkeypatch.setenv("WAN_MLX_KERNELS", "0")
    assert not kernels.agree(mx.float32)


def test_used_on_a_gpu_only():
    assert not kernels.usable(normal(0, 1, 2, 96))


def test_used_for_what_they_can_take(on_gpu):
    x = normal(0, 2, 3, 96)
    assert kernels.usable(x, normal(1, 96))
    assert not kernels.usable(x, normal(1, 2, 1, 96))  # one vector for each sample
    assert not kernels.usable(normal(0, 2, 3, 90))
    assert not kernels.usable(x.astype(mx.int32))


@pytest.mark.parametrize("channels", [96, 160])
def test_layers_are_the_same_with_them(on_gpu, monkeypatch, channels):
    x, y = 3 * normal(0, 1, 5, channels) + 1, normal(1, 1, 5, channels)
    gate, scale, shift = (normal(seed, 1, 1, channels) for seed in (2, 3, 4))
    vae_norm = RMSNorm(channels)
    vae_norm.gamma = scale.flatten()

    def results():
        yield layers.rms_norm(x, scale.flatten(), 1e-6)
        yield layers.modulated_norm(x, scale, shift, 1e-6)
        yield layers.gated_add(x, y, gate)
        yield from layers.add_and_norm(x, y, gate, scale, shift, 1e-6)
        yield vae_norm(x)
        yield vae_norm(x, then_silu=True)
        yield vae_norm(mx.zeros_like(x))

    got = list(results())
    monkeypatch.setattr(kernels, "usable", lambda *arrays: False)
    for mine, wanted in zip(got, results(), strict=True):
        assert mx.allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotation_is_the_same_with_them(on_gpu, monkeypatch, head_dim):
    heads, grid = 2, (2, 1, 3)
    x, weight, table = normal(0, 2, 6, heads * head_dim), normal(1, heads * head_dim), rope.rope_table(grid, head_dim)
    got = rope.norm_and_rotate(x, weight, heads, table, 1e-6)
    monkeypatch.setattr(kernels, "usable", lambda *arrays: False)
    assert mx.allclose(got, rope.norm_and_rotate(x, weight, heads, table, 1e-6), rtol=1e-5, atol=1e-5)


def test_doctor_tells(on_gpu, monkeypatch):
    assert [check.status for check in doctor.fused_kernels()] == ["ok", "ok"]
    kernels.agree.cache_clear()
    monkeypatch.setattr(kernels, "_trials", lambda dtype: iter([("gated_add", mx.array([1.0]), mx.array([2.0]))]))
    assert {check.status for check in doctor.fused_kernels()} == {"warn"}
    monkeypatch.setenv(kernels.SWITCH, "0")
    (check,) = doctor.fused_kernels()
    assert check.said == "turned off"
