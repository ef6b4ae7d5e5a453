"""The kernels' own text, for Metal and for CUDA, compiled as C++ with a thread for each lane: they give what MLX gives.

What stands in for a GPU is the adding among lanes, the languages' names, and float32 as the only dtype.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.cli import selftest
from wan_mlx.models import kernels, rope

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
#define __expf(x) exp(x)
#define __fdividef(x, y) ((x) / (y))
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
namespace fast { static float exp(float x) { return std::exp(x); } }
}
""",
}
# Threads stand for the lanes: each goes through all rows.
RUN = """
extern "C" void run(int rows, {parameters}) {{
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 32; lane++) lanes.emplace_back([=] {{
    this_lane = lane;
    for (int row = 0; row < rows; row++) {{ set_place(32 * row + lane); kernel({arguments}); }}
  }});
  for (auto& lane : lanes) lane.join();
}}
"""


class Emulated:
    """What takes the place of `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`."""

    compiled: dict[str, ctypes.CDLL] = {}

    def __init__(self, language, folder, name, input_names, output_names, source, header):
        self.language, self.folder = language, folder
        self.inputs, self.outputs, self.source, self.header = input_names, output_names, source, header

    def library(self, constants: dict[str, int]) -> ctypes.CDLL:
        parameters = [f"const float* {n}, const int* {n}_shape" for n in self.inputs]
        parameters = ", ".join(parameters + [f"float* {n}" for n in self.outputs])
        arguments = ", ".join([f"{n}, {n}_shape" for n in self.inputs] + list(self.outputs))
        fixed = "".join(f"constexpr int {n} = {v};\n" for n, v in constants.items())
        text = f"{LANGUAGE[self.language]}{self.header}"
        text += f"static void kernel({parameters}) {{ using T = float;\n{fixed}{self.source}\n}}"
        text += RUN.format(parameters=parameters, arguments=arguments)
        if text not in self.compiled:
            source, library = (self.folder / f"{len(self.compiled)}.{kind}" for kind in ("cpp", "so"))
            source.write_text(text)
            compile_cpp("-shared", "-include", self.folder / "lanes.hpp", source, "-o", library)
            self.compiled[text] = ctypes.CDLL(str(library))
        return self.compiled[text]

    def __call__(self, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        constants = {name: value for name, value in template if name != "T"}
        arrays = [np.array(a.astype(mx.float32)) for a in inputs]
        shapes = [np.array(a.shape, dtype=np.int32) for a in arrays]
        rows = int(np.prod(output_shapes[0][:-1]))
        # One row more than there are, as the last group of threads has: it must not be touched.
        results = [np.full((rows + 1, output_shapes[0][-1]), np.nan, dtype=np.float32) for _ in self.outputs]
        pairs = [a for array, shape in zip(arrays, shapes, strict=True) for a in (array, shape)]
        assert 32 * rows <= grid[0] < 32 * rows + threadgroup[0] and grid[0] % threadgroup[0] == 0
        self.library(constants).run(rows + 1, *[a.ctypes.data_as(ctypes.c_void_p) for a in (*pairs, *results)])
        assert all(np.isnan(result[rows]).all() for result in results)
        return [mx.array(r[:rows].reshape(output_shapes[0])).astype(output_dtypes[0]) for r in results]


def compile_cpp(*arguments: str | Path) -> None:
    subprocess.run(["g++", "-std=c++20", "-w", "-fPIC", "-pthread", *arguments], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where kernels are compiled; beside them the lanes, compiled once for all, since most of the time goes there."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "lanes.hpp").write_text(LANES)
    compile_cpp("-x", "c++-header", folder / "lanes.hpp", "-o", folder / "lanes.hpp.gch")
    return folder


@pytest.fixture(params=["cuda", "metal"])
def on_gpu(request, folder, monkeypatch):
    """The kernels are used as on a GPU with this language."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: request.param == "metal")
    name = f"{request.param}_kernel"
    monkeypatch.setattr(mx.fast, name, lambda **kwargs: Emulated(request.param, folder, **kwargs))
    caches = kernels.agrees, kernels._made
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("channels", [384, 640])
def test_agree_with_operations(on_gpu, caplog, kernel, channels):
    assert kernels.agrees(kernel, mx.float32, channels)
    assert not caplog.records


def test_parts_that_are_not_put_together(on_gpu, caplog):
    assert kernels.agrees(kernels.gated_add, mx.float32, 384, parts=3)
    assert not caplog.records


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_wrong_kernel_is_not_used(on_gpu, monkeypatch, caplog, kernel):
    right = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda *a, **k: [result + 1e-3 for result in right(*a, **k)])
    assert not kernels.agrees(kernel, mx.float32, 384)
    assert f"{kernel.__name__} for 384 channels of mlx.core.float32 is off by 0.001" in caplog.text


def test_a_kernel_that_does_not_compile_is_not_used(on_gpu, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("[metal::Device] Unable to build metal library")

    monkeypatch.setattr(kernels, "_run", fails)
    assert not kernels.gelu_tanh.usable(normal(0, 1, 2, 96))
    assert "does not run here ([metal::Device] Unable to build metal library)" in caplog.text


def test_can_be_turned_off(on_gpu, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not kernels.gelu_tanh.usable(normal(0, 1, 2, 96))


def test_used_on_a_gpu_only():
    assert not kernels.gelu_tanh.usable(normal(0, 1, 2, 96))


def test_kernels_are_used_for_supported_arrays_only(on_gpu):
    x = normal(0, 2, 3, 96)
    vector, of_each_sample = normal(1, 96), normal(1, 2, 1, 96)
    assert kernels.modulated_norm.usable(x, vector, vector, 1e-6)
    assert not kernels.modulated_norm.usable(x, of_each_sample, of_each_sample, 1e-6)
    assert not kernels.gelu_tanh.usable(normal(0, 2, 3, 90))
    assert not kernels.gelu_tanh.usable(x.astype(mx.int32))
    assert not kernels.gated_add.usable(x, [x[:, :2], x[:, 2:]], vector)  # parts of two samples
    assert not kernels.norm_and_rotate.usable(x, vector, 8, rope.rope_table((3, 1, 1), 12), 1e-6)


@pytest.mark.parametrize("channels", [96, 160])
def test_layers_are_the_same_with_them(on_gpu, monkeypatch, channels):
    x, y = 3 * normal(0, 1, 5, channels) + 1, normal(1, 1, 5, channels)
    gate, scale, shift = (normal(seed, 1, 1, channels) for seed in (2, 3, 4))

    def results():
        yield kernels.modulated_norm(x, scale, shift, 1e-6)
        yield from kernels.add_and_norm(x, y, gate, scale, shift, 1e-6)
        yield kernels.gated_add(x, [y], gate)
        yield kernels.gated_add(x, [y[:, :2], y[:, 2:4], y[:, 4:]], gate)
        x2, y2 = (mx.repeat(array, 2, axis=0) for array in (x, y))
        yield kernels.gated_add(x2, [y2[:, :3], y2[:, 3:]], gate)
        yield kernels.gelu_tanh(4 * x)

    got = list(results())
    monkeypatch.setattr(kernels.Fused, "usable", lambda self, *arguments: False)
    for mine, wanted in zip(got, results(), strict=True):
        assert mine.shape == wanted.shape and mx.allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotation_is_the_same_with_them(on_gpu, monkeypatch, head_dim):
    heads, grid = 2, (2, 1, 3)
    x, weight, table = normal(0, 2, 6, heads * head_dim), normal(1, heads * head_dim), rope.rope_table(grid, head_dim)
    got = kernels.norm_and_rotate(x, weight, heads, table, 1e-6)
    monkeypatch.setattr(kernels.Fused, "usable", lambda self, *arguments: False)
    assert mx.allclose(got, kernels.norm_and_rotate(x, weight, heads, table, 1e-6), rtol=1e-5, atol=1e-5)


def test_doctor_reports_kernels(on_gpu, monkeypatch):
    assert [check.status for check in selftest.fused_kernels()] == ["ok", "ok"]
    kernels.agrees.cache_clear()
    right = kernels.modulated_norm.kernel
    monkeypatch.setattr(kernels.modulated_norm, "kernel", lambda *arguments: right(*arguments) + 1)
    bad = list(selftest.fused_kernels())
    assert {check.status for check in bad} == {"warn"} and bad[0].said.startswith("modulated_norm: not right here")
    monkeypatch.setenv(kernels.SWITCH, "0")
    (check,) = selftest.fused_kernels()
    assert check.said == "turned off"
