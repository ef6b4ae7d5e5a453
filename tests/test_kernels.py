"""The kernels' own text, for Metal and for CUDA, compiled as C++ with a thread for each lane: they give what MLX gives.

Metal's is wrapped as MLX wraps it, with its three dtypes as real types. What stands in for a GPU is the adding among
lanes, and the languages' names. Where a clang is installed (PyPI's ziglang has one), Metal's is also read by its front
end for OpenCL, whose pointers have address spaces as Metal's have.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.cli import measure
from wan_mlx.models import kernels, rope

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

# As MLX names them, and integers of their size.
TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
BITS = {mx.float32: mx.uint32, mx.float16: mx.uint16, mx.bfloat16: mx.uint16}
LANES = r"""
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
using std::exp;
using uint = unsigned;
using float16_t = _Float16;
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t wide; std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t wide = uint32_t(bits) << 16; float value; std::memcpy(&value, &wide, 4);
    return value;
  }
};
static float rsqrt(float x) { return 1 / std::sqrt(x); }
struct uint3 { uint x, y, z; };
float other_lane(float value, int step);
int on_lanes(int rows, void (*run)(const void*, uint thread), const void* given);
"""
# Threads stand for the lanes: each goes through all rows. 1 if some lane was not there when the others met.
THREADS = """
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
static float slots[32];
static std::unique_ptr<std::barrier<>> meet;
thread_local int this_lane, meetings;
float other_lane(float value, int step) {
  slots[this_lane] = value; meet->arrive_and_wait();
  float other = slots[this_lane ^ step]; meet->arrive_and_wait();
  meetings++;
  return other;
}
int on_lanes(int rows, void (*run)(const void*, unsigned), const void* given) {
  meet = std::make_unique<std::barrier<>>(32);
  std::vector<std::thread> lanes;
  static int met[32];
  for (int lane = 0; lane < 32; lane++) lanes.emplace_back([=] {
    this_lane = lane;
    for (int row = 0; row < rows; row++) run(given, 32 * row + lane);
    met[lane] = meetings;
    meet->arrive_and_drop();
  });
  for (auto& lane : lanes) lane.join();
  for (int lane = 1; lane < 32; lane++) if (met[lane] != met[0]) return 1;
  return 0;
}
"""
LANGUAGE = {
    "cuda": """
#define device
#define constant
#define __device__
#define __shfl_xor_sync(mask, value, step) other_lane(value, step)
#define __expf(x) exp(x)
#define __fdividef(x, y) ((x) / (y))
thread_local uint3 blockIdx, blockDim, threadIdx;
static uint3 place(uint thread) { blockIdx.x = thread / 64; blockDim.x = 64; threadIdx.x = thread % 64; return {}; }
""",
    "metal": """
