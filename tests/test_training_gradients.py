"""A LoRA's gradients block by block: as of the whole loss, streamed as resident, and in pieces as at once."""

from contextlib import ExitStack
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from arrays import random_array, randomized, relative_error
from mlx.utils import tree_flatten

from wan_mlx.cuda import forward
from wan_mlx.models import layers, rope
from wan_mlx.models.attention import attention
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.rope import rope_table
from wan_mlx.models.transformer import Transformer
from wan_mlx.presets import PRESETS
from wan_mlx.training import attention_backward, backward, block_backward, slopes
from wan_mlx.training.attention_backward import attention_gradients
from wan_mlx.training.backward import (
    Sample,
    _in_one_thread,
    keeps_blocks,
    kept_bytes,
    loss,
    loss_and_gradients,
    with_targets,
)
from wan_mlx.training.factors import layer_shapes, new_factors, of_block, placed
from wan_mlx.training.optimizer import gradient_norm, make_optimizer, update
from wan_mlx.training.recipe import OPTIMIZERS, Recipe
from wan_mlx.weights.load import load_transformer

SIZES = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=4)
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", **SIZES, in_dim=36, image_dim=12),
    "ti2v": TransformerConfig("ti2v", **SIZES),
}
SCALE = 0.5


def samples(config: TransformerConfig, count: int = 2) -> list[Sample]:
    found = []
    for seed in range(0, 10 * count, 10):
        shape = (1, 2, 4, 6 - 2 * (seed > 0), 16)
        given = {}
        if config.has_image_branch:
            given = {
                "condition": random_array(seed + 4, *shape[:-1], 20),
                "image_features": random_array(seed + 5, 1, 257, 12),
            }
        if config.model_type == "ti2v":
            given = {"clean_frames": 1}
        context = random_array(seed + 2, 1, config.text_len, config.text_dim)
        found.append(
            Sample(random_array(seed + 1, *shape), 300.0 + seed * 20, context, random_array(seed + 3, *shape), given)
        )
    return found


def with_text(sample: Sample, length: int, padded: int = 0) -> Sample:
    """With so many rows of its text, and zeros up to ``padded`` of them."""
    context = sample.context[:, :length]
    return replace(sample, context=mx.pad(context, [(0, 0), (0, max(0, padded - length)), (0, 0)]))


def factors_of(config: TransformerConfig):
    """Factors as after some steps: `up` is not zero."""
    found = new_factors(layer_shapes(config), rank=3, seed=1)
    return {
        name: 0.2 * random_array(i, *array.shape) if name.endswith("up") else array
        for i, (name, array) in enumerate(found.items())
    }


def of_the_whole_loss(model, factors, step):
    """The loss and its gradients, as MLX derives them."""

    def whole(factors):
        with ExitStack() as stack:
            for place in model.block_order():
                stack.enter_context(placed(model.block(place), of_block(factors, place), SCALE, mx.float32))
            outs = [model(s.latents, s.timestep, s.context, **s.conditions) - s.target for s in step]
            outs = [error[:, s.conditions.get("clean_frames", 0) :] for error, s in zip(outs, step, strict=True)]
            return sum((error**2).mean() for error in outs) / len(step)

    return mx.value_and_grad(whole)(factors)


@pytest.fixture
def in_small_pieces(monkeypatch):
    monkeypatch.setattr(block_backward, "TOKENS_AT_ONCE", 5)
    monkeypatch.setattr(attention_backward, "SCORES_AT_ONCE", 40)


