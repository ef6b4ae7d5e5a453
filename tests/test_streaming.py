"""A transformer whose blocks are read at every pass computes the same bits as one that is resident."""

import ctypes
import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import wan_mlx
from wan_mlx.caching import StepCache
from wan_mlx.cuda import read as cuda
from wan_mlx.errors import WeightsError
from wan_mlx.files.base import WeightsFile
from wan_mlx.guidance import Guidance, guided_velocity
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.planning import speed as timing
from wan_mlx.planning.sizes import weight_bytes
from wan_mlx.presets import BUNDLED
from wan_mlx.types import Conditioning
from wan_mlx.weights import prefetch as ahead
from wan_mlx.weights.component import open_component, parameter_shapes
from wan_mlx.weights.convert import convert
from wan_mlx.weights.load import load_transformer, transformer_parameters
from wan_mlx.weights.parameters import Parameters
from wan_mlx.weights.stream import StreamedBlocks

SIZES = dict(dim=256, ffn_dim=192, num_heads=2, num_layers=4, freq_dim=32, text_dim=64, image_dim=96)
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", **SIZES, in_dim=36),
    "flf2v": TransformerConfig("flf2v", **SIZES, in_dim=36),
    "vace": TransformerConfig("vace", **SIZES, vace_layers=(0, 2)),
}


