"""What makes the tests quick is used, and the products have the bits of the BLAS that MLX brings."""

import ctypes
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import quick

has_products = pytest.mark.skipif(quick.PRODUCTS is None, reason="for the x86 package of MLX, with gcc")
FLOATS = ctypes.POINTER(ctypes.c_float)


def multiplied(library, a, b, c, turned: tuple[bool, bool], alpha: float, beta: float) -> np.ndarray:
    """alpha * a @ b + beta * c; ``turned``: whether a and b are stored transposed."""
    stored = [np.ascontiguousarray(x.T if turn else x) for x, turn in zip((a, b), turned, strict=True)]
    stored.append(c.copy())
    a_, b_, c_ = ((x.ctypes.data_as(FLOATS), x.shape[1]) for x in stored)
    orders = [112 if turn else 111 for turn in turned]
    scales = ctypes.c_float(alpha), ctypes.c_float(beta)
    library.cblas_sgemm(101, *orders, *c.shape, a.shape[1], scales[0], *a_, *b_, scales[1], *c_)
    return stored[-1]


@has_products
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 17), (4, 16, 64), (37, 50, 33), (65, 17, 300)])
def test_same_bits_as_the_reference(turned, shape):
    rows, columns, inner = shape
    rng, reference = np.random.default_rng(0), ctypes.CDLL(str(quick.reference_blas(quick.package())))
    a, b, c = (rng.normal(size=size).astype(np.float32) for size in ((rows, inner), (inner, columns), (rows, columns)))
    for alpha, beta in ((1, 0), (1, 1), (0.7, 0.3)):
        got, want = (multiplied(library, a, b, c, turned, alpha, beta) for library in (quick.PRODUCTS, reference))
        assert np.array_equal(got, want) and not np.array_equal(got, c)


USED = """
import ctypes
import mlx.core as mx
x = mx.ones((8, 8))
mx.eval(mx.matmul(x, 2 * x, stream=mx.cpu))
assert ctypes.c_long.in_dll(library, "calls").value > 0
"""


@has_products
def test_mlx_makes_its_products_of_them():
    exec(USED, {"library": quick.PRODUCTS})


@has_products
def test_and_in_processes_that_tests_start():
    code = f"import ctypes\nlibrary = ctypes.CDLL(None){USED}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(quick.READY is None, reason="where MLX compiles kernels with g++")
def test_kernels_include_what_is_compiled_already():
    """Where MLX writes them, with the flags that it gives."""
    mx.eval(mx.compile(lambda x: mx.exp(x) + 1)(mx.ones(3)))
    folder = quick.READY.parents[quick.PREAMBLE.count("/")]
    assert list(folder.glob("*.cpp"))
    flags = "-std=c++17 -O3 -Wall -fPIC -shared -fsyntax-only -H -x c++ -".split()
    command = ["g++", *flags, "-I", quick.package() / "include"]
    done = subprocess.run(command, input=f'#include "{quick.PREAMBLE}"', cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith(f"! {quick.PREAMBLE}.gch"), done.stderr