#define device
#define constant
static uint3 place(uint thread) { return {thread, 0, 0}; }
namespace metal {
static float simd_sum(float v) { for (int step = 1; step < 32; step *= 2) v += other_lane(v, step); return v; }
namespace fast { static float exp(float x) { return std::exp(x); } }
}
""",
}
RUN = """
extern "C" int run(int rows, {parameters}) {{
  auto kernel = [=](uint thread) {{ {name}({arguments}place(thread)); }};
  using Kernel = decltype(kernel);
  return on_lanes(rows, [](const void* it, uint thread) {{ (*static_cast<const Kernel*>(it))(thread); }}, &kernel);
}}
"""


class Emulated:
    """What takes the place of `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`."""

    compiled: dict[str, ctypes.CDLL] = {}

    def __init__(self, language, folder, name, input_names, output_names, source, header):
        self.language, self.folder, self.name = language, folder, name
        self.inputs, self.outputs, self.source, self.header = input_names, output_names, source, header

    def wrapped(self, inputs: list[mx.array], template, output_dtypes) -> tuple[str, str]:
        """The kernel as MLX 0.32 wraps it for Metal (``metal_kernel.cpp``), and its name with the template's values."""
        values = [TYPES.get(value, value) for _, value in template]
        name = "_".join(["custom_kernel", self.name, *map(str, values)])
        lines = []
        for given, array in zip(self.inputs, inputs, strict=True):
            space = "constant" if array.size < 8 else "device"
            lines.append(f"const {space} {TYPES[array.dtype]}* {given} [[buffer({len(lines)})]]")
            if f"{given}_shape" in self.source:
                lines.append(f"const constant int* {given}_shape [[buffer({len(lines)})]]")
        for given, dtype in zip(self.outputs, output_dtypes, strict=True):
            lines.append(f"device {TYPES[dtype]}* {given} [[buffer({len(lines)})]]")
        assert len(lines) <= 31  # buffers that Metal has
        lines.append("uint3 thread_position_in_grid [[thread_position_in_grid]]")
        kinds = ", ".join(f"{'int' if isinstance(value, int) else 'typename'} {given}" for given, value in template)
        text = f"template <{kinds}>\n[[kernel]] void {name}(\n  " + ",\n  ".join(lines) + f") {{\n{self.source}\n}}\n"
        return text, f"{name}<{', '.join(map(str, values))}>"

    def library(self, inputs: list[mx.array], template, output_dtypes) -> ctypes.CDLL:
        text, name = self.wrapped(inputs, template, output_dtypes)
        parameters, arguments = [], []
        for given, array in zip(self.inputs, inputs, strict=True):
            parameters.append(f"const {TYPES[array.dtype]}* {given}, const int* {given}_shape")
            arguments += [given, f"{given}_shape"] if f"{given}_shape" in self.source else [given]
        parameters += [f"{TYPES[dtype]}* {given}" for given, dtype in zip(self.outputs, output_dtypes, strict=True)]
        arguments += self.outputs
        text = f"{LANGUAGE[self.language]}{self.header}{text}"
        text += RUN.format(name=name, parameters=", ".join(parameters), arguments=", ".join(arguments) + ", ")
        if text not in self.compiled:
            source, library = (self.folder / f"{len(self.compiled)}.{kind}" for kind in ("cpp", "so"))
            source.write_text(text)
            compile_cpp("-shared", "-include", self.folder / "lanes.hpp", source, "-o", library)
            self.compiled[text] = ctypes.CDLL(str(library))
        return self.compiled[text]

    def __call__(self, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        arrays = [np.array(mx.contiguous(a).view(BITS[a.dtype])) for a in inputs]
        shapes = [np.array(a.shape, dtype=np.int32) for a in arrays]
        rows = int(np.prod(output_shapes[0][:-1]))
        # One row more than there are, as the last group of threads has: it must not be touched. All bits set is NaN.
        size = output_dtypes[0].size
        results = [np.full((rows + 1, output_shapes[0][-1]), -1, f"i{size}").view(f"u{size}") for _ in self.outputs]
        pairs = [a for array, shape in zip(arrays, shapes, strict=True) for a in (array, shape)]
        assert 32 * rows <= grid[0] < 32 * rows + threadgroup[0] and grid[0] % threadgroup[0] == 0
        run = self.library(inputs, template, output_dtypes).run
        assert run(rows + 1, *[a.ctypes.data_as(ctypes.c_void_p) for a in (*pairs, *results)]) == 0
        assert all((~result[rows] == 0).all() for result in results)
        return [mx.array(r[:rows].reshape(output_shapes[0])).view(output_dtypes[0]) for r in results]


def compile_cpp(*arguments: str | Path) -> None:
    subprocess.run(["g++", "-std=c++20", "-w", "-fPIC", "-pthread", *arguments], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where kernels are compiled; beside them the lanes, compiled once for all, since most of the time goes there."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "lanes.hpp").write_text(LANES)
    (folder / "threads.cpp").write_text(THREADS)
    compile_cpp("-x", "c++-header", folder / "lanes.hpp", "-o", folder / "lanes.hpp.gch")
    compile_cpp("-shared", folder / "threads.cpp", "-o", folder / "threads.so")
    ctypes.CDLL(str(folder / "threads.so"), ctypes.RTLD_GLOBAL)
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


@pytest.mark.parametrize("on_gpu", ["metal"], indirect=True)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=TYPES.get)
@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.__name__)
def test_agree_in_sixteen_bits(on_gpu, caplog, kernel, dtype):
    """With rounding as on Metal; a wider one is in the parts of `gated_add`."""
    assert kernels.agrees(kernel, dtype, 384 if dtype == mx.float16 else 512)
    assert not caplog.records