@pytest.mark.parametrize("way", ["kept", "chunks", "fused"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_by_blocks_are_those_of_the_whole_loss(kind, way, in_small_pieces, monkeypatch):
    """Also by the way that serves CUDA's kernel, here with MLX's own gradient of attention."""
    monkeypatch.setattr(attention_backward, "has_fused_gradient", lambda *given: way == "fused")
    config = CONFIGS[kind]
    model, factors, step = randomized(Transformer(config)), factors_of(config), samples(config)
    want_loss, want = of_the_whole_loss(model, factors, step)
    losses, got = loss_and_gradients(Execution(model), factors, step, SCALE, keeps=way == "kept")
    assert np.mean(losses) == pytest.approx(want_loss.item(), rel=1e-5)
    assert losses == pytest.approx(loss(Execution(model), factors, step, SCALE), rel=1e-6)
    assert got.keys() == want.keys() == factors.keys()
    for name in factors:
        assert relative_error(got[name], want[name]) <= 1e-5, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_row_of_text_stands_for_all_padding(kind, in_small_pieces, monkeypatch):
    """Texts of one row, some, all but one and all, beside the same with their padding."""
    config = replace(CONFIGS[kind], text_len=40)
    model, factors, step = randomized(Transformer(config)), factors_of(config), samples(config, 4)
    short = [with_text(sample, length) for sample, length in zip(step, (1, 7, 39, 40), strict=True)]
    padded = [with_text(sample, length, 40) for sample, length in zip(step, (1, 7, 39, 40), strict=True)]
    rows, enter = [], backward._enter

    def entered(*given):
        way = enter(*given)
        rows.append(way.this_pass.context.shape[1])
        return way

    monkeypatch.setattr(backward, "_enter", entered)
    want_losses, want = loss_and_gradients(Execution(model), factors, padded, SCALE)
    assert set(rows) == {40}
    rows.clear()
    for path in (Execution(model), Execution(model, lambda places: map(model.block, places))):  # streamed
        losses, got = loss_and_gradients(path, factors, short, SCALE)
        assert losses == pytest.approx(want_losses, rel=1e-5)
        assert losses == pytest.approx(loss(path, factors, short, SCALE), rel=1e-6)
        for name in factors:
            assert relative_error(got[name], want[name]) <= 1e-5, name
    assert set(rows) == {2, 8, 40}


def test_padding_in_16_bits_is_as_near_as_its_rows():
    config = replace(CONFIGS["t2v"], text_len=400)
    model, factors = randomized(Transformer(config)), factors_of(config)
    (sample,) = samples(config, 1)
    want = loss_and_gradients(Execution(model), factors, [with_text(sample, 7, 400)], SCALE)[1]
    model.apply(lambda array: array.astype(mx.bfloat16))
    of_rows, of_one = (
        loss_and_gradients(Execution(model), factors, [with_text(sample, 7, padded)], SCALE)[1] for padded in (400, 0)
    )
    errors = [np.mean([relative_error(got[name], want[name]) for name in factors]) for got in (of_rows, of_one)]
    assert 0 < errors[1] <= 1.2 * errors[0]


def test_without_a_target_it_is_what_the_model_answers_without_factors():
    """Bit for bit where nothing stands for padding."""
    config = replace(CONFIGS["t2v"], text_len=40)
    model, (other, sample) = Execution(randomized(Transformer(config))), samples(config)
    for length in (40, 7):
        want = model(sample.latents, sample.timestep, with_text(sample, length, 40).context)
        step = [other, replace(with_text(sample, length), target=None)]
        first, second = with_targets(model, step)
        assert mx.array_equal(first.target, other.target)
        error = relative_error(second.target, want)
        assert error == 0 if length == 40 else 0 < error <= 1e-5
        factors = factors_of(config)
        given, found = (loss_and_gradients(model, factors, some, SCALE) for some in ([first, second], step))
        assert given[0] == found[0]
        assert all(mx.array_equal(given[1][name], found[1][name]) for name in factors)


def test_nothing_stays_in_the_layers():
    config = CONFIGS["t2v"]
    model = randomized(Transformer(config))
    before = model(*(getattr(samples(config)[0], name) for name in ("latents", "timestep", "context")))
    loss_and_gradients(Execution(model), factors_of(config), samples(config), SCALE)
    after = model(*(getattr(samples(config)[0], name) for name in ("latents", "timestep", "context")))
    assert mx.array_equal(before, after)


def test_a_lora_beside_the_weights_stays():
    """The model's own, of which a quantised or streamed one is not merged."""
    config = CONFIGS["t2v"]
    model, factors, step = randomized(Transformer(config)), factors_of(config), samples(config, 1)
    with ExitStack() as stack:
        for place in model.block_order():
            stack.enter_context(placed(model.block(place), of_block(factors, place), SCALE, mx.float32))
        first = loss(Execution(model), {}, step, SCALE)
        none = {name: 0 * array for name, array in factors.items()}
        assert loss_and_gradients(Execution(model), none, step, SCALE)[0] == pytest.approx(first, rel=1e-6)
        assert loss(Execution(model), {}, step, SCALE) == first
    assert loss(Execution(model), {}, step, SCALE) != pytest.approx(first, rel=1e-3)


def test_gradients_pass_through_a_lora_beside_the_weights():
    config = CONFIGS["t2v"]
    model, factors, step = randomized(Transformer(config)), factors_of(config), samples(config, 1)
    with ExitStack() as stack:
        for place in model.block_order():
            own = {name: 0.5 * array for name, array in of_block(factors, place).items()}
            stack.enter_context(placed(model.block(place), own, SCALE, mx.float32))
        want = of_the_whole_loss(model, factors, step)[1]
        got = loss_and_gradients(Execution(model), factors, step, SCALE)[1]
    for name in factors:
        assert relative_error(got[name], want[name]) <= 1e-5, name


def test_streamed_blocks_give_the_same_bits():
    config = CONFIGS["t2v"]
    model, factors, step = randomized(Transformer(config)), factors_of(config), samples(config)
    order = []

    def blocks(places):
        order.append(places)
        yield from map(model.block, places)

    want = loss_and_gradients(Execution(model), factors, step, SCALE)
    got = loss_and_gradients(Execution(model, blocks), factors, step, SCALE)
    assert want[0] == got[0]
    assert all(mx.array_equal(want[1][name], got[1][name]) for name in factors)
    # One reading each way for all samples of the step.
    assert order == [["blocks.0", "blocks.1"], ["blocks.1", "blocks.0"]]


def test_what_is_kept_gives_the_bits_of_what_is_made_again():
    config = CONFIGS["i2v"]
    model, factors, step = Execution(randomized(Transformer(config))), factors_of(config), samples(config, 3)
    again, kept = (loss_and_gradients(model, factors, step, SCALE, keeps) for keeps in (False, True))
    assert again[0] == kept[0]
    assert all(mx.array_equal(again[1][name], kept[1][name]) for name in factors)


def test_small_models_keep_what_blocks_make(monkeypatch):
    """By sizes alone; streamed blocks, and those that a fused kernel differentiates, are made again."""
    nano, wan = PRESETS["nano"].transformer, PRESETS["t2v-1.3B"].transformer
    tokens = 2 * 5 * 64  # two clips
    assert keeps_blocks(nano, mx.float32, tokens, is_streamed=False)
    assert not keeps_blocks(nano, mx.float32, tokens, is_streamed=True)
    assert not keeps_blocks(wan, mx.bfloat16, 1560, is_streamed=False)
    made_again = []
    make = backward.block_gradients
    monkeypatch.setattr(backward, "block_gradients", lambda *given: made_again.append(given) or make(*given))
    config = CONFIGS["t2v"]
    model, factors, step = Execution(randomized(Transformer(config))), factors_of(config), samples(config, 1)
    loss_and_gradients(model, factors, step, SCALE)
    assert not made_again
    monkeypatch.setattr(backward, "KEPT_AT_MOST", kept_bytes(config, mx.float32, 12) - 1)
    loss_and_gradients(model, factors, step, SCALE)
    assert len(made_again) == config.num_layers


def test_samples_in_two_threads_have_the_gradients_of_one():
    config = CONFIGS["t2v"]
    model, factors, step = Execution(randomized(Transformer(config))), factors_of(config), samples(config, 3)
    losses, got = loss_and_gradients(model, factors, step, SCALE)
    want_losses, want = _in_one_thread(model, factors, step, SCALE, 3, keeps=True)
    assert losses == want_losses and got.keys() == want.keys()
    for name in factors:
        assert relative_error(got[name], want[name]) <= 1e-6, name


def test_a_quantised_base_passes_gradients_on(pico):
    plain, quantised = (Execution(load_transformer(pico, "float32", quantize=mode)) for mode in (None, "q8"))
    config = plain.model.config
    factors, step = factors_of(config), samples(config, 1)
    want = loss_and_gradients(plain, factors, step, SCALE)[1]
    got = loss_and_gradients(quantised, factors, step, SCALE)[1]
    worst = max(relative_error(got[name], want[name]) for name in factors)
    assert 0 < worst < 0.1
    of_short = loss_and_gradients(quantised, factors, [with_text(step[0], 3)], SCALE)[1]
    of_padded = loss_and_gradients(quantised, factors, [with_text(step[0], 3, config.text_len)], SCALE)[1]
    for name in factors:
        assert relative_error(of_short[name], of_padded[name]) <= 1e-4, name


@pytest.mark.parametrize("at_once", [1 << 25, 60, 7])
def test_gradients_of_attention_are_those_of_mlx(at_once, monkeypatch):
    monkeypatch.setattr(attention_backward, "SCORES_AT_ONCE", at_once)
    q, k, v = random_array(1, 2, 5, 3, 8), random_array(2, 2, 7, 3, 8), random_array(3, 2, 7, 3, 8)
    gradient = random_array(4, 2, 5, 24)
    (attended,), want = mx.vjp(attention, [q, k, v], [gradient])
    got = attention_gradients(q, k, v, attended, gradient)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_keys_are_filled_up_as_in_the_forward_pass(monkeypatch):
    """By their mean, which is a constant to gradients."""
    monkeypatch.setattr(attention_backward, "has_fused_gradient", lambda *given: True)
    monkeypatch.setattr(forward, "keys_to_append", lambda length: 2)
    q, k, v = random_array(1, 1, 5, 3, 8), random_array(2, 1, 7, 3, 8), random_array(3, 1, 7, 3, 8)
    gradient = random_array(4, 1, 5, 24)

    def filled(q, k, v):
        more = [mx.repeat(mx.stop_gradient(one.mean(1, keepdims=True)), 2, axis=1) for one in (k, v)]
        return attention(q, *(mx.concatenate(pair, axis=1) for pair in zip((k, v), more, strict=True)))

    _, want = mx.vjp(filled, [q, k, v], [gradient])
    _, without = mx.vjp(attention, [q, k, v], [gradient])
    got = attention_gradients(q, k, v, filled(q, k, v), gradient)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 1e-5
    assert relative_error(got[1], without[1]) > 1e-3


RNG = np.random.default_rng(1)
X, Y = (mx.array(2.5 * RNG.standard_normal((1, 9, 64), np.float32)) for _ in range(2))
GATE, SHIFT = (mx.array(RNG.uniform(-1, 1, 64).astype(np.float32)) for _ in range(2))
TABLE = rope_table((9, 1, 1), 16)
SLOPES = {  # what gives the gradient, and the function whose gradient it is
    "scaled": (lambda x, y: slopes.scaled(y, GATE), lambda x: layers.gated_add(Y, x, GATE)),
    "gelu": (slopes.gelu_tanh, layers.gelu_tanh),
    "norm": (
        lambda x, y: slopes.modulated_norm(x, y, GATE, 1e-6),
        lambda x: layers.modulated_norm(x, GATE, SHIFT, 1e-6),
    ),
    "rotation": (
        lambda x, y: slopes.norm_and_rotate(x, y, GATE, 4, TABLE, 1e-6),
        lambda x: rope.norm_and_rotate(x, GATE, 4, TABLE, 1e-6).flatten(2),
    ),
    "rms norm": (
        lambda x, y: slopes.rms_norm(x, y, GATE, 1e-6),
        lambda x: mx.fast.rms_norm(x, GATE, 1e-6),
    ),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_mlx_s_gradients(name):
    ours, function = SLOPES[name]
    (want,) = mx.vjp(function, [X], [Y])[1]
    assert relative_error(ours(X, Y), want) <= 2e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_by_blocks_is_mlx_s(name):
    """At another rate and step each time: neither is a constant of what is compiled."""
    config = CONFIGS["t2v"]
    factors = factors_of(config)
    gradients = {name: random_array(50 + i, *array.shape) for i, (name, array) in enumerate(factors.items())}
    whole, by_blocks = (make_optimizer(Recipe(rank=3, optimizer=name)) for _ in range(2))
    whole.init(factors)
    by_blocks.init(factors)
    want, got = factors, dict(factors)
    for clip, rate in ((1.0, 1e-2), (1e6, 3e-3), (0.0, 1e-3)):
        whole.learning_rate = by_blocks.learning_rate = mx.array(rate)
        clipped, norm = optim.clip_grad_norm(gradients, clip or 1e9)
        want = whole.apply_gradients(clipped, want)
        assert gradient_norm(gradients) == pytest.approx(norm.item(), rel=1e-6)
        update(by_blocks, dict(gradients), got, gradient_norm(gradients), clip)
    for name in factors:
        assert relative_error(got[name], want[name]) <= 1e-6, name
    assert by_blocks.step.item() == 3
    state, wanted = dict(tree_flatten(by_blocks.state)), dict(tree_flatten(whole.state))
    assert state.keys() == wanted.keys()
    assert all(relative_error(state[name], wanted[name]) <= 1e-6 for name in state if ".m" in name or ".v" in name)