def network(kind):
    return (VaceTransformer if kind == "vace" else Transformer)(CONFIGS[kind])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights of a kind of transformer, as ``weights_convert.py`` would write them."""
    folder, rng = tmp_path_factory.mktemp("streaming"), np.random.default_rng(0)

    def write(kind):
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            arrays = {
                name: mx.array(rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5)
                for name, shape in parameter_shapes(network(kind)).items()
            }
            mx.save_safetensors(str(path), arrays, {"layout": "mlx"})
        return path

    return write


def inputs(kind):
    def random(*shape):
        return mx.array(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))

    extra = {
        "i2v": lambda: dict(condition=random(1, 2, 4, 6, 20), image_features=random(1, 257, 96)),
        "flf2v": lambda: dict(condition=random(1, 2, 4, 6, 20), image_features=random(2, 257, 96)),
        "vace": lambda: dict(vace_context=random(1, 2, 4, 6, 96)),
    }
    return (random(1, 2, 4, 6, 16), 500.0, random(1, 512, 64)), extra.get(kind, dict)()


@pytest.mark.parametrize(
    "kind, dtype, quantize, skip_layers",
    [("t2v", "float32", None, ()), ("t2v", "bfloat16", "q4", ()), ("t2v", "float32", None, (1, 2)),
     ("i2v", "bfloat16", None, ()), ("flf2v", "float32", "q8", ()), ("vace", "bfloat16", None, ()),
     ("vace", "float32", "mxfp8", (0, 2))],
)  # fmt: skip
def test_streamed_equals_resident(file, kind, dtype, quantize, skip_layers):
    resident, streamed = (
        load_transformer(file(kind), dtype, quantize=quantize, stream=stream) for stream in (False, True)
    )
    args, kwargs = inputs(kind)
    want = resident(*args, **kwargs, skip_layers=skip_layers)
    for _ in range(2):
        assert mx.array_equal(streamed(*args, **kwargs, skip_layers=skip_layers), want)
    assert mx.isfinite(want).all() and want.std() > 0.01
    held = {name.split(".")[0] for name, _ in tree_flatten(streamed.model.parameters())}
    assert "head" in held and not held & {"blocks", "vace_blocks"}


def test_blocks_are_read_anew_at_every_pass_and_only_those_that_run(file, monkeypatch):
    asked = []
    new_block = VaceTransformer.new_block
    model = load_transformer(file("vace"), "float32", stream=True)
    model.blocks.make_block = lambda place: asked.append(place) or new_block(CONFIGS["vace"], place)
    args, kwargs = inputs("vace")
    order = ["blocks.0", "vace_blocks.0", "blocks.1", "blocks.2", "vace_blocks.1", "blocks.3"]
    mx.eval(model(*args, **kwargs))
    assert asked == order
    mx.eval(model(*args, **kwargs, skip_layers=(1, 2)))
    assert asked[6:] == [name for name in order if name not in ("blocks.1", "blocks.2")]


def test_the_next_block_is_being_read_while_one_computes(file, monkeypatch):
    model, events = load_transformer(file("t2v"), "float32", stream=True), []
    start, finish = Parameters.start, Parameters.finish
    monkeypatch.setattr(Parameters, "start", lambda self, *args: events.append("start") or start(self, *args))
    monkeypatch.setattr(Parameters, "finish", lambda self, *args: events.append("finish") or finish(self, *args))
    for _ in model.blocks(["blocks.0", "blocks.1", "blocks.2"]):
        events.append("computes")
    assert events == ["start", "finish", *["start", "computes", "finish"] * 2, "computes"]


def test_passes_that_run_at_once_take_turns(file, monkeypatch):
    """Both passes of guidance on the CPU: bits as resident, never more than one pass among the blocks."""
    inside, most = [], []
    call = StreamedBlocks.__call__

    def watched(self, places):
        for block in call(self, places):
            if threading.get_ident() not in inside:
                inside.append(threading.get_ident())
            most.append(len(inside))
            yield block
        inside.remove(threading.get_ident())

    monkeypatch.setattr(StreamedBlocks, "__call__", watched)
    (latents, timestep, context), _ = inputs("t2v")
    conditioning = Conditioning(latents, context, negative_context=mx.array(np.array(context) * 0.5))
    models = Execution(load_transformer(file("t2v"), "float32")), load_transformer(file("t2v"), "float32", stream=True)
    velocities = [
        guided_velocity(model, latents, timestep, conditioning, Guidance(3.0), 0, 1, StepCache(1)) for model in models
    ]
    assert mx.array_equal(*velocities) and len(most) == 2 * 4 and max(most) == 1


def test_missing_keys_of_a_block_are_reported_before_running(file, tmp_path):
    arrays = mx.load(str(file("t2v")))
    del arrays["blocks.3.ffn.0.bias"]
    mx.save_safetensors(str(tmp_path / "short.safetensors"), arrays, {"layout": "mlx"})
    with pytest.raises(WeightsError, match=r"lacks blocks\.3\.ffn\.0\.bias"):
        load_transformer(tmp_path / "short.safetensors", stream=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fewer_tokens_at_once_change_nothing(file, kind):
    args, kwargs = inputs(kind)
    model = load_transformer(file(kind), "float32")
    whole = model(*args, **kwargs)
    pieces = Execution(model, tokens_at_once=5)  # of 12: pieces of 5, 5 and 2
    np.testing.assert_allclose(pieces(*args, **kwargs), whole, rtol=0, atol=1e-5 * np.abs(np.array(whole)).max())


def test_a_dropped_streamed_model_frees_its_memory(file):
    """Not at some later time when Python looks for cycles: the VAE is loaded next."""
    model = load_transformer(file("vace"), "float32", stream=True)
    args, kwargs = inputs("vace")
    mx.eval(model(*args, **kwargs))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype, in_flight", [("bfloat16", None), ("bfloat16", 2**16), ("float32", None)])
def test_memory_of_reading_equals_the_prediction(file, monkeypatch, dtype, in_flight):
    """Two blocks, and what is cast or reordered on the way to them, so much of which may be in flight."""
    config = CONFIGS["t2v"]
    stored = {name: array.nbytes for name, array in mx.load(str(file("t2v"))).items()}
    whole = weight_bytes(config, getattr(mx, dtype), {}, stored).in_flight
    if in_flight:
        monkeypatch.setattr(ahead, "IN_FLIGHT", in_flight)
    model = load_transformer(file("t2v"), dtype, stream=True)
    weights = weight_bytes(config, model.model.dtype, {}, stored)
    assert weights.in_flight < whole / 4 if in_flight else weights.in_flight == whole
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in model.blocks([f"blocks.{i}" for i in range(4)]):
        time.sleep(0.3)  # the next is read meanwhile
    predicted = 2 * weights.largest + weights.in_flight
    assert 2 * weights.largest * 0.9 < mx.get_peak_memory() - before <= 1.1 * predicted


class PretendedDriver:
    """CUDA's driver, as far as `cuda` asks it, with nothing but host memory."""

    def __init__(self):
        self.copied, self.stagings = 0, threading.local()

    def staging(self):
        if not hasattr(self.stagings, "view"):
            self.stagings.view = memoryview(bytearray(cuda.PIECE))
        return self.stagings.view

    def copy(self, source, target):
        ctypes.memmove(target, source.tobytes(), len(source))
        self.copied += len(source)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Blocks are read as on CUDA, in many pieces."""
    driver = PretendedDriver()
    monkeypatch.setattr(wan_mlx.cuda, "in_use", lambda: True)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "address_of", lambda array: ctypes.addressof(ctypes.c_char.from_buffer(array)))
    monkeypatch.setattr(cuda, "PIECE", 10_000)
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    cuda._threads.cache_clear()  # they keep their staging memory
    yield driver
    cuda._threads().shutdown()
    cuda._threads.cache_clear()


@pytest.mark.parametrize(
    "kind, dtype, quantize", [("t2v", "float32", None), ("t2v", "bfloat16", None), ("vace", "bfloat16", "q4")]
)
def test_read_as_on_cuda_equals_resident(file, as_on_cuda, kind, dtype, quantize):
    test_streamed_equals_resident(file, kind, dtype, quantize, ())
    assert as_on_cuda.copied > 1.5 * os.path.getsize(file(kind))  # in two passes, all but what is outside the blocks


@pytest.mark.parametrize(
    "kind, dtype, quantize",
    [("t2v", "float32", None), ("i2v", "bfloat16", None), ("vace", "float16", None), ("t2v", "bfloat16", "q4")],
)
@pytest.mark.parametrize("in_flight", [1, 300_000, 2**30])
def test_cuda_reader_loads_the_same_weights(file, request, monkeypatch, kind, dtype, quantize, in_flight):
    """Some tensors at a time, over those before, which must have been made into something else by then."""
    wanted = tree_flatten(load_transformer(file(kind), dtype, quantize=quantize).parameters())
    driver = request.getfixturevalue("as_on_cuda")
    monkeypatch.setattr(ahead, "IN_FLIGHT", in_flight)
    model = load_transformer(file(kind), dtype, quantize=quantize)
    for (name, mine), (_, array) in zip(tree_flatten(model.parameters()), wanted, strict=True):
        assert mine.dtype == array.dtype and mx.array_equal(mine, array), name
    assert driver.copied == sum(array.nbytes for array in mx.load(str(file(kind))).values())


@pytest.mark.parametrize("stream", [False, True])
def test_cuda_reader_is_timed(file, as_on_cuda, monkeypatch, stream):
    """By what is read after kernels are compiled, which the first time takes long."""
    now, fill, filled = [0.0], cuda.StagingBuffer.fill, []

    def slow(self, address, ranges, stopped):
        fill(self, address, ranges, stopped)
        filled.append(sum(place.nbytes for place in ranges.values()))
        now[0] += filled[-1] / 5e6 if len(filled) > 1 else 1000.0

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "READ_BYTES", 2_000_000)
    monkeypatch.setattr(cuda.StagingBuffer, "fill", slow)
    config = CONFIGS["t2v"]
    parameters = transformer_parameters(open_component(file("t2v"), "transformer"), config, mx.bfloat16)
    assert timing.reading_rate(parameters, stream) == pytest.approx(5e6)
    assert 2_000_000 <= filled[-1] < os.path.getsize(file("t2v"))


def test_ctrl_c_ends_reading_as_on_cuda(file, as_on_cuda, monkeypatch):
    """Reading must not go on into memory that is no longer held."""
    stopped = []

    def interrupted(self):
        stopped.append(self._stopped)
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead.Prefetch, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_transformer(file("t2v"), "float32")
    assert len(stopped) == 1 and stopped[0].is_set()


def test_packed_weights_are_read_as_on_cuda(as_on_cuda, tmp_path):
    folder = convert(BUNDLED["nano"], tmp_path / "nano", quantize="q8")
    resident = load_transformer(folder, "float32")
    c = resident.config
    args = mx.ones((1, 2, 4, 6, c.out_dim)), 500.0, mx.ones((1, c.text_len, c.text_dim))
    assert mx.array_equal(load_transformer(folder, "float32", stream=True)(*args), resident(*args))
    assert as_on_cuda.copied


def test_cuda_reader_reports_a_truncated_file(file, as_on_cuda, tmp_path):
    path = tmp_path / "t2v.safetensors"
    path.write_bytes(file("t2v").read_bytes())
    blocks = load_transformer(path, "float32", stream=True).blocks(["blocks.0", "blocks.1", "blocks.2"])
    next(blocks)
    os.truncate(path, 20_000)
    with pytest.raises(WeightsError, match="changed since it was opened|bytes early"):
        list(blocks)


def test_a_file_that_ends_early_as_on_cuda(file, as_on_cuda, tmp_path, monkeypatch):
    path = tmp_path / "t2v.safetensors"
    path.write_bytes(file("t2v").read_bytes())
    model = load_transformer(path, "float32", stream=True)
    monkeypatch.setattr(WeightsFile, "check_unchanged", lambda self: None)
    os.truncate(path, 20_000)
    with pytest.raises(WeightsError, match="t2v.safetensors: ends [0-9,]+ bytes early; download it again"):
        list(model.blocks(["blocks.0"]))


@pytest.mark.parametrize("dtype, count", [("float32", 2), ("bfloat16", 1)])
def test_a_staging_buffer_is_filled_again_only_when_its_block_is_done(file, as_on_cuda, monkeypatch, dtype, count):
    buffers, make = [], cuda.StagingBuffer
    monkeypatch.setattr(cuda, "StagingBuffer", lambda nbytes: buffers.append(make(nbytes)) or buffers[-1])
    model = load_transformer(file("t2v"), dtype, stream=True)
    kept = load_transformer(file("t2v"), dtype)
    buffers.clear()
    for index, block in enumerate(model.blocks([f"blocks.{i}" for i in range(4)])):
        time.sleep(0.2)  # the next one is there by now
        for (name, mine), (_, wanted) in zip(
            tree_flatten(block.parameters()), tree_flatten(kept.blocks[index].parameters()), strict=True
        ):
            assert mx.array_equal(mine, wanted), name
    assert len(buffers) == count


def test_tensors_that_are_changed_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(ahead, "IN_FLIGHT", 10)
    changed = dict(a=6, b=5, c=30, d=4, e=1, f=0)
    assert list(ahead.batches(changed, changed.__getitem__)) == [["a"], ["b"], ["c"], ["d", "e", "f"]]
    assert ahead.most_in_flight([6, 5, 30], 7, 0, 0, 0) == 37 and ahead.most_in_flight([6, 3], 0, 0, 0, 0) == 9
    assert ahead.most_in_flight([], 7, 0, 0, 0) == 7


def test_read_errors_are_raised_with_their_block(file, tmp_path, monkeypatch):
    path = tmp_path / "t2v.safetensors"
    path.write_bytes(file("t2v").read_bytes())
    model, start, cut = load_transformer(path, "float32", stream=True), Parameters.start, []

    def cut_short(self, names, now=False):
        started = start(self, names, now)
        if names[0].startswith("blocks.1."):
            cut.append(os.truncate(path, 20_000))
        return started

    names = ["blocks.0", "blocks.1", "blocks.2"]
    monkeypatch.setattr(Parameters, "start", cut_short)
    blocks = model.blocks(names)
    next(blocks)
    with pytest.raises(RuntimeError, match="[Uu]nable to read"):
        next(blocks)
    assert cut and next(blocks, None) is None
    monkeypatch.undo()
    whole = load_transformer(file("t2v"), "float32", stream=True)
    assert len(list(whole.blocks(names))) == 3


def test_an_abandoned_pass_stops_prefetching(file, monkeypatch):
    model, begun, go_on = load_transformer(file("t2v"), "float32", stream=True), threading.Event(), threading.Event()
    evaluate, read = ahead._evaluate, []

    def slow(*args):
        if not read:  # the first block
            read.append(None)
            return evaluate(*args)
        begun.set()
        go_on.wait()
        started = evaluate(*args)
        read.append(args[-1].is_set())
        return started

    monkeypatch.setattr(ahead, "_evaluate", slow)
    blocks = model.blocks(["blocks.0", "blocks.1", "blocks.2"])
    next(blocks)
    begun.wait()
    threading.Timer(0.2, go_on.set).start()
    blocks.close()  # waits for the thread
    assert read == [None, True]
    assert len(list(model.blocks(["blocks.0"]))) == 1  # the next pass does not find it locked


def test_a_staging_buffer_that_something_computes_with_is_not_taken(monkeypatch):
    """Blocks that compute with the arrays of their buffer, and others, in any order."""
    monkeypatch.setattr(cuda, "StagingBuffer", lambda nbytes: SimpleNamespace(memory=SimpleNamespace(size=nbytes)))
    buffers, before, ranges = cuda.StagingBuffers(), None, {"x": SimpleNamespace(nbytes=10)}
    for stays_idle in (False, True, True, False, False, True, False, True, False, False):
        buffer = buffers.next(ranges, stays_idle)
        assert buffer is not before
        before = None if stays_idle else buffer