# Address spaces are types here too; the names of Metal's own library, declared.
OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define thread __private
typedef unsigned int uint;
typedef unsigned long size_t;
typedef half float16_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
struct bfloat16_t {
  unsigned short bits;
  bfloat16_t() = default; explicit bfloat16_t(float); explicit operator float() const;
};
namespace metal { float simd_sum(float); float rsqrt(float); namespace fast { float exp(float); } }
using namespace metal;
"""


def clang() -> list[str]:
    """The command of a clang, or nothing."""
    if shutil.which("clang"):
        return ["clang"]
    return [sys.executable, "-m", "ziglang", "clang"] if importlib.util.find_spec("ziglang") else []


def as_metal_reads_them(monkeypatch, widths: tuple[int, ...]) -> str:
    """All kernels' texts, of all dtypes, instantiated."""
    texts, headers = {}, set()

    class Noted(Emulated):
        def __call__(self, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            text, name = self.wrapped(inputs, template, output_dtypes)
            texts[name] = f"{text}template decltype({name}) {name};\n"
            headers.add(self.header)
            raise RuntimeError("not run")

    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **kwargs: Noted("metal", None, **kwargs))
    for width in widths:
        for dtype in TYPES:
            for kernel in kernels.KERNELS:
                assert not kernels.agrees(kernel, dtype, width)
            assert not kernels.agrees(kernels.gated_add, dtype, width, parts=10)
    assert len(texts) > 10 * len(widths)
    return OPENCL + headers.pop() + "".join(texts.values())


