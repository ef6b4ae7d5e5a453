"""CUDA kernels compiled without MLX's headers: in a tenth of a second, not two for each kernel in every process.

`mx.fast.cuda_kernel` compiles what is written for it together with headers of MLX's and CUDA's that these kernels need
nothing of, and keeps the result for one process only. So here NVRTC, CUDA's compiler, which MLX runs on too, is called
for the kernel alone, and MLX is given what comes out.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

log = logging.getLogger(__name__)

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
TYPES = {
    mx.float32: "float",
    mx.float16: "float16",
    mx.bfloat16: "bfloat16",
    mx.uint8: "unsigned char",
    mx.int64: "long long",
}
# What those names stand for that C++ does not know.
DEFINITIONS = {
    mx.float16: """
struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ explicit float16(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
  __device__ operator float() const { float value; asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits)); return value; }
};
""",
    mx.bfloat16: """
struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ explicit bfloat16(float value) {
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    unsigned int whole = __float_as_uint(value);
    bits = value != value ? 0x7fff : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
#endif
  }
  __device__ operator float() const { return __uint_as_float((unsigned int)bits << 16); }
};
""",
}


@lru_cache
def library() -> ctypes.CDLL | None:
    """NVRTC, if it is here: where MLX computes on CUDA it is loaded already."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@dataclass(frozen=True)
class Kernel:
    """A kernel, with the fields of `mx.fast.cuda_kernel`, and to be called with what is called that returns."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""

    def __call__(
        self,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
    ) -> list[mx.array]:
        sizes = [len(array.shape) if f"{name}_shape" in self.source else 0
                 for name, array in zip(self.input_names, inputs, strict=True)]  # fmt: skip
        dtypes = tuple(array.dtype for array in inputs)
        launch = dict(inputs=inputs, output_shapes=output_shapes, output_dtypes=output_dtypes, grid=grid,
                      threadgroup=threadgroup)  # fmt: skip
        try:
            code = compiled(self, tuple(template), dtypes, tuple(output_dtypes), tuple(sizes), architecture())
        except RuntimeError as error:
            log.info("%s is compiled as MLX does it (%s)", self.name, error)
            return as_mlx_compiles(self)(**launch, template=list(template))
        shapes = [n for array, size in zip(inputs, sizes, strict=True) for n in array.shape[:size]]
        return mx.fast.precompiled_cuda_kernel(
            name=self.name, compiled_source=code, scalars=shapes, ensure_row_contiguous=True, **launch
        )

    def parameters(self, dtypes: Sequence[mx.Dtype], out_dtypes: Sequence[mx.Dtype], sizes: Sequence[int]) -> list[str]:
        """Inputs, outputs, and the numbers of the shapes that it reads, of so many axes of each input."""
        inputs = [f"const {TYPES[dtype]}* {name}" for dtype, name in zip(dtypes, self.input_names, strict=True)]
        outputs = [f"{TYPES[dtype]}* {name}" for dtype, name in zip(out_dtypes, self.output_names, strict=True)]
        shapes = zip(self.input_names, sizes, strict=True)
        return inputs + outputs + [f"int {name}_shape_{axis}" for name, size in shapes for axis in range(size)]

    def text(
        self, template: tuple, dtypes: Sequence[mx.Dtype], out_dtypes: Sequence[mx.Dtype], sizes: Sequence[int]
    ) -> str:
        """The whole of it in CUDA's language."""
        lines = [text for dtype, text in DEFINITIONS.items() if dtype in (*dtypes, *out_dtypes)]
        parameters = ", ".join(self.parameters(dtypes, out_dtypes, sizes))
        lines += [self.header, f'extern "C" __global__ void {self.name}({parameters}) {{']
        for name, value in template:
            is_type = isinstance(value, mx.Dtype)
            lines.append(f"using {name} = {TYPES[value]};" if is_type else f"constexpr int {name} = {value};")
        for name, size in zip(self.input_names, sizes, strict=True):
            numbers = ", ".join(f"{name}_shape_{axis}" for axis in range(size))
            lines += [f"const int {name}_shape[] = {{{numbers}}};"] if size else []
        return "\n".join([*lines, self.source, "}"])


@lru_cache(maxsize=32)
def as_mlx_compiles(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """The same from `mx.fast.cuda_kernel`."""
    return mx.fast.cuda_kernel(
        name=kernel.name, input_names=list(kernel.input_names), output_names=list(kernel.output_names),
        source=kernel.source, header=kernel.header,
    )  # fmt: skip


@lru_cache
def architecture() -> str:
    """Of the GPU, as NVRTC calls it; raises RuntimeError if it is not one of CUDA's."""
    info = mx.device_info()
    if "compute_capability_major" not in info:
        raise RuntimeError("no GPU of CUDA's")
    major, minor = info["compute_capability_major"], info["compute_capability_minor"]
    return f"sm_{major}{minor}{'a' if int(major) >= 9 else ''}"


@lru_cache(maxsize=64)
def compiled(kernel: Kernel, template: tuple, dtypes: tuple, out_dtypes: tuple, sizes: tuple, arch: str) -> bytes:
    """Machine code of a kernel for these types; raises RuntimeError with what NVRTC says if it has none."""
    nvrtc, program = library(), ctypes.c_void_p()
    if nvrtc is None:
        raise RuntimeError("NVRTC is not here")
    source = kernel.text(template, dtypes, out_dtypes, sizes).encode()
    _succeeds(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, kernel.name.encode(), 0, None, None))
    try:
        options = [f"--gpu-architecture={arch}".encode()]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            said = _taken(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(said.rstrip(b"\0").decode(errors="replace").strip())
        return _taken(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(size_of, get, program: ctypes.c_void_p) -> bytes:
    """What a pair of functions of NVRTC's gives: how much it is, and then it."""
    size = ctypes.c_size_t()
    _succeeds(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _succeeds(get(program, buffer))
    return buffer.raw


def _succeeds(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC failed ({code})")