def front_end(text: str, folder: Path) -> str:
    """What clang says of it."""
    (folder / "kernels.cl").write_text(text)
    flags = "-cc1 -triple spir64 -x clcpp -cl-std=clc++2021 -fsyntax-only"
    warnings = "-Wall -Wno-unknown-attributes -Wno-unused-variable"
    command = [*clang(), *flags.split(), *warnings.split(), folder / "kernels.cl"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr + "failed" * bool(done.returncode)


@pytest.mark.skipif(not clang(), reason="needs clang, or ziglang")
@pytest.mark.parametrize("on_gpu", ["metal"], indirect=True)
def test_address_spaces_are_right(on_gpu, monkeypatch, tmp_path):
    text = as_metal_reads_them(monkeypatch, (640, 1536, 5120))
    assert front_end(text, tmp_path) == ""
    assert "address space" in front_end(text.replace("DEVICE Four<T>*", "thread Four<T>*"), tmp_path)


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


@pytest.mark.parametrize("before", [None, "1"])
def test_turned_off_for_a_while(on_gpu, monkeypatch, before):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    if before:
        monkeypatch.setenv(kernels.SWITCH, before)
    assert kernels.gelu_tanh.usable(normal(0, 1, 2, 96))
    with kernels.turned_off():
        assert not kernels.gelu_tanh.usable(normal(0, 1, 2, 96))
    assert kernels.gelu_tanh.usable(normal(0, 1, 2, 96)) and os.environ.get(kernels.SWITCH) == before


def test_used_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
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
    monkeypatch.setattr(measure, "WIDTHS", {256: 512})
    monkeypatch.setattr(measure, "KERNEL_SECONDS", np.inf)
    monkeypatch.setattr(measure, "TRIALS", [(dtype, 256) for dtype in (mx.bfloat16, mx.float16, mx.float32)])
    monkeypatch.setattr(measure, "kernel_seconds", lambda fused, *_: 1.3 if fused is kernels.gelu_tanh else 1.1)
    right, slower = kernels.modulated_norm.kernel, []
    monkeypatch.setattr(kernels.modulated_norm, "kernel", lambda *arguments: right(*arguments) + 1)
    bad = list(measure.fused_kernels(slower))
    assert {check.status for check in bad} == {"warn"}
    said = "modulated_norm 256 {0} is not right here; gelu_tanh 512 {0} takes 1.3 times as long, at 256 channels"
    assert [check.said for check in bad] == [said.format(of) for of in ("bfloat16", "float16", "float32")]
    assert slower == ["gelu_tanh 512 bfloat16", "gelu_tanh 512 float16", "gelu_tanh 512 float32"]
    monkeypatch.setattr(kernels.modulated_norm, "kernel", right)
    monkeypatch.setattr(measure, "kernel_seconds", lambda *_: 1.1)
    kernels.agrees.cache_clear()
    assert [check.status for check in measure.fused_kernels([])] == ["ok", "ok", "ok"]
    monkeypatch.setenv(kernels.SWITCH, "0")
    (check,) = measure.fused_kernels([])
    assert check.said == "turned off"


def test_a_kernel_is_compiled_once_for_all_numbers_of_tokens(on_gpu):
    """On CUDA that takes seconds."""
    compiled = []
    for tokens in (4, 7, 9):
        x, y = normal(0, 1, tokens, 128), normal(1, 1, tokens, 128)
        for kernel in kernels.KERNELS:
            arguments = kernels.trial(kernel, mx.float32, 128, tokens, parts=1)
            mx.eval(kernel.kernel(*arguments))
        assert mx.allclose(kernels.gated_add.kernel(x, [y], mx.ones((128,))), x + y)
        compiled.append(len(Emulated.compiled))
    assert compiled[0] == compiled[1] == compiled[2]


def test_where_compiling_takes_long_the_first_are_tried_and_the_rest_is_named(monkeypatch):
    tried = []
    monkeypatch.setattr(measure, "KERNEL_SECONDS", np.inf)
    monkeypatch.setattr(measure, "kernel_faults", lambda dtype, width, slower: tried.append((dtype, width)) or [])
    whole = [check.said for check in measure.fused_kernels([])]
    assert len(tried) == 9 and len(whole) == 3
    assert all(said.endswith("at 1536 and 3072 and 5120 channels") for said in whole)
    tried.clear()
    monkeypatch.setattr(measure, "KERNEL_SECONDS", 0.0)
    first, rest = measure.fused_kernels([])
    assert tried == [(mx.bfloat16, 5120)] and first.said.endswith("operations, at 5120 channels")
    assert rest.said.startswith("not tried, since compiling takes long here: bfloat16 at 1536, float16 at 5120, float")


@pytest.mark.parametrize("free, repeats", [(1e12, 8), (4e7, 3), (0.0, 1)])
def test_timing_holds_few_results_where_memory_is_short(monkeypatch, free, repeats):
    kernel, held = kernels.modulated_norm, []
    monkeypatch.setattr(measure, "ROWS", 512)
    monkeypatch.setattr(measure, "available_memory", lambda: free)
    monkeypatch.setattr(kernel, "kernel", kernel.plain)
    monkeypatch.setattr(measure, "timed", lambda run: held.append(len(run())) or 1.0)
    assert measure.kernel_seconds(kernel, mx.float32, 128) == 1 and {*held} == {repeats}


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_kernel_is_timed_beside_the_operations(monkeypatch, kernel):
    times = []
    monkeypatch.setattr(measure, "ROWS", 16)
    monkeypatch.setattr(kernel, "kernel", lambda *arguments: times.append(1) or kernel.plain(*arguments))
    assert measure.kernel_seconds(kernel, mx.float32, 128) > 0 and len(times) == 6 * measure.REPEATS
